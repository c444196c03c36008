"""A trace as a picture: lanes as rows, time to the right, regions coloured, overlap shaded. SVG, and nothing else.

Enters: a graph's replays and figures, the same on one stream where there is that. Leaves: SVG text, the same for the
same replays; it brings its own background. Invariant: lengths are to scale; texts do not overlap, and what does not fit
shows when the pointer rests on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..capture.picture import COLOURS, PLAIN, pattern_of, text_of
from ..capture.picture_layout import shortened
from .trace_layout import SERIAL_ROW, WIDTH, Box, Layout, Link, Piece, Stretch, lay_out, spread
from .trace_match import Traced
from .trace_regions import Figures, RegionFigures

_LEFT: Final = 112.0
_RIGHT: Final = 28.0
_HEAD: Final = 104.0
_AXIS: Final = 24.0
_BOX: Final = 30.0
_PAD: Final = 8.0  # around a row's boxes
_NOTE: Final = 20.0  # under a row that regions are on
_SERIAL_GAP: Final = 14.0
_BAND_GAP: Final = 22.0
_CHAR: Final = 6.1  # a letter of 10 pixels
_BIG_CHAR: Final = 7.3  # of 12
_MOST_ROWS: Final = 16
_ALL_WIDTH: Final = _LEFT + WIDTH + _RIGHT

_INK: Final = "#1f2730"
_GREY: Final = "#55606c"
_RULE: Final = "#d5dae0"
_AMBER: Final = ("#ffc933", "#8a5a00")
_GREEN: Final = ("#d9f2df", "#1a7f37")
_STYLE: Final = (
    f"text{{font-family:'DejaVu Sans Mono',Menlo,Consolas,monospace;fill:{_INK}}}"
    ".k{font-size:10px}.a{font-size:10px;fill:#55606c;text-anchor:middle}.t{font-size:12px}.r{font-weight:bold}"
    "g:hover>rect{stroke-width:2.5}"
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn. `name`: of the graph; `where`: the card, and how it was measured."""

    name: str
    where: str
    traced: Traced
    serial: Traced | None
    figures: Figures


def draw(scene: Scene) -> str:
    """The picture."""
    return _Drawing(scene).svg()


