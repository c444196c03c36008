"""In-place ops on a graph's own temporaries, as ops that return new tensors.

Enters: a graph. Leaves: the same graph in which `x.div_(y)` is `div(x, y)` wherever nobody can tell: the graph itself
allocated `x`, and no other name of its memory is used afterwards. Writes that can be seen - to caches, to inputs,
through views - stay in place. Invariant: same values, same dtypes, same strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .dataflow import Dataflow
from .pointwise import POINTWISE


def functionalise_locals(gm: GraphModule) -> int:
    """Rewrite `gm` in place; returns how many ops were rewritten."""
    changed = 0
    for node in [node for node in gm.graph.nodes if _pointwise_form(node.target) is not None]:
        flow = Dataflow.of(gm)
        if _is_local(node, flow):
            _rewrite(node, flow)
            changed += 1
    if changed:
        gm.recompile()
    return changed


def _pointwise_form(target: Any) -> OpOverload | None:
    """The op of the table that returns what an in-place op would have written."""
    if not isinstance(target, OpOverload) or not target._schema.name.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").rstrip("_"), None)
    found = getattr(packet, target._overloadname, None)
    return found if found in POINTWISE else None


def _is_local(write: Node, flow: Dataflow) -> bool:
    base, position = write.args[0], flow.index[write]
    if not isinstance(base, Node) or not flow.storages[base] or not _same_result(write):
        return False
    for storage in flow.storages[base]:
        owner = flow.owner.get(storage)
        if owner is None or owner.op != "call_function" or flow.barriers >> flow.index[owner] & 1:
            return False
        for other in flow.nodes:
            known_before = storage in flow.storages[other] and flow.index[other] < position
            if known_before and other is not base and any(flow.index[user] > position for user in other.users):
                return False
    return True


def _same_result(write: Node) -> bool:
    """Whether the functional op gives the written tensor's dtype, shape and strides: no promotion, no broadcasting."""
    target, value = _pointwise_form(write.target), write.meta.get("val")
    if target is None or not isinstance(value, FakeTensor):
        return False
    args, kwargs = map_arg((write.args, write.kwargs), lambda node: node.meta.get("val"))
    with value.fake_mode:
        result = target(*args, **kwargs)
    return (result.dtype, result.shape, result.stride()) == (value.dtype, value.shape, value.stride())


def _rewrite(write: Node, flow: Dataflow) -> None:
    target, base = _pointwise_form(write.target), write.args[0]
    assert target is not None and isinstance(base, Node)
    position = flow.index[write]
    write.target = target
    base.replace_all_uses_with(write, delete_user_cb=lambda user: flow.index[user] > position)
