"""Overlap alone: feed-forward blocks of Gemma-4, whose shared experts run beside the routed ones, against all else.

    python -m auxstream.bench.overlap [--layers N] [--batch B ...] [--kernels own torch] [--modes M ...] [--json PATH]

Measures: microseconds per layer (router, experts, dense branch, norms; sizes of Gemma-4-26B-A4B, random weights),
everything interleaved in one run:
- `eager`: the model's own code on one stream, and with the branch handed over by hand (bench/by_hand.py): with
  `synchronize`, with events only, with `record_stream`, with this library's regions;
- `graph`: the same in CUDA graphs; the host cannot wait in one, so without `synchronize`;
- `compile`, with its own kernels or with torch's: on one stream, shared experts on a lane, and as it chooses;
- either branch alone; the longer one bounds what overlap can reach; and torch.compile.
Beside them the bytes of the weights that must be read, over a device copy's bandwidth. What is by hand also runs with
the branch held up, against one stream: a way whose bits then differ is UNSAFE; what records must not be. Does not
measure: attention, whole steps (bench/models.py), the host beside a graph; nor the bits of what `compile` makes, which
it proves, and which bench/ffn.py and bench/equality.py compare. Needs a GPU and the extra `hf`; `--device cpu --size
tiny` tries it on the simulated machine, where times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from ..capture.compiler import compile, warm_up_and_capture
from ..capture.huggingface import build, gemma4_config
from ..capture.options import Options
from .blocks import ROUTED_ALONE, SHARED_ALONE, Branches, FeedForward, weight_bytes
from .budget import Clock
from .by_hand import EVENTS, RECORDED, REGIONS, WAYS, ByHand, Handoff, OneStream, differing
from .command import CommandLine
from .harness import Figure, interleave, write
from .replays import Captured, paces
from .torch_compile import rival

Run = Callable[[], object]
Step = tuple[Run, Callable[[Tensor], Tensor]]
"""What is timed, and the same for inputs of one's own."""
Kernels = Literal["own", "torch"]
EXPERTS: Final[dict[Kernels, str]] = {"own": "auxstream", "torch": "grouped_mm"}
SERIAL, SHARED, CHOSEN = "one stream", "shared experts on a lane", "as it chooses"
OPTIONS: Final = {
    SERIAL: {"multi_stream_moe": False},
    SHARED: {"overlap": "*=off,layers.*.shared=on"},
    CHOSEN: {},
}
MODES: Final = ("reduce-overhead", "max-autotune")
CORRUPT: Final = "corrupt, of runs held up"
HELD_UP_NS: Final = 2_000_000
"""Longer than the host takes to enqueue what the caller does beside a branch."""
HELD_UP_RUNS: Final = 20


