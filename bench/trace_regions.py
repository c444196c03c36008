"""What overlap gave, region by region: figures from matched replays.

Enters: the plan of a graph and its replays; where there is one, the plan and replays of the same work on one stream.
Leaves: `Figures`. Invariant: each figure is worked out per replay and then summarised; no times of different replays
are mixed.

Note "hidden and saved". Time of a region is hidden while anything else runs beside it. That is not yet time saved: two
kernels at once share the device's bandwidth, and each may take longer than alone. What is saved is told by the window
of a region, from the end of the last work before its fork to the first work behind its join: its length on one stream
less its length here. Windows of regions that run beside each other cover one another, and so do their savings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from .harness import Figure, figure
from .trace_intervals import Interval, covered, length, shared, union
from .trace_match import Replay, Traced
from .trace_plan import CALLER, Plan

UNIT: Final = "us"
Paid = Literal["yes", "no", "even", "unknown"]


@dataclass(frozen=True, slots=True)
class RegionFigures:
    """One region.

    Attributes:
        name, lane: of the region.
        kernels: how many it launches.
        streams: the device's streams that they were seen on, over all replays.
        busy: time in which it runs.
        hidden: how much of that something else runs too.
        alone: time its kernels take on one stream, with nothing beside them; None if that was not measured.
        saved: how much shorter the region's window is than on one stream; None likewise.
        paid: whether that is more than the replays differ among themselves.
    """

    name: str
    lane: str
    kernels: int
    streams: tuple[int, ...]
    busy: Figure
    hidden: Figure
    alone: Figure | None
    saved: float | None
    paid: Paid

    @property
    def share(self) -> float:
        """How much of its time is hidden, from 0 to 1."""
        return self.hidden.median / self.busy.median if self.busy.median else 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """A graph: its length, how much of it two lanes or more were busy, the same on one stream, and its regions."""

    kernels: int
    replays: int
    span: Figure
    overlapped: Figure
    serial: Figure | None
    regions: tuple[RegionFigures, ...]

    @property
    def saved(self) -> float | None:
        """How much shorter it is than on one stream."""
        return None if self.serial is None else self.serial.median - self.span.median


def figures_of(traced: Traced, serial: Traced | None = None) -> Figures:
    """The figures of a graph. `serial`: the same works in the same order, replayed on one stream."""
    assert traced.replays, "no replay was matched"
    if serial is not None:
        assert [work.kernel for work in serial.plan.works] == [work.kernel for work in traced.plan.works]
    return Figures(
        len(traced.plan.works),
        len(traced.replays),
        _figure([replay.span for replay in traced.replays]),
        _figure([length(overlaps(traced.plan, replay)) for replay in traced.replays]),
        None if serial is None else _figure([replay.span for replay in serial.replays]),
        tuple(_region(region, traced, serial) for region in traced.plan.regions),
    )


def overlaps(plan: Plan, replay: Replay) -> list[Interval]:
    """When two lanes or more were busy."""
    return covered(list(by_lane(plan, replay).values()), 2)


def by_lane(plan: Plan, replay: Replay) -> Mapping[str, list[Interval]]:
    """When each lane was busy."""
    found: dict[str, list[Interval]] = {lane: [] for lane in plan.lanes}
    for work, kernel in zip(plan.works, replay.kernels, strict=True):
        found[work.lane].append((kernel.start, kernel.end))
    return {lane: union(times) for lane, times in found.items()}


def hidden_in(plan: Plan, replay: Replay, region: str) -> list[Interval]:
    """When anything else ran beside a region."""
    own = set(plan.regions[region])
    others = set(range(len(plan.works))) - own
    return shared(replay.times(own), replay.times(others))


def _region(name: str, traced: Traced, serial: Traced | None) -> RegionFigures:
    plan, works = traced.plan, traced.plan.regions[name]
    lanes = dict.fromkeys(plan.works[work].lane for work in works)
    streams = sorted({replay.kernels[work].stream for replay in traced.replays for work in works})
    alone = saved = None
    paid: Paid = "unknown"
    if serial is not None:
        alone = _figure([length(replay.times(works)) for replay in serial.replays])
        here, there = (_figure(_windows(plan, name, replays)) for replays in (traced.replays, serial.replays))
        saved = there.median - here.median
        doubt = (here.high - here.low + there.high - there.low) / 2
        paid = "even" if abs(saved) <= doubt else "yes" if saved > 0 else "no"
    return RegionFigures(
        name,
        ", ".join(lanes) or CALLER,
        len(works),
        tuple(streams),
        _figure([length(replay.times(works)) for replay in traced.replays]),
        _figure([length(hidden_in(plan, replay, name)) for replay in traced.replays]),
        alone,
        saved,
        paid,
    )


def _windows(plan: Plan, region: str, replays: Sequence[Replay]) -> list[float]:
    """Per replay, the length of a region's window."""
    works = plan.regions[region]
    # A branch may wait for more behind its fork, and hand something out before its join: neither is the window's end.
    first = {plan.works[work].lane: work for work in reversed(works)}.values()
    last = {plan.works[work].lane: work for work in works}.values()
    before = set[int].intersection(*(plan.reaching([work]) for work in first))
    behind = set[int].intersection(*(plan.reached([work]) for work in last))
    inside = {*works, *plan.beside(region)}
    found: list[float] = []
    for replay in replays:
        own = replay.times(inside)
        start = max((end for _, end in replay.times(before)), default=min(start for start, _ in own))
        stop = min((start for start, _ in replay.times(behind)), default=max(end for _, end in own))
        found.append(stop - start)
    return found


def _figure(values: list[float]) -> Figure:
    if len(values) == 1:
        return Figure(values[0], values[0], values[0], 1, UNIT)
    return figure(values, UNIT)
