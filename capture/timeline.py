"""Which work on the device is behind which, as far as the host has said so: pure data, fed with numbers.

Enters: streams and events as numbers, in the order in which the host enqueues: work, records, waits, and what the host
itself waits for; and what each piece of work touches. Leaves: answers to "is what this stream does next behind that
work?", and the first `Conflict` between a replay and anything that touches the same bytes in no fixed order. No
tensors, no CUDA. Invariant: what nobody has ordered counts as unordered; what came before the first call counts as
done.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .hazards import union

Span = tuple[int, int]
Spans = tuple[Span, ...]
Clock = dict[int, int]
"""Per stream, how much of its work."""


class Point(NamedTuple):
    """A piece of work: the `position`th on its stream."""

    stream: int
    position: int


class Timeline:
    """Vector clocks of streams, events and the host."""

    def __init__(self) -> None:
        self._clocks: dict[int, Clock] = {}
        self._events: dict[Hashable, Clock] = {}
        self._host: Clock = {}

    def work(self, stream: int) -> Point:
        """`stream` is given a piece of work."""
        clock = self._now(stream)
        clock[stream] = clock.get(stream, 0) + 1
        return Point(stream, clock[stream])

    def behind(self, stream: int, point: Point) -> bool:
        """Whether what `stream` is given next starts after the work at `point` has ended."""
        return self._now(stream).get(point.stream, 0) >= point.position

    def done(self, point: Point) -> bool:
        """Whether the host has waited for the work at `point`, so that everything from now on is behind it."""
        return self._host.get(point.stream, 0) >= point.position

    def record(self, event: Hashable, stream: int) -> None:
        """`event` stands for all that `stream` was given so far; what it stood for before is forgotten."""
        self._events[event] = dict(self._now(stream))

    def wait(self, stream: int, event: Hashable) -> None:
        """What `stream` is given next is behind `event`. An event nobody recorded is no reason to wait."""
        _raise_to(self._now(stream), self._events.get(event, {}))

    def host_waits_for(self, *, event: Hashable | None = None, stream: int | None = None) -> None:
        """The host waits: for an event, for a stream, or for all of them."""
        if event is not None:
            clocks = [self._events.get(event, {})]
        elif stream is not None:
            clocks = [self._now(stream)]
        else:
            clocks = list(self._clocks.values())
        for clock in clocks:
            _raise_to(self._host, clock)

    def _now(self, stream: int) -> Clock:
        clock = self._clocks.setdefault(stream, {})
        _raise_to(clock, self._host)
        return clock


def _raise_to(clock: Clock, other: Clock) -> None:
    for stream, position in other.items():
        if clock.get(stream, 0) < position:
            clock[stream] = position


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes read and bytes written: each sorted and disjoint."""

    reads: Spans
    writes: Spans

    @classmethod
    def of(cls, reads: Iterable[Span], writes: Iterable[Span]) -> Footprint:
        """From spans in any order, which may overlap."""
        return cls(*(tuple(union(s for s in spans if s[0] < s[1])) for spans in (reads, writes)))

    def conflict(self, other: Footprint) -> Span | None:
        """Bytes that both touch and one of them writes, if there are any."""
        return (
            _meeting(self.writes, other.writes)
            or _meeting(self.writes, other.reads)
            or _meeting(self.reads, other.writes)
        )


def _meeting(one: Spans, other: Spans) -> Span | None:
    if len(one) > len(other):
        one, other = other, one
    for start, stop in one:
        place = bisect_left(other, (stop,))  # the spans before it begin before `stop`
        if place and other[place - 1][1] > start:
            return max(start, other[place - 1][0]), min(stop, other[place - 1][1])
    return None


@dataclass(frozen=True, slots=True)
class Use:
    """Work that touches a graph's memory: an op, or a replay (then `graph` names it). `stream` is a number."""

    what: str
    line: str
    stream: int
    graph: str | None
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Conflict:
    """`second` is enqueued now, `first` was before; both touch `span`, one writes it, and nothing orders them."""

    first: Use
    second: Use
    span: Span


class Launches:
    """What replays and other work do to the memory of graphs, over a timeline.

    Graphs are known by a number of their own. Of each, only the last replay counts: CUDA starts no launch of an
    executable before its earlier ones have ended.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._graphs: dict[int, Footprint] = {}
        self._replays: dict[int, tuple[Use, Point]] = {}
        self._others: dict[tuple[int, Footprint], tuple[Use, Point]] = {}  # by stream and bytes: the latest

    def know(self, graph: int, footprint: Footprint) -> None:
        """From now on, work that a replay of the graph could race with is remembered."""
        self._graphs[graph] = footprint

    def forget(self, graph: int) -> None:
        """The graph is gone."""
        del self._graphs[graph]
        self._replays.pop(graph, None)

    def replay(self, graph: int, use: Use) -> Conflict | None:
        """A graph is launched; on a conflict, nothing was enqueued."""
        self._timeline.wait(use.stream, ("launch", graph))
        for other, (first, point) in self._replays.items():
            if other != graph and (found := self._unordered(first, point, use)):
                return found
        self._forget_done()
        for first, point in self._others.values():
            if found := self._unordered(first, point, use):
                return found
        self._replays[graph] = use, self._timeline.work(use.stream)
        self._timeline.record(("launch", graph), use.stream)
        return None

    def other(self, use: Use) -> Conflict | None:
        """Something else is enqueued; on a conflict, nothing was."""
        if not any(use.footprint.conflict(known) for known in self._graphs.values()):
            return None
        for first, point in self._replays.values():
            if found := self._unordered(first, point, use):
                return found
        self._others[use.stream, use.footprint] = use, self._timeline.work(use.stream)
        return None

    def _unordered(self, first: Use, point: Point, second: Use) -> Conflict | None:
        if self._timeline.behind(second.stream, point):
            return None
        span = first.footprint.conflict(second.footprint)
        return None if span is None else Conflict(first, second, span)

    def _forget_done(self) -> None:
        self._others = {key: use for key, use in self._others.items() if not self._timeline.done(use[1])}
