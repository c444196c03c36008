"""Strided bytes: what a tensor covers, exactly, without listing every run.

Enters: `Extent`s, runs of bytes repeated at fixed strides. Leaves: their spans; and a `Quotient`, the bytes of a range
sorted into classes that the same extents cover. Whatever is asked of bytes one by one (who touched this byte, in which
order) has one answer per class, so two thousand interleaved rows cost as much as two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]
Bytes: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of `length` bytes at `start`, repeated `count` times every `stride` bytes for each (stride, count) of
    `repeats`, smallest stride first. Nothing, if `length` is 0."""

    start: int
    length: int
    repeats: tuple[tuple[int, int], ...] = ()

    @property
    def stop(self) -> int:
        """The end of the last run: [start, stop) is the hull."""
        return self.start + self.length + sum(stride * (count - 1) for stride, count in self.repeats)

    @property
    def runs(self) -> int:
        """How many runs there are, which may overlap."""
        runs = 1
        for _, count in self.repeats:
            runs *= count
        return runs

    def covers(self, byte: int) -> bool:
        """Whether the byte lies in one of the runs."""
        return self.start <= byte < self.stop and _reaches(byte - self.start, self.length, self.repeats)

    def spans(self) -> tuple[Span, ...]:
        """The same bytes as disjoint spans that do not touch, sorted."""
        starts, stops = _merged(self)
        return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def strided(start: int, item: int, size: Sequence[int], stride: Sequence[int]) -> Extent:
    """The bytes of a tensor whose first element lies at `start`; `stride` is in elements of `item` bytes."""
    if 0 in size:
        return Extent(start, 0)
    dims = sorted((step * item, count) for count, step in zip(size, stride, strict=True) if count > 1 and step)
    length = item
    repeats: list[tuple[int, int]] = []
    for step, count in dims:
        if not repeats and step <= length:
            length += step * (count - 1)  # continues the run so far
        elif repeats and step == repeats[-1][0] * repeats[-1][1]:
            repeats[-1] = (repeats[-1][0], repeats[-1][1] * count)  # continues the repetition so far
        else:
            repeats.append((step, count))
    return Extent(start, length, tuple(repeats))


def _reaches(offset: int, length: int, repeats: tuple[tuple[int, int], ...]) -> bool:
    if not repeats:
        return offset < length
    inner = repeats[:-1]
    stride, count = repeats[-1]
    reach = length + sum(step * (times - 1) for step, times in inner)
    index = min(offset // stride, count - 1)
    while index >= 0 and offset - index * stride < reach:
        if _reaches(offset - index * stride, length, inner):
            return True
        index -= 1
    return False


def _merged(extent: Extent) -> tuple[Bytes, Bytes]:
    """Starts and stops of the extent's spans, sorted, disjoint, not touching."""
    if not extent.length:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts = np.array([extent.start], np.int64)
    for stride, count in extent.repeats:
        starts = (np.arange(count, dtype=np.int64)[:, None] * stride + starts).reshape(-1)
    if any(step * times > stride for (step, times), (stride, _) in pairwise(extent.repeats)):
        starts.sort()  # repetitions that reach into each other
    apart = starts[1:] > starts[:-1] + extent.length
    return starts[np.r_[True, apart]], starts[np.r_[apart, True]] + extent.length


def _clipped(starts: Bytes, stops: Bytes, start: int, stop: int) -> tuple[Bytes, Bytes]:
    inside = (starts < stop) & (stops > start)
    return np.maximum(starts[inside], start), np.minimum(stops[inside], stop)


@dataclass(frozen=True, slots=True)
class Quotient:
    """The bytes of a range by which extents cover them.

    Attributes:
        covered: per extent, the classes it covers, in increasing order.
        sizes: per class, its number of bytes.
        first, last: per class, its lowest byte, and its highest.
    """

    covered: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]


def quotient(extents: Sequence[Extent], start: int, stop: int) -> Quotient:
    """Sort the bytes of [start, stop), which is not empty, into classes. Memory and time: runs + bounds x extents."""
    clipped = [_clipped(*_merged(extent), start, stop) for extent in extents]
    cuts = np.unique(np.concatenate([np.array([start, stop]), *(ends for pair in clipped for ends in pair)]))
    masks: list[NDArray[np.bool_]] = []
    classes, count = np.zeros(len(cuts) - 1, np.int64), 1
    for starts, stops in clipped:
        turns = np.zeros(len(cuts), np.int8)  # +1 where a span begins, -1 where one ends: they do not touch
        turns[np.searchsorted(cuts, starts)] += 1
        turns[np.searchsorted(cuts, stops)] -= 1
        masks.append(np.cumsum(turns[:-1]) > 0)
        # Each class splits into what the extent covers of it and what not.
        classes = classes * 2 + masks[-1]
        present = np.zeros(2 * count, np.bool_)
        present[classes] = True
        classes, count = (np.cumsum(present) - 1)[classes], int(present.sum())
    sizes = np.zeros(count, np.int64)
    np.add.at(sizes, classes, np.diff(cuts))
    lowest = np.unique(classes, return_index=True)[1]
    highest = len(classes) - 1 - np.unique(classes[::-1], return_index=True)[1]
    return Quotient(
        tuple(tuple(np.flatnonzero(mask[lowest]).tolist()) for mask in masks),
        tuple(sizes.tolist()),
        tuple(cuts[lowest].tolist()),
        tuple((cuts[highest + 1] - 1).tolist()),
    )
