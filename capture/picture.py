"""A report as a picture: streams as rows, time to the right, waits as arrows, races in red. SVG, and nothing else.

Enters: a `Report`. Leaves: SVG text, the same for the same report; it brings its own background. Invariant: every race
of the report is drawn, and listed below by number as far as the list goes; texts do not overlap. What does not fit
shows when the pointer rests on it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Final

from .picture_layout import BAND_WIDTH, CHAR, SMALL_CHAR, Item, lay_out, shortened, summary
from .report import MOST_SHOWN, Report

_LEFT: Final = 96.0  # for the lanes' names
_RIGHT: Final = 34.0
_HEAD: Final = 64.0
_ROW: Final = 96.0  # from lane to lane
_ABOVE: Final = 48.0  # of a band's first lane
_BELOW: Final = 34.0
_HALF: Final = 17.0  # a box's height
_DOT: Final = 4.5
_LINE: Final = 15.0
_CELL: Final = 64.0
_NAME_CHARS: Final = 11

PLAIN: Final = ("#e9edf2", "#8593a3")
COLOURS: Final = (
    ("#cfe5ff", "#2f74c0"),
    ("#ffe2b8", "#b5761a"),
    ("#d8f0d0", "#4a8f35"),
    ("#ead9f7", "#8352ab"),
    ("#c9efee", "#24898a"),
    ("#f9d7e6", "#b04a7c"),
    ("#ece7b4", "#857a1c"),
    ("#dcdcf8", "#5a5ac0"),
)
_RED: Final = "#d0021b"
_GREEN: Final = "#1a7f37"
_GREY: Final = "#55606c"
_STYLE: Final = (
    "text{font-family:'DejaVu Sans Mono',Menlo,Consolas,monospace;fill:#1f2730}"
    ".l{font-size:11px;text-anchor:middle}.n{font-size:9px;text-anchor:middle}.t{font-size:11px}"
    "g:hover>rect,g:hover>path{stroke-width:4}"
)

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def draw(report: Report, name: str = "graph") -> str:
    """The picture of one report."""
    return _Drawing(report).svg(name)


@dataclass(slots=True)
class _Taken:
    """Where boxes and text stand already, in a picture of some width; kept by cells, for pictures of thousands."""

    right: float
    cells: dict[tuple[int, int], list[Rectangle]] = field(default_factory=dict)

    def add(self, centre: Point, width: float, height: float) -> Rectangle | None:
        """Take a place; None, and nothing taken, where it meets another or leaves the picture."""
        (x, y), across, up = centre, width / 2, height / 2
        mine = (x - across, y - up, x + across, y + up)
        columns, rows = (range(int(mine[i] // _CELL), int(mine[i + 2] // _CELL) + 1) for i in (0, 1))
        cells = [self.cells.setdefault((column, row), []) for column in columns for row in rows]
        if mine[0] < 2 or mine[2] > self.right - 2 or any(_meet(mine, other) for cell in cells for other in cell):
            return None
        for cell in cells:
            cell.append(mine)
        return mine

    def take(self, width: float, height: float, centres: Iterable[Point]) -> Point | None:
        """The first of `centres` where a text of that size fits."""
        return next((centre for centre in centres if self.add(centre, width, height)), None)


class _Drawing:
    def __init__(self, report: Report) -> None:
        self._report = report
        self._layout = lay_out(report)
        self._racing = {party.node for race in report.races for party in (race.first, race.second)}
        self._lines: list[str] = []
        self._marks: list[str] = []
        patterns = dict.fromkeys(pattern_of(node.region) for node in report.nodes if node.region)
        self._colours = {pattern: COLOURS[n % len(COLOURS)] for n, pattern in enumerate(patterns)}
        # Lane -> height of its middle, per band; a band shows the lanes that something happens on.
        self._rows: list[dict[int, float]] = []
        top = _HEAD
        for band in range(max((item.band for item in self._layout.items), default=-1) + 1):
            lanes = sorted({item.lane for item in self._layout.items if item.band == band})
            self._rows.append({lane: top + _ABOVE + _ROW * n for n, lane in enumerate(lanes)})
            top += _ABOVE + _ROW * (len(lanes) - 1) + _BELOW
        self._bottom = top
        self._right = _LEFT + max((item.x + item.width for item in self._layout.items), default=0.0)
        self._width = max(self._right + _RIGHT, 760.0)
        self._taken = _Taken(self._width)

    def svg(self, name: str) -> str:
        """All of it, back to front."""
        items, layout = self._layout.items, self._layout
        for item in items:
            if item.kind != "event":
                self._taken.add(self._middle(item), item.width, 2 * _HALF)
        lanes = [self._lane(lane, y) for rows in self._rows for lane, y in rows.items()]
        for a, b in layout.links:
            self._link(items[a], items[b])
        races = [self._race(items[c.first], items[c.second], c.races) for c in layout.conflicts]
        waits = [self._wait(items[a.source], items[a.target], a.label) for a in layout.arrows]
        foot, height = self._foot()
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self._width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {self._width:.0f} {height:.0f}">',
            f"<style>{_STYLE}</style>",
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" fill="{_GREY}"/></marker></defs>',
            '<rect width="100%" height="100%" fill="#fcfcfd"/>',
            *self._title(name),
            *lanes,
            *self._lines,
            *waits,
            *races,
            *(self._item(item) for item in items),
            *self._marks,
            *foot,
            "</svg>",
        ]
        return "\n".join(part for part in parts if part) + "\n"

    # -- places --------------------------------------------------------------------------------------------------

    def _middle(self, item: Item) -> Point:
        return _LEFT + item.x + item.width / 2, self._rows[item.band][item.lane]

    def _colour(self, region: str | None) -> tuple[str, str]:
        return self._colours[pattern_of(region)] if region else PLAIN

    # -- parts ---------------------------------------------------------------------------------------------------

    def _title(self, name: str) -> list[str]:
        report = self._report
        verdict = report.verdict if report.ok else f"not proved: {report.verdict}"
        streams = f"{len(self._layout.lanes)} stream{'s' * (len(self._layout.lanes) != 1)}"
        return [
            f'<text x="16" y="26" style="font-size:15px;font-weight:bold">{text_of(shortened(name, 70))}</text>',
            f'<text class="t" x="16" y="46"><tspan>{text_of(report.size)}, {streams}: </tspan>'
            f'<tspan style="font-weight:bold;fill:{_GREEN if report.ok else _RED}">{text_of(verdict)}</tspan></text>',
        ]

    def _lane(self, lane: int, y: float) -> str:
        name = self._layout.lanes[lane]
        shown = name.removeprefix("stream ")  # of a long handle, the end tells more
        shown = shown if len(shown) <= _NAME_CHARS else f"…{shown[1 - _NAME_CHARS :]}"
        return (
            f'<rect x="0" y="{y - _HALF - 7:.0f}" width="{self._width:.0f}" height="{2 * _HALF + 14:.0f}" '
            f'fill="#f0f2f5"/><g><title>stream {text_of(name)}</title><text class="t" x="16" y="{y + 4:.0f}" '
            f'style="font-weight:bold">{text_of(shown)}</text></g>'
        )

    def _link(self, a: Item, b: Item) -> None:
        if a.band == b.band:
            ends = [(self._middle(a), self._middle(b))]
        else:
            (xa, ya), (xb, yb) = self._middle(a), self._middle(b)
            ends = [((xa, ya), (_LEFT + BAND_WIDTH, ya)), ((_LEFT - 8, yb), (xb, yb))]
        for (xa, ya), (xb, _) in ends:
            self._lines.append(f'<path d="M{xa:.1f} {ya:.1f}H{xb:.1f}" stroke="#a9b4c0" stroke-width="2"/>')

    def _item(self, item: Item) -> str:
        x, y = self._middle(item)
        nodes = [self._report.nodes[number] for number in item.nodes]
        first = nodes[0]
        where = f"{first.stream}, region {first.region}" if first.region else first.stream
        if item.kind == "event":
            return (
                f'<g><title>{text_of(str(first))} (on {text_of(where)})</title><circle cx="{x:.1f}" cy="{y:.1f}" '
                f'r="{_DOT}" fill="#fff" stroke="{_GREY}" stroke-width="2"/></g>'
            )
        fill, stroke = self._colour(first.region)
        hover = f"{first}\non {where}\n{first.line or 'no line known'}\nnode {item.nodes[0]}"
        extra = ""
        if item.kind == "run":
            hover = f"{item.label} on {where}: {summary(nodes)}\nfrom {first.line}\nto {nodes[-1].line}"
            extra = ' stroke-dasharray="4 3"'
        if item.nodes[0] in self._racing:
            stroke, extra = _RED, ' stroke-width="2.5"'
        note = f'<text class="n" x="{x:.1f}" y="{y + 12:.1f}">{text_of(item.note)}</text>' if item.note else ""
        return (
            f'<g><title>{text_of(hover)}</title><rect x="{x - item.width / 2:.1f}" y="{y - _HALF:.1f}" '
            f'width="{item.width:.1f}" height="{2 * _HALF:.0f}" rx="4" fill="{fill}" stroke="{stroke}"{extra}/>'
            f'<text class="l" x="{x:.1f}" y="{y + (-1 if item.note else 4):.1f}">{text_of(item.label)}</text>{note}</g>'
        )

    def _wait(self, a: Item, b: Item, label: str) -> str:
        lanes = self._layout.lanes
        hover = f"{lanes[b.lane]} waits for {lanes[a.lane]}: {label or 'an edge of the graph'}"
        curves = self._curves(a, b, at_ends=True)
        shown = label.partition(" ")[0]
        width = len(shown) * SMALL_CHAR + 4
        for curve in curves if shown else ():
            spots = [(x + side * (width / 2 + 5), y) for x, y in _along(curve) for side in (1, -1)]
            spot = self._taken.take(width, 13, spots)
            if spot is not None:
                x, y = spot
                self._marks.append(f'<text class="n" x="{x:.1f}" y="{y + 3:.1f}">{text_of(shown)}</text>')
        paths = "".join(
            f'<path d="{_path(curve)}" fill="none" stroke="{_GREY}" stroke-width="1.6" marker-end="url(#a)"/>'
            for curve in curves
        )
        return f"<g><title>{text_of(hover)}</title>{paths}</g>"

    def _race(self, a: Item, b: Item, races: tuple[int, ...]) -> str:
        hover = "\n".join(self._report.races[number].headline for number in races[:4])
        label = _numbered(races)
        curves = self._curves(a, b, at_ends=False)
        width = len(label) * SMALL_CHAR + 12
        for curve in curves:
            spots = _along(curve)
            spots += [(x + step * 16, y) for step in (1, -1, 2, -2, 3, -3, 4, -4, 6, -6) for x, y in spots[:3]]
            spot = self._taken.take(width, 17, spots)
            if spot is not None:
                x, y = spot
                self._marks.append(
                    f'<g><title>{text_of(hover)}</title><rect x="{x - width / 2:.1f}" y="{y - 8:.1f}" '
                    f'width="{width:.1f}" height="16" rx="8" fill="{_RED}"/><text class="n" x="{x:.1f}" '
                    f'y="{y + 3:.1f}" style="fill:#fff;font-weight:bold">{label}</text></g>'
                )
        paths = "".join(
            f'<path d="{_path(curve)}" fill="none" stroke="{_RED}" stroke-width="3.5"/>' for curve in curves
        )
        return f"<g><title>{text_of(hover)}</title>{paths}</g>"

    def _curves(self, a: Item, b: Item, *, at_ends: bool) -> list[tuple[Point, Point]]:
        """From item to item; between bands, a stub at each. `at_ends`: from the one's end to the other's start."""
        (xa, ya), (xb, yb) = self._middle(a), self._middle(b)
        if at_ends:
            xa += max(a.width / 2 - 8, 0)
            xb -= max(b.width / 2 - 8, 0)
        half_a, half_b = (_DOT + 1 if item.kind == "event" else _HALF for item in (a, b))
        down = 1 if a.lane < b.lane else -1
        if a.band != b.band:
            start, end = (xa, ya + down * half_a), (xb, yb - down * half_b)
            return [(start, (xa + 24, ya + down * 40)), ((xb - 24, yb - down * 40), end)]
        if a.lane == b.lane:
            return [((xa, ya - half_a), (xb, yb - half_b))]
        return [((xa, ya + down * half_a), (xb, yb - down * half_b))]

    def _foot(self) -> tuple[list[str], float]:
        """Legend and lists; and where the picture ends."""
        y = self._bottom + 6
        parts = [f'<path d="M0 {y:.0f}H{self._width:.0f}" stroke="#d5dae0"/>']
        x, y = 16.0, y + 22
        swatches: list[tuple[str, str]] = [(_swatch(*PLAIN), "no region")]
        swatches += [(_swatch(*colour), f"region {pattern}") for pattern, colour in self._colours.items()]
        if any(item.kind == "event" for item in self._layout.items):
            swatches.append(
                (f'<circle cx="11" cy="0" r="{_DOT}" fill="#fff" stroke="{_GREY}" stroke-width="2"/>', "event")
            )
        swatches.append(
            (f'<path d="M0 0H22" stroke="{_GREY}" stroke-width="1.6" marker-end="url(#a)"/>', "is waited for by")
        )
        if any(item.kind == "run" for item in self._layout.items):
            swatches.append((_swatch(*PLAIN, ' stroke-dasharray="4 3"'), "several in one box"))
        if self._report.races:
            swatches.append((f'<path d="M0 0H22" stroke="{_RED}" stroke-width="3.5"/>', "race: no order between them"))
        for mark, text in swatches:
            width = 30 + len(text) * CHAR + 22
            if x + width > self._width and x > 16:
                x, y = 16.0, y + 22
            parts.append(
                f'<g transform="translate({x:.1f} {y:.1f})">{mark}'
                f'<text class="t" x="30" y="4">{text_of(text)}</text></g>'
            )
            x += width
        y += 26
        for colour, line in self._listed():
            parts.append(
                f'<text class="t" x="16" y="{y:.1f}" xml:space="preserve" style="fill:{colour}">{text_of(line)}</text>'
            )
            y += _LINE
        return parts, y + 6

    def _listed(self) -> list[tuple[str, str]]:
        columns = int((self._width - 32) / CHAR)
        report = self._report
        texts = [(_RED, f"race {number}: ", race.headline) for number, race in enumerate(report.races, 1)]
        rest = len(texts) - MOST_SHOWN
        texts = texts[:MOST_SHOWN]
        if rest > 0:
            texts.append((_RED, "", f"and {rest:,} more races, in the report"))
        texts += [(_RED, "unattributed: ", item) for item in report.unattributed[:MOST_SHOWN]]
        if report.assumptions:
            texts.append((_GREY, "", f"assumptions, listed in the report: {len(report.assumptions)}"))
        return [
            (colour, line)
            for colour, head, text in texts
            for line in textwrap.wrap(text, columns, initial_indent=head, subsequent_indent=" " * len(head))
        ]


def _swatch(fill: str, stroke: str, extra: str = "") -> str:
    return f'<rect x="0" y="-7" width="22" height="14" rx="3" fill="{fill}" stroke="{stroke}"{extra}/>'


def pattern_of(region: str | None) -> str:
    """Regions that differ in numbers alone share a colour."""
    return re.sub(r"\d+", "*", region or "")


def _numbered(races: tuple[int, ...]) -> str:
    """Races by the numbers of the list."""
    first, last = races[0] + 1, races[-1] + 1
    if len(races) == 1:
        return f"race {first}"
    joined = f"{first}-{last}" if last - first == len(races) - 1 else f"{first}+{len(races) - 1}"
    return f"races {joined}"


def _meet(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _controls(curve: tuple[Point, Point]) -> tuple[Point, Point, Point, Point]:
    (xa, ya), (xb, yb) = curve
    if ya == yb:
        return (xa, ya), (xa, ya - 36), (xb, yb - 36), (xb, yb)
    middle = (ya + yb) / 2
    return (xa, ya), (xa, middle), (xb, middle), (xb, yb)


def _path(curve: tuple[Point, Point]) -> str:
    a, b, c, d = _controls(curve)
    return f"M{a[0]:.1f} {a[1]:.1f}C{b[0]:.1f} {b[1]:.1f} {c[0]:.1f} {c[1]:.1f} {d[0]:.1f} {d[1]:.1f}"


def _along(curve: tuple[Point, Point]) -> list[Point]:
    """Points of a curve, its middle first."""
    a, b, c, d = _controls(curve)
    points: list[Point] = []
    for t in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8):
        s = 1 - t
        weights = (s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t)
        x, y = (sum(w * p[axis] for w, p in zip(weights, (a, b, c, d), strict=True)) for axis in (0, 1))
        points.append((x, y))
    return points


def text_of(text: str) -> str:
    """Text for SVG, which holds no control characters."""
    return escape(re.sub(r"[^\n\t\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text), quote=False)
