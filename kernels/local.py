"""In-place ops on a graph's own temporaries, as ops that return new tensors.

Enters: a graph. Leaves: the same graph in which `x.div_(y)` is `div(x, y)` wherever nobody can tell: the graph itself
allocated `x`, and whatever reads its memory afterwards reads it by the name of `x` or of the result. Writes that can be
seen - to caches, to inputs, through views - stay in place. Invariant: same values, same dtypes, same strides; and which
ops are rewritten depends on the graph's edges, not on the order of its nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.node import map_arg

from .dataflow import Dataflow
from .pointwise import POINTWISE


def functionalise_locals(flow: Dataflow, allowed: Callable[[Node], bool]) -> int:
    """Rewrite the graph of `flow` in place; returns how many ops were rewritten. `allowed` is the marker's word.

    The module is to be recompiled afterwards, and the dataflow read again.
    """
    changed = 0
    # Each rewrite leaves the others' reasons as they are: it takes an access away, and adds none.
    for write in flow.nodes:
        if _functional(write) is not None and allowed(write) and _unseen(write, flow) and _same_result(write):
            _rewrite(write, flow)
            changed += 1
    return changed


def _functional(node: Node) -> OpOverload | None:
    """The op of the table that returns what an in-place op would have written."""
    target = node.target
    if not isinstance(target, OpOverload) or not target._schema.name.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").rstrip("_"), None)
    found = getattr(packet, target._overloadname, None)
    return found if found in POINTWISE and isinstance(node.args[0], Node) else None


def _unseen(write: Node, flow: Dataflow) -> bool:
    """Whether later reads of the written memory all go through the written tensor itself or through the result."""
    base = write.args[0]
    assert isinstance(base, Node)
    before = flow.ancestors[flow.index[write]]
    for storage in flow.storages[base]:
        owner = flow.owner[storage]
        if owner.op != "call_function" or flow.barriers >> flow.index[owner] & 1:
            return False
        for other in flow.holders[storage]:
            if other is write:
                continue
            users = (u for u in other.users if u.target is not operator.getitem or storage in flow.storages[u])
            later = [user for user in users if user is not write and not before >> flow.index[user] & 1]
            if other is base:
                # A view of the old tensor that comes later would have to become one of the result.
                if any(flow.is_view(user) for user in later):
                    return False
            elif before >> flow.index[other] & 1 and later:
                return False
    return bool(flow.storages[base])


def _same_result(write: Node) -> bool:
    """Whether the functional op gives the written tensor's dtype, shape and strides: no promotion, no broadcasting."""
    target, value = _functional(write), write.meta.get("val")
    nodes = write.all_input_nodes
    if target is None or not isinstance(value, FakeTensor) or any("val" not in node.meta for node in nodes):
        return False
    args, kwargs = map_arg((write.args, write.kwargs), lambda node: node.meta["val"])
    with value.fake_mode:
        result: Any = target(*args, **kwargs)
    return (result.dtype, result.shape, result.stride()) == (value.dtype, value.shape, value.stride())


def _rewrite(write: Node, flow: Dataflow) -> None:
    target, base = _functional(write), write.args[0]
    assert target is not None
    assert isinstance(base, Node)
    before = flow.ancestors[flow.index[write]]
    write.target = target
    base.replace_all_uses_with(write, delete_user_cb=lambda user: not before >> flow.index[user] & 1)