class _Drawing:
    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._layout: Layout = lay_out(scene.traced, scene.serial)
        patterns = dict.fromkeys(map(pattern_of, scene.traced.plan.regions))
        self._colours = {pattern: COLOURS[n % len(COLOURS)] for n, pattern in enumerate(patterns)}
        noted = {stretch.row for stretch in self._layout.stretches}
        self._tops: list[float] = []  # of each row's boxes, within a band
        y = _AXIS
        for row, name in enumerate(self._layout.rows):
            self._tops.append(y + _PAD)
            y += 2 * _PAD + _BOX + (_NOTE if row in noted and name != SERIAL_ROW else 0)
            y += _SERIAL_GAP if name == SERIAL_ROW else 0
        self._band = y + _BAND_GAP

    def svg(self) -> str:
        layout = self._layout
        bottom = _HEAD + self._band * layout.bands
        foot, height = self._foot(bottom)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_ALL_WIDTH:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {_ALL_WIDTH:.0f} {height:.0f}">',
            f"<style>{_STYLE}</style>",
            '<defs><pattern id="s" width="8" height="8" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="8" height="8" fill="{_GREEN[0]}"/>'
            f'<path d="M0 0V8" stroke="{_GREEN[1]}" stroke-opacity=".35" stroke-width="2"/></pattern></defs>',
            '<rect width="100%" height="100%" fill="#fcfcfd"/>',
            *self._head(),
            *self._rows(),
            *self._axes(),
            *(self._overlap(piece) for piece in layout.overlaps),
            *(self._saved(piece) for piece in layout.saved),
            *(self._link(link) for link in layout.links),
            *(self._box(box) for box in layout.boxes),
            *self._regions(),
            *self._saying(),
            *foot,
            "</svg>",
        ]
        return "\n".join(part for part in parts if part) + "\n"

    # -- places --------------------------------------------------------------------------------------------------

    def _y(self, band: int, row: int) -> float:
        """The top of a row's boxes."""
        return _HEAD + self._band * band + self._tops[row]

    @property
    def _lanes(self) -> tuple[int, int]:
        """The first and last row that is not of one stream."""
        return int(self._layout.rows[0] == SERIAL_ROW), len(self._layout.rows) - 1

    def _lanes_box(self, piece: Piece) -> str:
        """A rectangle over all lanes of a band, as attributes."""
        first, last = self._lanes
        top = self._y(piece.band, first) - _PAD
        bottom = self._y(piece.band, last) + _BOX + _PAD
        return f'x="{_LEFT + piece.x:.2f}" y="{top:.1f}" width="{piece.width:.2f}" height="{bottom - top:.1f}"'

    def _colour(self, region: str | None) -> tuple[str, str]:
        return self._colours[pattern_of(region)] if region else PLAIN

    # -- parts ---------------------------------------------------------------------------------------------------

    def _head(self) -> Iterator[str]:
        scene, figures = self._scene, self._scene.figures
        yield (
            f'<text x="16" y="30" style="font-size:17px;font-weight:bold">{text_of(shortened(scene.name, 110))}</text>'
        )
        yield f'<text class="t" x="16" y="52" style="fill:{_GREY}">{text_of(shortened(scene.where, 190))}</text>'
        lanes = sum(name != SERIAL_ROW for name in self._layout.rows)
        said = f"{figures.span.median:,.1f} us a replay on {lanes} lane{'s' * (lanes != 1)}"
        spans = [f"<tspan>{said}</tspan>"]
        if figures.serial is not None and figures.saved is not None:
            times = figures.serial.median / figures.span.median
            verb, colour = ("saved", _GREEN[1]) if figures.saved >= 0 else ("lost", "#d0021b")
            spans.append(f"<tspan>, {figures.serial.median:,.1f} us on one stream: </tspan>")
            spans.append(
                f'<tspan style="fill:{colour};font-weight:bold">{abs(figures.saved):,.1f} us {verb} ({times:.2f}x)'
                "</tspan>"
            )
        share = figures.overlapped.median / figures.span.median
        spans.append(
            f'<tspan style="fill:{_AMBER[1]}">; two lanes or more at once for {figures.overlapped.median:,.1f} us '
            f"({share:.0%} of the replay)</tspan>"
        )
        yield f'<text class="t" x="16" y="76" style="font-size:13px">{"".join(spans)}</text>'

    def _rows(self) -> Iterator[str]:
        for band in range(self._layout.bands):
            for row, name in enumerate(self._layout.rows):
                y = self._y(band, row)
                fill, ink = ("#f7f8fa", _GREY) if name == SERIAL_ROW else ("#eef1f5", _INK)
                yield (
                    f'<rect x="0" y="{y - _PAD:.1f}" width="{_ALL_WIDTH:.0f}" height="{_BOX + 2 * _PAD:.1f}" '
                    f'fill="{fill}"/><text class="t r" x="16" y="{y + _BOX / 2 + 4:.1f}" style="fill:{ink}">'
                    f"<title>{text_of(name)}</title>{text_of(shortened(name.removeprefix('stream '), 12))}</text>"
                )

    def _axes(self) -> Iterator[str]:
        top, bottom = self._tops[0] - _PAD, self._tops[-1] + _BOX + _PAD
        for band, x, us in self._layout.ticks():
            y = _HEAD + self._band * band
            yield (
                f'<path d="M{_LEFT + x:.1f} {y + top:.1f}V{y + bottom:.1f}" stroke="{_RULE}"/>'
                f'<text class="a" x="{_LEFT + x:.1f}" y="{y + top - 6:.1f}">{us:,g}{" us" if not us else ""}</text>'
            )

    def _overlap(self, piece: Piece) -> str:
        us = piece.width / self._layout.scale
        return (
            f"<g><title>two lanes or more busy at once for {us:,.2f} us</title><rect {self._lanes_box(piece)} "
            f'fill="{_AMBER[0]}" fill-opacity=".5"/></g>'
        )

    def _saved(self, piece: Piece) -> str:
        return f'<rect {self._lanes_box(piece)} fill="url(#s)" stroke="{_GREEN[1]}" stroke-opacity=".5"/>'

    def _saying(self) -> Iterator[str]:
        """How much was saved, where that is drawn; the widest piece says it."""
        if not self._layout.saved or self._scene.figures.saved is None:
            return
        piece = max(self._layout.saved, key=lambda piece: piece.width)
        label = f"{sum(piece.width for piece in self._layout.saved) / self._layout.scale:,.1f} us saved"
        first, last = self._lanes
        x = _LEFT + piece.x + piece.width / 2
        if piece.width > len(label) * _BIG_CHAR + 8:
            y = (self._y(piece.band, first) + self._y(piece.band, last) + _BOX) / 2 + 4
            yield (
                f'<text class="t r" x="{x:.1f}" y="{y:.1f}" style="fill:{_GREEN[1]};text-anchor:middle">{label}</text>'
            )

    def _link(self, link: Link) -> str:
        (xa, a), (xb, b) = link.source, link.target
        down = b > a
        ya = self._y(link.band, a) + (_BOX if down else 0)
        yb = self._y(link.band, b) + (0 if down else _BOX)
        xa, xb = _LEFT + xa, _LEFT + xb
        middle = (ya + yb) / 2
        return (
            f'<path d="M{xa:.1f} {ya:.1f}C{xa:.1f} {middle:.1f} {xb:.1f} {middle:.1f} {xb:.1f} {yb:.1f}" fill="none" '
            f'stroke="{_GREY}" stroke-opacity=".7" stroke-width="1.3"/>'
        )

    def _box(self, box: Box) -> str:
        x, y, width = _LEFT + box.piece.x, self._y(box.piece.band, box.row), max(box.piece.width, 0.8)
        fill, stroke = self._colour(box.region)
        letters = int((width - 6) / _CHAR)
        label = ""
        if letters >= min(3, len(box.label)):
            shown = text_of(shortened(box.label, letters))
            label = f'<text class="k" x="{x + 3:.2f}" y="{y + _BOX / 2 + 3.5:.1f}">{shown}</text>'
        return (
            f'<g><title>{text_of(box.hover)}</title><rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" '
            f'height="{_BOX:.0f}" rx="{min(2.5, width / 3):.1f}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{1 if width > 3 else 0.4}"/>{label}</g>'
        )

    def _regions(self) -> Iterator[str]:
        """Under its row, each region: how long, and how much of it is hidden."""
        figures = {region.name: region for region in self._scene.figures.regions}
        lines: dict[tuple[int, int], list[Stretch]] = {}
        for stretch in self._layout.stretches:
            if self._layout.rows[stretch.row] != SERIAL_ROW:
                lines.setdefault((stretch.piece.band, stretch.row), []).append(stretch)
        for (band, row), stretches in lines.items():
            stretches.sort(key=lambda stretch: stretch.piece.x)
            y = self._y(band, row) + _BOX + _PAD
            starts = [*(stretch.piece.x for stretch in stretches[1:]), WIDTH]
            texts = [
                _note(figures[stretch.region], max(stretch.piece.width, after - stretch.piece.x - 10))
                for stretch, after in zip(stretches, starts, strict=True)
            ]
            places = [(s.piece.x, len(text) * _CHAR) for s, text in zip(stretches, texts, strict=True)]
            for stretch, text, shown in zip(stretches, texts, spread(places, 8), strict=True):
                _, stroke = self._colour(stretch.region)
                x, width = _LEFT + stretch.piece.x, max(stretch.piece.width, 2)
                yield (
                    f'<path d="M{x:.1f} {y - 1:.1f}v4h{width:.1f}v-4" fill="none" stroke="{stroke}" stroke-width="2"/>'
                )
                if shown and text:
                    yield f'<text class="k" x="{x:.1f}" y="{y + 15:.1f}" style="fill:{stroke}">{text_of(text)}</text>'

    # -- below ---------------------------------------------------------------------------------------------------

    def _foot(self, bottom: float) -> tuple[list[str], float]:
        """Legend and table; and where the picture ends."""
        parts = [f'<path d="M0 {bottom:.0f}H{_ALL_WIDTH:.0f}" stroke="{_RULE}"/>']
        x, y = 16.0, bottom + 24
        for mark, text in self._legend():
            width = 34 + len(text) * _BIG_CHAR + 20
            if x + width > _ALL_WIDTH and x > 16:
                x, y = 16.0, y + 24
            parts.append(
                f'<g transform="translate({x:.1f} {y:.1f})">{mark}'
                f'<text class="t" x="34" y="4">{text_of(text)}</text></g>'
            )
            x += width
        y += 32
        for line, style in self._table():
            parts.append(
                f'<text class="t" x="16" y="{y:.1f}" xml:space="preserve"{f" style={style!r}" if style else ""}>'
                f"{text_of(line)}</text>"
            )
            y += 17
        return parts, y + 4

    def _legend(self) -> Iterator[tuple[str, str]]:
        yield _swatch(*PLAIN), "the caller's work"
        for pattern, colour in self._colours.items():
            yield _swatch(*colour), f"region {shortened(pattern, 60)}"
        yield _swatch(_AMBER[0], "none", ' fill-opacity=".6"'), "overlap: two lanes or more busy at once"
        if self._layout.saved:
            yield _swatch("url(#s)", _GREEN[1]), "saved, against one stream"
        if self._layout.links:
            yield f'<path d="M0 5C12 5 12 -5 24 -5" fill="none" stroke="{_GREY}" stroke-width="1.3"/>', "waits for"

    def _table(self) -> Iterator[tuple[str, str]]:
        regions = self._scene.figures.regions
        if regions:
            width = min(60, max(len(region.name) for region in regions))
            head = columns(self._scene.figures)
            yield f"{'region':{width}}  " + "  ".join(f"{text:>9}" for text in head), "font-weight:bold"
            for region in regions[:_MOST_ROWS]:
                line = "  ".join(f"{cells(region)[text]:>9}" for text in head)
                yield f"{shortened(region.name, width):{width}}  {line}", ""
        if len(regions) > _MOST_ROWS:
            yield f"and {len(regions) - _MOST_ROWS} more regions, in the table", ""
        if self._layout.hidden_us:
            yield f"the last {self._layout.hidden_us:,.0f} us are not drawn; the Perfetto trace has all", ""


