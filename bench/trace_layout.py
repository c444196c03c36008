"""Where things go in the picture of a trace: lanes as rows, time to the right, long replays in several bands.

Enters: a graph's typical replay, and that of the same work on one stream if there is one. Leaves: a `Layout`: boxes
for kernels, stretches for regions and overlap, links for waits between lanes, no drawing. Invariant: one scale holds
for all bands and rows, so that lengths can be compared by eye; what crosses the end of a band is cut in two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ..capture.report import short
from .trace_intervals import Interval
from .trace_match import Replay, Traced
from .trace_plan import Plan, Work
from .trace_regions import overlaps

WIDTH: Final = 1320.0
"""Of a band, without the margins."""
SERIAL_ROW: Final = "one stream"
_LEGIBLE: Final = 9.0  # a kernel of usual length should be so wide
_MOST_BANDS: Final = 10
_APART: Final = 1.0  # stretches of overlap closer than this, in pixels, are drawn as one


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of time within one band: x counts from the band's left end."""

    band: int
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Box:
    """One kernel on a row, or a part of one."""

    piece: Piece
    row: int
    region: str | None
    label: str
    hover: str


@dataclass(frozen=True, slots=True)
class Stretch:
    """A region on a row, from its first kernel to its last."""

    piece: Piece
    row: int
    region: str


@dataclass(frozen=True, slots=True)
class Link:
    """A wait between two lanes: from the end of one kernel to the start of another, in the same band."""

    band: int
    source: tuple[float, int]
    target: tuple[float, int]


@dataclass(frozen=True)
class Layout:
    """Everything with its place. `rows`: of each band, from the top. `us`: microseconds of a band. `hidden_us`: how
    much of the end is not drawn."""

    rows: tuple[str, ...]
    us: float
    bands: int
    hidden_us: float
    step: float
    boxes: list[Box] = field(default_factory=list[Box])
    stretches: list[Stretch] = field(default_factory=list[Stretch])
    overlaps: list[Piece] = field(default_factory=list[Piece])
    saved: list[Piece] = field(default_factory=list[Piece])
    links: list[Link] = field(default_factory=list[Link])

    @property
    def scale(self) -> float:
        """Pixels of a microsecond."""
        return WIDTH / self.us

    def place(self, us: float) -> tuple[int, float]:
        """Band and x of a moment."""
        band = min(int(us // self.us), self.bands - 1)
        return band, (us - band * self.us) * self.scale

    def pieces(self, start: float, end: float) -> Iterator[Piece]:
        """What is drawn of a stretch, band by band."""
        for band in range(int(start // self.us), min(int(end // self.us), self.bands - 1) + 1):
            left, right = max(start, band * self.us), min(end, (band + 1) * self.us)
            if right > left:
                yield Piece(band, (left - band * self.us) * self.scale, (right - left) * self.scale)

    def ticks(self) -> Iterator[tuple[int, float, float]]:
        """Band, x and microseconds of each mark of the axes."""
        for band in range(self.bands):
            first = math.ceil(band * self.us / self.step - 1e-9)
            last = math.floor((band + 1) * self.us / self.step + 1e-9)
            for number in range(first, last + 1):
                us = number * self.step
                yield band, (us - band * self.us) * self.scale, us


def lay_out(traced: Traced, serial: Traced | None) -> Layout:
    """Place a graph's typical replay, under that of one stream."""
    replay = traced.typical
    alone = None if serial is None else serial.typical
    whole = max(replay.span, 0.0 if alone is None else alone.span)
    lengths = [kernel.end - kernel.start for kernel in replay.kernels]
    us, bands = _bands(whole, statistics.median(lengths))
    rows = (*(() if serial is None else (SERIAL_ROW,)), *traced.plan.lanes)
    layout = Layout(rows, us, bands, max(0.0, whole - us * bands), _step(us))
    if serial is not None and alone is not None:
        _fill(layout, serial.plan, alone, dict.fromkeys(serial.plan.lanes, 0))
        if alone.span > replay.span:
            layout.saved.extend(layout.pieces(replay.span, alone.span))
    first = len(rows) - len(traced.plan.lanes)
    places = {lane: first + number for number, lane in enumerate(traced.plan.lanes)}
    _fill(layout, traced.plan, replay, places)
    shaded = [(a - replay.start, b - replay.start) for a, b in overlaps(traced.plan, replay)]
    for start, end in _joined(shaded, _APART / layout.scale):
        layout.overlaps.extend(layout.pieces(start, end))
    _link(layout, traced.plan, replay, places)
    return layout


def _fill(layout: Layout, plan: Plan, replay: Replay, rows: dict[str, int]) -> None:
    zero = replay.start
    for work, kernel in zip(plan.works, replay.kernels, strict=True):
        start, end = kernel.start - zero, kernel.end - zero
        hover = (
            f"{work.op}: {end - start:,.2f} us, from {start:,.2f}\n{work.kernel}\non {work.lane}"
            + (f", region {work.region}" if work.region else "")
            + f"; stream {kernel.stream} of this replay\n{work.line or 'no line known'}"
        )
        for piece in layout.pieces(start, end):
            layout.boxes.append(Box(piece, rows[work.lane], work.region, label_of(work), hover))
    for region, works in plan.regions.items():
        times = replay.times(works)
        start, end = min(start for start, _ in times) - zero, max(end for _, end in times) - zero
        row = rows[plan.works[works[0]].lane]
        layout.stretches.extend(Stretch(piece, row, region) for piece in layout.pieces(start, end))


def _link(layout: Layout, plan: Plan, replay: Replay, rows: dict[str, int]) -> None:
    for number, waits in enumerate(plan.before):
        target, row = replay.kernels[number], rows[plan.works[number].lane]
        for earlier in waits:
            source, other = replay.kernels[earlier], rows[plan.works[earlier].lane]
            here, there = layout.place(source.end - replay.start), layout.place(target.start - replay.start)
            if row != other and here[0] == there[0] and there[1] <= WIDTH:
                layout.links.append(Link(here[0], (here[1], other), (there[1], row)))


def label_of(work: Work) -> str:
    """An op's name without its namespace and overload."""
    return short(work.op).rpartition("::")[2].rpartition(".")[2]


def _joined(intervals: Iterable[Interval], gap: float) -> list[Interval]:
    found: list[Interval] = []
    for start, end in intervals:
        if found and start - found[-1][1] < gap:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _bands(whole: float, usual: float) -> tuple[float, int]:
    """Microseconds of a band, and how many bands: few, but kernels legible."""
    wanted = max(WIDTH * max(usual, 1e-3) / _LEGIBLE, 1e-3)
    number = max(1, math.ceil(whole / wanted))
    if number == 1:
        return max(whole * 1.01, 1e-3), 1
    if number <= _MOST_BANDS:
        return whole / number * 1.002, number
    return wanted, _MOST_BANDS


def _step(us: float) -> float:
    """Between marks of an axis: a round number, about twelve to a band."""
    rough = us / 12
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def spread(places: Sequence[tuple[float, float]], gap: float) -> list[bool]:
    """Of texts on one line, as (start, width) from left to right, those that meet none before them."""
    shown: list[bool] = []
    free = -math.inf
    for start, width in places:
        fits = start >= free
        shown.append(fits)
        if fits:
            free = start + width + gap
    return shown