class Bench:
    """One batch size: the ways to run it, and what is known of them."""

    def __init__(self, decoder: nn.Module, batch: int, options: argparse.Namespace) -> None:
        self.decoder: Any = decoder
        self.layers: Any = self.decoder.model.layers
        self.batch = batch
        self.options = options
        self.clock: Clock = options.clock
        self.gpu = self.clock.device.type == "cuda"
        width = len(self.layers[0].pre_feedforward_layernorm.weight)
        self.hidden = torch.randn(batch, 1, width, dtype=torch.bfloat16, device=self.clock.device)
        self.runs: dict[str, Run] = {}
        self.left_out: dict[str, str] = {}
        self.corrupt: dict[str, tuple[int, int]] = {}
        self.results: dict[str, Any] = {"left out": self.left_out, CORRUPT: self.corrupt}

    # --- the ways -----------------------------------------------------------------------------------------------------

    def by_hand(self) -> None:
        """The model's own code: on one stream, and on two in every way."""
        self.decoder.set_experts_implementation("grouped_mm")
        self.runs["eager, one stream"] = torch.no_grad()(partial(FeedForward(self.layers), self.hidden))
        right: Callable[[Tensor], Tensor] = ByHand(self.layers, OneStream())
        for name, make in WAYS.items():
            if self.gpu or name == REGIONS:
                self._add(f"eager, {name}", make, self._eager, right)
        if self.gpu:
            self.runs["graph, one stream"], right = self._in_torchs_graph(ByHand(self.layers, OneStream()))
            for name in (EVENTS, RECORDED):
                self._add(f"graph, {name}", WAYS[name], self._in_torchs_graph, right)
        self._add(f"graph, {REGIONS}", WAYS[REGIONS], self._in_our_graph, right)

    def _add(
        self,
        name: str,
        make: Callable[[], Handoff],
        prepare: Callable[[ByHand], Step],
        right: Callable[[Tensor], Tensor],
    ) -> None:
        self.runs[name], _ = prepare(ByHand(self.layers, make()))
        held_up = torch.tensor([HELD_UP_NS], device=self.clock.device)
        _, step = prepare(ByHand(self.layers, make(), held_up))
        self.corrupt[name] = differing(step, right, self.hidden, HELD_UP_RUNS), HELD_UP_RUNS

    def _eager(self, module: ByHand) -> Step:
        return partial(module, self.hidden), module

    def _in_torchs_graph(self, module: ByHand) -> Step:
        hidden = self.hidden.clone()
        captured = Captured(module, hidden)
        return captured.replay, _replaying(hidden, captured.replay, captured.out)

    def _in_our_graph(self, module: ByHand) -> Step:
        hidden = self.hidden.clone()
        graph, out = warm_up_and_capture(module, (hidden,), (), self.clock.device, name="by hand", verify="error")
        return graph.replay, _replaying(hidden, graph.replay, out)

    def compiled(self, kernels: Kernels) -> None:
        """As `compile` makes it, on one stream and on several, and both branches alone."""
        self.decoder.set_experts_implementation(EXPERTS[kernels])
        torchs = kernels == "torch"
        names = ("decode_attention", "router_kernels", "product_kernels")
        rest: dict[str, Any] = dict.fromkeys(names, False) if torchs else {}
        for how, given in OPTIONS.items():
            start = time.perf_counter()
            options = Options(fusion_safe="*=1", **given, **rest)
            made = compile(FeedForward(self.layers), (self.hidden,), options, name=f"{kernels} kernels, {how}")
            self.runs[f"compile, {kernels} kernels, {how}"] = partial(made, self.hidden)  # torch.compile copies in too
            seconds = time.perf_counter() - start
            print(
                f"  {kernels} kernels, {how}: {seconds:.1f} s, {len(made.regions)} regions; {made.choice}", flush=True
            )
        for branch in (SHARED_ALONE, ROUTED_ALONE):
            model = Branches(self.layers, branch)
            options = Options(fusion_safe="*=1", multi_stream_moe=False, **rest)
            made = compile(model, (model.residuals(self.batch),), options, name=branch)
            self.runs[f"compile, {kernels} kernels, {branch}"] = made.graph.replay
        self.decoder.set_experts_implementation("grouped_mm")

    def rivals(self) -> bool:
        """torch.compile; whether there is any."""
        model = FeedForward(self.layers)
        for number, mode in enumerate(self.options.modes):
            name, later = f"torch.compile, {mode}", len(self.options.modes) - number - 1
            others = 20 + (self.clock.left() - 20) * later / (later + 1)
            found = rival(model, (self.hidden,), mode, self.clock, needs=10, for_others=others)
            if isinstance(found, str):
                self.left_out[name] = found
                print(f"  {name}: left out, {found[:300]}", flush=True)
                continue
            self.runs[name], took = found
            self.results[f"compile, s: {name}"] = took
            print(f"  {name}: compiled in {took:.0f} s", flush=True)
        return len(self.left_out) < len(self.options.modes)

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def measure(self, save: Callable[[], None]) -> None:
        """All of it, saved part by part: torch.compile comes last, and all is then timed again beside it."""
        self.by_hand()
        save()
        for kernels in self.options.kernels:
            self.compiled(kernels)
        self.time()
        save()
        if self.rivals():
            self.time()
        save()

    def time(self) -> None:
        """Time all of it, and print the table."""
        count = len(self.layers)

        def per_layer(name: str, run: Run) -> float:
            return self.clock.ms(run, 3 if name.startswith("eager") else 10) * 1000 / count

        samples = {name: partial(per_layer, name, run) for name, run in self.runs.items()}
        figures = interleave(samples, self.options.rounds, "us")
        self.results["us per layer"] = figures
        nbytes = weight_bytes(FeedForward(self.layers), self.hidden) / count
        self.results["bytes per layer"] = nbytes
        print(f"batch {self.batch}, {count} layers: us per layer; each must read {nbytes / 2**20:.1f} MiB of weights")
        if self.gpu:
            pace = self.results["copy, TB/s"] = self.results.get("copy, TB/s") or paces()["copy"]
            bound = self.results["bound: bytes over copy bandwidth, us"] = nbytes / pace / 1e6
            print(f"  {'bound: those bytes, as a copy moves them':48} {bound:8.2f} us  at {pace:.2f} TB/s")
        for kernels in self.options.kernels:
            self._bound(kernels, figures)
        for name, figure in figures.items():
            print(f"  {name:48} {figure}  {self._said(name)}", flush=True)

    def _bound(self, kernels: Kernels, figures: dict[str, Figure]) -> None:
        def median(what: str) -> float:
            return figures[f"compile, {kernels} kernels, {what}"].median

        shorter, longer = sorted((median(SHARED_ALONE), median(ROUTED_ALONE)))
        self.results[f"bound: longer branch, {kernels} kernels, us"] = longer
        print(f"  {f'bound: longer branch, {kernels} kernels':48} {longer:8.2f} us")
        for how in (SHARED, CHOSEN):
            recovered = (median(SERIAL) - median(how)) / shorter
            self.results[f"recovered of the shorter branch: {kernels} kernels, {how}"] = recovered
            print(f"  {f'of the shorter branch recovered, {kernels} kernels, {how}':60} {recovered:4.0%}")

    def _said(self, name: str) -> str:
        if name not in self.corrupt:
            return ""
        wrong, runs = self.corrupt[name]
        return f"UNSAFE: corrupt in {wrong} of {runs} runs held up" if wrong else f"right in {runs} runs held up"


