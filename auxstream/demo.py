"""The main job: a Gemma-4 MoE decode step with its shared-expert branch on an auxiliary stream, and the same numbers.

    python -m auxstream demo [--layers N] [--size tiny|real|full] [--replays K] [--json PATH]

Enters: dimensions. Leaves: a table. Every variant is the same traced graph over the same weights with its own caches;
each replay draws new tokens (and, on a GPU, new delays in every branch) and compares the bits of logits and caches
with one stream. The first row compares one stream with itself. The last rows take a safety out and must be corrupt.
Exit code 1 if a safe row differs or a control does not.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule

from .bench.harness import device_time, machine
from .capture.compiler import warm_up_and_capture
from .capture.delays import insert_delays
from .capture.graphs import SimulatedGraph
from .capture.huggingface import DecodeStep, build, gemma4_config
from .capture.mark import mark_multi_stream_moe_shared_experts
from .capture.proof import Report, verify
from .capture.schedule import insert_regions
from .capture.trace import TracedGraph, trace
from .controls import Fault, directed_replays, without_waits
from .runtime.errors import InputError, SettingsError
from .runtime.machine import using_machine
from .runtime.settings import SETTINGS

CONTEXT = 1024
DELAY_NS = 60_000
"""Longest delay a safe row draws for one branch, on a GPU; controls delay by CONTROL_DELAY_NS."""
CONTROL_DELAY_NS = 300_000


@dataclass(slots=True)
class Row:
    """One line of the table. `equal` of `runs` replays had the same bits as the reference."""

    mode: str
    streams: str
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
        self.regions: list[str] = []

    def module(
        self, *, aux: bool, delays: bool = False, unsafe: bool = False
    ) -> tuple[GraphModule, list[Tensor], Tensor | None]:
        """A copy of the traced graph over the same weights, with caches of its own: (module, caches, delay buffer)."""
        module = GraphModule(self.traced.graph_module, copy.deepcopy(self.traced.graph_module.graph))
        caches: list[Tensor] = []
        for name in self.traced.mutated_buffers:
            owner, _, leaf = name.rpartition(".")
            cache = torch.zeros_like(getattr(module.get_submodule(owner), leaf))
            setattr(module.get_submodule(owner), leaf, cache)
            caches.append(cache)
        if not aux:
            return module, caches, None
        marked = mark_multi_stream_moe_shared_experts(module)
        if unsafe:
            insert_regions(module, marked, order="aux_first", fork_at="first_product", unsafe_no_lifetime=True)
        else:
            plans = insert_regions(module, marked)
            self.regions = self.regions or [str(plan) for plan in plans]
        buffer = torch.zeros(2 * len(marked), dtype=torch.int64, device=self.device) if delays else None
        if buffer is not None:
            insert_delays(module, buffer)
        return module, caches, buffer

    def eager(self, row: Row, replays: int, *, aux: bool) -> Variant:
        """The graph module, run op by op."""
        module, caches, buffer = self.module(aux=aux, delays=self.gpu and aux)
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
        module, caches, buffer = self.module(aux=aux, delays=delays and self.gpu and aux, unsafe=unsafe)
        faulty = None
        if fault is not None and self.gpu:
            from .faulty import FaultyMachine

            faulty = FaultyMachine(fault)
        step = module if faulty is None else _between(faulty.begin, module, faulty.finish)
        inputs = (self.ids.clone(), self.position.clone())
        with nullcontext() if faulty is None else using_machine(faulty):
            graph, logits = warm_up_and_capture(
                step, inputs, caches, self.device, name=row.control or row.streams,
                verify="off" if row.control else "error",
            )  # fmt: skip
        program = graph.program if fault is None else without_waits(graph.program, fault)
        report = verify(program)
        row.checker = _verdict(report)

        replay = graph.replay
        if row.control and isinstance(graph, SimulatedGraph):
            replay = directed_replays(graph, program)

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


def _between(
    begin: Callable[[], None], step: Callable[[Tensor, Tensor], Tensor], finish: Callable[[], None]
) -> Callable[[Tensor, Tensor], Tensor]:
    def run(ids: Tensor, position: Tensor) -> Tensor:
        begin()
        logits = step(ids, position)
        finish()
        return logits

    return run


def _verdict(report: Report) -> str:
    if report.ok:
        return "no race"
    reused = sum(race.reuse for race in report.races)
    return f"{len(report.races)} races" + (f" ({reused} reuse)" if reused else "")


def compare(lab: Lab, reference: Variant, variants: Sequence[Variant], seed: int, progress: Progress) -> None:
    """Run every variant beside the reference on the same draws, and count the replays whose bits agree."""
    draw = torch.Generator().manual_seed(seed)
    total = max(variant.replays for variant in variants)
    task = progress.add_task("comparing bits", total=total)
    with torch.no_grad():
        for turn in range(total):
            ids = torch.randint(lab.vocabulary, (lab.batch, 1), generator=draw).to(lab.device, non_blocking=True)
            position = torch.tensor([turn % lab.context]).to(lab.device, non_blocking=True)
            _draw_delays(reference, draw)
            expected = reference.run(ids, position)
            for variant in variants:
                if turn >= variant.replays:
                    continue
                _draw_delays(variant, draw)
                got = variant.run(ids, position)
                variant.flags.append(_differs([expected, *reference.caches], [got, *variant.caches]))
                for mine, right in zip(variant.caches, reference.caches, strict=True):
                    mine.copy_(right)  # each replay starts from the right state, so that replays count singly
            progress.advance(task)
    names = ["logits", *lab.traced.mutated_buffers]
    for variant in variants:
        row = variant.row
        flags = torch.stack(variant.flags).cpu()
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


def _differs(expected: Sequence[Tensor], got: Sequence[Tensor]) -> Tensor:
    """Per tensor, whether any bit differs, as a tensor on the device: comparing waits for nothing."""
    return torch.stack([(a.view(torch.uint8) != b.view(torch.uint8)).any() for a, b in zip(expected, got, strict=True)])


def measure(lab: Lab, rounds: int) -> dict[tuple[str, str], float]:
    """Median microseconds per step without delays, variants interleaved; GPU only."""
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for streams, aux in (("one", False), ("aux", True)):
        eager = lab.module(aux=aux)[0]
        steps["eager", streams] = lambda eager=eager: eager(lab.ids, lab.position)
        graph = lab.captured(Row("graph", streams), 0, aux=aux, delays=False)
        steps["graph", streams] = lambda graph=graph: graph.run(lab.ids, lab.position)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for key, step in steps.items():
                value = device_time(step, 5 if key[0] == "eager" else 20)
                if turn:
                    samples[key].append(value)
    return {key: statistics.median(values) for key, values in samples.items()}


def run_demo(options: argparse.Namespace, console: Console) -> int:
    """Build, run, print. Returns the exit code."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    size = options.size or ("real" if gpu else "tiny")
    layers = 30 if size == "full" and options.layers is None else options.layers or 2
    context = CONTEXT if size != "tiny" else 64
    replays = options.replays or (1000 if gpu else 40)
    eager_replays, control_runs = min(replays, 100), min(replays, 20)

    _refuse_settings()
    if gpu and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU", came="none", remedy="leave --device out: the simulated machine")
    console.print(
        f"Gemma-4 MoE, {layers} layers, {size} dimensions, random weights, batch {options.batch}, on {_where(device)}"
    )
    with _repeatable_attention(), _progress(console) as progress:
        task = progress.add_task("building and tracing", total=None)
        lab = Lab(size, layers, options.batch, context, device)
        progress.update(task, total=1, completed=1)
        variants = _variants(lab, replays, eager_replays, control_runs, progress)
        reference = (
            lab.captured(Row("graph", "one"), 0, aux=False) if gpu else lab.eager(Row("eager", "one"), 0, aux=False)
        )
        compare(lab, reference, variants, options.seed, progress)
        if gpu:
            timed = measure(lab, options.rounds)
            for variant in variants:
                if variant.row.control is None:
                    variant.row.us = timed[variant.row.mode, variant.row.streams]

    rows = [variant.row for variant in variants]
    console.print(f"\nregions found: {len(lab.regions)} in {layers} layers")
    for line in lab.regions[:4]:
        console.print(f"  {line}")
    if len(lab.regions) > 4:
        console.print(f"  ... and {len(lab.regions) - 4} more")
    console.print(_table(rows, "one stream, " + ("graph" if gpu else "eager")))
    failed = [row for row in rows if not row.passed]
    console.print(_conclusion(failed, rows[0]))
    if options.json:
        document = {"machine": machine(), "layers": layers, "size": size, "batch": options.batch, "seed": options.seed}
        document |= {"regions": lab.regions, "rows": [asdict(row) | {"passed": row.passed} for row in rows]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if failed else 0


def _refuse_settings() -> None:
    """With these the rows would not be what they say: no lanes, or controls made safe."""
    for name, given in (("AUXSTREAM_DISABLE", SETTINGS.disable), ("AUXSTREAM_VERIFY", SETTINGS.verify)):
        if given:
            raise SettingsError(f"the demo sets what {name} would override", remedy=f"unset {name}")


@contextmanager
def _repeatable_attention() -> Generator[None]:
    """cuDNN's attention does not give the same bits twice (one call in a hundred differs, on an H200 with torch 2.11),
    so no comparison of bits could be made with it. The first row is what finds such kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _variants(lab: Lab, replays: int, eager: int, controls: int, progress: Progress) -> list[Variant]:
    plans: list[Callable[[], Variant]] = [
        lambda: lab.eager(Row("eager", "one"), eager, aux=False),
        lambda: lab.captured(Row("graph", "one"), replays, aux=False),
        lambda: lab.eager(Row("eager", "aux"), eager, aux=True),
        lambda: lab.captured(Row("graph", "aux"), replays, aux=True),
        lambda: lab.captured(Row("graph", "aux", "fork wait"), controls, aux=True, fault="fork wait"),
        lambda: lab.captured(Row("graph", "aux", "join wait"), controls, aux=True, fault="join wait"),
        lambda: lab.captured(Row("graph", "aux", "lifetime"), controls, aux=True, unsafe=True),
    ]
    task = progress.add_task("capturing and proving", total=len(plans))
    variants: list[Variant] = []
    for plan in plans:
        variants.append(plan())
        progress.advance(task)
    return variants


def _table(rows: Sequence[Row], reference: str) -> Table:
    table = Table(title=f"bits of logits and caches, compared with {reference}", title_justify="left")
    for heading in ("mode", "streams", "taken out", "equal", "checker", "us/step", "verdict"):
        table.add_column(heading, justify="right" if heading in ("equal", "us/step") else "left", no_wrap=True)
    for row in rows:
        verdict = ("corrupt" if row.control else "equal") if row.passed else "[bold red]FAILED[/]"
        table.add_row(
            row.mode,
            row.streams,
            row.control or "",
            f"{row.equal}/{row.runs}",
            row.checker,
            "n/a" if row.us is None else f"{row.us:,.1f}",
            verdict,
            end_section=row is rows[3],
        )
    return table


def _conclusion(failed: Sequence[Row], serial: Row) -> str:
    if not failed:
        return "Every safe row is bit for bit the same; every control is corrupt, and the checker names its races."
    lines = ["FAILED:" + (" one stream differs from itself, so no other row counts" if serial in failed else "")]
    for row in failed:
        name = f"{row.mode}, {row.streams}" + (f", without {row.control}" if row.control else "")
        lines.append(f"  {name}: " + ("; ".join(row.differing) or "never differed, though it must"))
    return "\n".join(lines)


def _where(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the simulated machine (no GPU)"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}"),
        TimeElapsedColumn(),
        console=console,
    )
