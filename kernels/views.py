"""Views that groups look through.

Enters: FX nodes of view ops, and how the value they look at varies over its group's rows and columns. Leaves: how what
they show does. Invariant: a view that passes keeps every element in its row, and columns in their order.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from .build import Kind
from .call import Call
from .shapes import product, row_dims, same, width_of

aten = torch.ops.aten

_IN_ORDER: Final = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
    }
)
"""Ops that keep the logical order of elements, whatever the strides."""
_PERMUTING: Final = frozenset({aten.transpose.int, aten.permute.default, aten.t.default})
_VIEWS: Final = _IN_ORDER | _PERMUTING | {aten.expand.default, aten.slice.Tensor, aten.dropout.default}
_CASTING: Final = frozenset({aten.to.dtype, aten.type_as.default, aten.to.dtype_layout})


def seen_through(node: Node) -> Node | None:
    """What a view looks at; None for a node that groups do not look through."""
    if node.op != "call_function" or (node.target not in _VIEWS and node.target not in _CASTING):
        return None
    call = Call.of(node)
    if node.target is aten.dropout.default and call.arguments["train"] and call.arguments["p"] != 0:
        return None  # else it returns its input, memory and all
    source = call.source
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if node.target in _CASTING and (
        (before.dtype, before.device) != (after.dtype, after.device) or call.arguments.get("copy")
    ):
        return None
    return source


def seen_as(view: Node, kind: Kind, rows: Any) -> Kind | None:
    """What a view of a value of `kind` shows in a group of `rows` rows; None for other rows, or other columns."""
    source = seen_through(view)
    assert source is not None
    before, after = source.meta["val"], view.meta["val"]
    if view.target in _PERMUTING and not _in_order(before, view):
        return None
    if same(product(before.shape), product(after.shape)):
        return kind if kind is Kind.ROW or same(width_of(before), width_of(after)) else None
    if view.target is aten.slice.Tensor:
        return Kind.FULL if kind is Kind.FULL and column_slice(view) is not None else None
    # An expansion: of a value per row to equal columns.
    repeated = kind is Kind.ROW and before.dim() and same(width_of(before), 1) and isinstance(width_of(after), int)
    return Kind.FULL if repeated and same(product(row_dims(after)), rows) else None


def column_slice(node: Node) -> tuple[int, int] | None:
    """Start and width of a slice of adjacent columns, two or more; None for any other node."""
    if node.target is not aten.slice.Tensor:
        return None
    given = Call.of(node).arguments
    width, start, stop = width_of(given["self"].meta["val"]), given["start"], given["end"]
    last = given["dim"] in (-1, given["self"].meta["val"].dim() - 1)
    if not last or given["step"] != 1 or not all(isinstance(x, int | None) for x in (width, start, stop)):
        return None
    first, behind, _ = slice(start, stop).indices(width)
    return (first, behind - first) if behind - first > 1 else None


def _in_order(before: Tensor, node: Node) -> bool:
    """Whether a permutation moves only dimensions of size 1."""
    rank, given = before.dim(), Call.of(node).arguments
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in given["dims"]]
    elif rank >= 2:
        one, other = (0, 1) if node.target is aten.t.default else (given["dim0"] % rank, given["dim1"] % rank)
        order[one], order[other] = order[other], order[one]
    kept = [dim for dim in order if not same(before.shape[dim], 1)]
    return kept == sorted(kept)
