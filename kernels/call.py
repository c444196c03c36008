"""A node's arguments by the names of its schema.

Enters: a node that calls an op. Leaves: `Call`, with defaults filled in. Invariant: `read()` lists the tensors whose
elements the op looks at, and no others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
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
        defaults = _defaults(node.target)
        return Call(node, {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs})

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
        unread, found = UNREAD.get(self.node.target), list[Node]()
        for name, argument in self.arguments.items():
            if name != unread:
                given = argument if isinstance(argument, list | tuple) else (argument,)
                found += [item for item in given if isinstance(item, Node)]
        return found


@functools.cache
def _defaults(target: Any) -> Mapping[str, Any]:
    """The arguments of an op's schema, with their defaults; None for those that have none."""
    return {argument.name: argument.default_value for argument in target._schema.arguments}
