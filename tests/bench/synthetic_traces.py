"""Graphs and replays made up for tests of tracing: whatever runs where, when is known.

A graph is written as a list of `Step`s. `replay_of` plays it: a lane runs its steps one after the other, each when what
it waits for is over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from auxstream.bench.trace_match import Kernel, Replay, Traced
from auxstream.bench.trace_plan import Plan, plan_of
from auxstream.bench.trace_regions import Figures, figures_of
from auxstream.capture.evidence import Node


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel: how long it takes alone, and beside others; `after` are the steps it waits for, by position."""

    op: str
    kernel: str
    us: float
    lane: str = "caller"
    region: str | None = None
    beside_us: float | None = None
    after: tuple[int, ...] = ()


GAP_US = 0.9


def graph(steps: Sequence[Step], *, one_stream: bool = False) -> tuple[list[Node], list[tuple[int, int]]]:
    """Nodes and edges as a report has them; on one stream all lanes are the caller's."""
    nodes = [
        Node(step.op, "caller" if one_stream else step.lane, step.region, f"model.py:{n}: {step.op}", (), step.kernel)
        for n, step in enumerate(steps)
    ]
    edges = [(earlier, n) for n, step in enumerate(steps) for earlier in step.after]
    last: dict[str, int] = {}
    for n, node in enumerate(nodes):
        if node.stream in last:
            edges.append((last[node.stream], n))
        last[node.stream] = n
    return nodes, edges


def plan(steps: Sequence[Step], *, one_stream: bool = False) -> Plan:
    return plan_of(*graph(steps, one_stream=one_stream))


def replay_of(
    steps: Sequence[Step],
    *,
    one_stream: bool = False,
    start: float = 0.0,
    slower: float = 1.0,
    streams: Mapping[str, int] | None = None,
) -> Replay:
    """One replay, `slower` times as long as usual; `streams` of the device by lane."""
    free: dict[str, float] = {}
    kernels: list[Kernel] = []
    for step in steps:
        lane = "caller" if one_stream else step.lane
        waits = [kernels[n].end + GAP_US for n in step.after]
        begin = max([free.get(lane, start), *waits])
        us = step.us if one_stream or step.beside_us is None else step.beside_us
        end = begin + us * slower
        stream = (streams or {}).get(lane, 7 if lane == "caller" else 20 + int(lane[-1]))
        kernels.append(Kernel(step.kernel, begin, end, stream))
        free[lane] = end + GAP_US
    return Replay(tuple(kernels))


def traced(steps: Sequence[Step], *, one_stream: bool = False, replays: int = 5) -> Traced:
    """Replays that differ a little in length; the median one is as the steps say."""
    found = [
        replay_of(steps, one_stream=one_stream, start=1000.0 * n, slower=1 + 0.002 * (n - replays // 2))
        for n in range(replays)
    ]
    return Traced(plan(steps, one_stream=one_stream), tuple(found))


def both(steps: Sequence[Step]) -> tuple[Traced, Traced, Figures]:
    """A graph on its lanes, on one stream, and its figures."""
    here, there = traced(steps), traced(steps, one_stream=True)
    return here, there, figures_of(here, there)


def mixture(layers: int) -> list[Step]:
    """Feed-forward blocks as a mixture of experts has them: router and experts on the caller, a dense branch beside."""
    steps: list[Step] = []

    def add(op: str, kernel: str, us: float, after: tuple[int, ...] = (), **where: object) -> int:
        steps.append(Step(op, kernel, us, after=after, **where))  # type: ignore[arg-type]
        return len(steps) - 1

    for layer in range(layers):
        fork = add("auxstream_fused.fused_add_rms_norm.default", "fused_add_rms_norm_2816", 2.6)
        routed = [
            ("auxstream_fused.fused_rms_norm.default", "fused_rms_norm_2816", 2.2, None),
            ("auxstream.moe_router.default", "router_scores_kernel", 6.1, 6.6),
            ("auxstream.moe_router.default", "router_pick_kernel", 3.8, 4.0),
            ("auxstream_fused.fused_rms_norm.default", "fused_rms_norm_2816", 2.1, None),
            ("auxstream.moe_experts.default", "experts_up_kernel", 27.5, 33.9),
            ("auxstream.moe_experts.default", "experts_down_kernel", 14.2, 16.8),
            ("sum.dim_IntList", "reduce_kernel<512, 1, ReduceOp>", 3.1, None),
            ("auxstream_fused.fused_rms_norm.default", "fused_rms_norm_2816", 2.4, None),
        ]
        for op, kernel, us, beside in routed:
            add(op, kernel, us, beside_us=beside)
        end = len(steps) - 1
        dense = [
            ("auxstream_fused.fused_rms_norm.default", "fused_rms_norm_2816", 2.2, 2.5),
            ("mm.default", "nvjet_tst_64x8_gate", 11.4, 15.9),
            ("mm.default", "nvjet_tst_64x8_gate", 11.3, 15.2),
            ("auxstream_fused.fused_gelu_mul.default", "fused_gelu_mul_2112", 2.0, 2.3),
            ("mm.default", "nvjet_tst_64x8_down", 10.9, 14.6),
            ("auxstream_fused.fused_rms_norm.default", "fused_rms_norm_2816", 2.3, 2.3),
        ]
        for n, (op, kernel, us, beside) in enumerate(dense):
            where = {"lane": "lane0", "region": f"layers.{layer}.mlp", "beside_us": beside}
            add(op, kernel, us, (fork,) if n == 0 else (), **where)
        add("auxstream_fused.fused_add_rms_norm_add.default", "fused_add_rms_norm_add_2816", 3.0, (len(steps) - 1, end))
    return steps
