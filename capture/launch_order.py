"""The order in which a graph with regions is enqueued.

Enters: a graph's dataflow and the node sets that shall run on lanes. Leaves: a list of `Step`s: each node outside the
blocks once, and a fork, a body and a join for each block. Pure: the graph is not touched. Invariants: the steps are a
linear extension of the dataflow's edges; inputs come first, in their own order; what a block waits for precedes its
fork; what waits for a block follows its join.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from ..kernels.dataflow import Dataflow, positions
from ..kernels.routing import Weights
from ..runtime.errors import RegionError

LaunchOrder = Literal["caller_first", "aux_first"]
ForkAt = Literal["live_in", "first_product"]
_ALREADY_THERE = ("get_attr", "placeholder")


@dataclass(frozen=True, slots=True)
class Block:
    """The nodes of one region as a mask over the dataflow's positions."""

    name: str
    mask: int


@dataclass(frozen=True, slots=True)
class Step:
    """A node, by its position in the dataflow, or one of the three steps of a block, by the block's number."""

    kind: Literal["node", "fork", "body", "join"]
    at: int


def make_block(flow: Dataflow, name: str, nodes: Sequence[Node], fork_at: ForkAt) -> Block:
    """The nodes as one block: elements of tuples go where the tuple goes, and what has no work to do stays out.

    Raises RegionError when other nodes lie between the block's own: it could not be enqueued in one piece.
    """
    mask = flow.mask(node for node in nodes if node.op not in _ALREADY_THERE)
    if fork_at == "first_product":
        product = next(positions(mask & Weights.of(flow).products), None)
        if product is not None:
            mask &= ~flow.ancestors[product] | 1 << product
    for position in positions(mask):
        for user in flow.nodes[position].users:
            if user.target is operator.getitem:
                mask |= 1 << flow.index[user]
    for position in positions(mask):
        node = flow.nodes[position]
        if node.target is operator.getitem and not any(mask >> flow.index[a] & 1 for a in node.all_input_nodes):
            mask &= ~(1 << position)
    above = 0
    for position in positions(mask):
        above |= flow.ancestors[position]
    between = above & flow.descendants(mask) & ~mask
    if between:
        culprit = flow.select(between)[0]
        raise RegionError(
            f"region {name!r} cannot run in one piece",
            expected="no work outside the region between two of its nodes",
            came=f"{culprit.name} ({culprit.target}), which waits for the region and which the region waits for",
            remedy=f"mark {culprit.name} too, or make two regions",
        )
    return Block(name, mask)


def launch_order(flow: Dataflow, blocks: Sequence[Block], order: LaunchOrder) -> list[Step]:
    """Fork as soon as what a block waits for is there, then the work beside it, then the block; join as late as can be.

    "aux_first" puts the block ahead of the work beside it. Nodes far from any block stay where they are.
    """
    units = _Units(flow, blocks)
    sequence = units.sorted()
    for number in range(len(blocks)):
        sequence = _arranged(units, sequence, number, order)
    for number in range(len(blocks)):
        join = units.join(number)
        sequence.remove(join)
        consumer = next(index for index, unit in enumerate(sequence) if join in units.before[unit])
        sequence.insert(consumer, join)
    # The order of the inputs is the graph's signature: they keep it, whatever moved ahead of a fork.
    inputs = [unit for unit in range(units.count) if flow.nodes[unit].op == "placeholder"]
    return [units.step(unit) for unit in dict.fromkeys((*inputs, *sequence))]


