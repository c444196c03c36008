"""Constant parts of a graph, computed once.

Enters: a graph over its module's parameters and buffers. Leaves: the same graph with every value that depends on
nothing the graph changes replaced by a buffer that holds it: weight casts, rope tables, `1 + weight`. Invariants: views
stay views, and what is large is computed in every step, so no weight is held twice; what leaves the graph is made anew
in every run, for its caller may write to it; the values are eager's, on the same device. The fold is of the parameters
as they are: change one later and the graph must be made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .dataflow import Dataflow

MOST_BYTES = 16 << 20
"""A folded value, and every value on the way to it, may take this much memory."""
MOST_BYTES_TOGETHER = 256 << 20


def fold_constants(gm: GraphModule, allowed: Callable[[Node], bool]) -> int:
    """Fold `gm` in place; returns how many values became buffers. `allowed` is the marker's word on a node.

    The module is to be recompiled afterwards.
    """
    folder = _Folder(gm, Dataflow.of(gm), allowed)
    budget, folded = MOST_BYTES_TOGETHER, 0
    for node in list(folder.known):
        if not folder.is_name(node) and folder.is_needed(node) and _bytes(node) <= budget:
            folder.fold(node)
            budget -= _bytes(node)
            folded += 1
    folder.drop_dead()
    return folded


class _Folder:
    """`known`: the nodes whose values can be computed here and now, in graph order."""

    def __init__(self, gm: GraphModule, flow: Dataflow, allowed: Callable[[Node], bool]) -> None:
        self.gm = gm
        self.flow = flow
        self.known: dict[Node, None] = {}
        self.values: dict[Node, Any] = {}
        # A storage that somebody writes to has other contents at other times; one that leaves may be written later.
        unsteady = {s for node in flow.nodes for s in flow.writes[node] if flow.owner.get(s) is not node}
        unsteady.update(s for node in flow.nodes if node.op == "output" for s in flow.reads[node])
        for node in flow.select(flow.constants):
            if node.op == "get_attr" or (allowed(node) and self._is_computable(node, unsteady)):
                self.known[node] = None

    def _is_computable(self, node: Node, unsteady: set[int]) -> bool:
        if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "prims"):
            return False
        if not isinstance(node.meta.get("val"), Tensor) or self.flow.storages[node] & unsteady:
            return False
        small = self.is_name(node) or _bytes(node) <= MOST_BYTES
        return small and all(a in self.known for a in node.all_input_nodes)

    def is_name(self, node: Node) -> bool:
        """Whether a node only names memory: an attribute, or a view."""
        return node.op == "get_attr" or self.flow.is_view(node)

    def is_needed(self, node: Node) -> bool:
        """Whether something that cannot be computed here reads a value, itself or through views."""
        return any(user not in self.known or (self.flow.is_view(user) and self.is_needed(user)) for user in node.users)

    def fold(self, node: Node) -> None:
        """Put a buffer in the place of `node`, for whatever is not folded itself."""
        name = _free_name(self.gm, f"_folded_{node.name}")
        self.gm.register_buffer(name, self._value(node).detach(), persistent=False)
        with self.gm.graph.inserting_before(node):
            replacement = self.gm.graph.get_attr(name)
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(
            replacement, delete_user_cb=lambda user: user not in self.known or self.flow.is_view(user)
        )

    def _value(self, node: Node) -> Any:
        if node not in self.values:
            if node.op == "get_attr":
                value: Any = self.gm
                for part in str(node.target).split("."):
                    value = getattr(value, part)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self._value)
                assert callable(node.target)
                with torch.no_grad():
                    value = node.target(*args, **kwargs)
            self.values[node] = value
        return self.values[node]

    def drop_dead(self) -> None:
        """Take out what was computed here and nothing reads any more."""
        for node in reversed(self.values):
            if not node.users:
                self.gm.graph.erase_node(node)


def _bytes(node: Node) -> int:
    value: Tensor = node.meta["val"]
    return value.numel() * value.element_size()


def _free_name(gm: GraphModule, wanted: str) -> str:
    name, number = wanted, 0
    while hasattr(gm, name):
        number += 1
        name = f"{wanted}_{number}"
    return name
