"""Which nodes become one kernel.

Enters: a graph with marks and without regions. Leaves: `Group`s of fusible nodes that share a row domain. Invariants:
contracting all groups, and all marked regions, leaves the graph free of cycles (so no group straddles an opaque op or
a mutation on its way); a group lies inside one region or outside of all; and no group makes work that a region could
overlap wait for that region. The order of the nodes in the graph does not matter, only names and edges do: so fusing
before regions are inserted and after gives the same groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from .build import Kind
from .dataflow import Dataflow
from .lower import CONCATENATION, FREE, REDUCING, ROW_RESULT, Call, fusible
from .pointwise import POINTWISE
from .reach import Reach, region_of
from .views import is_view, keeps_rows, memory_order, product, row_dims, same, width_of

MOST_OPERANDS = 40
MOST_MEMBERS = 160


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Nodes that become one kernel."""

    nodes: tuple[Node, ...]
    """In an order that computes operands first."""
    kinds: Mapping[Node, Kind]
    """How each member varies over rows and columns: full or row."""
    views: frozenset[Node]
    """Views of members that keep rows: an operand that is one of these is computed from its base."""
    hidden: frozenset[Node]
    """Those of the views that nothing outside reads."""
    rows: tuple[Any, ...]
    """The row dimensions; sizes may be symbolic."""
    width: int
    region: str | None
    outputs: tuple[Node, ...]
    """Members that something outside reads."""

    def __str__(self) -> str:
        where = f" in {self.region}" if self.region else ""
        return f"{len(self.nodes)} ops over {self.rows} x {self.width}{where}: {', '.join(map(str, self.nodes))}"


@dataclass(slots=True, eq=False)
class _Growing:
    rows: tuple[Any, ...]
    width: int
    region: str | None
    members: dict[Node, Kind] = field(default_factory=dict[Node, Kind])
    views: set[Node] = field(default_factory=set[Node])
    mask: int = 0

    def kind_of(self, node: Node) -> Kind:
        """The kind of a member, or of a view of one."""
        return self.members[_base(node, self.views)]


def find_groups(flow: Dataflow, allowed: Callable[[Node], bool]) -> list[Group]:
    """The groups of a graph. `allowed` is the marker's word on a node."""
    finder = _Finder(flow, allowed)
    for node in finder.order:
        finder.visit(node)
    return finder.groups()


