"""One FX node as MLIR: what each fusible op becomes inside its group's function.

Enters: a node of a fusible op, and its operands as values in row form. Leaves: the value of its result. The tables say
how: `pointwise`, `rowwise`, `gathers`. Invariant: `fusible` admits a node only if `lower` can express exactly what
eager would compute; everything else is opaque.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor
from torch.fx import Node

from .body import MLIR_TYPE, Number, Scalar, Term
from .build import GroupBuilder, Value
from .call import Call, aten
from .eager import EagerBody, Terms, common_dtype
from .gathers import GATHERS, picks_elements
from .pointwise import CASTS, POINTWISE, attributes, positional
from .rowwise import ROWWISE, Rowwise
from .use import Operand

BY_ROWS: Final[Mapping[Any, Rowwise]] = {**ROWWISE, **GATHERS}
"""Ops that need more than a formula."""
_CASTING_FIRST: Final = frozenset({aten.softmax.int, aten.log_softmax.int})
"""Ops that eager casts an operand for, in a kernel of its own."""


def is_elementwise(call: Call) -> bool:
    """Whether each element of the result depends on one element of each operand, or on an element picked by it."""
    return call.node.target in POINTWISE or picks_elements(call)


def launches_twice(call: Call) -> bool:
    """Whether eager runs the op as two kernels or more."""
    given = call.arguments
    copies = call.node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    return copies or (
        call.node.target in _CASTING_FIRST and given.get("dtype") not in (None, call.tensor("self").dtype)
    )


def lower(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    """Write one op into the group."""
    row = BY_ROWS.get(call.node.target)
    if row is not None:
        return row.lower(builder, call, operand)
    if call.node.target in CASTS:
        return builder.cast(operand(call.source), call.value.dtype)
    return _pointwise(builder, call, operand)


def _pointwise(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    row, terms, names = POINTWISE[call.node.target], terms_of(call), positional(call)
    tensors = [name for name in names if isinstance(call.arguments[name], Node)]
    numbers = {name: _as_taken(value, terms) for name, value in attributes(call).items()}

    def compute(body: EagerBody, *scalars: Scalar) -> Scalar:
        given = dict(zip(tensors, scalars, strict=True))

        def term(position: int, name: str) -> Term | None:
            if name not in given:
                return _as_taken(call.arguments[name], terms)
            if name == row.apart:
                return body.convert(given[name], "i1")
            return body.operand(given[name], exact=position == 1 and _kept(call, name, terms))

        return row.body(body, *(term(i, name) for i, name in enumerate(names)), **numbers)

    values = [operand(call.arguments[name]) for name in tensors]
    return builder.pointwise(compute, values, call.value.dtype, EagerBody(terms))


def _as_taken(value: Any, terms: Terms) -> Any:
    """An argument as eager's kernel sees it; what is no number stays as it is."""
    return terms.number(value) if isinstance(value, int | float) else value


def _kept(call: Call, name: str, terms: Terms) -> bool:
    """Whether a second operand without dimensions keeps its own dtype: see `eager`."""
    multiplies = "cpu" in POINTWISE[call.node.target].exact
    return terms.device == "cpu" and multiplies and call.tensor(name).dim() == 0


def terms_of(call: Call) -> Terms:
    """The terms of a pointwise call that is no cast."""
    row = POINTWISE[call.node.target]
    parts: list[Tensor | Number] = []
    for name in positional(call):
        value = call.arguments[name]
        if name != row.apart and value is not None:
            parts.append(value.meta["val"] if isinstance(value, Node) else value)
    device = call.value.device.type
    return Terms(common_dtype(parts, row.promotion), device, device in row.exact)


def fusible(node: Node) -> bool:
    """Whether a table has a row for this node and its dtypes."""
    if node.op != "call_function" or (node.target not in POINTWISE and node.target not in BY_ROWS):
        return False
    if not _is_known(node.meta.get("val")):
        return False
    call = Call.of(node)
    reads = call.read()
    for source in reads:
        other = source.meta.get("val")
        if not _is_known(other) or other.device != call.value.device:
            return False
    if not reads or not _are_plain(call):
        return False
    if node.target in BY_ROWS:
        return BY_ROWS[node.target].admits(call)
    if node.target in CASTS:
        return True
    terms = terms_of(call)
    return terms.common in MLIR_TYPE and _fit(call, terms) and POINTWISE[node.target].admits(call, terms)


def _is_known(value: Any) -> TypeGuard[Tensor]:
    """Whether kernels know tensors like this one."""
    return (
        isinstance(value, Tensor)
        and value.dtype in MLIR_TYPE
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
    )


def _are_plain(call: Call) -> bool:
    """Whether all arguments but tensors are literals, and the dtypes among them known."""
    for value in call.arguments.values():
        if isinstance(value, complex | torch.SymInt | torch.SymFloat | torch.SymBool):
            return False
        if isinstance(value, Node) and not isinstance(value.meta.get("val"), Tensor):
            return False
        if isinstance(value, torch.dtype) and value not in MLIR_TYPE:
            return False
    return True


def _fit(call: Call, terms: Terms) -> bool:
    """Whether the numbers of a call on integers are integers of that size."""
    if terms.common.is_floating_point or terms.common is torch.bool:
        return True
    limits = torch.iinfo(terms.common)
    values = [value for value in call.arguments.values() if isinstance(value, int | float)]
    return all(value == value and limits.min <= value <= limits.max and int(value) == value for value in values)
