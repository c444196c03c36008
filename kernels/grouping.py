"""Which nodes become one kernel.

Enters: a graph with marks and without regions. Leaves: `Group`s of fusible nodes that share a row domain. Invariants:
contracting all groups, and all marked regions, leaves the graph free of cycles (so no group straddles an opaque op or
a mutation on its way); a group lies inside one region or outside of all; no group makes work wait that a region could
overlap; and what a member reads of another is at its own row. The order of the nodes in the graph does not matter, only
names and edges do: so fusing before regions are inserted and after gives the same groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from .build import Kind
from .call import Call
from .dataflow import Dataflow
from .free import FREE, is_free
from .geometry import layout
from .lower import fusible, is_elementwise, launches_twice
from .meet import rows_meet, walked
from .reach import Reach, region_of
from .rowwise import CONCATENATION, REDUCING, ROW_RESULT
from .shapes import memory_order, product, row_dims, same, static, width_of
from .views import seen_as, seen_through

MOST_OPERANDS = 40
"""Inputs and outputs of a kernel. What needs more becomes several kernels."""
MOST_MEMBERS = 160


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Nodes that become one kernel."""

    nodes: tuple[Node, ...]
    """In an order that computes operands first."""
    kinds: Mapping[Node, Kind]
    """How each member, and each view of one, varies over rows and columns: full or row."""
    hidden: frozenset[Node]
    """Views of members that nothing outside reads: they are gone with the group."""
    free: frozenset[Node]
    """Inputs that need not be read: constants and ranges that nothing writes to."""
    rows: tuple[Any, ...]
    """The row dimensions; sizes may be symbolic."""
    width: int
    region: str | None
    outputs: tuple[Node, ...]
    """Members that something outside reads."""

    def __str__(self) -> str:
        where = f" in {self.region}" if self.region else ""
        return f"{len(self.nodes)} ops over {self.rows} x {self.width}{where}: {', '.join(map(str, self.nodes))}"


def find_groups(flow: Dataflow, allowed: Callable[[Node], bool], least: int = 2) -> list[Group]:
    """The groups of a graph, of `least` members or more, or of one that eager needs two kernels for. `allowed` is the
    marker's word on a node."""
    finder = _Finder(flow, allowed)
    for node in finder.order:
        finder.visit(node)
    return finder.groups(least)


@dataclass(slots=True, eq=False)
class _Growing:
    rows: tuple[Any, ...]
    width: int
    region: str | None
    members: dict[Node, Call] = field(default_factory=dict[Node, Call])
    kinds: dict[Node, Kind] = field(default_factory=dict[Node, Kind])  # of members and of views of them
    read: set[Node] = field(default_factory=set[Node])  # what members read, of each other too
    mask: int = 0

    def inputs(self) -> set[Node]:
        return self.read - self.kinds.keys()

    def add(self, other: _Growing) -> None:
        self.width = max(self.width, other.width)
        self.members |= other.members
        self.kinds |= other.kinds
        self.read |= other.read
        self.mask |= other.mask

    def turns(self, rows: Any) -> bool:
        """Whether this is one row of `rows` elements, each on its own: it may as well be `rows` rows of one."""
        alone = same(product(self.rows), 1) and self.width > 1 and same(self.width, rows)
        alike = all(same(product(node.meta["val"].shape), self.width) for node in self.kinds)
        return alone and alike and all(map(is_elementwise, self.members.values()))

    def turn(self) -> None:
        self.rows, self.width = (self.width,), 1
        self.kinds = dict.fromkeys(self.kinds, Kind.ROW)


