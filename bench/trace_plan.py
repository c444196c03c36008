"""What a captured graph was to do, as a trace needs it: the work of each node, its lane, its region, what it waits for.

Enters: the nodes and edges of a report, in which every kernel node is attributed to its op. Leaves: a `Plan`, plain
data. Invariant: only nodes that show on a device's timeline are in it, in the order they were enqueued; what only
orders others (events, empty nodes, the host) is gone, and the order it made is kept.

Note "occurrences". A name may be forked many times in one graph. Nodes of one name count as one region as long as no
work of the caller was enqueued between them; then the next begins, and is numbered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from typing import Final

from ..capture.evidence import Node
from .costliest import readable

CALLER: Final = "caller"
"""The lane that no region is on."""
UNKNOWN: Final = "?"
"""The stream of a node that no recorded op launched."""
_COPIES: Final = ("memcpy", "memset")
_QUIET: Final = frozenset(
    {
        "host", "child graph", "empty", "event wait", "event record", "semaphore signal", "semaphore wait",
        "alloc", "free", "batch memop", "conditional", "unknown", "",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """One node that a timeline shows.

    Attributes:
        kernel: its name on a device: a kernel's readable one, or memcpy, or memset.
        op: the op that launched it, or the kernel's name where nobody knows.
        lane: the stream it was captured on, by its name.
        region: the region it belongs to; on an auxiliary stream that no region opened, that stream's name.
        line: where the op was called.
    """

    kernel: str
    op: str
    lane: str
    region: str | None = None
    line: str = ""


@dataclass(frozen=True)
class Plan:
    """`works` in the order they were enqueued; `before[n]`: the works that n waits for, by position."""

    works: tuple[Work, ...]
    before: tuple[tuple[int, ...], ...]

    @cached_property
    def behind(self) -> tuple[tuple[int, ...], ...]:
        """Per work, those that wait for it."""
        found: list[list[int]] = [[] for _ in self.works]
        for work, waits in enumerate(self.before):
            for earlier in waits:
                found[earlier].append(work)
        return tuple(map(tuple, found))

    @cached_property
    def lanes(self) -> tuple[str, ...]:
        """The caller first, then by first use; nodes that nobody knows last."""
        used = dict.fromkeys(work.lane for work in self.works)
        return tuple(sorted(used, key=lambda lane: (lane != CALLER, lane == UNKNOWN)))

    @cached_property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """The works of each region, regions in the order they were enqueued."""
        found: dict[str, list[int]] = {}
        for number, work in enumerate(self.works):
            if work.region is not None:
                found.setdefault(work.region, []).append(number)
        return {region: tuple(works) for region, works in found.items()}

    def reaching(self, works: Sequence[int]) -> set[int]:
        """All that must be over before the last of `works` begins, themselves left out."""
        return _closure(works, self.before)

    def reached(self, works: Sequence[int]) -> set[int]:
        """All that waits for any of `works`, themselves left out."""
        return _closure(works, self.behind)

    def beside(self, region: str) -> set[int]:
        """Work of others that nothing orders against the region: what it can hide under."""
        own = self.regions[region]
        return set(range(len(self.works))) - set(own) - self.reaching(own) - self.reached(own)


def plan_of(nodes: Sequence[Node], edges: Sequence[tuple[int, int]]) -> Plan:
    """The plan of a captured graph. `nodes` in the order they were enqueued, `edges` as positions in it."""
    shown = [number for number, node in enumerate(nodes) if node.kernel not in _QUIET]
    place = {number: position for position, number in enumerate(shown)}
    waits = _waits(len(nodes), edges, place)
    works = [_work(nodes[number]) for number in shown]
    return Plan(tuple(_numbered(works)), tuple(tuple(sorted(waits[number])) for number in shown))


def _work(node: Node) -> Work:
    kernel = node.kernel if node.kernel in _COPIES else readable(node.kernel)
    op = kernel if node.stream == UNKNOWN else node.name
    outside = node.stream not in (CALLER, UNKNOWN)
    return Work(kernel, op, node.stream, node.region or (node.stream if outside else None), node.line)


def _waits(count: int, edges: Sequence[tuple[int, int]], place: dict[int, int]) -> list[set[int]]:
    """Per node, the works that it waits for directly, or through nodes that a timeline does not show."""
    sources: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        sources[b].append(a)
    sorter: TopologicalSorter[int] = TopologicalSorter(dict(enumerate(sources)))
    found: list[set[int]] = [set() for _ in range(count)]
    for node in sorter.static_order():
        for source in sources[node]:
            found[node] |= {place[source]} if source in place else found[source]
    return found


def _numbered(works: Sequence[Work]) -> Iterator[Work]:
    """The works, with regions that come again told apart."""
    seen: dict[str, int] = {}
    broken: set[str] = set()  # regions that work of the caller came behind
    for work in works:
        if work.region is None:
            broken.update(seen)
            yield work
            continue
        if work.region not in seen or work.region in broken:
            seen[work.region] = seen.get(work.region, 0) + 1
            broken.discard(work.region)
        times = seen[work.region]
        yield work if times == 1 else Work(work.kernel, work.op, work.lane, f"{work.region} #{times}", work.line)


def _closure(start: Sequence[int], next_of: Sequence[Sequence[int]]) -> set[int]:
    found: set[int] = set()
    waiting = list(start)
    while waiting:
        for other in next_of[waiting.pop()]:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found - set(start)
