"""What is computed from weights, computed where it is read.

Enters: a graph. Leaves: the same graph in which an elementwise op of many rows no longer reads a vector that another op
makes from a weight in every step (a cast, `1 + weight`): such ops take no launch of their own any more. Invariant: the
same values. Weights may be written between steps, so nothing of this can be computed ahead (`fold`).

A cast that the reader would do itself is left out, on marked branches too, for then the reader stays eager's kernel.
Anything else is computed at the reader's shape, from the weight expanded, and becomes part of the reader's group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .call import Call, aten
from .dataflow import Dataflow
from .derive import derived
from .fold import foldable
from .lower import fusible
from .pointwise import CASTS, POINTWISE
from .shapes import static

_PROMOTING: Final = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
"""Ops that eager computes in the common dtype of their operands, whatever theirs are."""


def leave_out_casts(flow: Dataflow) -> int:
    """Rewrite the graph in place; returns how many operands changed."""
    left_out: list[Node] = []
    for node in flow.nodes:
        if node.target not in _PROMOTING or not all(isinstance(a, Node) for a in node.args[:2]):
            continue
        pair: list[Any] = list(node.args[:2])
        for position, other in ((0, pair[1]), (1, pair[0])):
            if _casts_to_dtype_of(flow, pair[position], other) and node.meta["val"].dtype == other.meta["val"].dtype:
                node.update_arg(position, Call.of(pair[position]).source)
                left_out.append(pair[position])
                break
    _drop_unread(flow, left_out)
    return len(left_out)


def _casts_to_dtype_of(flow: Dataflow, cast: Node, other: Node) -> bool:
    if not flow.constants >> flow.index[cast] & 1 or cast.target not in CASTS or not _is_steady(flow, cast):
        return False
    before, after, beside = (node.meta["val"] for node in (Call.of(cast).source, cast, other))
    vectors = before.dim() > 0 and beside.dim() > 0 and before.device == beside.device
    common = torch.promote_types(before.dtype, beside.dtype)
    return vectors and before.is_floating_point() and common == after.dtype == beside.dtype


def spread_weights(flow: Dataflow, allowed: Callable[[Node], bool]) -> int:
    """Rewrite the graph in place; returns how many operands changed. `allowed` is the marker's word on a node."""
    made = {node for node in flow.select(flow.constants & ~foldable(flow)) if _is_elementwise(flow, node, allowed)}
    readers = dict.fromkeys(user for node in made for user in node.users if user not in made)
    changed = 0
    for node in sorted(readers, key=flow.index.__getitem__):
        if node.target not in POINTWISE or not fusible(node) or not allowed(node) or not _lies_plainly(node):
            continue
        for operand in made.intersection(node.all_input_nodes):
            if operand.meta["val"].shape != node.meta["val"].shape:
                node.replace_input_with(operand, _Spreader(made, node, operand.name).at(operand))
                changed += 1
    _drop_unread(flow, made if changed else ())
    return changed


def _is_steady(flow: Dataflow, node: Node) -> bool:
    """Whether what a node reads, and what it makes, is the same when its reader runs."""
    return not (flow.storages[node] | flow.reads[node]) & flow.rewritten


def _is_elementwise(flow: Dataflow, node: Node, allowed: Callable[[Node], bool]) -> bool:
    if node.target not in POINTWISE or flow.is_view(node) or not _is_steady(flow, node):
        return False
    return node.meta["val"].dim() > 0 and fusible(node) and allowed(node)


def _lies_plainly(node: Node) -> bool:
    """Whether a new operand of its shape cannot change how the result lies in memory."""
    value: Tensor = node.meta["val"]
    values = [operand.meta["val"] for operand in Call.of(node).read()]
    alike = [value, *(other for other in values if other.shape == value.shape)]
    return static(value.shape) and all(other.is_contiguous() for other in alike)


def _drop_unread(flow: Dataflow, nodes: Iterable[Node]) -> None:
    for node in sorted(set(nodes), key=flow.index.__getitem__, reverse=True):
        if not node.users:
            node.graph.erase_node(node)


class _Spreader:
    """Work on weights (`made`) once more, at the shape of `reader`."""

    def __init__(self, made: Collection[Node], reader: Node, role: str) -> None:
        self._made = made
        self._reader = reader
        self._role = role
        self._count = 0

    def at(self, node: Node) -> Node:
        value: Tensor = node.meta["val"]
        if not value.dim():  # a number to its readers, and their dtypes depend on that
            return node
        if node in self._made:
            args, kwargs = map_arg((node.args, node.kwargs), self.at)
            return self._derived(node.target, args, kwargs)
        return self._derived(aten.expand.default, (node, list(self._reader.meta["val"].shape)), {})

    def _derived(self, target: Any, args: Any, kwargs: Any) -> Node:
        self._count += 1
        return derived(self._reader, f"{self._role}_{self._count}", target, args, kwargs)
