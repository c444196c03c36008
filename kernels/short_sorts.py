"""Sorts of a few integers, by counting.

Enters: a graph. Leaves: the same graph in which the sort of a short integer vector (the experts that tokens were sent
to) is comparisons and sums over a small square, which fuse with what is around them; eager copies, sorts and copies
again. An element's rank is how many are smaller, or equal and further ahead: also the inverse of the permutation, which
models compute by writing a range through the indices. Invariant: values, indices and inverse are those of a stable
sort, one of the orders that an unstable one may give.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from .call import Call, aten
from .dataflow import Dataflow
from .derive import derived
from .shapes import static

MOST_ELEMENTS: Final = 64
_SORTS: Final = (aten.sort.default, aten.sort.stable)
_EMPTY: Final = (aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format)


def count_short_sorts(flow: Dataflow, allowed: Callable[[Node], bool]) -> int:
    """Rewrite the graph of `flow` in place; returns how many sorts were rewritten. `allowed` is the marker's word.

    The module is to be recompiled afterwards, and the dataflow read again.
    """
    found = [node for node in flow.nodes if node.target in _SORTS and _is_short(node) and allowed(node)]
    for node in found:
        _rewrite(node, flow, allowed)
    return len(found)


def _is_short(node: Node) -> bool:
    call = Call.of(node)
    value = call.source.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
        return False
    size: Any = value.shape[0]  # or a symbol
    plain = call.arguments["dim"] in (0, -1) and not call.arguments["descending"]
    picked = all(user.target is operator.getitem and user.args[1] in (0, 1) for user in node.users)
    return plain and picked and static((size,)) and 2 <= size <= MOST_ELEMENTS


def _rewrite(sort: Node, flow: Dataflow, allowed: Callable[[Node], bool]) -> None:
    values: Node = Call.of(sort).source
    value: Tensor = values.meta["val"]

    def new(role: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        return derived(sort, role, target, args, kwargs)

    places = new("places", aten.arange.default, value.shape[0], device=value.device)
    own, others = new("own", aten.unsqueeze.default, values, 1), new("others", aten.unsqueeze.default, values, 0)
    down, across = new("down", aten.unsqueeze.default, places, 1), new("across", aten.unsqueeze.default, places, 0)
    tied = new(
        "tied",
        aten.logical_and.default,
        new("equal", aten.eq.Tensor, others, own),
        new("ahead", aten.lt.Tensor, across, down),
    )
    counted = new("counted", aten.logical_or.default, new("smaller", aten.lt.Tensor, others, own), tied)
    rank = new("rank", aten.sum.dim_IntList, counted, [-1])
    hit = new("hit", aten.eq.Tensor, new("ranks", aten.unsqueeze.default, rank, 0), down)
    indices = new("indices", aten.sum.dim_IntList, new("places_hit", aten.mul.Tensor, hit, across), [-1])
    ordered = new("values", aten.index.Tensor, values, [indices])
    for user in list(sort.users):
        if user.args[1] == 1:
            # One only: two would share the memory of `rank`, and somebody may write to either.
            for inverse in [other for other in user.users if _is_inverse(other, user, flow) and allowed(other)][:1]:
                inverse.replace_all_uses_with(rank)
                given = Call.of(inverse).arguments
                for unread in (inverse, given["self"], given["values"]):
                    if not unread.users:
                        unread.graph.erase_node(unread)
        user.replace_all_uses_with(indices if user.args[1] == 1 else ordered)
        user.graph.erase_node(user)
    sort.graph.erase_node(sort)


def _is_inverse(node: Node, indices: Node, flow: Dataflow) -> bool:
    """Whether a node writes 0, 1, 2, ... through the indices into a tensor of its own; neither is written to itself."""
    if node.target not in (aten.index_put_.default, aten.index_put.default):
        return False
    given = Call.of(node).arguments
    target, places = given["self"], given["values"]
    fresh = target.target in _EMPTY and list(target.users) == [node]
    counts = places.target is aten.arange.default and len(places.args) == 1
    alike = node.meta["val"].shape == indices.meta["val"].shape == places.meta["val"].shape
    dtypes = {node.meta["val"].dtype, places.meta["val"].dtype} == {torch.int64}
    steady = not (flow.storages[indices] | flow.storages[places]) & flow.rewritten
    plain = list(given["indices"]) == [indices] and not given["accumulate"]
    return fresh and counts and alike and dtypes and steady and plain
