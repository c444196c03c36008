"""Happens-before race checking over plain data: no tensors, no CUDA.

Enters: a `Graph`, the form that a simulated program and a captured CUDA graph both yield: byte ranges read and written
per node, and the edges that order nodes. Leaves: `Hazard`s, bytes that two nodes touch, at least one writing, with no
path either way.

What holds, byte by byte:
- sound: each reported pair races on every byte of the reported range;
- complete: a byte with any racing pair lies in some reported range, so no hazards means no races;
- pruned: a write resets its bytes' history, so a race behind another one on the same byte may show only once the
  first is gone. Without this, one missing edge would bury its cause under every later reuse of the block.

Cost: near-linear. An access splits segments (runs of bytes with one history) at its ends; a write fuses all it covers.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .clocks import NOBODY, Clock, Order

__all__ = ["Access", "Graph", "Hazard", "find_hazards", "races"]

Span = tuple[int, int]

BLOCK = 128  # segments in a fresh block: more make short reads slower, fewer make reads over everything slower


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes [start, stop) that a node touches; `writes` also stands for read and written. Empty ranges never race."""

    start: int
    stop: int
    writes: bool


@dataclass(frozen=True, slots=True)
class Graph:
    """Per node (index = position) its accesses; `edges` are (from, to). Node numbers need not be topological."""

    accesses: tuple[tuple[Access, ...], ...]
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Hazard:
    """Nodes `first` and `second` both touch bytes [start, stop), at least one writing, and no path orders them.

    `first` comes earlier in the topological order used, which says nothing about how they will run. `gaps` counts the
    bytes in between that do not race; `find_hazards` reports none, capture/conflicts.py one hazard per pair of tensors.
    """

    first: int
    second: int
    start: int
    stop: int
    first_writes: bool
    second_writes: bool
    gaps: int = 0

    @property
    def nbytes(self) -> int:
        """How many bytes race."""
        return self.stop - self.start - self.gaps

    @property
    def kind(self) -> str:
        """'read/write', 'write/read' or 'write/write', first node's access first."""
        return f"{'write' if self.first_writes else 'read'}/{'write' if self.second_writes else 'read'}"


class _Segment:
    """A run of bytes with one history: the last write, and reads since that no later read is ordered after."""

    __slots__ = ("readers", "start", "stop", "writer")

    def __init__(self, start: int, stop: int, writer: int = NOBODY, readers: tuple[int, ...] = ()) -> None:
        self.start = start
        self.stop = stop
        self.writer = writer
        self.readers = readers


class _Block:
    """Neighbouring segments, at least one, sorted by start.

    Reads over many segments. A key/value cache is written row by row and read as a whole: visiting every row per read
    is quadratic. So a read over a whole block that is ordered after all `writers` (per chain the last to write in the
    block, overwritten or not: where nothing races, what follows a write follows those it overwrote) is left in
    `pending` on behalf of every segment. It must be settled before any segment's history is looked at or replaced, or
    a write would miss it.
    """

    __slots__ = ("pending", "segments", "starts", "writers")

    def __init__(self, segments: list[_Segment], writers: dict[int, int]) -> None:
        self.segments = segments
        self.starts = [segment.start for segment in segments]
        self.writers = writers
        self.pending: tuple[int, ...] = ()

    def cut(self, index: int, at: int) -> None:
        """Split one segment in two that share its history."""
        segment = self.segments[index]
        right = _Segment(at, segment.stop, segment.writer, segment.readers)
        segment.stop = at
        self.segments.insert(index + 1, right)
        self.starts.insert(index + 1, at)

    def span(self, start: int, stop: int) -> Span:
        """Indices of the segments inside [start, stop), after cutting those that straddle an end."""
        starts, segments = self.starts, self.segments
        low = max(bisect_right(starts, start) - 1, 0)
        segment = segments[low]
        if segment.start == start and segment.stop == stop:
            return low, low + 1  # most accesses: the block of memory as it was last used
        if segment.stop <= start:
            low += 1
        elif segment.start < start:
            self.cut(low, start)
            low += 1
        high = low
        while high < len(starts) and starts[high] < stop:
            if segments[high].stop > stop:
                self.cut(high, stop)
            high += 1
        return low, high


