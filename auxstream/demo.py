"""The main job: a Gemma-4 MoE decode step with its shared-expert branch on an auxiliary stream, and the same numbers.

    python -m auxstream demo [--layers N] [--size tiny|real|full] [--replays K] [--json PATH]

Enters: dimensions. Leaves: a table. Every variant is the same traced graph over the same weights with its own caches;
each replay draws new tokens (and, on a GPU, new delays in every branch) and compares the bits of logits and caches
with one stream of the same kernels. The rows come unfused, fused on the caller alone (the default: the marker keeps the
branches out) and fused everywhere. The first row of each compares one stream with itself. The last ones take a safety
out and must be corrupt.
Exit code 1 if a safe row differs or a control does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .bench.harness import device_time, machine
from .bench.lab import (
    CONTEXT,
    FUSIONS,
    Fusion,
    Lab,
    Row,
    Variant,
    compare,
    gemma4_lab,
    repeatable_attention,
)
from .runtime.errors import InputError, SettingsError
from .runtime.settings import SETTINGS


def measure(lab: Lab, fusions: Sequence[Fusion], rounds: int) -> dict[tuple[str, str, str], float]:
    """Median microseconds per step without delays, variants interleaved; GPU only."""
    steps: dict[tuple[str, str, str], Callable[[], object]] = {}
    for fusion in fusions:
        for streams, aux in (("one", False), ("aux", True)):
            eager = lab.module(fusion, aux=aux)[0]
            steps["eager", streams, fusion] = lambda eager=eager: eager(lab.ids, lab.position)
            graph = lab.captured(Row("graph", streams, fusion), 0, aux=aux, delays=False)
            steps["graph", streams, fusion] = lambda graph=graph: graph.run(lab.ids, lab.position)
    samples: dict[tuple[str, str, str], list[float]] = {key: [] for key in steps}
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
    fusions: Sequence[Fusion] = options.fusion or (("unfused",) if SETTINGS.fusion == "off" else FUSIONS)
    if gpu and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU", came="none", remedy="leave --device out: the simulated machine")
    console.print(
        f"Gemma-4 MoE, {layers} layers, {size} dimensions, random weights, batch {options.batch}, on {_where(device)}"
    )
    with repeatable_attention(), _progress(console) as progress:
        task = progress.add_task("building and tracing", total=None)
        lab = gemma4_lab(size, layers, options.batch, context, device)
        progress.update(task, total=1, completed=1)
        variants: list[Variant] = []
        for fusion in fusions:
            made = _variants(lab, fusion, replays, eager_replays, control_runs, progress)
            reference = (
                lab.captured(Row("graph", "one", fusion), 0, aux=False)
                if gpu
                else lab.eager(Row("eager", "one", fusion), 0, aux=False)
            )
            task = progress.add_task("comparing bits", total=replays)
            compare(lab, reference, made, options.seed, partial(progress.advance, task))
            variants += made
        if gpu:
            timed = measure(lab, fusions, options.rounds)
            for variant in variants:
                if variant.row.control is None:
                    variant.row.us = timed[variant.row.mode, variant.row.streams, variant.row.fusion]

    rows = [variant.row for variant in variants]
    console.print(f"\nregions found: {len(lab.regions)} in {layers} layers")
    for line in lab.regions[:4]:
        console.print(f"  {line}")
    if len(lab.regions) > 4:
        console.print(f"  ... and {len(lab.regions) - 4} more")
    for line in lab.fusing:
        console.print(f"fused, {line}")
    for fusion in fusions:
        console.print(_table([row for row in rows if row.fusion == fusion], _SAYS[fusion], "graph" if gpu else "eager"))
    failed = [row for row in rows if not row.passed]
    console.print(_conclusion(failed, rows[0]))
    if options.json:
        document = {"machine": machine(), "layers": layers, "size": size, "batch": options.batch, "seed": options.seed}
        document |= {
            "regions": lab.regions,
            "fusing": lab.fusing,
            "rows": [asdict(row) | {"passed": row.passed} for row in rows],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if failed else 0


def _refuse_settings() -> None:
    """With these the rows would not be what they say: no lanes, or controls made safe."""
    for name, given in (("AUXSTREAM_DISABLE", SETTINGS.disable), ("AUXSTREAM_VERIFY", SETTINGS.verify)):
        if given:
            raise SettingsError(f"the demo sets what {name} would override", remedy=f"unset {name}")


def _variants(lab: Lab, fusion: Fusion, replays: int, eager: int, controls: int, progress: Progress) -> list[Variant]:
    def row(mode: str, streams: str, control: str | None = None) -> Row:
        return Row(mode, streams, fusion, control)

    plans: list[Callable[[], Variant]] = [
        lambda: lab.eager(row("eager", "one"), eager, aux=False),
        lambda: lab.captured(row("graph", "one"), replays, aux=False),
        lambda: lab.eager(row("eager", "aux"), eager, aux=True),
        lambda: lab.captured(row("graph", "aux"), replays, aux=True),
        lambda: lab.captured(row("graph", "aux", "fork wait"), controls, aux=True, fault="fork wait"),
        lambda: lab.captured(row("graph", "aux", "join wait"), controls, aux=True, fault="join wait"),
        lambda: lab.captured(row("graph", "aux", "lifetime"), controls, aux=True, unsafe=True),
    ]
    task = progress.add_task(f"capturing and proving, {_SAYS[fusion]}", total=len(plans))
    variants: list[Variant] = []
    for plan in plans:
        variants.append(plan())
        progress.advance(task)
    return variants


_SAYS = {"unfused": "unfused", "caller": "fused on the caller", "everywhere": "fused everywhere"}


def _table(rows: Sequence[Row], fusion: str, reference: str) -> Table:
    title = f"{fusion}: bits of logits and caches, compared with one stream, {reference}"
    table = Table(title=title, title_justify="left")
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
        name = f"{_SAYS[row.fusion]}, {row.mode}, {row.streams}" + (f", without {row.control}" if row.control else "")
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