class _Finder:
    def __init__(self, flow: Dataflow, allowed: Callable[[Node], bool]) -> None:
        self.flow = flow
        self.allowed = allowed
        self.group: dict[Node, _Growing] = {}  # of members and of views of them
        self.all: list[_Growing] = []
        self.order = _canonical_order(flow)
        self.reach = Reach(flow)
        self.rewritten = flow.rewritten

    def visit(self, node: Node) -> None:
        source = seen_through(node)
        if source is not None:
            self._look_through(node, source)
            return
        if not self._may_fuse(node):
            return
        call = Call.of(node)
        home = next((group for group in self._producers(call) if self._takes(group, call)), None)
        if home is None:
            home = self._started(call)
        if home is not None:
            self._merge_producers(call, home)

    def _may_fuse(self, node: Node) -> bool:
        settled = (self.reach.settled | self.flow.symbolic) >> self.flow.index[node] & 1
        if settled or node.target in FREE or not fusible(node) or not self.allowed(node):
            return False
        if any(self.flow.owner[storage] is not node for storage in self.flow.storages[node]):
            return False  # what it returns may be memory of another: whoever writes to that must be seen
        empty = any(same(size, 0) for size in walked(Call.of(node)))
        return not empty and _is_writable(node.meta["val"])

    def _look_through(self, view: Node, source: Node) -> None:
        group = self.group.get(source)
        if group is None or region_of(view) != group.region or not self.allowed(view):
            return
        before = group.kinds[source]
        kind = seen_as(view, before, product(group.rows))
        if kind is None and group.turns(group.width) and seen_as(view, Kind.ROW, group.width) is Kind.ROW:
            group.turn()
            kind = Kind.ROW
        mask = group.mask | 1 << self.flow.index[view]
        if kind is not None and not self.reach.cyclic(mask, group.region):
            group.kinds[view], group.mask, self.group[view] = kind, mask, group
            self.reach.contract(mask, group.region)

    def _producers(self, call: Call) -> list[_Growing]:
        """Groups that compute operands of an op, the youngest first."""
        found = [self.group[a] for a in call.read() if a in self.group]
        return sorted(dict.fromkeys(found), key=self.all.index, reverse=True)

    def _started(self, call: Call) -> _Growing | None:
        """A new group, unless the op has no columns to walk, or their number is not known."""
        domain = _domain(call)
        if domain is None:
            return None
        group = _Growing(*domain, region_of(call.node))
        self.all.append(group)
        self._add(group, self._alone(call, _own_kind(call)))
        return group

    def _alone(self, call: Call, kind: Kind) -> _Growing:
        """A group of one op, to be united with another."""
        width = int(width_of(call.value)) if kind is Kind.FULL else 1
        mask = 1 << self.flow.index[call.node]
        return _Growing((), width, region_of(call.node), {call.node: call}, {call.node: kind}, set(call.read()), mask)

    def _takes(self, group: _Growing, call: Call) -> bool:
        """Let an op join a group, if it fits there, or would if the group's columns were rows."""
        if region_of(call.node) != group.region:
            return False
        if self._joins(group, call):
            return True
        domain = _domain(call)
        if domain is None or not group.turns(product(domain[0])):
            return False
        before = group.rows, group.width, group.kinds
        group.turn()
        if self._joins(group, call):
            return True
        group.rows, group.width, group.kinds = before
        return False

    def _joins(self, group: _Growing, call: Call) -> bool:
        kind = self._fits(group, call)
        if kind is None or not self._may_unite(group, alone := self._alone(call, kind)):
            return False
        self._add(group, alone)
        return True

    def _fits(self, group: _Growing, call: Call) -> Kind | None:
        """The kind an op would have in a group, None where their domains differ."""
        domain, value = _domain(call), call.value
        if domain is not None and same(product(domain[0]), product(group.rows)):
            full = (a for a in call.read() if self.group.get(a) is group and group.kinds[a] is Kind.FULL)
            known = {1, group.width, *(width_of(a.meta["val"]) for a in full)}
            if group.width == 1 or domain[1] in known or call.node.target is CONCATENATION:
                return _own_kind(call)
        # One value per row, also without a last dimension of 1, as a reduction without keepdim leaves it.
        per_row = is_elementwise(call) and same(product(value.shape), product(group.rows))
        return Kind.ROW if per_row else None

    def _merge_producers(self, call: Call, group: _Growing) -> None:
        """Groups that meet in an op become one, where their domains agree."""
        for other in self._producers(call):
            alike = other.region == group.region and same(product(other.rows), product(group.rows))
            wide = len({group.width, other.width} - {1}) <= 1 or call.node.target is CONCATENATION
            if other is group or not alike or not wide:
                continue
            if self._may_unite(group, other):
                self.all.remove(other)
                self._add(group, other)

    def _add(self, group: _Growing, other: _Growing) -> None:
        group.add(other)
        self.group |= dict.fromkeys(other.kinds, group)
        self.reach.contract(group.mask, group.region)

    def _may_unite(self, group: _Growing, other: _Growing) -> bool:
        united = _Growing(group.rows, group.width, group.region)
        united.add(group)
        united.add(other)
        if len(united.members) > MOST_MEMBERS or self._operands(united) > MOST_OPERANDS:
            return False
        if not self._meet(united, other, group) or not self._meet(united, group, other):
            return False
        return not self.reach.cyclic(united.mask, group.region) and not self.reach.delays(united.mask, group.region)

    def _meet(self, united: _Growing, reader: _Growing, source: _Growing) -> bool:
        """Whether members of one group read what is of another at their own rows."""
        if reader.read.isdisjoint(source.kinds):
            return True
        rows = product(united.rows)
        return all(
            rows_meet(call, reader.kinds[node], a, source.kinds[a], rows)
            for node, call in reader.members.items()
            for a in call.read()
            if a in source.kinds
        )

    def _operands(self, group: _Growing) -> int:
        """How many inputs and outputs a group has; for one that is small in any case, no more than this."""
        most = len(group.read) + len(group.members)
        return most if most <= MOST_OPERANDS else len(group.inputs()) + len(self._read_outside(group))

    def _read_outside(self, group: _Growing) -> list[Node]:
        """Members that something outside reads, themselves or through a view."""
        read = {a for a in group.kinds if any(user not in group.kinds for user in a.users)}
        for view in [a for a in read if a not in group.members]:
            source = seen_through(view)
            while source is not None and source not in group.members:
                source = seen_through(source)
            assert source is not None
            read.add(source)
        return [node for node in group.members if node in read]

    def _free(self, group: _Growing) -> frozenset[Node]:
        return frozenset(a for a in group.inputs() if is_free(a) and not self.flow.storages[a] & self.rewritten)

    def groups(self, least: int) -> list[Group]:
        """The groups worth a kernel: those that replace at least that many nodes, and of which something is read."""
        ranks = {node: rank for rank, node in enumerate(self.order)}
        found: list[Group] = []
        for growing in self.all:
            outputs, free = self._read_outside(growing), self._free(growing)
            worth = len(growing.members) >= least or any(map(launches_twice, growing.members.values()))
            if not worth or not outputs or not growing.inputs() - free:
                continue
            found.append(
                Group(
                    nodes=tuple(sorted(growing.members, key=ranks.__getitem__)),
                    kinds=growing.kinds,
                    hidden=_hidden(growing),
                    free=free,
                    rows=growing.rows,
                    width=growing.width,
                    region=growing.region,
                    outputs=tuple(sorted(outputs, key=ranks.__getitem__)),
                )
            )
        return found


