"""Pairs of branches that may run side by side, found by structure.

Enters: a graph. Leaves: `BranchPair`s: at a join node, what only one operand needs against what only the others need.
With A_i for the ancestors of operand i, itself included, and mutation edges counted like data:
    X_i = A_i minus the other A_j        Y_i = the other A_j minus A_i
Invariant: no node of X reaches one of Y or the reverse (x before y in A_j would put x in A_j), and each is convex
(what lies between two nodes of X is in A_i, and were it in A_j so would be the first). So each side can be enqueued as
a whole. No op is known by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ..kernels.dataflow import Dataflow


@dataclass(frozen=True, slots=True)
class BranchPair:
    """Two sets of nodes, each in graph order, that nothing orders, and the node where their results meet."""

    join: Node
    sides: tuple[tuple[Node, ...], tuple[Node, ...]]

    def __str__(self) -> str:
        one, other = self.sides
        return f"{one[0]}..{one[-1]} ({len(one)}) beside {other[0]}..{other[-1]} ({len(other)}), met at {self.join}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair as bit masks over the dataflow's positions: cheap to count and compare before nodes are listed."""

    join: Node
    one: int
    other: int


def find_branches(gm: GraphModule) -> list[BranchPair]:
    """Every pair of branches with real work on both sides, in the order of their joins."""
    flow = Dataflow.of(gm)
    return [BranchPair(c.join, (flow.select(c.one), flow.select(c.other))) for c in candidates(flow)]


def candidates(flow: Dataflow) -> Iterator[Candidate]:
    """The pairs of `find_branches` as masks. Scalars of shapes, constants and mere views make no branch."""
    dropped = flow.constants | flow.symbolic
    views = 0
    for position, node in enumerate(flow.nodes):
        if node.op in ("get_attr", "placeholder", "output"):
            dropped |= 1 << position
        elif flow.is_view(node):
            views |= 1 << position
    for position, join in enumerate(flow.nodes):
        if join.op != "call_function" or (flow.barriers | dropped) >> position & 1:
            continue
        above = _operands(flow, join)
        seen: set[frozenset[int]] = set()
        for i, own in enumerate(above):
            others = 0
            for j, ancestors in enumerate(above):
                if j != i:
                    others |= ancestors
            one, other = own & ~others & ~dropped, others & ~own & ~dropped
            # With two operands the second pair is the first one turned around.
            if one & ~views and other & ~views and frozenset((one, other)) not in seen:
                seen.add(frozenset((one, other)))
                yield Candidate(join, one, other)


def _operands(flow: Dataflow, join: Node) -> list[int]:
    """For each operand of `join`, everything that must have run for it to hold the value the join reads.

    That is more than the operand's own ancestors when its memory was written after it was made.
    """
    operands = [a for a in join.all_input_nodes if not flow.constants >> flow.index[a] & 1]
    given = {flow.index[operand] for operand in operands}
    through_memory = [flow.nodes[p] for p in flow.predecessors[flow.index[join]] if p not in given]
    above: list[int] = []
    for operand in operands:
        mask = flow.ancestors[flow.index[operand]]
        for other in through_memory:
            if (flow.reads[other] | flow.writes[other]) & flow.storages[operand]:
                mask |= flow.ancestors[flow.index[other]]
        above.append(mask)
    return above
