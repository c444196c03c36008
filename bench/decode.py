"""The launches of a whole decode step, per layer and by kind, beside torch.compile's.

    python -m auxstream.bench.decode [--layers N] [--batch B] [--compile-limit SECONDS] [--json PATH]

Measures: the kernels that one replay of each graph launches (Gemma-4-26B-A4B, random weights, static cache), and its
device time, all graphs from one trace: unfused, fused on the caller, fused everywhere, and the traced graph through
torch.compile. Lists what is left of elementwise launches in one layer, each with what it computes and what stands
around it. Does not measure: the host, overlap, other models. Needs a GPU and the extra `hf`.

torch.compile may fail or take too long: that is reported, and what was measured before is written.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ..capture.huggingface import DecodeStep, build, gemma4_config
from ..capture.mark import mark_multi_stream_moe_shared_experts
from ..capture.trace import trace
from ..kernels import FusionReport, fuse_elementwise
from ..kernels.derive import copy_of
from ..kernels.launch import compile_ahead
from ..runtime.settings import SafetyRules
from .budget import Clock, limit
from .command import CommandLine
from .harness import interleave, write
from .launches import KINDS, Launches, by_kind
from .replays import Captured

CONTEXT = 1024
COMPILED = "torch.compile"
EVERYWHERE = "fused everywhere"
_LAYER = re.compile(r"\blayers\W+(\d+)")
_PASSED = ("getitem", "view", "reshape", "unsqueeze", "squeeze", "transpose", "expand", "to.dtype", "contiguous")


# --- graphs -----------------------------------------------------------------------------------------------------------


def variants(traced: GraphModule) -> Iterator[tuple[str, GraphModule, FusionReport | None, dict[str, float]]]:
    """The graph at each stage of fusion: its name, what was fused, and the seconds that took."""
    yield "unfused", copy_of(traced), None, {}
    stages: dict[str, SafetyRules] = {"fused on the caller": (), EVERYWHERE: (("*", "1"),)}
    for name, safe in stages.items():
        module, start = copy_of(traced), time.perf_counter()
        report = fuse_elementwise(module, safe=safe)
        fused = time.perf_counter()
        compile_ahead(report.fusions)
        yield name, module, report, {"fuse": fused - start, "compile or load": time.perf_counter() - fused}


# --- what is left -----------------------------------------------------------------------------------------------------


def layer_of(node: Node) -> int | None:
    """The decoder layer whose code a node comes from."""
    for path, _ in reversed(list(node.meta.get("nn_module_stack", {}).values())):
        found = _LAYER.search(path)
        if found:
            return int(found[1])
    return None


def remaining(module: GraphModule, report: FusionReport, layer: int) -> list[str]:
    """The launches of one layer in graph order, one line each: what it computes, from what, and for what."""
    fusions = {fusion.spec.name: fusion for fusion in report.fusions}
    lines: list[str] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or layer_of(node) != layer or _passes(node):
            continue
        what, name = f"eager's {_name(node)}", node.meta.get("auxstream_fused")
        if name is not None:
            ops = [_name(member) for member in fusions[name].group.nodes]
            what = f"{fusions[name].spec.title}, {len(ops)} ops ({', '.join(dict.fromkeys(ops))})"
        around = (", ".join(dict.fromkeys(map(_name, side))) or "nothing" for side in (_sources(node), _readers(node)))
        lines.append("{}: from {}; for {}".format(what, *around))
    return lines


def _passes(node: Node) -> bool:
    """Whether a node launches nothing: it looks at what another made."""
    if isinstance(node.target, OpOverload) and node.target.is_view:
        return True
    return node.op == "call_function" and any(word in str(node.target) for word in _PASSED)


def _name(node: Node) -> str:
    if node.op != "call_function":
        return "a weight" if node.op == "get_attr" else f"the {node.op}"
    if "auxstream_fused" in node.meta:
        return re.sub("_[0-9a-f]{12}$", "", node.meta["auxstream_fused"])
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _sources(node: Node) -> Iterator[Node]:
    """What made a node's operands, seen through what only passes them; weights left out."""
    for source in node.all_input_nodes:
        if _passes(source):
            yield from _sources(source)
        elif source.op != "get_attr":
            yield source


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if _passes(user):
            yield from _readers(user)
        else:
            yield user


