"""The tiles that products of few rows may be launched with, from which measuring picks.

Enters: the shapes of a call. Leaves: tiles, the likeliest first. Invariant: every tile computes the same products; sums
may add up differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .products_work import Tile, Work, row_class

_SMS: Final = 132
_SM_BYTES: Final = 200 * 1024
"""Of shared memory that the programs of a multiprocessor have together, at least on the cards these tiles are for."""
_PROGRAM_BYTES: Final = 96 * 1024
_BUSY: Final = 20 * 1024
"""Bytes that each multiprocessor must have asked for to keep memory busy, about."""


def programs(work: Work, tile: Tile) -> int:
    return tile.splits * sum(-(-width // tile.rows) for width in work.widths)


def every(work: Work) -> list[Tile]:
    """All that may be fast."""
    found = list(_one(work) if work.rows == 1 else _few(work))
    return found or [_any(work)]


def _any(work: Work) -> Tile:
    """Where no tile keeps memory busy."""
    if work.rows == 1:
        return Tile(1, 512, 4, ahead=True)
    return Tile(16, 128, 4, 3, max(1, min(8, work.summed // 384)))


def _one(work: Work) -> Iterator[Tile]:
    """Of 16 bytes per thread and load, or twice that; as many loads in flight as there are registers for."""
    wide = 16 // work.x.element_size()
    for warps in (1, 2, 4, 8):
        for rows in (1, 2, 4, 8):
            for each in (1, 2):
                cols = each * wide * 32 * warps // rows
                held = each * -(-work.summed // cols) * (2 if work.activation is not None else 1)
                tile = Tile(rows, cols, warps, ahead=True)
                if 16 * wide <= cols and 4 <= held <= 36 and programs(work, tile) >= min(_SMS, sum(work.widths)):
                    yield tile
                    if each == 1 and held >= 16:
                        yield Tile(rows, cols, warps)


def _few(work: Work) -> Iterator[Tile]:
    """As many programs as there are multiprocessors, or sums in parts, so that each has enough asked for."""
    shapes = [(16, 128), (16, 256), (32, 64), (32, 128), (32, 256), (64, 64), (64, 128)]
    item, tokens = work.x.element_size(), row_class(work.rows)
    for rows, cols in shapes:
        for stages in (3, 4, 6):
            for splits in (1, 2, 3, 4, 6, 8):
                tile = Tile(rows, cols, 4, stages, splits)
                asked = rows * cols * item * (stages - 1)
                held = asked + tokens * cols * item * (stages - 1)
                if held > _PROGRAM_BYTES or work.summed < splits * cols * stages:
                    continue
                count = programs(work, tile)
                resident = min(_SM_BYTES // held, -(-count // _SMS))
                fits = 110 <= count <= 4 * _SMS or (splits == 1 and count > 110)
                if fits and resident * asked >= 2 * _BUSY:
                    yield tile


def likely(work: Work) -> list[Tile]:
    """The few that are worth measuring, the likeliest first."""
    found, known = every(work), _LIKELY_ONE if work.rows == 1 else _LIKELY_FEW
    return [tile for tile in known if tile in found] or found[: len(known)]


_LIKELY_ONE: Final = (
    Tile(2, 1024, 4, ahead=True),
    Tile(2, 2048, 8, ahead=True),
    Tile(1, 256, 1),
    Tile(1, 512, 2, ahead=True),
)
_LIKELY_FEW: Final = (
    Tile(32, 128, 4, 4),
    Tile(32, 128, 4, 6),
    Tile(32, 64, 4, 6, 4),
    Tile(32, 128, 4, 3, 4),
)
"""At most 1.7% slower than the fastest of all where that is faster than cuBLAS (docs/evidence/products.json)."""
