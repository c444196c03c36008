"""The marker: which branches of a mixture-of-experts graph are shared experts.

Enters: a traced graph. Leaves: the same graph with `meta["auxstream"]` (the region's name) and
`meta["skip_mlir_fusion"]` (True) on the nodes of each shared expert, and a `MarkedRegion` for each. Nothing else is
changed. Invariant: a region is one side of a `BranchPair`, so no node of it is ordered against the routed side.

What counts is structure, not op names:
- A side *routes* when a selection's indices (top-k: float in, integers out) reach, inside the side, an op that consumes
  a stacked weight (a constant of three or more dimensions), or when it holds an opaque op that consumes two of those.
- The other side is a *shared expert* when it does not route, multiplies activations by a weight, writes nothing outside
  itself, and starts from floating-point values the router also starts from. So tables of positions, masks and norms are
  none, nor is whatever runs beside whole layers: between the fork and the selection lie at most two weights (a latent
  projection and the router), and attention alone has two before the router.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .branches import Candidate, candidates
from .dataflow import Dataflow, positions

_WEIGHTS_BEFORE_SELECTION = 2


@dataclass(frozen=True, slots=True)
class MarkedRegion:
    """A branch for an auxiliary stream: its `nodes` in graph order, the `routed` side, and where the two meet."""

    name: str
    nodes: tuple[Node, ...]
    routed: tuple[Node, ...]
    join: Node

    def __str__(self) -> str:
        return f"{self.name}: {len(self.nodes)} nodes beside {len(self.routed)}, met at {self.join}"


def mark_multi_stream_moe_shared_experts(gm: GraphModule) -> tuple[MarkedRegion, ...]:
    """Mark every shared expert of `gm`; returns the regions in graph order, none for a model without shared experts."""
    flow = Dataflow.of(gm)
    weights = Weights.of(flow)
    routings = tuple(_routings(flow, weights))
    best: dict[int, Candidate] = {}
    if routings:
        for candidate in candidates(flow):
            for shared, routed in ((candidate.one, candidate.other), (candidate.other, candidate.one)):
                for routing in routings:
                    # The smallest pair is the block the routing belongs to; larger ones reach across layers.
                    size = (shared | routed).bit_count()
                    known = best.get(routing.expert)
                    if known is not None and (known.one | known.other).bit_count() <= size:
                        continue
                    if _routes(routing, routed) and _is_shared_expert(flow, weights, routings, shared, routed, routing):
                        best[routing.expert] = Candidate(candidate.join, shared, routed)
    regions: list[MarkedRegion] = []
    taken = 0
    for expert in sorted(best):
        chosen = best[expert]
        nodes = _with_own_constants(flow, _without_leading_getitems(flow, chosen.one))
        if nodes & taken:
            continue
        taken |= nodes
        name = _name(flow.select(nodes), len(regions), {region.name for region in regions})
        regions.append(MarkedRegion(name, flow.select(nodes), flow.select(chosen.other), chosen.join))
    for region in regions:
        for node in region.nodes:
            node.meta["auxstream"] = region.name
            node.meta["skip_mlir_fusion"] = True
    return tuple(regions)


@dataclass(frozen=True, slots=True)
class Weights:
    """Which nodes consume weights, as masks."""

    products: int
    """Products of floating-point activations with a matrix or more."""
    stacked: int
    """Where activations meet a weight of three or more dimensions, as experts are stored, or a part picked from it."""
    opaque: int
    """Ops from outside ATen that consume two or more stacked weights: a fused mixture of experts."""

    @staticmethod
    def of(flow: Dataflow) -> Weights:
        products = stacked = opaque = 0
        picked: set[Node] = set()  # computed from stacked weights and indices: experts' weights before any activation
        for position, node in enumerate(flow.nodes):
            if node.op != "call_function" or flow.constants >> position & 1 or node.target is operator.getitem:
                continue
            given = [a for a in node.all_input_nodes if flow.constants >> flow.index[a] & 1]
            moving = any(_is_floating(a) for a in node.all_input_nodes if a not in given and a not in picked)
            experts = [a for a in given if _rank(flow, a) >= 3]
            if not moving and (experts or any(a in picked for a in node.all_input_nodes)):
                picked.add(node)
                continue
            pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
            if moving and not pointwise and any(_rank(flow, a) >= 2 for a in given):
                products |= 1 << position
            if not pointwise and (experts or any(a in picked for a in node.all_input_nodes)):
                stacked |= 1 << position
            aten = isinstance(node.target, OpOverload) and node.target.namespace == "aten"
            if not aten and len({flow.storages[a] for a in experts}) >= 2:
                opaque |= 1 << position
        return Weights(products, stacked, opaque)


@dataclass(frozen=True, slots=True)
class _Routing:
    """A decision which experts see a token: where it is taken, and the first op over stacked weights it reaches."""

    selection: int
    expert: int


def _routings(flow: Dataflow, weights: Weights) -> Iterator[_Routing]:
    for position, node in enumerate(flow.nodes):
        if weights.opaque >> position & 1:
            yield _Routing(position, position)
        elif _is_selection(node):
            expert = _first_expert(flow, weights, position)
            if expert is not None:
                yield _Routing(position, expert)


def _is_selection(node: Node) -> bool:
    """Integers computed from floats other than by a cast: top-k, argmax, sort, and their fused forms."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if not any(_is_integer(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))):
        return False
    if isinstance(node.target, OpOverload):
        casts = any(argument.name == "dtype" for argument in node.target._schema.arguments)
        if casts or torch.Tag.pointwise in node.target.tags:
            return False
    return any(_is_floating(argument) for argument in node.all_input_nodes)


