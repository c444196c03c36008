"""What must run before what, once groups and regions are each one step.

Enters: a graph's dataflow. Leaves: answers to two questions about a set of nodes that shall become one kernel: would it
wait for itself, and would it keep work from running beside a region? Invariant: what is outside of regions sees each
region as one step, for that is how it is launched; inside a region only the region's own nodes count.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from .dataflow import Dataflow, positions


def region_of(node: Node) -> str | None:
    """The region a node is marked for."""
    return node.meta.get("auxstream")


def regions_of(gm: GraphModule) -> tuple[str, ...]:
    """The regions a graph is marked with, in graph order."""
    return tuple(dict.fromkeys(name for node in gm.graph.nodes if (name := region_of(node)) is not None))


class Order:
    """A partial order of steps: sets (bit masks) of what each comes after and of what comes after it, both with itself.
    Sets of steps can be made one."""

    def __init__(self, predecessors: Sequence[Sequence[int]], among: int) -> None:
        self.above: list[int] = []
        for position, before in enumerate(predecessors):
            mask = 1 << position
            for other in before:
                mask |= self.above[other]
            self.above.append(mask & among)
        self.below = [0] * len(predecessors)
        for position in reversed(range(len(predecessors))):
            self.below[position] = (self.below[position] | 1 << position) & among
            for other in predecessors[position]:
                self.below[other] |= self.below[position]

    def contract(self, mask: int) -> None:
        """The steps of `mask` are one from now on: whatever precedes one of them precedes whatever follows another."""
        above, always_above = _spans(self.above, mask)
        below, always_below = _spans(self.below, mask)
        # What follows all of them comes after all that precedes one of them already.
        for position in positions(below & ~always_below | mask):
            self.above[position] |= above
        for position in positions(above & ~always_above | mask):
            self.below[position] |= below

    def cyclic(self, mask: int) -> bool:
        """Whether a path leaves the set and comes back."""
        return bool(_spans(self.above, mask)[0] & _spans(self.below, mask)[0] & ~mask)


def _spans(sets: Sequence[int], mask: int) -> tuple[int, int]:
    """The union and the intersection of the sets of some steps."""
    union, common = 0, -1
    for position in positions(mask):
        union |= sets[position]
        common &= sets[position]
    return union, common


class Reach:
    """The order of a graph's nodes, its regions contracted, and that of each region's nodes among themselves. Inputs,
    constants and sizes, which are there from the start, are in neither."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        given = flow.mask(node for node in flow.nodes if node.op in ("placeholder", "get_attr"))
        work = ((1 << len(flow.nodes)) - 1) & ~(given | flow.constants | flow.symbolic)
        self.outer = Order(flow.predecessors, work)
        self.inner: dict[str, Order] = {}
        self.members: dict[str, int] = {}
        for position in positions(work):
            name = region_of(flow.nodes[position])
            if name is not None:
                self.members[name] = self.members.get(name, 0) | 1 << position
        for name, mask in self.members.items():
            self.inner[name] = Order(flow.predecessors, mask)
            self.outer.contract(mask)
        self.after: list[list[int]] = [[] for _ in flow.nodes]
        for position, before in enumerate(flow.predecessors):
            for other in before:
                self.after[other].append(position)

    def contract(self, mask: int, region: str | None) -> None:
        """The nodes of `mask` are one step from now on."""
        self._order(region).contract(mask)

    def cyclic(self, mask: int, region: str | None) -> bool:
        """Whether a path leaves the set and comes back."""
        return self._order(region).cyclic(mask)

    def _order(self, region: str | None) -> Order:
        return self.outer if region is None else self.inner[region]

    def delays(self, mask: int, region: str | None) -> bool:
        """Note "a group and the regions beside it". A kernel runs when its last operand is there. So if one member
        waits for a region, nothing that does not wait for it may want another member: it could have run beside the
        region, and would now run behind it. And if a region waits for one member, no other may wait for more than the
        region does: the region could have run beside that, and would now run behind it.
        """
        if region is not None or not self.members:
            return False
        above, _ = _spans(self.outer.above, mask)
        regions = list(self.members.values())
        waited = sum(above & inside for inside in regions)
        for position in positions(mask) if waited else ():
            for other in self.after[position]:
                behind = mask >> other & 1 or self.flow.nodes[other].op == "output"
                if not behind and waited & ~self.outer.above[other]:
                    return True
        for inside in regions:
            before = self.outer.above[next(positions(inside))]
            if before & mask and above & ~mask & ~before:
                return True
        return False
