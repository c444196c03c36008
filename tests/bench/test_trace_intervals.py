"""Arithmetic of intervals against counting, unit by unit."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from auxstream.bench.trace_intervals import covered, length, shared, union

interval = st.tuples(st.integers(0, 40), st.integers(-3, 12)).map(lambda pair: (float(pair[0]), float(sum(pair))))
intervals = st.lists(interval, max_size=12)


def units(given_intervals: list[tuple[float, float]]) -> set[int]:
    """The unit stretches [n, n + 1) that any interval covers; all ends are whole numbers."""
    return {n for start, end in given_intervals for n in range(int(start), int(end))}


@given(intervals)
def test_union_covers_the_same_and_is_disjoint(given_intervals: list[tuple[float, float]]) -> None:
    found = union(given_intervals)
    assert units(found) == units(given_intervals)
    assert all(a_end < b_start for (_, a_end), (b_start, _) in itertools.pairwise(found))
    assert length(given_intervals) == len(units(given_intervals))


@given(intervals, intervals)
def test_shared_is_what_both_cover(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> None:
    assert units(shared(first, second)) == units(first) & units(second)


@given(st.lists(intervals, max_size=4), st.integers(1, 4))
def test_covered_counts_groups_not_intervals(groups: list[list[tuple[float, float]]], least: int) -> None:
    expected = {n for n in range(60) if sum(n in units(group) for group in groups) >= least}
    assert units(covered(groups, least)) == expected


def test_intervals_that_touch_do_not_overlap() -> None:
    assert shared([(0, 1)], [(1, 2)]) == []
    assert union([(0, 1), (1, 2)]) == [(0, 2)]
