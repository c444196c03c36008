"""How a tensor meets the op that reads it, in row form.

Enters: the shape of a tensor, the shape its reader walks over, and the rows of the reader's group. Leaves: for a value
of the same group, whether its rows are the reader's rows; for a tensor from outside, how it varies over them.
Invariant: broadcasting aligns shapes at their last dimension, while rows are flattened leading dimensions. Where the
two differ (one value per row, added to a square matrix, is broadcast along its columns), value and reader do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from .build import Kind
from .call import Call
from .gathers import index_of, picks_elements, tables
from .lower import BY_ROWS
from .rowwise import CONCATENATION, REDUCING
from .shapes import product, same, width_of
from .use import Use


def walked(call: Call) -> tuple[Any, ...]:
    """The shape an op walks over: of what it reduces, else of its result."""
    value: Tensor = call.source.meta["val"] if call.node.target in REDUCING else call.value
    return tuple(value.shape)


def rows_meet(call: Call, reader: Kind, operand: Node, kind: Kind, rows: Any) -> bool:
    """Whether `operand`, a value of the reader's group, has at each row what the reader wants there.

    `reader` and `kind` say how the two vary in a group of `rows` rows.
    """
    shape, wanted = tuple(operand.meta["val"].shape), walked(call)
    if operand in tables(call):
        return False
    if operand is index_of(call) or (picks_elements(call) and reader is Kind.ROW):
        return kind is Kind.ROW and same(product(shape), rows)
    if len(shape) > len(wanted):
        return False
    shape = (1,) * (len(wanted) - len(shape)) + shape
    if call.node.target is CONCATENATION:
        return kind is Kind.FULL and _equal(shape[:-1], wanted[:-1])
    if call.node.target in BY_ROWS and kind is not Kind.FULL:
        return False
    if _equal(shape, wanted):
        return True
    per_row = kind is Kind.ROW and same(shape[-1], 1) and same(product(wanted[:-1]), rows)
    return per_row and _equal(shape[:-1], wanted[:-1])


def use_of(call: Call, reader: Kind, operand: Node, rows: Any) -> Use:
    """How `operand`, from outside the group, is read by an op of kind `reader` in a group of `rows` rows."""
    value: Tensor = operand.meta["val"]
    shape, width = tuple(value.shape), width_of(value)
    if call.node.target in BY_ROWS:
        use = BY_ROWS[call.node.target].use(call, operand)
        return (
            Use.per_row(operand) if reader is Kind.ROW and picks_elements(call) and operand not in tables(call) else use
        )
    wanted = walked(call)
    if all(same(size, 1) for size in shape):
        return Use(Kind.SCALAR, ())
    if reader is Kind.ROW:
        kept = same(product(wanted[:-1]), rows) and same(wanted[-1], 1)
        return Use(Kind.ROW, wanted, "columns" if kept else "rows")
    if all(same(size, 1) for size in shape[:-1]) and (value.dim() == 1 or not same(rows, 1)):
        return Use(Kind.COL, (width,))
    if same(width, 1):
        return Use(Kind.ROW, (*wanted[:-1], 1))
    return Use(Kind.FULL, wanted)


def _equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(same(a, b) for a, b in zip(one, other, strict=True))
