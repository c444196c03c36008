"""New nodes that take the place of an old one, and copies of whole graphs.

Enters: the node to be replaced, an op and its arguments. Leaves: a node in front of it, with the value the op would
have. Invariant: names come from the old node's, so that equal graphs stay equal; marks and source lines are kept.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree


def derived(origin: Node, role: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """`target(*args, **kwargs)` as a node in front of `origin`, named after it and its role."""
    graph = origin.graph
    with graph.inserting_before(origin):
        new = graph.create_node("call_function", target, args, kwargs or {}, name=f"{origin.name}_{role}")
    leaves = pytree.tree_leaves(origin.meta["val"])
    mode = next(leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    given, named = map_arg((args, kwargs or {}), lambda node: node.meta["val"])
    with mode:
        new.meta = {**origin.meta, "val": target(*given, **named)}
    return new


def copy_of(gm: GraphModule) -> GraphModule:
    """The same graph over the same parameters and buffers, marks and all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its tree specs
        copied = GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    return copied
