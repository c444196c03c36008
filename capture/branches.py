"""Pairs of branches that may run side by side, found by structure.

Enters: a graph. Leaves: `BranchPair`s: at a join node, what only one operand needs against what only the others need.
With A_i for the ancestors of operand i, itself included, and mutation edges counted like data:
    X_i = A_i minus the other A_j        Y_i = the other A_j minus A_i
Invariant: no node of X reaches one of Y or the reverse (x before y in A_j would put x in A_j), and each is convex
(what lies between two nodes of X is in A_i, and were it in A_j so would be the first). So each side can be enqueued as
a whole. Where Y holds experts, their router is set beside X too: what of Y leads to the first expert and waits for no
expert's weights, which inherits both. No op is known by name; only the costs, by which nothing is found or left out,
know a few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ..kernels import accesses
from ..kernels.dataflow import Dataflow, positions
from ..kernels.routing import Weights, routings
from .costs import Cost, cost_of, is_stacked
from .module_paths import title


@dataclass(frozen=True, slots=True)
class Branch:
    """One side of a pair: nodes that can be enqueued in one piece, and what passes their border."""

    nodes: tuple[Node, ...]
    """In graph order."""
    live_ins: tuple[Node, ...]
    """Values made elsewhere that it reads or writes; parameters, buffers and constants made of them not listed."""
    live_outs: tuple[Node, ...]
    """Its values that others use."""
    writes: tuple[Node, ...]
    """Memory of others, caches mostly, that it writes in place."""
    cost: Cost
    title: str
    """Where it lies in the model."""

    @property
    def bytes(self) -> int:
        """What its nodes must read and write, each for itself."""
        return self.cost.bytes

    @property
    def flops(self) -> int:
        """Operations of its products."""
        return self.cost.flops

    def __str__(self) -> str:
        crossing = [("reads", self.live_ins), ("gives", self.live_outs), ("writes", self.writes)]
        said = [f"{verb} {', '.join(node.name for node in nodes)}" for verb, nodes in crossing if nodes]
        return f"{self.title} ({len(self.nodes)} ops, {self.cost}; {'; '.join(said)})"


@dataclass(frozen=True, slots=True)
class BranchPair:
    """Two branches that nothing orders, and the node where their results meet."""

    join: Node
    branches: tuple[Branch, Branch]

    @property
    def sides(self) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """The nodes of the two branches."""
        one, other = self.branches
        return one.nodes, other.nodes

    def __str__(self) -> str:
        one, other = self.branches
        return f"{one}\n  beside {other}\n  met at {self.join}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair as bit masks over the dataflow's positions: cheap to count and compare before nodes are listed."""

    join: Node
    one: int
    other: int


def find_branches(gm: GraphModule) -> list[BranchPair]:
    """Find what may run side by side.

    Args:
        gm: an ATen graph whose nodes have `meta["val"]`; it is not changed.

    Returns:
        every pair of branches with real work on both sides, in the order of their joins. A branch's `bytes` are what
        its ops read and write, each for itself; its `flops` are those of its products.
    """
    flow = Dataflow.of(gm)
    weights = Weights.of(flow)
    experts = sorted({routing.expert for routing in routings(flow, weights)})
    costs = [cost_of(flow, node) for node in flow.nodes]
    found = [c for candidate in candidates(flow) for c in (candidate, *_routers(flow, weights, experts, candidate))]
    return [BranchPair(c.join, (_branch(flow, costs, c.one), _branch(flow, costs, c.other))) for c in found]


def candidates(flow: Dataflow) -> Iterator[Candidate]:
    """The pairs at joins, as masks. Scalars of shapes, constants and mere views make no branch."""
    dropped = flow.constants | flow.symbolic
    views = 0
    for position, node in enumerate(flow.nodes):
        if node.op != "call_function":
            dropped |= 1 << position
        elif flow.is_view(node):
            views |= 1 << position
    for join in flow.nodes:
        if join.op != "output" and (flow.barriers | dropped) >> flow.index[join] & 1:
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


def _routers(flow: Dataflow, weights: Weights, experts: Sequence[int], pair: Candidate) -> Iterator[Candidate]:
    """The router of a side with experts, beside the other side: a lane for it, while the caller does the other."""
    for side, beside in ((pair.one, pair.other), (pair.other, pair.one)):
        expert = next((position for position in experts if side >> position & 1), None)
        if expert is not None and beside & weights.products:
            router = _before_experts(flow, side & flow.ancestors[expert])
            if router & weights.products:
                yield Candidate(pair.join, router, beside)


def _before_experts(flow: Dataflow, side: int) -> int:
    """What of `side` waits for no expert's weights, which may be gathered before they are multiplied by."""
    touching = before = 0
    for position in positions(side):
        if any(is_stacked(flow, argument) for argument in flow.nodes[position].all_input_nodes):
            touching |= 1 << position
        if not flow.ancestors[position] & touching:
            before |= 1 << position
    return before


def _branch(flow: Dataflow, costs: Sequence[Cost], mask: int) -> Branch:
    nodes = flow.select(mask)
    inside = frozenset(nodes)
    taken = dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in inside)
    written = frozenset[int]().union(*(flow.writes[node] for node in nodes))
    products = [node for node in nodes if costs[flow.index[node]].flops]
    return Branch(
        nodes=nodes,
        live_ins=tuple(a for a in taken if accesses.tensors(a) and not _lasts(flow, a)),
        live_outs=tuple(node for node in nodes if any(user not in inside for user in node.users)),
        writes=tuple(a for a in taken if flow.storages[a] & written),
        cost=sum((costs[flow.index[node]] for node in nodes), Cost()),
        title=title(products or nodes),
    )


def _lasts(flow: Dataflow, node: Node) -> bool:
    """Whether a value outlives any branch."""
    return node.op == "get_attr" or bool(flow.constants >> flow.index[node] & 1)
