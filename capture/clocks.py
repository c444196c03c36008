"""Happens-before: "is there a path from a to b", answered in constant time for a whole graph.

Enters: the number of nodes, and edges between them. Leaves: an `Order`: a topological order, a decomposition into
chains, and a vector clock per node. No tensors, no CUDA.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

# Per chain, the last position known to precede; chains beyond the end: none. Quoted: 3.11 cannot subscript arrays.
Clock: TypeAlias = "array[int]"

NOBODY = -1


class Order:
    """Answers "is there a path from a to b" in constant time: vector clocks over a decomposition into chains.

    A chain is a sequence of nodes each of which has a path to the next: streams, where they can be told. A node's clock
    holds, per other chain, the last position with a path to the node. Nodes that only continue their chain share one
    clock, so memory is (forks + joins) x chains x 4 bytes. A node that precedes nothing is in no chain: it would keep
    its chain from being continued, and a graph with many such nodes would have as many chains.

    Raises ValueError on an edge to a node that does not exist, and on a cycle, naming its nodes.
    """

    def __init__(self, nodes: int, edges: Sequence[tuple[int, int]]) -> None:
        self.topological: list[int] = _sort(nodes, edges)
        self.chain: list[int] = [NOBODY] * nodes
        self.position: list[int] = [NOBODY] * nodes  # within the chain
        self.clocks: list[Clock] = [array("i")] * nodes

        predecessors: list[list[int]] = [[] for _ in range(nodes)]
        precedes = bytearray(nodes)
        for source, target in edges:
            predecessors[target].append(source)
            precedes[source] = True
        tails: list[int] = []  # per chain, the position of its last node
        for node in self.topological:
            self._place(node, predecessors[node], tails, last=not precedes[node])
        self.chains: int = len(tails)

    def before(self, a: int, b: int) -> bool:
        """Whether a path leads from `a` to `b`; False for a == b."""
        chain = self.chain[a]
        if chain == self.chain[b]:
            return self.position[a] < self.position[b]
        clock = self.clocks[b]
        return chain < len(clock) and clock[chain] >= self.position[a]

    def _place(self, node: int, predecessors: list[int], tails: list[int], last: bool) -> None:
        """Give `node` its clock and its chain; its predecessors have theirs."""
        chains, positions = self.chain, self.position
        tail = NOBODY
        if not last:
            # The first predecessor that ends a chain is continued: listing stream order first makes chains of streams.
            tail = next((p for p in predecessors if positions[p] == tails[chains[p]]), NOBODY)
        own, clock = (NOBODY, array("i")) if tail == NOBODY else (chains[tail], self.clocks[tail])
        for p in predecessors:
            chain, position = chains[p], positions[p]
            if chain == own or (chain < len(clock) and clock[chain] >= position):
                continue  # already known, and with it all that precedes p
            clock = _later(clock, self.clocks[p])
            if chain >= len(clock):
                clock.extend([NOBODY] * (chain + 1 - len(clock)))
            clock[chain] = position
        if last:
            chains[node], positions[node], self.clocks[node] = len(chains) + node, 0, clock  # beyond every clock
            return
        if own == NOBODY:
            # A branch that starts may continue one that ended before it. Else a program that forks a thousand times
            # would have a thousand chains, as a captured graph does not say which nodes shared a stream.
            own = next((c for c, known in enumerate(clock) if known == tails[c]), NOBODY)
        if own == NOBODY:
            own = len(tails)
            tails.append(NOBODY)
        tails[own] += 1
        chains[node], positions[node], self.clocks[node] = own, tails[own], clock


def _later(left: Clock, right: Clock) -> Clock:
    """A fresh clock, the elementwise maximum."""
    if len(left) < len(right):
        left, right = right, left
    out = left[:]
    if len(right) > 16:  # below that, numpy's calls cost more than the loop
        head = np.frombuffer(out, np.int32)[: len(right)]
        np.maximum(head, np.frombuffer(right, np.int32), out=head)
    else:
        for chain, position in enumerate(right):
            if position > out[chain]:
                out[chain] = position
    return out


def _sort(nodes: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Topological order, smallest number first, so that a program's own order survives."""
    for source, target in edges:
        if not (0 <= source < nodes and 0 <= target < nodes):
            raise ValueError(f"expected edges between nodes 0..{nodes - 1}, got the edge {source} -> {target}")
    if all(source < target for source, target in edges):
        return list(range(nodes))
    successors: list[list[int]] = [[] for _ in range(nodes)]
    waiting = [0] * nodes
    for source, target in edges:
        successors[source].append(target)
        waiting[target] += 1
    ready = [node for node in range(nodes) if not waiting[node]]
    order: list[int] = []
    while ready:
        node = heapq.heappop(ready)
        order.append(node)
        for target in successors[node]:
            waiting[target] -= 1
            if not waiting[target]:
                heapq.heappush(ready, target)
    if len(order) < nodes:
        cycle = _cycle(edges, stuck={node for node in range(nodes) if waiting[node]})
        raise ValueError(
            f"expected ordering edges without a cycle, got {' -> '.join(map(str, cycle))}: "
            "no node of it could ever start; one of these edges points the wrong way"
        )
    return order


def _cycle(edges: Sequence[tuple[int, int]], stuck: set[int]) -> list[int]:
    """One cycle, first node repeated at the end: each stuck node waits for a stuck one, so the walk meets itself."""
    waits_for = {target: source for source, target in edges if source in stuck and target in stuck}
    node = min(stuck)
    path: dict[int, None] = {}
    while node not in path:
        path[node] = None
        node = waits_for[node]
    walked = list(path)
    return [node, *reversed(walked[walked.index(node) :])]
