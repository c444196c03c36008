"""Figures of regions, worked out by hand for replays whose times are known."""

from __future__ import annotations

import pytest
from synthetic_traces import GAP_US, Step, both, mixture, plan, replay_of, traced

from auxstream.bench.trace_match import Kernel, Replay, Traced
from auxstream.bench.trace_regions import figures_of

# norm 0-2 | caller 3-9 | lane0 3-7 and 8-12 | add 13-14; on one stream 0-2 3-7 8-12 13-19 20-21
STEPS = [
    Step("norm", "norm", 2.0),
    Step("mm", "big", 6.0),
    Step("mm", "small", 4.0, "lane0", "aux", after=(0,)),
    Step("mm", "small", 4.0, "lane0", "aux"),
    Step("add", "add", 1.0, after=(3,)),
]


def replay(*times: tuple[float, float], streams: tuple[int, ...] = (7, 7, 9, 9, 7)) -> Replay:
    names = [step.kernel for step in STEPS]
    return Replay(tuple(Kernel(n, *t, s) for n, t, s in zip(names, times, streams, strict=True)))


HERE = replay((0, 2), (3, 9), (3, 7), (8, 12), (13, 14))
THERE = replay((0, 2), (3, 9), (10, 14), (15, 19), (20, 21), streams=(7,) * 5)


def test_hidden_saved_and_share_are_what_the_times_say() -> None:
    figures = figures_of(Traced(plan(STEPS), (HERE,)), Traced(plan(STEPS, one_stream=True), (THERE,)))
    (aux,) = figures.regions
    assert (aux.name, aux.lane, aux.kernels, aux.streams) == ("aux", "lane0", 2, (9,))
    assert aux.busy.median == 8
    assert aux.hidden.median == 5  # 3-7 and 8-9
    assert aux.share == pytest.approx(5 / 8)
    assert aux.alone is not None
    assert aux.alone.median == 8
    assert aux.saved == 7  # from the norm's end to the sum's start: 2-20 and 2-13
    assert aux.paid == "yes"
    assert (figures.span.median, figures.overlapped.median, figures.saved) == (14, 5, 7)


def test_figures_are_medians_over_replays() -> None:
    late = replay((0, 2), (3, 9), (4, 8), (9, 13), (14, 15), streams=(7, 7, 11, 11, 7))
    later = replay((0, 2), (3, 9), (12, 16), (17, 21), (22, 23))
    figures = figures_of(Traced(plan(STEPS), (HERE, late, later)))
    (aux,) = figures.regions
    assert aux.hidden.median == 4  # of 5, 4 and 0
    assert aux.streams == (9, 11)
    assert figures.span.median == 15
    assert (aux.saved, aux.alone, aux.paid) == (None, None, "unknown")


def test_an_overlap_that_slows_everything_down_is_hidden_and_does_not_pay() -> None:
    slow = replay((0, 2), (3, 19), (3, 10), (11, 18), (22, 23))
    figures = figures_of(Traced(plan(STEPS), (slow,) * 5), Traced(plan(STEPS, one_stream=True), (THERE,) * 5))
    (aux,) = figures.regions
    assert aux.share == 1
    assert (aux.saved, aux.paid, figures.saved) == (-2, "no", -2)


def test_a_difference_within_the_spread_of_the_replays_is_even() -> None:
    here = [replay((0, 2), (3, 9), (3, 7), (8, 12), (19 + n, 21 + n)) for n in range(-4, 5, 2)]
    there = [replay((0, 2), (3, 9), (10, 14), (15, 19), (20 + n, 21 + n)) for n in range(-4, 5, 2)]
    figures = figures_of(Traced(plan(STEPS), tuple(here)), Traced(plan(STEPS, one_stream=True), tuple(there)))
    assert figures.regions[0].saved == 1
    assert figures.regions[0].paid == "even"


def test_the_savings_of_regions_that_follow_one_another_add_up() -> None:
    here, there, figures = both(mixture(3))
    assert [region.name for region in figures.regions] == [f"layers.{n}.mlp" for n in range(3)]
    assert all(region.saved is not None and region.paid == "yes" for region in figures.regions)
    assert sum(region.saved or 0 for region in figures.regions) == pytest.approx(figures.saved, abs=0.5)
    assert here.typical.span == figures.span.median
    assert there.typical.span > here.typical.span


def test_one_stream_hides_nothing() -> None:
    """The control: the same regions in line."""
    figures = figures_of(traced(mixture(2), one_stream=True))
    assert figures.overlapped.median == 0
    assert [region.hidden.median for region in figures.regions] == [0, 0]
    assert {region.lane for region in figures.regions} == {"caller"}


def test_the_window_of_a_region_that_is_joined_last_ends_with_the_graph() -> None:
    steps = [Step("a", "a", 1.0), Step("b", "b", 3.0), Step("c", "c", 2.0, "lane0", "aux", after=(0,))]
    here, there = replay_of(steps), replay_of(steps, one_stream=True)
    figures = figures_of(Traced(plan(steps), (here,)), Traced(plan(steps, one_stream=True), (there,)))
    assert figures.regions[0].saved == pytest.approx(2 + GAP_US)


def test_different_work_is_not_compared() -> None:
    with pytest.raises(AssertionError):
        figures_of(traced(mixture(1)), traced(mixture(2), one_stream=True))


def test_a_wait_within_a_region_and_a_result_handed_out_early_do_not_end_its_window() -> None:
    steps = [
        Step("a", "a", 2.0),
        Step("b", "b", 6.0),
        Step("x", "x", 4.0, "lane0", "aux", after=(0,)),
        Step("y", "y", 4.0, "lane0", "aux", after=(1,)),
        Step("w", "w", 1.0, after=(2,)),
        Step("z", "z", 1.0, after=(3,)),
    ]
    here, there = replay_of(steps), replay_of(steps, one_stream=True)
    figures = figures_of(Traced(plan(steps), (here,)), Traced(plan(steps, one_stream=True), (there,)))
    windows = [replay.kernels[5].start - replay.kernels[0].end for replay in (there, here)]
    assert figures.regions[0].saved == pytest.approx(windows[0] - windows[1])
    assert windows == pytest.approx([19.5, 12.7])
