"""Constant parts of a graph, computed once.

Enters: a graph over its module's parameters and buffers. Leaves: the same graph with every value that depends on
nothing at all replaced by a buffer that holds it: ranges, masks, tables made from them. Invariants: views stay views,
and what is large is computed in every step; what leaves the graph is made anew in every run, for its caller may write
to it; the values are eager's, on the same device.

Note "weights are not constants". A parameter, a buffer, a tensor from elsewhere may be written in place between two
steps (`load_state_dict`, an optimizer, `weight.data.copy_`, which no version counter sees), and the next step must see
it. So what is computed from one (a cast, `1 + weight`) is computed in every step; fused, it costs no launch.
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


def foldable(flow: Dataflow) -> int:
    """Constants that depend on no weight: see the note "weights are not constants"."""
    bits = 0
    for node in flow.select(flow.constants):
        if node.op != "get_attr" and all(bits >> flow.index[a] & 1 for a in node.all_input_nodes):
            bits |= 1 << flow.index[node]
    return bits


def fold_constants(gm: GraphModule, allowed: Callable[[Node], bool]) -> int:
    """Fold `gm` in place; returns how many values became buffers. `allowed` is the marker's word on a node.

    The module is to be recompiled afterwards.
    """
    folder = _Folder(gm, Dataflow.of(gm), allowed)
    budget, folded = MOST_BYTES_TOGETHER, 0
    for node in list(folder.known):
        if not folder.flow.is_view(node) and folder.is_needed(node) and _bytes(node) <= budget:
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
            if allowed(node) and self._is_computable(node, unsteady):
                self.known[node] = None

    def _is_computable(self, node: Node, unsteady: set[int]) -> bool:
        if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "prims"):
            return False
        if not isinstance(node.meta.get("val"), Tensor) or self.flow.storages[node] & unsteady:
            return False
        small = self.flow.is_view(node) or _bytes(node) <= MOST_BYTES
        return small and all(a in self.known for a in node.all_input_nodes)

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
            if node.op == "get_attr":  # what a view of something folded reads by now
                return getattr(self.gm, str(node.target))
            args, kwargs = map_arg((node.args, node.kwargs), self._value)
            assert callable(node.target)
            with torch.no_grad():
                self.values[node] = node.target(*args, **kwargs)
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