def columns(figures: Figures) -> tuple[str, ...]:
    """What a table says of each region; of one stream only where that was measured."""
    shown = ("busy us", "hidden us", "hidden")
    return shown if figures.serial is None else ("alone us", *shown, "saved us", "paid")


def cells(region: RegionFigures) -> dict[str, str]:
    """A region's figures as text, by column."""
    return {
        "alone us": "-" if region.alone is None else f"{region.alone.median:,.1f}",
        "busy us": f"{region.busy.median:,.1f}",
        "hidden us": f"{region.hidden.median:,.1f}",
        "hidden": f"{region.share:.0%}",
        "saved us": "-" if region.saved is None else f"{region.saved:+,.1f}",
        "paid": region.paid,
    }


def _note(region: RegionFigures, width: float) -> str:
    """What stands under a region, as much as fits."""
    figures = f"{region.busy.median:,.1f} us, {region.share:.0%} hidden"
    letters = int(width / _CHAR)
    if letters >= len(figures) + 12:
        return f"{shortened(region.name, letters - len(figures) - 2)}: {figures}"
    return figures if letters >= len(figures) else f"{region.share:.0%}" if letters >= 4 else ""


def _swatch(fill: str, stroke: str, extra: str = "") -> str:
    return f'<rect x="0" y="-8" width="24" height="16" rx="3" fill="{fill}" stroke="{stroke}"{extra}/>'