# --- the benchmark ----------------------------------------------------------------------------------------------------


class Bench:
    """Graphs of one step, and what is known of them so far."""

    def __init__(self, layers: int, inputs: tuple[Tensor, Tensor]) -> None:
        self.layers = layers
        self.inputs = inputs
        self.runs: dict[str, Captured] = {}
        self.results: dict[str, Any] = {}

    def add(self, name: str, run: Callable[..., Tensor], **facts: Any) -> None:
        """Capture, count and print one variant."""
        captured = self.runs[name] = Captured(run, *self.inputs)
        launches = captured.launches()
        kinds = {kind: count / self.layers for kind, count in by_kind(launches).items()}
        self.results[name] = {**facts, "launches per layer": kinds, "kernels": launches}
        counts = "  ".join(f"{kinds[kind]:6.2f} {kind}" for kind in KINDS)
        print(f"{name:20} {counts}", flush=True)

    def time(self, rounds: int) -> None:
        for name, figure in interleave({name: run.sample for name, run in self.runs.items()}, rounds, "us").items():
            self.results[name]["us per step"] = figure
            print(f"{name:20} {figure} a step", flush=True)

    def compare(self) -> None:
        ours, theirs = (self.results[name]["launches per layer"]["pointwise"] for name in (EVERYWHERE, COMPILED))
        self.results["pointwise launches, ours over torch.compile's"] = ours / theirs
        print(f"pointwise launches per layer: {ours:.2f}, torch.compile {theirs:.2f}, ratio {ours / theirs:.2f}")
        print("torch.compile's kernels, by count:")
        kernels: Launches = self.results[COMPILED]["kernels"]
        for name, (count, us) in sorted(kernels.items(), key=lambda item: -item[1][0])[:40]:
            print(f"  {count / self.layers:6.2f} a layer, {us / count:7.2f} us each  {name[:110]}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = {"layers": 4, "rounds": 3, "compile_limit": 0}
    parser = CommandLine(__doc__, rounds=10, limit=560, quick=quick)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile-limit", type=float, default=300, help="seconds for torch.compile; 0 leaves it out")
    options = parser.options(arguments)
    clock: Clock = options.clock
    device = clock.device
    step = DecodeStep(build(gemma4_config(options.layers, options.size), device), options.batch, CONTEXT)
    ids = torch.zeros(options.batch, 1, dtype=torch.int64, device=device)
    position = torch.full((1,), CONTEXT // 2, dtype=torch.int64, device=device)
    traced = trace(step, (ids, position)).graph_module
    mark_multi_stream_moe_shared_experts(traced)

    bench = Bench(options.layers, (ids, position))
    print(f"{options.layers} layers, batch {options.batch}; launches per layer")
    for name, module, report, stages in variants(traced):
        bench.add(name, module, seconds=stages)
        if report is not None:
            print(f"  {report.summary}; " + ", ".join(f"{took:.2f} s to {what}" for what, took in stages.items()))
        if name == EVERYWHERE and report is not None:
            layer = min(1, options.layers - 1)
            lines = bench.results[name]["one layer"] = remaining(module, report, layer)
            print(f"  layer {layer}, in order:", *lines, sep="\n    ", flush=True)
    bench.time(options.rounds)
    write(options.json, "decode", bench.results)
    seconds = min(options.compile_limit, clock.left() - 10)
    if options.compile_limit and seconds < 10:
        bench.results["left out"] = [COMPILED]
    elif options.compile_limit:
        try:
            start = time.perf_counter()
            with limit(seconds):
                compiled = torch.compile(copy_of(traced), dynamic=False, fullgraph=True)
                bench.add(COMPILED, compiled)
            print(f"  {time.perf_counter() - start:.0f} s to compile", flush=True)
            bench.compare()
            bench.time(options.rounds)
        except Exception as error:  # whatever it is, ours stands
            bench.results["left out"] = f"{COMPILED}: {type(error).__name__}: {error}"[:2000]
            print(bench.results["left out"][:300], flush=True)
        write(options.json, "decode", bench.results)
    return bench.results


if __name__ == "__main__":
    main()
