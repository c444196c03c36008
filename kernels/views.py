"""Shapes in row form, and views that keep it.

Enters: shapes, possibly with symbolic sizes, and FX nodes of view ops. Leaves: whether a view only renames the rows of
a value that has them in row form, so that a group can look through it. Invariant: a view that passes keeps every
element at its row and column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

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
_CASTING: Final = frozenset({aten.to.dtype, aten.type_as.default, aten._to_copy.default, aten.to.dtype_layout})


def product(sizes: Sequence[Any]) -> Any:
    """The product of sizes: an int, or a symbolic expression."""
    total: Any = 1
    for size in sizes:
        total = total * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return int(total) if getattr(total, "is_Integer", False) else total


def same(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for certain; no guard is added."""
    return bool(product([one]) == product([other]))


def row_dims(value: Tensor) -> tuple[Any, ...]:
    """All dimensions but the last."""
    return tuple(value.shape[:-1])


def width_of(value: Tensor) -> Any:
    """The size of the last dimension; 1 for a tensor without dimensions."""
    return value.shape[-1] if value.dim() else 1


def is_identity(node: Node) -> bool:
    """A cast that returns its argument, because the dtype is the same already."""
    if node.target not in _CASTING or node.kwargs.get("copy"):
        return False
    source = node.args[0]
    if not isinstance(source, Node) or node.target is aten._to_copy.default:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype


def is_view(node: Node) -> bool:
    """Whether the node may be one that groups look through."""
    known = (
        node.target in _IN_ORDER or node.target in _PERMUTING or node.target in (aten.expand.default, aten.slice.Tensor)
    )
    return node.op == "call_function" and (known or is_identity(node)) and isinstance(node.args[0], Node)


def column_slice(node: Node) -> tuple[int, int] | None:
    """Start and width of a slice of adjacent columns, two or more; None for any other node."""
    if node.target is not aten.slice.Tensor:
        return None
    before: Tensor = node.args[0].meta["val"]  # pyright: ignore
    dim, start, stop, step = _padded(node.args[1:])
    rank = before.dim()
    if not rank or dim % rank != rank - 1 or step != 1 or not isinstance(before.shape[-1], int):
        return None
    if isinstance(start, torch.SymInt | Node) or isinstance(stop, torch.SymInt | Node):
        return None
    first, last, _ = slice(start, stop).indices(before.shape[-1])
    return (first, last - first) if last - first > 1 else None


def _padded(given: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """The arguments dim, start, end and step of a slice, defaults filled in."""
    dim, start, stop, step = (*given, *(0, None, None, 1)[len(given) :])
    return dim, start, stop, step


def keeps_rows(node: Node, *, per_row: bool) -> bool:
    """Whether a view of a value in row form names the same rows (and columns, unless the value is one per row)."""
    before, after = node.args[0].meta["val"], node.meta["val"]  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not after.dim():
        return False
    if node.target is aten.slice.Tensor:
        return not per_row and column_slice(node) is not None
    if node.target is aten.expand.default:
        rows_kept = same(product(row_dims(before)), product(row_dims(after))) and before.dim() > 0
        return rows_kept and ((per_row and same(width_of(before), 1)) or same(width_of(before), width_of(after)))
    if node.target in _PERMUTING and not _in_order(before, node):
        return False
    if not same(product(tuple(before.shape)), product(tuple(after.shape))):
        return False
    return per_row or (before.dim() > 0 and same(width_of(before), width_of(after)))


def _in_order(before: Tensor, node: Node) -> bool:
    """Whether a permutation moves only dimensions of size 1."""
    rank = before.dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in node.args[1]]  # pyright: ignore
    elif rank >= 2:
        one, other = (0, 1) if node.target is aten.t.default else (dim % rank for dim in node.args[1:3])  # pyright: ignore
        order[one], order[other] = order[other], order[one]
    kept = [dim for dim in order if not same(before.shape[dim], 1)]
    return kept == sorted(kept)


def memory_order(value: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a dense tensor from the slowest to the fastest; None for one with gaps or overlaps."""
    rank = value.dim()
    strides, shape = value.stride(), value.shape
    if any(isinstance(s, torch.SymInt) for s in (*strides, *shape)):
        expected: Any = 1
        for dim in reversed(range(rank)):
            if not same(shape[dim], 1) and not same(strides[dim], expected):
                return None
            expected = product([expected, shape[dim]])
        return tuple(range(rank))
    if 0 in shape:
        return tuple(range(rank))
    free = [dim for dim in range(rank) if shape[dim] == 1]
    order = sorted((dim for dim in range(rank) if shape[dim] != 1), key=lambda dim: -strides[dim])
    step = 1
    for dim in reversed(order):
        if strides[dim] != step:
            return None
        step *= shape[dim]
    # Dimensions of size 1 go where they stand, so that a contiguous tensor has the plain order.
    merged = order
    for dim in free:
        place = next((i for i, other in enumerate(merged) if other > dim), len(merged))
        merged = [*merged[:place], dim, *merged[place:]]
    return tuple(merged)