class _Units:
    """The graph with each block contracted to fork, body and join, as numbers: nodes first, then three per block."""

    def __init__(self, flow: Dataflow, blocks: Sequence[Block]) -> None:
        self.flow = flow
        self.blocks = blocks
        self.count = len(flow.nodes)
        self.block_of = {position: k for k, block in enumerate(blocks) for position in positions(block.mask)}
        self.before: dict[int, set[int]] = {}
        self.free = flow.constants | flow.symbolic | flow.mask(n for n in flow.nodes if flow.is_view(n))
        for k, block in enumerate(blocks):
            self.before[self.fork(k)] = set()
            self.before[self.body(k)] = {self.fork(k)}
            self.before[self.join(k)] = {self.body(k)}
            if sum(1 for p in positions(block.mask) if self.block_of[p] != k):
                raise RegionError(
                    f"region {block.name!r} shares nodes with another region",
                    expected="each node in one region at most",
                    remedy="mark them as one region",
                )
        for position, node in enumerate(flow.nodes):
            own = self.block_of.get(position)
            unit = position if own is None else self.body(own)
            waits = self.before.setdefault(unit, set())
            for other in flow.predecessors[position]:
                theirs = self.block_of.get(other)
                if theirs is not None and theirs == own:
                    continue
                after = other if theirs is None else self.join(theirs)
                # Parameters and inputs are there from the start: the fork need not wait for them.
                if own is None or flow.nodes[other].op in _ALREADY_THERE or flow.symbolic >> other & 1:
                    waits.add(after)
                else:
                    self.before[self.fork(own)].add(after)
            if node.op == "output":
                waits.update(self.join(k) for k in range(len(blocks)))

    def fork(self, k: int) -> int:
        return self.count + 3 * k

    def body(self, k: int) -> int:
        return self.count + 3 * k + 1

    def join(self, k: int) -> int:
        return self.count + 3 * k + 2

    def step(self, unit: int) -> Step:
        if unit < self.count:
            return Step("node", unit)
        k, kind = divmod(unit - self.count, 3)
        return Step("fork" if kind == 0 else "body" if kind == 1 else "join", k)

    def real_work_before(self, unit: int) -> set[int]:
        """What `unit` waits for, looking through views and constants, which cost nothing to move up with it."""
        found: set[int] = set()
        pending = list(self.before[unit])
        while pending:
            other = pending.pop()
            if other < self.count and self.free >> other & 1:
                pending.extend(self.before[other])
            else:
                found.add(other)
        return found

    def sorted(self) -> list[int]:
        """The graph's own order, with each block where its first node stood."""

        def rank(unit: int) -> tuple[float, int]:
            step = self.step(unit)
            if step.kind == "node":
                return float(step.at), unit
            return next(positions(self.blocks[step.at].mask)) - 0.5, unit

        after: dict[int, list[int]] = {}
        waiting: dict[int, int] = {}
        for unit, before in self.before.items():
            waiting[unit] = len(before)
            for other in before:
                after.setdefault(other, []).append(unit)
        ready = [rank(unit) for unit, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        sequence: list[int] = []
        while ready:
            _, unit = heapq.heappop(ready)
            sequence.append(unit)
            for later in after.get(unit, ()):
                waiting[later] -= 1
                if waiting[later] == 0:
                    heapq.heappush(ready, rank(later))
        if len(sequence) < len(self.before):
            stuck = sorted({self.blocks[self.step(u).at].name for u, n in waiting.items() if n and u >= self.count})
            raise RegionError(
                f"the regions {', '.join(stuck)} wait for each other",
                expected="regions that can be enqueued one after the other",
                came="each needs a result of the other",
                remedy="mark them as one region, or split them where they exchange results",
            )
        return sequence


def _arranged(units: _Units, sequence: list[int], number: int, order: LaunchOrder) -> list[int]:
    """`sequence` with the stretch around one block in order: what it needs, fork, what runs beside it, body, join."""
    fork, body, join = units.fork(number), units.body(number), units.join(number)
    at = {unit: index for index, unit in enumerate(sequence)}
    start = min(at[fork], 1 + max((at[unit] for unit in units.real_work_before(fork)), default=-1))
    end = next(at[unit] for unit in sequence[at[body] :] if join in units.before[unit])
    window = sequence[start:end]
    needed, waiting = {fork}, {body, join}
    for unit in window:
        if units.before[unit] & waiting:
            waiting.add(unit)
    for unit in reversed(window):
        # Parameters that only the body names must stand somewhere ahead of it.
        if unit in needed or unit in units.before[body]:
            needed.update((unit, *units.before[unit]))
    first = [unit for unit in window if unit in needed and unit != fork]
    beside = [unit for unit in window if unit not in needed and unit not in waiting]
    late = [unit for unit in window if unit in waiting and unit not in (body, join)]
    middle = [body, *beside, join] if order == "aux_first" else [*beside, body, join]
    return [*sequence[:start], *first, fork, *middle, *late, *sequence[end:]]