class _History:
    """What has touched each byte that is ever written, as nodes come in topological order, and the races met."""

    def __init__(self, order: Order, written: list[Span]) -> None:
        self._order = order
        # Only written bytes have segments: a weight that everyone reads finds none and costs one lookup.
        segments = [_Segment(start, stop) for start, stop in written]
        self._blocks = [_Block(segments[i : i + BLOCK], {}) for i in range(0, len(segments), BLOCK)]
        self._starts = [block.starts[0] for block in self._blocks]
        self._node, self._chain = NOBODY, NOBODY
        self._clock: Clock = array("i")
        self.races: dict[tuple[int, int, bool, bool], list[Span]] = {}

    def enter(self, node: int) -> None:
        """The accesses that follow are this node's: its reads, then its writes."""
        self._node = node
        self._chain = self._order.chain[node]
        self._clock = self._order.clocks[node]

    def read(self, start: int, stop: int) -> None:
        """[start, stop) is read: each byte's last write must be ordered before."""
        blocks, starts = self._blocks, self._starts
        alone, followed = (self._node,), None
        index = max(bisect_right(starts, start) - 1, 0)
        while index < len(blocks) and starts[index] < stop:
            block = blocks[index]
            if start <= starts[index] and block.segments[-1].stop <= stop and len(block.starts) > 1:
                pending = block.pending
                if pending is followed:  # the very tuple that the node was found to follow in a block before
                    block.pending = alone
                    index += 1
                    continue
                if self._follows(block):
                    joined = self._joined_by_node(pending)
                    block.pending = alone if joined == alone else joined
                    followed = pending if pending and joined == alone else None
                    index += 1
                    continue
            self._settle(block)
            low, high = block.span(start, stop)
            for segment in block.segments[low:high]:
                if segment.writer != NOBODY and not self._ordered(segment.writer):
                    self._race(segment.writer, segment, True, False)
                segment.readers = self._joined_by_node(segment.readers)
            index += self._halve(index)

    def write(self, start: int, stop: int) -> None:
        """[start, stop) is written: all that touched it must be ordered before, and is then forgotten."""
        home: _Segment | None = None
        index = max(bisect_right(self._starts, start) - 1, 0)
        while index < len(self._blocks) and self._starts[index] < stop:
            block = self._blocks[index]
            self._settle(block)
            low, high = block.span(start, stop)
            for segment in block.segments[low:high]:
                if segment.writer != NOBODY and not self._ordered(segment.writer):
                    self._race(segment.writer, segment, True, True)
                for reader in segment.readers:
                    if not self._ordered(reader):
                        self._race(reader, segment, False, True)
            if home is None and low < high:
                home = block.segments[low]
                home.writer, home.readers, home.stop = self._node, (), stop
                block.writers[self._chain] = self._node
                low += 1
            if low < high:
                del block.segments[low:high], block.starts[low:high]
                if not block.starts:
                    del self._blocks[index], self._starts[index]
                    continue
                self._starts[index] = block.starts[0]
            index += self._halve(index)
        assert home is not None, f"node {self._node} writes [{start}, {stop}), which was not announced as written"

    def _ordered(self, earlier: int) -> bool:
        """`Order.before` against the current node, which is last so far: on one chain, all others precede it."""
        chain = self._order.chain[earlier]
        if chain == self._chain:
            return True
        return chain < len(self._clock) and self._clock[chain] >= self._order.position[earlier]

    def _follows(self, block: _Block) -> bool:
        """Whether the current node is ordered after all writers of the block: surely if it follows a pending read."""
        return any(map(self._ordered, block.pending)) or all(map(self._ordered, block.writers.values()))

    def _joined_by_node(self, readers: tuple[int, ...]) -> tuple[int, ...]:
        """Readers and the current node, less those ordered before it: what follows the node follows them."""
        if len(readers) < 2 and all(map(self._ordered, readers)):
            return (self._node,)
        return (*(reader for reader in readers if not self._ordered(reader)), self._node)

    def _settle(self, block: _Block) -> None:
        """Hand each segment the reads left for it; they are later than all of its own."""
        if not block.pending:
            return
        before, pending = self._order.before, block.pending
        settled: dict[tuple[int, ...], tuple[int, ...]] = {}  # neighbours mostly have the same readers
        for segment in block.segments:
            old = segment.readers
            if old not in settled:
                kept = (r for r in old if not any(r == p or before(r, p) for p in pending))
                settled[old] = (*kept, *pending)
            segment.readers = settled[old]
        block.pending = ()

    def _race(self, earlier: int, segment: _Segment, earlier_writes: bool, writes: bool) -> None:
        pair = (earlier, self._node, earlier_writes, writes)
        self.races.setdefault(pair, []).append((segment.start, segment.stop))

    def _halve(self, index: int) -> int:
        """Split a block that grew too long; how many blocks the walk must step over."""
        block = self._blocks[index]
        if len(block.starts) <= 2 * BLOCK:
            return 1
        right = _Block(block.segments[BLOCK:], dict(block.writers))
        del block.segments[BLOCK:], block.starts[BLOCK:]
        self._blocks.insert(index + 1, right)
        self._starts.insert(index + 1, right.starts[0])
        return 2


def union(spans: Iterable[Span]) -> list[Span]:
    """The same bytes as disjoint spans that do not touch, sorted."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _written(nodes: Sequence[Sequence[Access]]) -> list[Span]:
    for node, accesses in enumerate(nodes):
        for access in accesses:
            if access.start > access.stop:
                raise ValueError(f"expected byte ranges with start <= stop, got {access} in node {node}")
    return union({(a.start, a.stop) for accesses in nodes for a in accesses if a.writes and a.start < a.stop})


def find_hazards(graph: Graph) -> list[Hazard]:
    """Races of `graph`, by the later node, then the earlier one, then bytes; [] means that there are none.

    Adjacent bytes of one pair and kind come as one hazard. What is promised per byte: the module's docstring. Raises
    ValueError on a cycle, an edge to a node that does not exist, and a range that ends before it starts.
    """
    return races(Order(len(graph.accesses), graph.edges), graph.accesses)


def races(order: Order, nodes: Sequence[Sequence[Access]]) -> list[Hazard]:
    """`find_hazards` where the order is known already."""
    history = _History(order, _written(nodes))
    for node in order.topological:
        history.enter(node)
        accesses = nodes[node]
        for access in accesses:  # reads first: a node's own write must not hide what it reads from the write before
            if not access.writes and access.start < access.stop:
                history.read(access.start, access.stop)
        for access in accesses:
            if access.writes and access.start < access.stop:
                history.write(access.start, access.stop)
    rank = {node: place for place, node in enumerate(order.topological)}
    by_order = sorted(history.races.items(), key=lambda race: (rank[race[0][1]], rank[race[0][0]], race[0][2:]))
    return [
        Hazard(a, b, start, stop, a_writes, b_writes)
        for (a, b, a_writes, b_writes), spans in by_order
        for start, stop in union(spans)
    ]
