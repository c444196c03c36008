"""The demo's model and the ways to run it.

Enters: dimensions. Leaves: `Variant`s: the same traced graph over the same weights, with caches of its own, eager or
captured, on one stream or two, fused or not, whole or with one safety taken out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from .capture.compiler import rehearsed, warm_up_and_capture
from .capture.delays import insert_delays
from .capture.graphs import SimulatedGraph
from .capture.huggingface import DecodeStep, build, gemma4_config
from .capture.mark import mark_multi_stream_moe_shared_experts
from .capture.proof import Report, verify
from .capture.schedule import insert_regions
from .capture.trace import TracedGraph, trace
from .controls import Fault, directed_replays, without_waits
from .kernels import fuse_elementwise
from .kernels.launch import compile_ahead
from .runtime.machine import using_machine

CONTEXT = 1024
DELAY_NS = 60_000
"""Longest delay a safe row draws for one branch, on a GPU; controls delay by CONTROL_DELAY_NS."""
CONTROL_DELAY_NS = 300_000


Fusion = Literal["unfused", "caller", "everywhere"]
"""What runs as fused kernels: nothing, what is not marked (the default), or the aux branches too (declared safe)."""
FUSIONS: tuple[Fusion, ...] = ("unfused", "caller", "everywhere")


@dataclass(slots=True)
class Row:
    """One line of the table. `equal` of `runs` replays had the same bits as the reference."""

    mode: str
    streams: str
    fusion: Fusion = "unfused"
    control: str | None = None
    runs: int = 0
    equal: int = 0
    us: float | None = None
    checker: str = "n/a"
    differing: list[str] = field(default_factory=list[str])  # the first replays that differed, and in what

    @property
    def passed(self) -> bool:
        """Safe rows never differ; controls differ in more than half of their runs, and the checker sees why."""
        if not self.runs:
            return False
        if self.control:
            return 2 * (self.runs - self.equal) > self.runs and self.checker != "no race"
        return self.equal == self.runs


@dataclass(slots=True)
class Variant:
    """A way to run the step. `run(ids, position)` returns logits; `caches` are this variant's own."""

    row: Row
    run: Callable[[Tensor, Tensor], Tensor]
    caches: list[Tensor]
    replays: int
    delay_ns: tuple[int, int] = (0, 0)  # longest delay on the caller's side and on the lane
    delays: Tensor | None = None
    flags: list[Tensor] = field(default_factory=list[Tensor])  # per replay: which of logits and caches differ