def passed(results: Mapping[str, Any]) -> bool:
    """What this library or `record_stream` secures is never corrupt."""
    return not any(wrong for name, (wrong, _) in results[CORRUPT].items() if name.endswith((RECORDED, REGIONS)))


def _replaying(hidden: Tensor, replay: Callable[[], object], out: Tensor) -> Callable[[Tensor], Tensor]:
    def run(given: Tensor) -> Tensor:
        hidden.copy_(given)
        replay()
        return out

    return run


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    quick = {"layers": 3, "rounds": 5, "kernels": ["own"], "modes": []}
    parser = CommandLine(__doc__, rounds=15, limit=560, quick=quick, devices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--kernels", nargs="+", choices=list(EXPERTS), default=list(EXPERTS), help="of `compile`")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES), help="of torch.compile")
    options = parser.options(arguments)
    decoder = build(gemma4_config(options.layers, options.size), options.clock.device, experts="auxstream")
    left_out: list[str] = []
    benches: list[Bench] = []
    results: dict[str, Any] = {"left out": left_out, "all passed": False}
    if missing := [mode for mode in MODES if mode not in options.modes]:
        left_out.append("torch.compile " + ", ".join(missing) + ", as asked")
    save = partial(write, options.json, "overlap", results)
    for batch in options.clock.in_time(options.batch, left_out, "batch {}".format):
        benches.append(Bench(decoder, batch, options))
        results[f"batch {batch}"] = benches[-1].results
        benches[-1].measure(save)
    results["all passed"] = bool(benches) and all(passed(bench.results) for bench in benches)
    save()
    return results


if __name__ == "__main__":
    sys.exit(0 if main()["all passed"] else 1)
