"""Constant parts of a graph, computed once.

Enters: a graph over its module's parameters and buffers. Leaves: the same graph with every value that depends on
nothing the graph changes replaced by a buffer that holds it: weight casts, rope tables, `1 + weight`. Invariant: views
of parameters stay views, so no weight is held twice; the values are the ones eager computes, on the same device.
The fold is of the parameters as they are: change one later and the graph must be made again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .dataflow import Dataflow

MOST_BYTES = 64 << 20
"""A folded value may take this much memory; a larger one is computed in every step."""


def fold_constants(gm: GraphModule, keep: Callable[[Node], bool] = lambda node: False) -> int:
    """Fold `gm` in place; returns how many values became buffers. What `keep` names is left as it is."""
    flow = Dataflow.of(gm)
    constant = {node for node in flow.select(flow.constants) if node.op in ("get_attr", "call_function")}
    computed = {node for node in constant if not _is_view_of_attribute(node, flow)}
    values: dict[Node, object] = {}
    folded = 0
    for node in list(gm.graph.nodes):
        if node not in computed or keep(node) or all(user in computed for user in node.users):
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or _size(value) > MOST_BYTES:
            continue
        with torch.no_grad():
            result = _evaluate(gm, node, values)
        assert isinstance(result, Tensor)
        name = f"_folded_{node.name}"
        gm.register_buffer(name, result.detach(), persistent=False)
        with gm.graph.inserting_before(node):
            replacement = gm.graph.get_attr(name)
        replacement.meta = {key: value for key, value in node.meta.items() if key != "auxstream_role"}
        node.replace_all_uses_with(replacement)
        folded += 1
    if folded:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return folded


def _is_view_of_attribute(node: Node, flow: Dataflow) -> bool:
    return node.op == "get_attr" or (
        flow.is_view(node) and all(flow.owner[storage].op == "get_attr" for storage in flow.storages[node])
    )


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _evaluate(gm: GraphModule, node: Node, values: dict[Node, object]) -> object:
    if node not in values:
        if node.op == "get_attr":
            value: object = gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            values[node] = value
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda other: _evaluate(gm, other, values))
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
    return values[node]
