"""Whole models: decode and prefill of Gemma-4-26B-A4B, one stream against two.

    python -m auxstream.bench.models [--parts P ...] [--variants V ...] [--batch B ...] [--reduce-overhead]

Measures, all over one set of random weights, static cache of 1,024 positions, variants interleaved, medians:
- `first`: seconds from a cold process to the first replay, with empty caches of kernels and with warm ones;
- `decode`: time of a step of Hugging Face's model in one CUDA graph, and of `compile` on one stream, with shared
  experts on a lane, and with what it chose itself; with `--reduce-overhead` also of torch.compile, and the seconds that
  takes; the host's time of one call; both branches of a layer alone, and how much of the shorter one the overlap
  recovers; the ten costliest kernels against the bytes they must move;
- `prefill`: a prompt through `compile`'s pieces against torch.compile without graphs.
Does not measure: sampling, tokenizers, real weights. What does not fit into `--limit` seconds is left out, and named.
Needs a GPU and the extra `hf`; `--device cpu --size tiny` tries it on the simulated machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from ..capture.compiled import CompiledModel
from ..capture.compiler import compile
from ..capture.graphs import CudaGraph
from ..capture.huggingface import DecodeStep, build, gemma4_config
from ..capture.options import Options
from ..runtime.errors import AuxstreamError
from .blocks import ROUTED_ALONE, SHARED_ALONE, Branches
from .budget import Clock, Out
from .command import CommandLine
from .costliest import HEADING, costliest
from .first_replay import first_replays
from .harness import Figure, interleave, write
from .prefill import prefill
from .replays import Captured
from .torch_compile import rival

CONTEXT: Final = 1024
PARTS: Final = ("first", "decode", "prefill")
HF, TORCH = "HF, one CUDA graph", "torch.compile reduce-overhead"
SERIAL, SHARED, CHOSEN = "serial", "shared experts", "chosen by measuring"
OWN_SERIAL, OWN = "own kernels, serial", "own kernels, chosen"
_TORCHS_OWN: Final = Options(
    fusion_safe="*=1", decode_attention=False, router_kernels=False, product_kernels=False
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variant:
    """How a step is compiled, with whose experts, and what it is compared with."""

    options: Options
    experts: Literal["grouped_mm", "auxstream"] = "grouped_mm"
    serial: str = SERIAL


OURS: Final[dict[str, Variant]] = {
    SERIAL: Variant(replace(_TORCHS_OWN, multi_stream_moe=False)),
    SHARED: Variant(replace(_TORCHS_OWN, overlap="*=off,layers.*.shared=on", fusion_safe="")),
    CHOSEN: Variant(_TORCHS_OWN),
    OWN_SERIAL: Variant(Options(fusion_safe="*=1", multi_stream_moe=False), "auxstream", OWN_SERIAL),
    OWN: Variant(Options(fusion_safe="*=1"), "auxstream", OWN_SERIAL),
}
"""On one stream; with shared experts alone on a lane, their branches as the marker leaves them; with whatever `compile`
finds to pay. Products, attention, routers and experts are torch's and transformers' own, then this library's."""


def compiled_for(named: Collection[str]) -> tuple[str, ...]:
    """The variants named and those they are compared with, and no other: each takes a minute to compile."""
    wanted = {*named, *(OURS[name].serial for name in named)}
    return tuple(name for name in OURS if name in wanted)


def alone_of(serial: str) -> tuple[str, str]:
    """What both branches alone are called, of the kernels that this serial variant runs."""
    prefix = "" if serial == SERIAL else "own kernels, "
    return prefix + SHARED_ALONE, prefix + ROUTED_ALONE


# --- decode -----------------------------------------------------------------------------------------------------------


