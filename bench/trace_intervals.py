"""Arithmetic of stretches of time: what any covers, what two share, when how many are under way.

Enters: intervals (start, end), in any order, overlapping or not. Leaves: disjoint ones in order. Invariant: an interval
is half-open, so ones that touch do not overlap, and empty ones count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What any of them covers."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def shared(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """What both cover."""
    return covered([union(first), union(second)], 2)


def covered(groups: Sequence[Iterable[Interval]], least: int) -> list[Interval]:
    """When at least so many of the groups are under way. A group counts once, however many of its intervals run."""
    steps: dict[float, int] = {}
    for group in groups:
        for start, end in union(group):
            steps[start] = steps.get(start, 0) + 1
            steps[end] = steps.get(end, 0) - 1
    running = 0
    found: list[Interval] = []
    for now, following in pairwise([*sorted(steps), float("inf")]):
        running += steps[now]
        if running >= least:
            found.append((now, following))
    return union(found)


def length(intervals: Iterable[Interval]) -> float:
    """How long they are together; what several cover counts once."""
    return sum(end - start for start, end in union(intervals))