class Lab:
    """One model, one trace, and the variants made from them."""

    def __init__(self, size: str, layers: int, batch: int, context: int, device: torch.device) -> None:
        self.device = device
        self.batch = batch
        self.context = context
        self.gpu = device.type == "cuda"
        config = gemma4_config(layers, "tiny" if size == "tiny" else "full")
        self.vocabulary: int = config.vocab_size
        self.step = DecodeStep(build(config, device), batch, context)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.traced: TracedGraph = trace(self.step, (self.ids, self.position))
        mark_multi_stream_moe_shared_experts(self.traced.graph_module)
        self.regions: list[str] = []
        self.fused: dict[Fusion, GraphModule] = {"unfused": self.traced.graph_module}
        self.fusing: list[str] = []

    def base(self, fusion: Fusion) -> GraphModule:
        """The marked graph, fused that far."""
        if fusion not in self.fused:
            module, start = _copied(self.traced.graph_module), time.perf_counter()
            report = fuse_elementwise(module, safe=(("*", "1"),) if fusion == "everywhere" else ())
            fused = time.perf_counter()
            compile_ahead(report.fusions)
            compiled = time.perf_counter()
            self.fused[fusion] = module
            self.fusing.append(
                f"{fusion}: {report.summary}; {fused - start:.2f} s, and {compiled - fused:.2f} s to compile or load"
            )
        return self.fused[fusion]

    def module(
        self, fusion: Fusion, *, aux: bool, delays: bool = False, unsafe: bool = False
    ) -> tuple[GraphModule, list[Tensor], Tensor | None]:
        """A copy of the graph over the same weights, with caches of its own: (module, caches, delay buffer)."""
        module = _copied(self.base(fusion))
        caches: list[Tensor] = []
        for name in self.traced.mutated_buffers:
            owner, _, leaf = name.rpartition(".")
            cache = torch.zeros_like(getattr(module.get_submodule(owner), leaf))
            setattr(module.get_submodule(owner), leaf, cache)
            caches.append(cache)
        if not aux:
            return module, caches, None
        if unsafe:
            plans = insert_regions(module, order="aux_first", fork_at="first_product", unsafe_no_lifetime=True)
        else:
            plans = insert_regions(module)
            self.regions = self.regions or [str(plan) for plan in plans]
        buffer = torch.zeros(2 * len(plans), dtype=torch.int64, device=self.device) if delays else None
        if buffer is not None:
            insert_delays(module, buffer)
        return module, caches, buffer

    def eager(self, row: Row, replays: int, *, aux: bool) -> Variant:
        """The graph module, run op by op."""
        module, caches, buffer = self.module(row.fusion, aux=aux, delays=self.gpu and aux)
        return Variant(row, module, caches, replays, (DELAY_NS, DELAY_NS), buffer)

    def captured(
        self,
        row: Row,
        replays: int,
        *,
        aux: bool,
        fault: Fault | None = None,
        unsafe: bool = False,
        delays: bool = True,
    ) -> Variant:
        """The graph module, captured: into a CUDA graph, or into a program of the simulated machine."""
        module, caches, buffer = self.module(row.fusion, aux=aux, delays=delays and self.gpu and aux, unsafe=unsafe)
        faulty = None
        if fault is not None and self.gpu:
            from .faulty import FaultyMachine

            faulty = FaultyMachine(fault)
        step = module if faulty is None else _between(faulty.begin, module, faulty.finish)
        inputs = (self.ids.clone(), self.position.clone())
        with nullcontext() if faulty is None else using_machine(faulty):
            if row.control and self.gpu:
                replay, logits, report = _captured_by_torch(step, inputs, caches, self.device)
            else:
                graph, logits = warm_up_and_capture(
                    step, inputs, caches, self.device, name=row.control or row.streams,
                    verify="off" if row.control else "error",
                )  # fmt: skip
                replay, report = graph.replay, graph.report
                if row.control:
                    assert isinstance(graph, SimulatedGraph)
                    program = graph.program if fault is None else without_waits(graph.program, fault)
                    replay, report = directed_replays(graph, program), verify(program)
        row.checker = verdict_of(report)

        def run(ids: Tensor, position: Tensor) -> Tensor:
            inputs[0].copy_(ids)
            inputs[1].copy_(position)
            if logits.is_floating_point():
                logits.fill_(float("nan"))  # a replay that writes nothing must not pass
            replay()
            return logits

        longest = (0, CONTROL_DELAY_NS) if row.control else (DELAY_NS, DELAY_NS)
        if fault == "fork wait":
            longest = (CONTROL_DELAY_NS, 0)
        return Variant(row, run, caches, replays, longest, buffer)


def _captured_by_torch(
    step: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor], caches: list[Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor, Report]:
    """A capture without auxstream.graph, which would refuse or mend what the controls get wrong; and its proof."""
    from .capture.adopt import Adopted, adopting

    found: list[Adopted] = []
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with rehearsed(step, inputs, caches, device) as stream, adopting(found), torch.cuda.graph(graph, stream=stream):
        logits = step(*inputs)
    return graph.replay, logits, found[0].report


def _between(
    begin: Callable[[], None], step: Callable[[Tensor, Tensor], Tensor], finish: Callable[[], None]
) -> Callable[[Tensor, Tensor], Tensor]:
    def run(ids: Tensor, position: Tensor) -> Tensor:
        begin()
        logits = step(ids, position)
        finish()
        return logits

    return run


def _copied(module: GraphModule) -> GraphModule:
    """The same graph over the same parameters and buffers, marks and all."""
    copied = GraphModule(module, copy.deepcopy(module.graph))
    copied.meta = dict(module.meta)
    return copied


def verdict_of(report: Report) -> str:
    """A proof's outcome in a few words."""
    if report.ok:
        return "no race"
    reused = sum(race.reuse for race in report.races)
    return f"{len(report.races)} races" + (f" ({reused} reuse)" if reused else "")