def decode(
    model: nn.Module,
    batch: int,
    clock: Clock,
    options: argparse.Namespace,
    save: Callable[[], None],
    results: dict[str, Any],
) -> None:
    """Fill in all figures of one batch size; torch.compile comes last, when they are saved."""
    device = clock.device
    step = DecodeStep(model, batch, CONTEXT if options.size == "full" else 64)
    ids = torch.randint(128, (batch, 1), device=device)
    position = torch.full((1,), step.context // 2, dtype=torch.int64, device=device)
    print(f"decode, batch {batch}, {options.layers} layers", flush=True)
    runs: dict[str, Callable[[], object]] = {HF: _hugging_face(step, ids, position)}
    ours: dict[str, CompiledModel] = {}
    for name in compiled_for(options.variants):
        start = time.perf_counter()
        _use_experts(model, name)
        made = ours[name] = compile(step, (ids, position), OURS[name].options, name=f"decode-{options.layers}-layers")
        runs[name] = partial(made, ids, position)
        seconds, mib = time.perf_counter() - start, made.graph.memory.reserved / 2**20
        results |= {f"compile, s: {name}": seconds, f"choice: {name}": str(made.choice)}
        if isinstance(made.graph, CudaGraph):
            results[f"kernels: {name}"] = kernels = len(made.graph.evidence.nodes)
            print(f"  {kernels} nodes in the graph of:", flush=True)
        print(f"  {name}: {seconds:.1f} s, {len(made.regions)} regions, {mib:.1f} MiB; {made.choice}", flush=True)
    layers: Any = model.model.layers  # pyright: ignore[reportAttributeAccessIssue]
    for serial in dict.fromkeys(OURS[name].serial for name in ours):
        _use_experts(model, serial)
        for branch in alone_of(serial):
            runs[branch] = _alone(layers, branch, batch, OURS[serial].options)
    _use_experts(model, SERIAL)
    figures = interleave({name: partial(clock.ms, run) for name, run in runs.items()}, options.rounds, "ms")
    results |= {f"ms per step: {name}": figure for name, figure in figures.items()}
    _compare(figures, list(ours), results, options.layers)
    for name, compiled in ours.items():
        results[f"host, us: {name}"] = clock.host(partial(compiled, ids, position))
        print(f"  host time of a call, {name}: {results[f'host, us: {name}']}", flush=True)
    best = min(ours, key=lambda name: figures[name].median, default=HF)
    captured = ours[best].graph if ours else None
    if isinstance(captured, CudaGraph):
        results["host, us: launch of the graph alone"] = clock.host(captured.cuda_graph.replay)
        print(f"  host time of launching the graph alone: {results['host, us: launch of the graph alone']}", flush=True)
        found = costliest(captured)
        results["costliest kernels"] = [_row(costly) for costly in found]
        print(f"  costliest kernels, {best}:\n    {HEADING}", *found, sep="\n    ", flush=True)
    if options.reduce_overhead:
        save()
        _torch_compile(step, ids, position, clock, options, runs[best], best, results)


def _hugging_face(step: DecodeStep, ids: Tensor, position: Tensor) -> Callable[[], object]:
    if ids.is_cuda:
        return Captured(step, ids, position).replay
    return torch.no_grad()(partial(step, ids, position))


def _use_experts(model: nn.Module, variant: str) -> None:
    cast("Any", model).set_experts_implementation(OURS[variant].experts)


def _alone(layers: Any, branch: str, batch: int, options: Options) -> Callable[[], object]:
    model = Branches(layers, branch)
    return compile(model, (model.residuals(batch),), options, name=branch).graph.replay


def _compare(figures: dict[str, Figure], ours: Sequence[str], results: dict[str, Any], layers: int) -> None:
    """Print the steps, and what of the shorter branch each overlap recovers."""
    branches = {serial: alone_of(serial) for serial in dict.fromkeys(OURS[name].serial for name in ours)}
    shorter = {serial: min(figures[name].median for name in names) for serial, names in branches.items()}
    for serial, bound in shorter.items():
        results["bound: shorter branch of all layers, ms" + ("" if serial == SERIAL else ": own kernels")] = bound
    for name, timed in figures.items():
        said = f"  {name:30} {timed}"
        if any(name in alone for alone in branches.values()):
            said += f"   {timed.median / layers * 1000:6.1f} us a layer"
        reference = OURS[name].serial if name in ours else name
        if reference != name and reference in figures:
            serial = figures[reference].median
            results[f"serial over {name}"] = serial / timed.median
            recovered = results[f"recovered: {name}"] = (serial - timed.median) / shorter[reference]
            said += f"   {reference} takes {serial / timed.median:5.3f} of it"
            said += f", recovers {recovered:4.0%} of the shorter branch"
        print(said, flush=True)


def _row(costly: Any) -> dict[str, Any]:
    names = ("name", "calls", "us", "nbytes", "floor_us", "ratio")
    return {name: getattr(costly, name) for name in names}


def _torch_compile(
    step: DecodeStep,
    ids: Tensor,
    position: Tensor,
    clock: Clock,
    options: argparse.Namespace,
    best: Callable[[], object],
    name: str,
    results: dict[str, Any],
) -> None:
    """torch.compile beside our best, interleaved; it may fail, and then ours stands."""
    torch.compiler.reset()  # another batch size is another step
    found = rival(step, (ids, position), "reduce-overhead", clock, needs=40)
    if isinstance(found, str):
        results["left out"] = f"{TORCH}: {found}"
        print(f"  {results['left out'][:300]}", flush=True)
        return
    run, seconds = found
    results[f"compile, s: {TORCH}"] = seconds
    figures = interleave({TORCH: partial(clock.ms, run), name: partial(clock.ms, best)}, options.rounds, "ms")
    results[f"ms per step: {TORCH}"] = figures[TORCH]
    results[f"ms per step: {name}, beside it"] = figures[name]
    results["torch.compile over ours"] = ratio = figures[TORCH].median / figures[name].median
    print(f"  {TORCH:30} {figures[TORCH]}   {ratio:5.3f} of {name}; compiled in {seconds:.0f} s", flush=True)


# --- command line -----------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Part by part; what fails or does not fit is named, and the rest goes on."""
    clock: Clock = options.clock
    device = clock.device
    results: dict[str, Any] = {}
    save = partial(write, options.json, "models", results)

    def part(name: str, seconds: float, run: Callable[[dict[str, Any]], None]) -> None:
        found = results[name] = dict[str, Any]()
        try:
            clock.need(seconds, name)
            run(found)
        except (Out, subprocess.TimeoutExpired, torch.OutOfMemoryError) as error:
            found["left out"] = str(error)
            print(error, flush=True)
        except (AuxstreamError, subprocess.CalledProcessError) as error:
            found["failed"] = f"{type(error).__name__}: {error}"
            print(found["failed"], flush=True)
        finally:
            save()

    if "first" in options.parts:  # first of all: two models do not fit into a GPU's memory
        chosen = argparse.Namespace(**{**vars(options), "batch": options.batch[0]})
        part("first replay", 30, partial(first_replays, chosen, min(240.0, clock.left())))
    if not {"decode", "prefill"} & set(options.parts):
        return results
    start = time.perf_counter()
    model = build(gemma4_config(options.layers, options.size), device, experts="auxstream")  # which makes it known
    cast("Any", model).set_experts_implementation("grouped_mm")
    clock.settle()
    print(f"{options.layers} layers with random weights, {time.perf_counter() - start:.1f} s", flush=True)
    needs = 10 + len(compiled_for(options.variants)) * options.layers if options.size == "full" else 5
    if "decode" in options.parts:
        for batch in options.batch:
            part(f"decode, batch {batch}", needs, partial(decode, model, batch, clock, options, save))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if "prefill" in options.parts:
        for tokens in options.tokens:
            part(f"prefill, {tokens} tokens", needs, partial(prefill, model, tokens, clock, options.rounds))
    return results


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    quick = {"layers": 4, "batch": [1], "rounds": 5, "parts": ["decode"], "variants": [OWN_SERIAL, OWN]}
    parser = CommandLine(__doc__, rounds=15, limit=560, quick=quick, devices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--variants", nargs="*", choices=OURS, default=list(OURS), metavar="VARIANT",
        help="of decode, each with its serial one; none: only the model in a CUDA graph. " + ", ".join(map(repr, OURS)),
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of the prompt")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--reduce-overhead", action="store_true", help="torch.compile too: minutes for each batch")
    options = parser.options(arguments)
    return measure(options)


if __name__ == "__main__":
    sys.exit(1 if any("failed" in part for part in main().values()) else 0)
