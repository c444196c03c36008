"""What `trace` leaves in its folder, and prints.

Enters: graphs with their matched replays. Leaves: for each a picture, `NNN-name.svg`; all of them in `perfetto.json`
and, as figures, in `regions.json`; and a table on the console. Invariant: all of these are of the same replays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from .bench.harness import Figure, machine
from .bench.trace_match import Traced
from .bench.trace_perfetto import perfetto
from .bench.trace_picture import Scene, cells, columns, draw
from .bench.trace_regions import Figures, figures_of

SCHEMA: Final = 1
"""Version of `regions.json`; it changes when a key changes its meaning or goes away."""
_MOST_ROWS: Final = 40


@dataclass(frozen=True)
class Entry:
    """One graph that was traced. `serial`: the same work on one stream. `unprofiled`: microseconds a replay without a
    profiler, by variant."""

    name: str
    traced: Traced
    serial: Traced | None = None
    unprofiled: dict[str, Figure] = field(default_factory=dict[str, Figure])


def write_all(folder: Path, entries: Sequence[Entry], console: Console) -> None:
    """Write the files and print the tables. The folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs: dict[str, Traced] = {}
    documents: list[dict[str, Any]] = []
    for number, entry in enumerate(entries, 1):
        figures = figures_of(entry.traced, entry.serial)
        scene = Scene(entry.name, _where(entry), entry.traced, entry.serial, figures)
        stem = re.sub(r"[^\w.-]+", "_", entry.name)[:80]
        (folder / f"{number:03d}-{stem}.svg").write_text(draw(scene))
        title = entry.name if len(entries) == 1 else f"{number}: {entry.name}"
        graphs[title] = entry.traced
        if entry.serial is not None:
            graphs[f"{title}, one stream"] = entry.serial
        documents.append(_document(entry, figures))
        for part in _shown(entry, figures):
            console.print(part)
    (folder / "perfetto.json").write_text(json.dumps(perfetto(graphs)) + "\n")
    document = {"schema": SCHEMA, "machine": machine(), "graphs": documents}
    (folder / "regions.json").write_text(json.dumps(document, indent=1) + "\n")
    pictures = f"{len(entries)} picture{'s' * (len(entries) != 1)} (.svg)"
    console.print(f"in {folder}: {pictures}, perfetto.json (open it at ui.perfetto.dev), regions.json")


def _where(entry: Entry) -> str:
    """The card, and what was done on it."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    count = len(entry.traced.replays)
    said = f"{card}, torch {torch.__version__}; drawn: the replay of median length of {count}, under the profiler"
    if entry.unprofiled:
        times = (f"{name} {value.median:,.1f} us" for name, value in entry.unprofiled.items())
        said += f"; without it: {', '.join(times)}"
    return said


def _shown(entry: Entry, figures: Figures) -> Iterator[Table | str]:
    whole, both = figures.span.median, figures.overlapped.median
    head = f"{entry.name}: {figures.kernels:,} kernels, {whole:,.1f} us a replay under the profiler"
    if figures.serial is not None:
        head += f", {figures.serial.median:,.1f} on one stream"
    yield f"{head}; two lanes or more at once for {both:,.1f} us ({both / whole:.0%})"
    if entry.unprofiled:
        yield "without a profiler: " + ", ".join(f"{name} {value}" for name, value in entry.unprofiled.items())
    if entry.traced.lost:
        first = str(entry.traced.lost[0]).replace("\n", "\n  ")
        yield f"{len(entry.traced.lost)} replays could not be matched and are left out; the first:\n  {first}"
    if figures.regions:
        yield _table(figures)
    else:
        yield "no region, and one stream: nothing runs beside anything"


def _table(figures: Figures) -> Table:
    shown = columns(figures)
    table = Table(caption=None if figures.serial else "saved, and paid: known only beside the same work on one stream")
    table.add_column("region", overflow="fold")
    table.add_column("lane", no_wrap=True)
    for heading in (*shown, "kernels", "streams"):
        table.add_column(heading, justify="right", no_wrap=True)
    for region in figures.regions[:_MOST_ROWS]:
        streams = ", ".join(map(str, region.streams))
        table.add_row(region.name, region.lane, *(cells(region)[text] for text in shown), f"{region.kernels}", streams)
    if len(figures.regions) > _MOST_ROWS:
        table.add_row(f"and {len(figures.regions) - _MOST_ROWS} more, in regions.json")
    return table


def _document(entry: Entry, figures: Figures) -> dict[str, Any]:
    """Everything in plain values; times in microseconds."""
    return {
        "name": entry.name,
        "kernels": figures.kernels,
        "lanes": list(entry.traced.plan.lanes),
        "replays": figures.replays,
        "replays lost": [str(error) for error in entry.traced.lost],
        "matched by": sorted({replay.how for replay in entry.traced.replays}),
        "span": asdict(figures.span),
        "overlapped": asdict(figures.overlapped),
        "span on one stream": None if figures.serial is None else asdict(figures.serial),
        "saved": figures.saved,
        "without a profiler": {name: asdict(value) for name, value in entry.unprofiled.items()},
        "regions": [{**asdict(region), "overlap share": region.share} for region in figures.regions],
    }
