"""Ops that pick elements by index: rows of a table, or columns.

Enters: a call. Leaves: the value of its result, read from the table where it lies in memory. Invariant: the table is an
input of the kernel, never a value computed in it; an index out of range is an error, as in eager.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from .build import GroupBuilder, Value
from .call import Call, aten
from .rowwise import Rowwise
from .use import Operand, Use


def _table(call: Call) -> Node:
    return call.arguments["weight"] if "weight" in call.arguments else call.arguments["self"]


def _index(call: Call) -> Node:
    given = call.arguments
    if "indices" in given:
        return given["indices"] if isinstance(given["indices"], Node) else given["indices"][-1]
    return given["index"]


def tables(call: Call) -> tuple[Node, ...]:
    """The operands of a call that must lie in memory."""
    return (_table(call),) if call.node.target in GATHERS else ()


def _static(size: object) -> bool:
    return isinstance(size, int)


def _indexes(call: Call, *, table_rank: int) -> bool:
    """Whether index and table are as the kernels take them; the sizes that are indexed must be known."""
    found: Tensor = _table(call).meta["val"]
    integers = _index(call).meta["val"].dtype in (torch.int32, torch.int64)
    return integers and found.dim() == table_rank and all(map(_static, found.shape)) and 0 not in found.shape


# --- rows of a matrix, by an index of any shape -----------------------------------------------------------------------


def _pick_rows(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    return builder.gather(operand(_table(call)), operand(_index(call)), along="rows", wraps=_wraps(call))


def _use_for_rows(call: Call, node: Node) -> Use:
    return Use.table(node) if node is _table(call) else Use.per_row(node)


# --- elements of a vector, by an index of any shape -------------------------------------------------------------------


def _pick_elements(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    return builder.gather(operand(_table(call)), operand(_index(call)), along="columns", wraps=_wraps(call))


def _use_for_elements(call: Call, node: Node) -> Use:
    return Use.columns(node) if node is _table(call) else Use.full(node)


# --- along the last dimension, each row its own -----------------------------------------------------------------------


def _same_rows(call: Call) -> bool:
    table, index = call.tensor("self"), call.tensor("index")
    rank = table.dim()
    if rank == 0 or call.arguments["dim"] % rank != rank - 1 or index.dtype not in (torch.int32, torch.int64):
        return False
    return table.shape[:-1] == index.shape[:-1] and _static(table.shape[-1]) and table.shape[-1] > 0


# --- which of them ----------------------------------------------------------------------------------------------------


def _is_vector(call: Call) -> bool:
    return _table(call).meta["val"].dim() == 1


def picks_elements(call: Call) -> bool:
    """Whether each index picks one element of a vector."""
    return call.node.target in (aten.index.Tensor, aten.index_select.default) and _is_vector(call)


def index_of(call: Call) -> Node | None:
    """The index of a call that picks rows; None for any other."""
    target = call.node.target
    rows = target is aten.embedding.default or (target in GATHERS and target is not aten.gather.default)
    return _index(call) if rows and not picks_elements(call) else None


def _by_shape_lower(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    return (_pick_elements if _is_vector(call) else _pick_rows)(builder, call, operand)


def _by_shape_use(call: Call, node: Node) -> Use:
    return (_use_for_elements if _is_vector(call) else _use_for_rows)(call, node)


def _first_dim(call: Call) -> bool:
    """One index, for the first dimension of a matrix or a vector."""
    given = call.arguments
    if "dim" in given and given["dim"] % max(1, call.tensor("self").dim()):
        return False
    if isinstance(given.get("indices"), list | tuple) and len(given["indices"]) != 1:
        return False
    if given.get("scale_grad_by_freq") or given.get("sparse"):
        return False
    return _indexes(call, table_rank=1 if _is_vector(call) else 2)


def _wraps(call: Call) -> bool:
    """Whether negative indices count from the end."""
    return call.node.target is aten.index.Tensor


GATHERS: Final[Mapping[Any, Rowwise]] = {
    aten.embedding.default: Rowwise(_pick_rows, _first_dim, _use_for_rows),
    aten.index.Tensor: Rowwise(_by_shape_lower, _first_dim, _by_shape_use),
    aten.index_select.default: Rowwise(_by_shape_lower, _first_dim, _by_shape_use),
    aten.gather.default: Rowwise(_pick_elements, _same_rows, lambda call, node: Use.full(node)),
}
"""One row per overload."""