def _hidden(group: _Growing) -> frozenset[Node]:
    """Views that nothing outside reads, not even through another view."""
    views = [a for a in group.kinds if a not in group.members]
    shown: set[Node] = set()
    for view in reversed(views):  # a view of a view came later
        if any(user not in group.kinds or user in shown for user in view.users):
            shown.add(view)
    return frozenset(views) - shown


def _canonical_order(flow: Dataflow) -> list[Node]:
    """By distance from the inputs, then by name: the same however the graph is ordered."""
    depth: list[int] = []
    for before in flow.predecessors:
        depth.append(1 + max((depth[other] for other in before), default=0))
    return sorted(flow.nodes, key=lambda node: (depth[flow.index[node]], node.name))


def _is_writable(value: Tensor) -> bool:
    """Whether a kernel can write a tensor that lies like this: dense, its rows in few levels."""
    if memory_order(value) is None:
        return False
    if not static(value.shape):
        return True  # contiguous, so one level
    return _in_few_levels(tuple(value.shape), value.stride())


@functools.cache
def _in_few_levels(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(layout(shape, strides, shape, columns=columns) is not None for columns in (True, False))


def _domain(call: Call) -> tuple[tuple[Any, ...], int] | None:
    """The rows and columns an op walks over; None where it has no columns to walk, or their number is not known."""
    value: Tensor = call.source.meta["val"] if call.node.target in REDUCING else call.value
    width = width_of(value)
    if not isinstance(width, int) or (width == 1 and not is_elementwise(call)) or not value.dim():
        return None
    return row_dims(value), width


def _own_kind(call: Call) -> Kind:
    per_row = call.node.target in ROW_RESULT or same(width_of(call.value), 1)
    return Kind.ROW if per_row else Kind.FULL
