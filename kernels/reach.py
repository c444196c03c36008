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
    """For every node, the set (a bit mask) it must come after, itself included. Inputs, constants and sizes, which are
    there from the start, are left out of the sets."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        given = flow.mask(node for node in flow.nodes if node.op in ("placeholder", "get_attr"))
        work = ~(given | flow.constants | flow.symbolic)
        self.region = [region_of(node) for node in flow.nodes]
        self.members: dict[str, int] = {}
        for position, name in enumerate(self.region):
            if name is not None:
                self.members[name] = self.members.get(name, 0) | 1 << position
        self.in_regions = 0
        for name, mask in self.members.items():
            self.members[name] = mask & work
            self.in_regions |= mask & work
        self.after: list[list[int]] = [[] for _ in flow.nodes]
        self.above: list[int] = []
        for position, name in enumerate(self.region):
            self.above.append(flow.ancestors[position] & work & (-1 if name is None else self.members[name]))
            for other in flow.predecessors[position]:
                self.after[other].append(position)
        self.region_above: dict[str, int] = {}
        for name, mask in self.members.items():
            self.region_above[name] = mask
            for position in positions(mask):
                self.region_above[name] |= flow.ancestors[position] & work
        for name, mask in self.members.items():
            self._spread(mask, self.region_above[name])

    def contract(self, mask: int, region: str | None) -> None:
        """The nodes of `mask` are one step from now on."""
        above = self._above(mask)
        if all(above & ~self.above[position] & ~mask == 0 for position in positions(mask)):
            return  # whoever comes after one of them comes after all that it waits for already
        if region is None:
            self._spread(mask, above)
            return
        for position in positions(self.members[region]):
            if self.above[position] & mask:
                self.above[position] |= above

    def _spread(self, mask: int, above: int) -> None:
        for position, name in enumerate(self.region):
            if name is None and self.above[position] & mask:
                self.above[position] |= above
        for name, before in self.region_above.items():
            if before & mask:
                self.region_above[name] = before | above

    def _above(self, mask: int) -> int:
        above = mask
        for position in positions(mask):
            above |= self.above[position]
        return above

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
        """Note "a group and the regions beside it". A kernel runs when its last operand is there. So if one member
        waits for a region, nothing that does not wait for it may want another member: it could have run beside the
        region, and would now run behind it. And if a region waits for one member, no other may wait for more than the
        region does: the region could have run beside that, and would now run behind it.
        """
        if region is not None:
            return False
        above = self._above(mask)
        waited = above & self.in_regions
        for position in positions(mask) if waited else ():
            for other in self.after[position]:
                name = self.region[other]
                seen = self.above[other] if name is None else self.region_above[name]
                if not mask >> other & 1 and self.flow.nodes[other].op != "output" and waited & ~seen:
                    return True
        return any(before & mask and above & ~mask & ~before for before in self.region_above.values())
