"""Every architecture's decode step on one stream and on several: the same bits, replay after replay.

    python -m auxstream.bench.equality [--model NAME ...] [--batch B ...] [--replays N] [--part K/N]

Each architecture (tiny, random weights) is traced for each batch size, and captured on one stream and once for each of
its layouts (bench/layouts.py), in which shared experts and every further branch run on lanes. Each replay draws tokens,
positions of each row, and a delay for each side of each region, and compares logits and caches with one stream of the
same kernels. A row of its own compares one stream with itself; one architecture is also captured without a wait, and
must differ. Where there is a shared expert, prompts of five lengths are compared too (bench/prompts.py). What does not
fit into `--limit` seconds is left out, and named.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from ..capture.huggingface import DecodeStep
from ..capture.trace import TracedGraph, trace
from ..runtime.errors import AuxstreamError
from .architectures import MODELS, VOCABULARY
from .budget import Clock
from .command import CommandLine
from .controls import Fault
from .harness import write
from .lab import Fusion, Lab, Row, Variant, compare, repeatable_attention
from .layouts import Layout, layouts, shared_experts
from .prompts import check_prompts

CONTEXT: Final = 32
BATCHES: Final = (1, 3, 8)
CONTROL: Final = "gemma4"
"""The architecture that is also run with waits taken out."""
CONTROL_RUNS: Final = 20
FAULTS: Final[tuple[Fault, ...]] = ("fork wait", "join wait")


@dataclass(frozen=True, slots=True)
class Case:
    """One variant of one architecture at one batch size, and how its bits compared."""

    model: str
    batch: int
    regions: int
    row: Row

    def plain(self) -> dict[str, Any]:
        own = {"model": self.model, "batch": self.batch, "regions": self.regions, "passed": self.row.passed}
        return {**asdict(self.row), **own}

    def __str__(self) -> str:
        row = self.row
        what = f"without {row.control}" if row.control else f"{self.regions} regions" if self.regions else "one stream"
        what = f"prompts, {what}" if row.mode == "prompt" else what
        verdict = ("corrupt, as it must be" if row.control else "equal") if row.passed else "FAILED"
        differing = "" if row.passed else "  " + "; ".join(row.differing)
        return (
            f"{self.model:18} {self.batch:3} {row.fusion:10} {what:20} {row.equal:5}/{row.runs:<5} "
            f"{row.checker:24} {verdict}{differing}"
        )


def check(name: str, batch: int, replays: int, device: torch.device, fusion: Fusion = "unfused") -> list[Case]:
    """One architecture at one batch size: one stream against itself, and every layout against one stream."""
    traced, ids, position = _traced(name, batch, device)
    cases: list[Case] = []
    reference: Variant | None = None
    for number, layout in enumerate(layouts(traced.graph_module)):
        lab = _lab(traced, layout, ids, position)
        if reference is None or fusion != "unfused":  # groups end at regions, so other regions are other kernels
            reference = _one_stream(lab, fusion)
        made: list[tuple[int, Variant]] = []
        if number == 0:
            made.append((0, lab.captured(Row("graph", "one", fusion), replays, aux=False)))
        if regions := len(layout.regions):
            made.append((regions, lab.captured(Row("graph", "aux", fusion), replays, aux=True)))
        compare(lab, reference, [variant for _, variant in made], number)
        cases += [Case(name, batch, regions, variant.row) for regions, variant in made]
    return cases


def check_controls(name: str, batch: int, runs: int, device: torch.device, fusion: Fusion = "unfused") -> list[Case]:
    """An architecture with its shared experts on a lane, and each kind of wait taken out."""
    traced, ids, position = _traced(name, batch, device)
    layout = shared_experts(traced.graph_module)  # a stale index of anything else could leave the memory it is for
    lab = _lab(traced, layout, ids, position)
    faulty = [lab.captured(Row("graph", "aux", fusion, fault), runs, aux=True, fault=fault) for fault in FAULTS]
    compare(lab, _one_stream(lab, fusion), faulty, 0)
    return [Case(name, batch, len(layout.regions), variant.row) for variant in faulty]


def prompted(name: str, prompts: int, device: torch.device) -> list[Case]:
    """An architecture's prompts; nothing where bench/prompts.py has nothing to compare."""
    found = check_prompts(name, prompts, device)
    return [] if found is None else [Case(name, 1, *found)]


def _traced(name: str, batch: int, device: torch.device) -> tuple[TracedGraph, Tensor, Tensor]:
    step = DecodeStep(MODELS[name].build(device), batch, CONTEXT)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    position = torch.zeros(batch, dtype=torch.int64, device=device)
    return trace(step, (ids, position)), ids, position


def _lab(traced: TracedGraph, layout: Layout, ids: Tensor, position: Tensor) -> Lab:
    marked = replace(traced, graph_module=layout.marked(traced.graph_module))
    return Lab(marked, ids, position, vocabulary=VOCABULARY, context=CONTEXT)


def _one_stream(lab: Lab, fusion: Fusion) -> Variant:
    """What all are compared with; on the simulated machine, the graph itself."""
    if lab.gpu:
        return lab.captured(Row("graph", "one", fusion), 0, aux=False)
    return lab.eager(Row("eager", "one", fusion), 0, aux=False)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    quick = {"replays": 100, "prompts": 0, "batch": [BATCHES[0]]}
    parser = CommandLine(__doc__, rounds=None, limit=560, quick=quick, devices=("cuda", "cpu"))
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=200, help="for each architecture; 0 leaves them out")
    parser.add_argument("--fusion", choices=("unfused", "caller", "everywhere"), default="unfused")
    parser.add_argument("--part", default="1/1", help="K/N: every Nth architecture, from the Kth on")
    options = parser.options(arguments)
    clock: Clock = options.clock
    cases: list[dict[str, Any]] = []
    left_out: list[str] = []
    errors: dict[str, str] = {}
    results: dict[str, Any] = {"replays": options.replays, "cases": cases, "left out": left_out, "errors": errors}
    with repeatable_attention():
        for name, batch in clock.in_time(_turns(options), left_out, lambda turn: f"{turn[0]}, batch {turn[1]}"):
            start = time.monotonic()
            made: list[Case] = []
            try:
                if options.prompts and batch == options.batch[0]:
                    made += prompted(name, options.prompts, clock.device)
                made += check(name, batch, options.replays, clock.device, options.fusion)
                if name == CONTROL:
                    runs = min(options.replays, CONTROL_RUNS)
                    made += check_controls(name, batch, runs, clock.device, options.fusion)
            except (AuxstreamError, RuntimeError) as error:  # a failure, of this architecture alone
                errors[f"{name}, batch {batch}"] = f"{type(error).__name__}: {error}"
                print(f"{name:18} {batch:3} FAILED  {type(error).__name__}: {error}", flush=True)
            took = time.monotonic() - start
            for case in made:
                print(case, flush=True)
                cases.append({**case.plain(), "seconds": took})
            write(options.json, "equality", results)
    failed = [case for case in cases if not case["passed"]]
    results["all passed"] = bool(cases) and not failed and not left_out and not errors
    print(f"{len(cases)} comparisons, {len(failed)} failed; errors: {len(errors)}; left out: {left_out}")
    write(options.json, "equality", results)
    return results


def _turns(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    first, _, every = options.part.partition("/")
    for name in options.model[int(first) - 1 :: int(every)]:
        for batch in options.batch:
            yield name, batch


if __name__ == "__main__":
    sys.exit(0 if main()["all passed"] else 1)
