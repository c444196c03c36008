"""How an op uses a tensor from outside its group.

Enters: an op's operand. Leaves: `Use`: the kind of value it is, the shape it is used in, and its role. Invariant: the
use depends on shapes alone, never on where the tensor lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from .build import Kind, Value

Role = Literal["columns", "rows", "table"]
"""What the last dimension of a tensor is: columns, rows like all others, or neither: the tensor is indexed."""

Operand = Callable[[Node], Value]
"""The value of an operand, in row form."""


@dataclass(frozen=True, slots=True)
class Use:
    """One use: how the tensor varies over the op's rows and columns, and the shape it is broadcast to."""

    kind: Kind
    shape: tuple[Any, ...]
    role: Role = "columns"

    @staticmethod
    def full(node: Node) -> Use:
        """By rows and columns, as it is."""
        return Use(Kind.FULL, tuple(node.meta["val"].shape))

    @staticmethod
    def columns(node: Node) -> Use:
        """One value per column, the same in all rows."""
        return Use(Kind.COL, tuple(node.meta["val"].shape))

    @staticmethod
    def per_row(node: Node) -> Use:
        """One value per row, whose dimensions are all rows."""
        shape = tuple(node.meta["val"].shape)
        return Use(Kind.ROW, shape, "rows") if shape else Use(Kind.SCALAR, ())

    @staticmethod
    def table(node: Node) -> Use:
        """Indexed by row and column."""
        return Use(Kind.FULL, tuple(node.meta["val"].shape), "table")
