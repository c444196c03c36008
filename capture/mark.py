"""The marker: which branches of a mixture-of-experts graph are shared experts.

Enters: a traced graph. Leaves: the same graph with `meta["auxstream"]` (the region's name) and
`meta["skip_mlir_fusion"]` (True) on the nodes of each shared expert, and a `MarkedRegion` for each. Nothing else is
changed. Invariant: a region is one side of a `BranchPair`, so no node of it is ordered against the routed side.

What counts is structure, not op names:
- A side *routes* when a selection's indices (top-k: float in, integers out) reach, inside the side, an op that consumes
  a stacked weight (a constant of three or more dimensions), or when it holds an opaque op that consumes two of those.
- The other side is a *shared expert* when it does not route, multiplies activations by a weight, writes nothing outside
  itself, and starts from floating-point values that the router or its experts also start from. So tables of positions,
  masks and norms are none, nor is whatever runs beside whole layers: between the fork and the selection lie at most two
  weights (a latent projection and the router), and attention alone has two before the router.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Container
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ..kernels.dataflow import Dataflow, positions
from ..kernels.routing import MARKED, Routing, Weights, is_floating, routings
from ..runtime.errors import RegionError
from .branches import Candidate, candidates
from .module_paths import common_path

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
    """Mark every shared expert of `gm`.

    Args:
        gm: an ATen graph whose nodes have `meta["val"]`. Nodes get `meta["auxstream"]` and `meta["skip_mlir_fusion"]`;
            nothing else is changed.

    Returns:
        the regions in graph order; none for a model without shared experts.

    Raises:
        RegionError: the graph has fused kernels: the mark is to keep them off branches, and comes too late.
    """
    fused = next((node for node in gm.graph.nodes if node.meta.get("auxstream_fused")), None)
    if fused is not None:
        raise RegionError(
            "this graph has fused kernels already",
            expected="the marker first: it keeps fused kernels off branches that will run on auxiliary streams",
            came=fused.name,
            remedy="call mark_multi_stream_moe_shared_experts(gm) before fuse_elementwise(gm)",
        )
    regions = find_shared_experts(Dataflow.of(gm))
    gm.meta[MARKED] = True
    for region in regions:
        for node in region.nodes:
            node.meta["auxstream"] = region.name
            node.meta["skip_mlir_fusion"] = True
    return regions


def find_shared_experts(flow: Dataflow) -> tuple[MarkedRegion, ...]:
    """The same, and nothing is marked."""
    weights = Weights.of(flow)
    found = tuple(routings(flow, weights))
    best: dict[int, Candidate] = {}
    if found:
        for candidate in candidates(flow):
            for shared, routed in ((candidate.one, candidate.other), (candidate.other, candidate.one)):
                for routing in found:
                    # The smallest pair is the block the routing belongs to; larger ones reach across layers.
                    size = (shared | routed).bit_count()
                    known = best.get(routing.expert)
                    if known is not None and (known.one | known.other).bit_count() <= size:
                        continue
                    if _routes(routing, routed) and _is_shared_expert(flow, weights, found, shared, routed, routing):
                        best[routing.expert] = Candidate(candidate.join, shared, routed)
    regions: list[MarkedRegion] = []
    taken = 0
    for expert in sorted(best):
        chosen = best[expert]
        nodes = with_own_constants(flow, without_leading_getitems(flow, chosen.one))
        if nodes & taken:
            continue
        taken |= nodes
        name = _name(flow.select(nodes), len(regions), {region.name for region in regions})
        regions.append(MarkedRegion(name, flow.select(nodes), flow.select(chosen.other), chosen.join))
    return tuple(regions)


def _routes(routing: Routing, side: int) -> bool:
    return bool(side >> routing.selection & 1 and side >> routing.expert & 1)


def _is_shared_expert(
    flow: Dataflow, weights: Weights, found: tuple[Routing, ...], side: int, routed: int, routing: Routing
) -> bool:
    if not side & weights.products or side & flow.barriers or any(_routes(other, side) for other in found):
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
            known_to_experts = flow.ancestors[routing.expert] >> other & 1
            if not known_to_experts or not (is_floating(node) if leading else is_floating(flow.nodes[other])):
                return False
    return _depth(flow, weights, routed, routing) <= _WEIGHTS_BEFORE_SELECTION


def _depth(flow: Dataflow, weights: Weights, routed: int, routing: Routing) -> int:
    """The longest chain of weights between the fork and the selection."""
    depth: dict[int, int] = {}
    for position in positions(routed & flow.ancestors[routing.selection]):
        before = max((depth.get(other, 0) for other in flow.predecessors[position]), default=0)
        # An opaque op is where the selection happens, not a step towards it.
        counts = position != routing.selection and weights.products >> position & 1
        depth[position] = before + (1 if counts else 0)
    return depth.get(routing.selection, 0)


def without_leading_getitems(flow: Dataflow, side: int) -> int:
    """The elements of a tuple made outside stay outside: tensors cross the border, tuples do not."""
    for position in positions(side):
        node = flow.nodes[position]
        if node.target is operator.getitem and not any(side >> flow.index[a] & 1 for a in node.all_input_nodes):
            side &= ~(1 << position)
    return side


def with_own_constants(flow: Dataflow, side: int) -> int:
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
    found = re.search(r"(?:^|\.)([A-Za-z_]\w*)\.(\d+)(?:\.|$)", common_path(nodes))
    base = f"layers.{found.group(2)}.shared" if found else f"moe.{count}.shared"
    return unique(base, used)


def unique(base: str, used: Container[str]) -> str:
    """`base`, or with the first number behind it that makes a name of its own."""
    name, again = base, 1
    while name in used:
        name, again = f"{base}.{again}", again + 1
    return name
