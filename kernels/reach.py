"""What must run before what, once groups and regions are each one step.

Enters: a graph's dataflow. Leaves: answers to two questions about a set of nodes that shall become one kernel: would it
wait for itself, and would it keep work from running beside a region? Invariant: what is outside of regions sees each
region as one step, for that is how it is launched; inside a region only the region's own nodes count.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from .dataflow import Dataflow, positions
from .fold import foldable


def region_of(node: Node) -> str | None:
    """The region a node is marked for."""
    return node.meta.get("auxstream")


def regions_of(gm: GraphModule) -> tuple[str, ...]:
    """The regions a graph is marked with, in graph order."""
    return tuple(dict.fromkeys(name for node in gm.graph.nodes if (name := region_of(node)) is not None))


class Order:
    """A partial order of steps, which are single nodes at first; several steps can be made one.

    Sets of nodes are bit masks. A step's first node speaks for it: at its position are what the step comes after and
    what comes after it, both with itself; and in these sets a step is there if its first node is. Invariant: a mask
    that is asked about or contracted holds whole steps.
    """

    def __init__(self, predecessors: Sequence[Sequence[int]], among: int) -> None:
        self.first = list(range(len(predecessors)))  # of the step that a node is in
        self.firsts = among
        self.above = [0] * len(predecessors)
        self.below = [0] * len(predecessors)
        span = range(max((among & -among).bit_length() - 1, 0), among.bit_length())
        for position in span:
            mask = 1 << position
            for other in predecessors[position]:
                mask |= self.above[other]
            self.above[position] = mask & among
        for position in reversed(span):
            self.below[position] = (self.below[position] | 1 << position) & among
            for other in predecessors[position]:
                self.below[other] |= self.below[position]

    def contract(self, mask: int) -> None:
        """The steps of `mask` are one from now on: whatever precedes one of them precedes whatever follows another."""
        above, always_above = self._spans(self.above, mask)
        below, always_below = self._spans(self.below, mask)
        first, others = next(positions(mask)), self.firsts & ~mask
        earlier, later = above & others, below & others
        # What follows all of the steps knows enough. So does what follows the first, if all came after the same.
        aware_later = always_below if earlier & ~always_above else self.below[first]
        aware_earlier = always_above if later & ~always_below else self.above[first]
        for position in positions(later & ~aware_later):
            self.above[position] |= above
        for position in positions(earlier & ~aware_earlier):
            self.below[position] |= below
        self.above[first], self.below[first] = above, below
        self.firsts = others | 1 << first
        for position in positions(mask):
            self.first[position] = first

    def cyclic(self, mask: int) -> bool:
        """Whether a path leaves the set and comes back."""
        return bool(self.preceding(mask) & self.following(mask) & ~mask)

    def preceding(self, mask: int) -> int:
        """What some step of `mask` comes after, and the steps themselves."""
        return self._spans(self.above, mask)[0]

    def following(self, mask: int) -> int:
        """What comes after some step of `mask`, and the steps themselves."""
        return self._spans(self.below, mask)[0]

    def _spans(self, sets: Sequence[int], mask: int) -> tuple[int, int]:
        """The union and the intersection of the sets of some steps."""
        union, common = 0, -1
        for position in positions(mask & self.firsts):
            union |= sets[position]
            common &= sets[position]
        return union, common


class Reach:
    """The order of a graph's nodes, its regions contracted, and that of each region's nodes among themselves. Inputs,
    sizes, and constants that will be folded (`settled`), which are there from the start, are in neither."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        given = flow.mask(node for node in flow.nodes if node.op in ("placeholder", "get_attr"))
        self.settled = foldable(flow)
        work = ((1 << len(flow.nodes)) - 1) & ~(given | self.settled | flow.symbolic)
        self.outer = Order(flow.predecessors, work)
        members: dict[str, int] = {}
        for position in positions(work):
            name = region_of(flow.nodes[position])
            if name is not None:
                members[name] = members.get(name, 0) | 1 << position
        self.inner = {name: Order(flow.predecessors, mask) for name, mask in members.items()}
        self.marked = 0
        for mask in members.values():
            self.outer.contract(mask)
            self.marked |= mask
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
        if region is not None or not self.marked:
            return False
        above, below = self.outer.preceding(mask), self.outer.following(mask)
        waited = above & self.marked & self.outer.firsts
        for position in positions(mask) if waited else ():
            for other in self.after[position]:
                behind = mask >> other & 1 or self.flow.nodes[other].op == "output"
                if not behind and waited & ~self.outer.above[self.outer.first[other]]:
                    return True
        late = above & ~mask & self.outer.firsts & ~self.flow.constants  # which wait for nothing
        return any(late & ~self.outer.above[inside] for inside in positions(below & self.marked & self.outer.firsts))
