"""Which branches of a graph run on lanes, so that among a few graphs every branch has been on one.

Enters: a traced graph. Leaves: `Layout`s, each the regions of one graph: shared experts first, and beside them one side
of every further pair that can be laid into the same graph; what cannot goes into the next layout. Invariant: of every
pair with products on both sides, one side is (in) a region of some layout, and each layout can be inserted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from ..capture.branches import BranchPair, find_branches
from ..capture.mark import mark_multi_stream_moe_shared_experts
from ..capture.proposals import Region, mark
from ..capture.schedule import insert_regions
from ..kernels.derive import copy_of
from ..runtime.errors import RegionError


@dataclass(slots=True)
class Layout:
    """The regions of one graph: names of their nodes, by region."""

    regions: dict[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])

    def marked(self, gm: GraphModule) -> GraphModule:
        """A copy of the graph over the same weights, with the regions marked as the marker marks shared experts."""
        copied = copy_of(gm)
        mark(copied, [Region(name, tuple(nodes)) for name, nodes in self.regions.items()])
        return copied

    def takes(self, gm: GraphModule, name: str, nodes: frozenset[str]) -> bool:
        """Add a region, if it can run beside the others."""
        if any(nodes & other for other in self.regions.values()):
            return False
        wider = Layout({**self.regions, name: nodes})
        try:
            insert_regions(wider.marked(gm))
        except RegionError:
            return False
        self.regions[name] = nodes
        return True


def shared_experts(gm: GraphModule) -> Layout:
    """Shared experts alone."""
    marked = mark_multi_stream_moe_shared_experts(copy_of(gm))
    return Layout({region.name: _names(region.nodes) for region in marked})


def layouts(gm: GraphModule) -> list[Layout]:
    """Few layouts that hold every branch with products; at least one, which may have no region."""
    found = [shared_experts(gm)]
    for number, pair in enumerate(find_branches(gm)):
        sides = _sides(pair)
        if sides and not any(side <= region for side in sides for known in found for region in known.regions.values()):
            name = f"pair.{number}"
            if not any(layout.takes(gm, name, side) for layout in found for side in sides):
                found.append(Layout())
                assert any(found[-1].takes(gm, name, side) for side in sides), f"{pair} cannot run beside the rest"
    return found


def _sides(pair: BranchPair) -> list[frozenset[str]]:
    """The sides of a pair with products on both, what moves less first."""
    if not all(branch.flops for branch in pair.branches):
        return []
    return [_names(branch.nodes) for branch in sorted(pair.branches, key=lambda branch: branch.bytes)]


def _names(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset(node.name for node in nodes)
