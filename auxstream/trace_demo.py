"""`auxstream trace demo`: a few layers of Gemma-4-26B-A4B, on one stream and with their dense branches on a lane.

Enters: dimensions. Leaves: an `Entry`, the same kernels traced on one stream and on two. Invariant: both graphs are
captured from one FX graph, regions and all; on one stream the regions run on the caller's, in the same order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from .bench.blocks import FeedForward
from .bench.harness import device_time, interleave
from .bench.lab import CONTEXT, FUSIONS, repeatable_attention
from .bench.trace_match import Traced, trace_of
from .bench.trace_plan import plan_of
from .bench.trace_profile import launches_of_replays
from .capture.compiler import warm_up_and_capture
from .capture.graphs import CapturedGraph
from .capture.huggingface import DecodeStep, build, gemma4_config
from .capture.mark import mark_multi_stream_moe_shared_experts
from .capture.schedule import insert_regions
from .capture.trace import TracedGraph, trace
from .kernels import fuse_elementwise
from .runtime.errors import CaptureError, SettingsError
from .runtime.machine import INLINE, using_machine
from .runtime.settings import SETTINGS
from .trace_output import Entry

ONE_STREAM = "one stream"
LANES = "on lanes"


@dataclass(frozen=True, slots=True)
class Demo:
    """What is traced."""

    step: str = "feed-forward"
    size: str = "real"
    layers: int = 2
    batch: int = 1
    fusion: str = "caller"

    @property
    def name(self) -> str:
        fused = {"unfused": "unfused", "caller": "fused on the caller", "everywhere": "fused everywhere"}[self.fusion]
        layers = f"{self.layers} layer{'s' * (self.layers != 1)}"
        return f"Gemma-4-26B-A4B {self.step}, {layers}, batch {self.batch}, {self.size} dimensions, {fused}"


def parse(arguments: Sequence[str]) -> Demo:
    """The demo's command line."""
    parser = argparse.ArgumentParser(
        prog="auxstream trace demo", description="A few layers of Gemma-4-26B-A4B, random weights."
    )
    usual = Demo()
    parser.add_argument(
        "--step",
        choices=("feed-forward", "decode"),
        default=usual.step,
        help="that part of layers, or a whole step",
    )
    parser.add_argument("--size", choices=("tiny", "real"), default=usual.size)
    parser.add_argument("--layers", type=int, default=usual.layers)
    parser.add_argument("--batch", type=int, default=usual.batch, help="sequences per step")
    parser.add_argument("--fusion", choices=FUSIONS, default=usual.fusion, help="what runs as fused kernels")
    options = parser.parse_args(arguments)
    if options.layers < 1 or options.batch < 1:
        parser.error("--layers and --batch are at least 1")
    return Demo(**vars(options))


def trace_demo(demo: Demo, replays: int, rounds: int = 15) -> Entry:
    """Build, capture twice, replay under the profiler and without. Needs a GPU.

    Args:
        demo: what to build.
        replays: how many are traced of either graph.
        rounds: of timing without the profiler.

    Raises:
        SettingsError: settings under which there would be no lanes, or no graph read back.
        MatchError: the profiler shows other kernels than the graphs have.
    """
    for name, given in (("AUXSTREAM_DISABLE", SETTINGS.disable), ("AUXSTREAM_VERIFY", SETTINGS.verify == "off")):
        if given:
            raise SettingsError(f"`trace demo` needs what {name} switches off", remedy=f"unset {name}")
    with torch.no_grad(), repeatable_attention():
        traced, inputs = _model(demo)
        module = _scheduled(traced.graph_module, demo.fusion)
        written = traced.written_tensors()
        lanes = _captured(module, inputs, written, LANES)
        with using_machine(INLINE):
            alone = _captured(module, inputs, written, ONE_STREAM)
        graphs = {ONE_STREAM: alone, LANES: lanes}
        found = {name: _traced(graph, replays) for name, graph in graphs.items()}
        times = interleave(
            {name: lambda graph=graph: device_time(graph.replay, 20) for name, graph in graphs.items()}, rounds, "us"
        )
    _same_work(found[ONE_STREAM], found[LANES])
    return Entry(demo.name, found[LANES], found[ONE_STREAM], times)


def _same_work(alone: Traced, lanes: Traced) -> None:
    """Figures compare the two kernel by kernel."""
    pairs = zip(alone.plan.works, lanes.plan.works, strict=False)
    other = next((f"{a.kernel} and {b.kernel}" for a, b in pairs if a.kernel != b.kernel), "")
    if other or len(alone.plan.works) != len(lanes.plan.works):
        raise CaptureError(
            "the demo's graph launches other kernels on one stream than on lanes",
            expected="the same in the same order",
            came=other or f"{len(alone.plan.works)} and {len(lanes.plan.works)} kernels",
            remedy="try --fusion unfused; a library that chooses kernels by the stream cannot be compared so",
        )


def _model(demo: Demo) -> tuple[TracedGraph, tuple[Any, ...]]:
    device = torch.device("cuda")
    config = gemma4_config(demo.layers, "tiny" if demo.size == "tiny" else "full")
    model: Any = build(config, device)
    if demo.step == "decode":
        ids = torch.zeros(demo.batch, 1, dtype=torch.int64, device=device)
        inputs = (ids, torch.zeros(1, dtype=torch.int64, device=device))
        return trace(DecodeStep(model, demo.batch, CONTEXT), inputs), inputs
    hidden = torch.randn(demo.batch, 1, config.hidden_size, device=device, dtype=torch.bfloat16)
    return trace(FeedForward(model.model.layers), (hidden,)), (hidden,)


def _scheduled(module: GraphModule, fusion: str) -> GraphModule:
    mark_multi_stream_moe_shared_experts(module)
    if fusion != "unfused":
        fuse_elementwise(module, safe=(("*", "1"),) if fusion == "everywhere" else ())
    insert_regions(module)
    return module


def _captured(module: GraphModule, inputs: tuple[Any, ...], written: list[torch.Tensor], name: str) -> CapturedGraph:
    return warm_up_and_capture(module, inputs, written, torch.device("cuda"), name=name, verify="error")[0]


def _traced(graph: CapturedGraph, replays: int) -> Traced:
    plan = plan_of(graph.report.nodes, graph.report.edges)
    launches = launches_of_replays(graph.replay, replays)
    if len(launches) != replays:
        raise CaptureError(
            f"the profiler did not see the replays of graph {graph.name!r}",
            expected=f"{replays} launches of a graph",
            came=f"{len(launches)}",
            remedy="run nothing else on this process's GPU meanwhile, and no other profiler",
        )
    return trace_of(plan, [launch.kernels for launch in launches])
