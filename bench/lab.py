"""One decode step, the ways to run it, and the comparison of their bits.

Enters: a traced graph whose branches are marked. Leaves: `Variant`s: the same graph over the same weights, with caches
of its own, eager or captured, on one stream or several, fused or not, whole or with one safety taken out; and in their
`Row`s how many replays had the bits of a reference. Invariant: each replay is compared on inputs of its own, from the
reference's caches, so that replays count singly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..capture.compiler import rehearsed, warm_up_and_capture
from ..capture.delays import insert_delays
from ..capture.graphs import SimulatedGraph
from ..capture.huggingface import DecodeStep, build, gemma4_config
from ..capture.mark import mark_multi_stream_moe_shared_experts
from ..capture.proof import Report, verify
from ..capture.schedule import insert_regions
from ..capture.trace import TracedGraph, trace
from ..kernels import fuse_elementwise
from ..kernels.derive import copy_of
from ..kernels.launch import compile_ahead
from ..runtime.errors import AuxstreamError
from ..runtime.machine import using_machine
from .controls import Fault, directed_replays, without_waits

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
    """One marked graph of a decode step, and the variants made from it.

    Args:
        traced: of `ids` `[batch, 1]` below `vocabulary` and `position` `[1]` or `[batch]` below `context`, as in
            `DecodeStep`; with what shall run on lanes marked.
    """

    def __init__(self, traced: TracedGraph, ids: Tensor, position: Tensor, *, vocabulary: int, context: int) -> None:
        self.traced = traced
        self.ids = ids
        self.position = position
        self.vocabulary = vocabulary
        self.context = context
        self.device = ids.device
        self.gpu = self.device.type == "cuda"
        self.regions: list[str] = []
        self.fused: dict[Fusion, GraphModule] = {"unfused": self.traced.graph_module}
        self.fusing: list[str] = []

    def base(self, fusion: Fusion) -> GraphModule:
        """The marked graph, fused that far."""
        if fusion not in self.fused:
            module, start = copy_of(self.traced.graph_module), time.perf_counter()
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
        module = copy_of(self.base(fusion))
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


def gemma4_lab(size: str, layers: int, batch: int, context: int, device: torch.device) -> Lab:
    """A Gemma-4 MoE with random weights, its shared experts marked; `size` "tiny", or anything else for real layers."""
    config = gemma4_config(layers, "tiny" if size == "tiny" else "full")
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    traced = trace(DecodeStep(build(config, device), batch, context), (ids, position))
    mark_multi_stream_moe_shared_experts(traced.graph_module)
    return Lab(traced, ids, position, vocabulary=config.vocab_size, context=context)


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(
    lab: Lab, reference: Variant, variants: Sequence[Variant], seed: int, done: Callable[[], object] = lambda: None
) -> None:
    """Run every variant beside the reference on the same draws, and count the replays whose bits agree.

    `done` is called behind each turn. Raises AuxstreamError if the reference computes what is no number: then bits say
    nothing.
    """
    draw = torch.Generator().manual_seed(seed)
    finite: list[Tensor] = []
    with torch.no_grad():
        for turn in range(max(variant.replays for variant in variants)):
            if turn % lab.context == 0:  # a new sequence: recurrences must not grow for ever
                for cache in (*reference.caches, *(cache for variant in variants for cache in variant.caches)):
                    cache.zero_()
            ids = torch.randint(lab.vocabulary, lab.ids.shape, generator=draw).to(lab.device, non_blocking=True)
            position = torch.randint(lab.context, lab.position.shape, generator=draw).to(lab.device, non_blocking=True)
            _draw_delays(reference, draw)
            expected = reference.run(ids, position)
            finite.append(expected.isfinite().all())
            for variant in variants:
                if turn >= variant.replays:
                    continue
                _draw_delays(variant, draw)
                got = variant.run(ids, position)
                variant.flags.append(differs([expected, *reference.caches], [got, *variant.caches]))
                for mine, right in zip(variant.caches, reference.caches, strict=True):
                    mine.copy_(right)
            done()
    if not bool(torch.stack(finite).all()):
        raise AuxstreamError("the reference computes infinities or NaN", remedy="compare a model that computes numbers")
    names = ["logits", *lab.traced.mutated_buffers]
    for variant in variants:
        count_differing(variant.row, variant.flags, names)


def count_differing(row: Row, compared: Sequence[Tensor], names: Sequence[str]) -> None:
    """Fill in a row from what `differs` said of each replay; `names` of what was compared."""
    flags = torch.stack(list(compared)).cpu()
    differing = flags.any(1)
    row.runs = len(flags)
    row.equal = row.runs - int(differing.sum())
    for turn in differing.nonzero().flatten().tolist()[:3]:
        which = [name for name, flag in zip(names, flags[turn].tolist(), strict=True) if flag]
        row.differing.append(f"replay {turn}: {', '.join(which[:3])}{' ...' if len(which) > 3 else ''}")


def _draw_delays(variant: Variant, draw: torch.Generator) -> None:
    if variant.delays is None:
        return
    share = torch.rand(variant.delays.numel() // 2, 2, generator=draw)
    if variant.row.control is None:  # one of four branches gets none, so that either side may lead
        share = share.where(torch.rand(share.shape, generator=draw) > 0.25, 0.0)
    else:
        share = share.clamp(min=0.5)
    drawn = (share * torch.tensor(variant.delay_ns)).to(torch.int64).flatten()
    variant.delays.copy_(drawn.pin_memory() if variant.delays.is_cuda else drawn, non_blocking=True)


def differs(expected: Sequence[Tensor], got: Sequence[Tensor]) -> Tensor:
    """Per tensor, whether any bit differs, as a tensor on the device: comparing waits for nothing."""
    return torch.stack([(a.view(torch.uint8) != b.view(torch.uint8)).any() for a, b in zip(expected, got, strict=True)])


@contextmanager
def repeatable_attention() -> Generator[None]:
    """cuDNN's attention does not give the same bits twice (one call in a hundred differs, on an H200 with torch 2.11),
    so no comparison of bits could be made with it. One stream compared with itself is what finds such kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# --- parts ------------------------------------------------------------------------------------------------------------


def _captured_by_torch(
    step: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor], caches: list[Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor, Report]:
    """A capture without auxstream.graph, which would refuse or mend what the controls get wrong; and its proof."""
    from ..capture.adopt import Adopted, adopting

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


def verdict_of(report: Report) -> str:
    """A proof's outcome in a few words."""
    if report.ok:
        return "no race"
    reused = sum(race.reuse for race in report.races)
    return f"{len(report.races)} races" + (f" ({reused} reuse)" if reused else "")