def _first_expert(flow: Dataflow, weights: Weights, selection: int) -> int | None:
    """The first op over a stacked weight that the selection's indices reach; its values alone do not count."""
    reached = 0
    chosen = flow.nodes[selection]
    for position in range(selection + 1, len(flow.nodes)):
        before = flow.predecessors[position]
        if any(reached >> other & 1 for other in before) or _takes_indices(flow, flow.nodes[position], chosen):
            if weights.stacked >> position & 1:
                return position
            reached |= 1 << position
    return None


def _takes_indices(flow: Dataflow, node: Node, chosen: Node) -> bool:
    if chosen in node.all_input_nodes:
        value = node.meta.get("val") if node.target is operator.getitem else chosen.meta.get("val")
        return any(_is_integer(leaf) for leaf in pytree.tree_leaves(value))
    # A selection may also write its results into tensors it was given.
    memory = flow.writes[chosen]
    return any(flow.storages[a] & memory and _is_integer(a.meta.get("val")) for a in node.all_input_nodes)


def _routes(routing: _Routing, side: int) -> bool:
    return bool(side >> routing.selection & 1 and side >> routing.expert & 1)


def _is_shared_expert(
    flow: Dataflow, weights: Weights, routings: tuple[_Routing, ...], side: int, routed: int, routing: _Routing
) -> bool:
    if not side & weights.products or side & flow.barriers or any(_routes(other, side) for other in routings):
        return False
    for position in positions(side):
        node = flow.nodes[position]
        for storage in flow.writes[node]:
            owner = flow.owner.get(storage)
            if owner is None or not side >> flow.index[owner] & 1:
                return False
        # A getitem of a fork with several results is a name for one of them: look through it.
        leading = node.target is operator.getitem
        for other in flow.predecessors[position]:
            if (side | flow.constants | flow.symbolic) >> other & 1:
                continue
            known_to_router = flow.ancestors[routing.selection] >> other & 1
            if not known_to_router or not (_is_floating(node) if leading else _is_floating(flow.nodes[other])):
                return False
    return _depth(flow, weights, routed, routing) <= _WEIGHTS_BEFORE_SELECTION


def _depth(flow: Dataflow, weights: Weights, routed: int, routing: _Routing) -> int:
    """The longest chain of weights between the fork and the selection."""
    depth: dict[int, int] = {}
    for position in positions(routed & flow.ancestors[routing.selection]):
        before = max((depth.get(other, 0) for other in flow.predecessors[position]), default=0)
        # An opaque op is where the selection happens, not a step towards it.
        counts = position != routing.selection and weights.products >> position & 1
        depth[position] = before + (1 if counts else 0)
    return depth.get(routing.selection, 0)


def _without_leading_getitems(flow: Dataflow, side: int) -> int:
    """The elements of a tuple made outside stay outside: tensors cross the border, tuples do not."""
    for position in positions(side):
        node = flow.nodes[position]
        if node.target is operator.getitem and not any(side >> flow.index[a] & 1 for a in node.all_input_nodes):
            side &= ~(1 << position)
    return side


def _with_own_constants(flow: Dataflow, side: int) -> int:
    """Constant work that only the branch uses (a weight's cast) travels with it, or the fork would wait for it."""
    while True:
        more = side
        for position in positions(side):
            for other in flow.predecessors[position]:
                node = flow.nodes[other]
                computed = flow.constants >> other & 1 and node.op == "call_function"
                if computed and all(more >> flow.index[user] & 1 for user in node.users):
                    more |= 1 << other
        if more == side:
            return side
        side = more


def _name(nodes: tuple[Node, ...], count: int, used: set[str]) -> str:
    """`layers.<i>.shared` from the module path the nodes have in common, else `moe.<k>.shared`; always unique."""
    paths = [path.split(".") for node in nodes if (path := _module_path(node))]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    found = re.search(r"(?:^|\.)([A-Za-z_]\w*)\.(\d+)(?:\.|$)", ".".join(common))
    base = f"layers.{found.group(2)}.shared" if found else f"moe.{count}.shared"
    name, again = base, 1
    while name in used:
        name, again = f"{base}.{again}", again + 1
    return name


def _module_path(node: Node) -> str:
    """The dotted path of the innermost module a node was traced in; subscripts and getattr calls become dots."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"""\[['"]?(\w+)['"]?\]""", r".\1", path)


def _is_floating(node: Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)


def _is_integer(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.int64, torch.int32, torch.int16)


def _rank(flow: Dataflow, node: Node) -> int:
    """Dimensions of a weight as consumed, capped by those it was stored with: broadcasting a vector makes no matrix."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    stored = 0
    for position in positions(flow.ancestors[flow.index[node]]):
        source = flow.nodes[position]
        if source.op == "get_attr" and isinstance(source.meta.get("val"), Tensor):
            stored = max(stored, source.meta["val"].dim())
    return min(value.dim(), stored)
