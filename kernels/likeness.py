"""What makes two groups the same kernel: the layers of a model are alike.

Enters: a group. Leaves: a `Likeness`: all that `emit` may look at, as text in which nodes are numbers, and the nodes
that these stand for. Invariant: groups of equal text have equal specs, and inputs of equal numbers; a group whose sizes
are symbolic has none, for symbols of one name need not be one symbol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .grouping import Group
from .shapes import static
from .views import seen_through


@dataclass(frozen=True, slots=True)
class Likeness:
    """A group without its nodes, and its nodes."""

    text: str
    numbers: dict[Node, int]

    @staticmethod
    def of(group: Group) -> Likeness | None:
        """None for a group that is like no other."""
        writer = _Writer(group)
        for node in group.nodes:
            writer.number(node)
        outputs = [writer.number(node) for node in group.outputs]
        lines = [f"{group.rows} x {group.width}: {outputs}", *writer.lines]
        return Likeness("\n".join(lines), writer.numbers) if writer.static else None


class _Number(int):
    """A node's number among arguments: no argument that is a number itself looks like it."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


class _Writer:
    def __init__(self, group: Group) -> None:
        self.group = group
        self.told = set(group.kinds)  # nodes of which more counts than the value
        for node in group.free:
            origin: Node | None = node
            while origin is not None:
                self.told.add(origin)
                origin = seen_through(origin)
        self.numbers: dict[Node, int] = {}
        self.lines: list[str] = []
        self.static = static((*group.rows, group.width))

    def number(self, node: Node) -> _Number:
        """The number of a node, told what it is and what it is computed from as far as that matters."""
        if node not in self.numbers:
            told = ""
            if node in self.told:
                given: Any = map_arg((node.args, node.kwargs), self.number)
                told = f"{node.target}{given!r} {self.group.kinds.get(node)}"
            self.numbers[node] = len(self.numbers)
            self.lines.append(f"{told}: {self._value(node.meta.get('val'))}")
        return _Number(self.numbers[node])

    def _value(self, value: Any) -> str:
        if not isinstance(value, Tensor) or not static((*value.shape, *value.stride())):
            self.static = False
            return ""
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}"