class _Finder:
    def __init__(self, flow: Dataflow, allowed: Callable[[Node], bool]) -> None:
        self.flow = flow
        self.allowed = allowed
        self.group: dict[Node, _Growing] = {}
        self.all: list[_Growing] = []
        self.order = _canonical_order(flow)
        self.reach = Reach(flow)

    def visit(self, node: Node) -> None:
        if is_view(node) and self._look_through(node):
            return
        if not self._may_fuse(node):
            return
        for group in self._producers(node):
            kind = self._fits(node, group)
            if kind is not None and self._may_unite(group, 1 << self.flow.index[node], {node: kind}):
                self._join(node, kind, group)
                break
        else:
            domain = _domain(node)
            if domain is None:
                return
            group = _Growing(*domain, region_of(node))
            self.all.append(group)
            self._join(node, _own_kind(node), group)
        self._merge_producers(node, group)

    def _may_fuse(self, node: Node) -> bool:
        position = self.flow.index[node]
        settled = (self.flow.constants | self.flow.symbolic) >> position & 1
        if settled or is_view(node) or node.target in FREE or not self.allowed(node):
            return False
        return fusible(node) and memory_order(node.meta["val"]) is not None

    def _look_through(self, node: Node) -> bool:
        base = node.args[0]
        group = self.group.get(base) if isinstance(base, Node) else None
        if group is None or region_of(node) != group.region:
            return False
        if not keeps_rows(node, per_row=group.kind_of(node.args[0]) is Kind.ROW):  # pyright: ignore
            return False
        group.views.add(node)
        group.mask |= 1 << self.flow.index[node]
        self.group[node] = group
        self.reach.contract(group.mask, group.region)
        return True

    def _producers(self, node: Node) -> list[_Growing]:
        """Groups that compute operands of `node`, the youngest first."""
        found = [self.group[a] for a in Call.of(node).read() if a in self.group]
        return sorted(dict.fromkeys(found), key=self.all.index, reverse=True)

    def _join(self, node: Node, kind: Kind, group: _Growing) -> None:
        group.members[node] = kind
        group.mask |= 1 << self.flow.index[node]
        self.group[node] = group
        if kind is Kind.FULL:
            group.width = max(group.width, int(width_of(node.meta["val"])))
        self.reach.contract(group.mask, group.region)

    def _fits(self, node: Node, group: _Growing) -> Kind | None:
        """The kind `node` would have in `group`, None where their domains differ."""
        if region_of(node) != group.region:
            return None
        operands = [a for a in Call.of(node).read() if self.group.get(a) is group]
        kinds = {group.kind_of(a) for a in operands}
        domain = _domain(node)
        if domain is not None and same(product(domain[0]), product(group.rows)):
            width = domain[1]
            widths = {width_of(a.meta["val"]) for a in operands if group.kind_of(a) is Kind.FULL}
            if width == group.width or group.width == 1 or width in widths or node.target is CONCATENATION:
                return _own_kind(node)
            if width == 1 and kinds == {Kind.ROW}:
                return Kind.ROW
        value: Tensor = node.meta["val"]
        one_per_row = same(product(tuple(value.shape)), product(group.rows))
        if kinds == {Kind.ROW} and node.target in POINTWISE and one_per_row:
            return Kind.ROW  # also without a last dimension of 1, as a reduction without keepdim leaves it
        return None

    def _merge_producers(self, node: Node, group: _Growing) -> None:
        """Two groups that meet in a node become one, where their domains agree."""
        for other in self._producers(node):
            alike = other.region == group.region and same(product(other.rows), product(group.rows))
            if other is group or not alike or len({group.width, other.width} - {1}) > 1:
                continue
            if not self._may_unite(group, other.mask, other.members):
                continue
            group.members |= other.members
            group.views |= other.views
            group.mask |= other.mask
            group.width = max(group.width, other.width)
            for member in (*other.members, *other.views):
                self.group[member] = group
            self.all.remove(other)
            self.reach.contract(group.mask, group.region)

    def _may_unite(self, group: _Growing, mask: int, joining: Mapping[Node, Kind]) -> bool:
        if len(group.members) + len(joining) > MOST_MEMBERS:
            return False
        united = group.mask | mask
        if self._operands({**group.members, **joining}) > MOST_OPERANDS:
            return False
        return not self.reach.cyclic(united, group.region) and not self.reach.delays(united, group.region)

    def _operands(self, members: Mapping[Node, Kind]) -> int:
        inputs = {a for node in members for a in Call.of(node).read() if a not in members}
        return len(inputs) + sum(any(user not in members for user in node.users) for node in members)

    def groups(self) -> list[Group]:
        """The groups worth a kernel: those that replace at least two."""
        ranks = {node: rank for rank, node in enumerate(self.order)}
        found: list[Group] = []
        for growing in self.all:
            if len(growing.members) < 2:
                continue
            nodes = tuple(sorted(growing.members, key=ranks.__getitem__))
            inside = growing.members.keys() | growing.views
            outputs = tuple(node for node in nodes if _escapes(node, growing.views, inside))
            found.append(
                Group(
                    nodes=nodes,
                    kinds=dict(growing.members),
                    views=frozenset(growing.views),
                    hidden=frozenset(v for v in growing.views if not _escapes(v, growing.views, inside)),
                    rows=growing.rows,
                    width=growing.width,
                    region=growing.region,
                    outputs=outputs,
                )
            )
        return found


def _canonical_order(flow: Dataflow) -> list[Node]:
    """By distance from the inputs, then by name: the same however the graph is ordered."""
    depth: list[int] = []
    for before in flow.predecessors:
        depth.append(1 + max((depth[other] for other in before), default=0))
    return sorted(flow.nodes, key=lambda node: (depth[flow.index[node]], node.name))


def _escapes(node: Node, views: set[Node], inside: Any) -> bool:
    """Whether something outside the group reads a node, itself or through a view."""
    return any(user not in inside or (user in views and _escapes(user, views, inside)) for user in node.users)


def _base(node: Node, views: set[Node]) -> Node:
    """The member a view stands for."""
    while node in views:
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def _domain(node: Node) -> tuple[tuple[Any, ...], int] | None:
    """The rows and columns an op walks over; None where it has no columns to walk, or their number is not known."""
    value: Tensor = node.meta["val"]
    reduces = node.target in REDUCING
    if reduces:
        value = Call.of(node).source.meta["val"]
    width = width_of(value)
    if not isinstance(width, int) or (reduces and width == 1) or not value.dim():
        return None
    return row_dims(value), width


def _own_kind(node: Node) -> Kind:
    if node.target in ROW_RESULT:
        return Kind.ROW
    return Kind.ROW if width_of(node.meta["val"]) == 1 else Kind.FULL
