"""A node's arguments by the names of its schema.

Enters: a node that calls an op. Leaves: `Call`, with defaults filled in. Invariant: `read()` lists the tensors whose
elements the op looks at, and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten

UNREAD: Final[Mapping[Any, str]] = {
    aten.type_as.default: "other",
    aten.full_like.default: "self",
    aten.zeros_like.default: "self",
    aten.ones_like.default: "self",
    aten.new_full.default: "self",
    aten.new_zeros.default: "self",
    aten.new_ones.default: "self",
}
"""The tensor argument that an op asks for its dtype or shape, not for its elements."""


@dataclass(frozen=True, slots=True)
class Call:
    """A node with its arguments by schema name, in the schema's order."""

    node: Node
    arguments: Mapping[str, Any]

    @staticmethod
    def of(node: Node) -> Call:
        schema = schema_of(node)
        given = dict(zip((argument.name for argument in schema), node.args, strict=False))
        given |= node.kwargs
        return Call(node, {a.name: given.get(a.name, a.default_value) for a in schema})

    @property
    def value(self) -> Tensor:
        return self.node.meta["val"]

    @property
    def source(self) -> Node:
        """The tensor a reduction reduces, or a view looks at."""
        return self.arguments["self"] if "self" in self.arguments else self.arguments["input"]

    def tensor(self, name: str) -> Tensor:
        """The traced value of a tensor argument."""
        return self.arguments[name].meta["val"]

    def read(self) -> list[Node]:
        """The nodes whose elements the op reads, in the order of its schema."""
        return [node for name, argument in self.arguments.items() if name != self._unread for node in _nodes(argument)]

    @property
    def _unread(self) -> str | None:
        return UNREAD.get(self.node.target)


def schema_of(node: Node) -> Any:
    """The arguments of the schema of a node's op."""
    return node.target._schema.arguments  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]


def _nodes(argument: Any) -> Iterator[Node]:
    for item in argument if isinstance(argument, list | tuple) else (argument,):
        if isinstance(item, Node):
            yield item
