"""What must run before what, once groups and regions are each one step.

Enters: a graph's dataflow. Leaves: answers to two questions about a set of nodes that shall become one kernel: would it
wait for itself, and would it keep work from running beside a region? Invariant: what is outside of regions sees each
region as one step, for that is how it is launched; inside a region only the region's own nodes count.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from .dataflow import Dataflow, positions


def region_of(node: Node) -> str | None:
    """The region a node is marked for."""
    return node.meta.get("auxstream")


def regions_of(gm: GraphModule) -> tuple[str, ...]:
    """The regions a graph is marked with, in graph order."""
    return tuple(dict.fromkeys(name for node in gm.graph.nodes if (name := region_of(node)) is not None))


class Reach:
    """For every node, the set (a bit mask) it must come after, itself included."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.region = [region_of(node) for node in flow.nodes]
        self.members: dict[str, int] = {}
        for position, name in enumerate(self.region):
            if name is not None:
                self.members[name] = self.members.get(name, 0) | 1 << position
        self.in_regions = 0
        for mask in self.members.values():
            self.in_regions |= mask
        self.above = list(flow.ancestors)
        self.region_above: dict[str, int] = {}
        for position, name in enumerate(self.region):
            if name is not None:
                self.above[position] &= self.members[name]
        for name, mask in self.members.items():
            self.region_above[name] = mask
            for position in positions(mask):
                self.region_above[name] |= flow.ancestors[position]
        for name in self.members:
            self._spread(self.members[name], self.region_above[name])

    def contract(self, mask: int, region: str | None) -> None:
        """The nodes of `mask` are one step from now on."""
        above = mask
        for position in positions(mask):
            above |= self.above[position]
        if region is not None:
            for position in positions(self.members[region]):
                if self.above[position] & mask:
                    self.above[position] |= above
            return
        self._spread(mask, above)

    def _spread(self, mask: int, above: int) -> None:
        for position, name in enumerate(self.region):
            if name is None and self.above[position] & mask:
                self.above[position] |= above
        for name, before in self.region_above.items():
            if before & mask:
                self.region_above[name] = before | above

    def _before(self, position: int, region: str | None) -> int:
        """What must have run before the step that `position` belongs to, as a member of `region` sees it."""
        name = self.region[position]
        if name == region:
            return self.above[position]
        return 0 if name is None or region is not None else self.region_above[name]

    def cyclic(self, mask: int, region: str | None) -> bool:
        """Whether a path leaves the set and comes back."""
        for position in positions(mask):
            for before in self.flow.predecessors[position]:
                if not mask >> before & 1 and self._before(before, region) & mask:
                    return True
        return False

    def delays(self, mask: int, region: str | None) -> bool:
        """Note "a group and the regions beside it". A kernel runs when its last operand is there. Should one member
        wait for a region, then nothing that does not wait for it may want a result of the group: it could have run
        beside the region, and would now run behind it."""
        if region is not None:
            return False
        waited = 0
        for position in positions(mask):
            waited |= self.above[position] & self.in_regions
        if not waited:
            return False
        for position in positions(mask):
            for user in self.flow.nodes[position].users:
                other = self.flow.index[user]
                if user.op == "output" or mask >> other & 1:
                    continue
                name = self.region[other]
                if waited & ~(self.above[other] if name is None else self.region_above[name]):
                    return True
        return False
