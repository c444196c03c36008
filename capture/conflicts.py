"""Races between ops that touch strided memory: exact, at the speed of plain ranges.

Enters: per node the extents it touches, and the edges that order nodes. Leaves: `Findings`, one conflict per pair of
nodes and tensors. First each extent counts as its hull: more bytes can only mean more races, so where the hulls show
none there is none. The bytes that hulls do show racing are judged again, exactly. Bytes race or not independently of
each other, so this is the whole truth; dropping the reported pairs that turn out to be disjoint would not be, because a
hull that is written hides what came before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .clocks import Order
from .evidence import Evidence, from_program
from .extents import Extent, Span, quotient
from .hazards import Access, Hazard, races, union
from .program import Program

MOST_RUNS = 1 << 22
"""More separate runs than this, in one range of doubtful bytes, are not listed: there hulls are the last word."""

Touch = tuple[Extent, bool]
"""Bytes a node touches, and whether it writes them, which also stands for read and written."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A race, and what of each node meets there: positions among the node's touches."""

    hazard: Hazard
    first_touch: int
    second_touch: int


@dataclass(frozen=True, slots=True)
class Findings:
    """What `find_conflicts` found.

    Attributes:
        conflicts: by the later node, then the earlier one.
        hulls: ranges judged by hulls alone, being of too many runs: a conflict there may be a false alarm.
    """

    conflicts: tuple[Conflict, ...]
    hulls: tuple[Span, ...]

    @property
    def hazards(self) -> tuple[Hazard, ...]:
        return tuple(conflict.hazard for conflict in self.conflicts)


def hazards_of(work: Program | Evidence) -> Findings:
    """Races of recorded work. Nodes and touches are counted as evidence counts them: nodes of a program are its steps,
    and a step's touches are its writes, then its reads."""
    evidence = from_program(work) if isinstance(work, Program) else work
    base = [buffer.address for buffer in evidence.buffers]
    nodes = [[(ref.extent(base[ref.buffer]), writes) for ref, writes in node.touches] for node in evidence.nodes]
    return find_conflicts(nodes, evidence.edges)


def find_conflicts(nodes: Sequence[Sequence[Touch]], edges: Sequence[tuple[int, int]]) -> Findings:
    """Races between `nodes`, exact to the byte.

    Raises ValueError on a cycle, and on an edge to a node that does not exist.
    """
    order = Order(len(nodes), edges)
    found = races(order, [_hulls(touches) for touches in nodes])
    doubtful = _doubtful(nodes, found)
    if not doubtful:
        return Findings(_per_tensor(nodes, found), ())
    starts = [start for start, _ in doubtful]
    certain = [h for h in found if not _meets(doubtful, starts, h.start, h.stop)]
    exact, hulls = _judge_again(order, nodes, doubtful)
    rank = {node: place for place, node in enumerate(order.topological)}
    hazards = sorted((*certain, *exact), key=lambda h: (rank[h.second], rank[h.first], h.start))
    return Findings(_per_tensor(nodes, hazards), tuple(hulls))


def _hulls(touches: Sequence[Touch]) -> list[Access]:
    return [Access(*hull) for hull in {(extent.start, extent.stop, writes): None for extent, writes in touches}]


def _doubtful(nodes: Sequence[Sequence[Touch]], found: Sequence[Hazard]) -> list[Span]:
    """The racing bytes where some hull holds bytes that its extent does not."""
    if not found:
        return []
    hulls = union({(e.start, e.stop) for touches in nodes for e, _ in touches if e.repeats})
    starts = [start for start, _ in hulls]
    return [span for span in union((h.start, h.stop) for h in found) if _meets(hulls, starts, *span)]


def _meets(spans: Sequence[Span], starts: Sequence[int], start: int, stop: int) -> range:
    """Which of the disjoint, sorted spans share bytes with [start, stop)."""
    low = bisect_right(starts, start)
    if low and spans[low - 1][1] > start:
        low -= 1
    high = low
    while high < len(spans) and starts[high] < stop:
        high += 1
    return range(low, high)


def _judge_again(
    order: Order, nodes: Sequence[Sequence[Touch]], doubtful: Sequence[Span]
) -> tuple[list[Hazard], list[Span]]:
    """The races in these ranges, exactly, and the ranges for which that was too much work.

    Each class of bytes (see `quotient`) stands as one byte, in a row of its own numbers, and is checked as one.
    """
    starts = [start for start, _ in doubtful]
    meeting: list[dict[Extent, int]] = [{} for _ in doubtful]  # extents by range, numbered
    for touches in nodes:
        for extent, _ in touches:
            for place in _meets(doubtful, starts, extent.start, extent.stop):
                meeting[place].setdefault(extent, len(meeting[place]))
    origins: list[int] = []  # per range, the number of its first class
    classes: list[tuple[int, int, int]] = []  # per class: first byte, end, bytes
    covered: list[tuple[tuple[int, ...], ...]] = []
    hulls: list[Span] = []
    for (start, stop), extents in zip(doubtful, meeting, strict=True):
        exact = list(extents)
        if sum(extent.runs for extent in exact) > MOST_RUNS:
            exact = [Extent(extent.start, extent.stop - extent.start) for extent in exact]
            hulls.append((start, stop))
        sorted_out = quotient(exact, start, stop)
        origins.append(len(classes))
        covered.append(sorted_out.covered)
        for first, last, size in zip(sorted_out.first, sorted_out.last, sorted_out.sizes, strict=True):
            classes.append((first, last + 1, size))

    def in_classes(touches: Sequence[Touch]) -> Iterator[Access]:
        for extent, writes in touches:
            for place in _meets(doubtful, starts, extent.start, extent.stop):
                origin = origins[place]
                for low, high in union((c, c + 1) for c in covered[place][meeting[place][extent]]):
                    yield Access(origin + low, origin + high, writes)

    found = [
        replace(hazard, start=start, stop=stop, gaps=stop - start - size)
        for hazard in races(order, [list(in_classes(touches)) for touches in nodes])
        for start, stop, size in classes[hazard.start : hazard.stop]
    ]
    return found, hulls


def _per_tensor(nodes: Sequence[Sequence[Touch]], hazards: Sequence[Hazard]) -> tuple[Conflict, ...]:
    """One conflict for all bytes in which the same two touches race."""
    merged: dict[tuple[int, int, int, int], Hazard] = {}
    for hazard in hazards:
        key = (
            hazard.first,
            hazard.second,
            _touching(nodes[hazard.first], hazard.start, hazard.first_writes),
            _touching(nodes[hazard.second], hazard.start, hazard.second_writes),
        )
        known = merged.setdefault(key, hazard)
        if known is not hazard:
            start, stop = min(known.start, hazard.start), max(known.stop, hazard.stop)
            gaps = stop - start - known.nbytes - hazard.nbytes
            merged[key] = replace(known, start=start, stop=stop, gaps=gaps)
    return tuple(Conflict(hazard, key[2], key[3]) for key, hazard in merged.items())


def _touching(touches: Sequence[Touch], byte: int, writes: bool) -> int:
    """The first touch that covers `byte` and writes, or does not."""
    near = [
        position
        for position, (extent, written) in enumerate(touches)
        if written == writes and extent.start <= byte < extent.stop
    ]
    return next((position for position in near if touches[position][0].covers(byte)), near[0])  # else: judged by hulls
