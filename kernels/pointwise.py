"""The table of pointwise ops: ATen overload -> MLIR body.

Enters: an overload. Leaves: its row: the formula, how eager promotes its operands, and what it must refuse. An
overload that is not here is opaque.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Promotion

from . import formulas as f
from .body import Compare, Scalar
from .call import Call, aten
from .eager import Terms

Compute = Callable[..., Scalar]

_CUDA: Final = frozenset({"cuda"})
_BOTH: Final = frozenset({"cpu", "cuda"})


@dataclass(frozen=True, slots=True)
class Pointwise:
    """One row.

    `body(b, *operands, **attributes)`: operands are the schema's tensors, and the numbers that stand for one, in order;
    None for one left out. Attributes are its other arguments, by name.
    """

    body: Compute
    promotion: Promotion = Promotion.DEFAULT
    apart: str | None = None
    """An operand that is not promoted with the others: a condition."""
    exact: frozenset[str] = frozenset()
    """Devices whose kernels do not round Python numbers to the operands' dtype."""
    admits: Callable[[Call, Terms], bool] = lambda call, terms: True


@functools.cache
def operands(target: Any) -> tuple[str, ...]:
    """The arguments a body takes by position: tensors, and numbers where another overload of the op has a tensor.

    Eager makes such a number a tensor without dimensions, and promotes it like one; other numbers are attributes.
    """
    overloads = [getattr(target.overloadpacket, name) for name in target.overloadpacket.overloads()]
    tensors = {a.name for overload in overloads for a in overload._schema.arguments if "Tensor" in str(a.type)}
    return tuple(a.name for a in target._schema.arguments if a.name in tensors and _is_value(a))


def _is_value(argument: Any) -> bool:
    kind = str(argument.type).removeprefix("Optional[").rstrip("]")
    return kind in ("Tensor", "number")


def positional(call: Call) -> tuple[str, ...]:
    """The operands of a call that its op reads."""
    read = call.read()
    return tuple(
        name
        for name in operands(call.node.target)
        if not isinstance(call.arguments[name], torch.fx.Node) or call.arguments[name] in read
    )


def attributes(call: Call) -> dict[str, Any]:
    """The other arguments, by name."""
    named = operands(call.node.target)
    return {name: value for name, value in call.arguments.items() if name not in named}


# --- what a row refuses -----------------------------------------------------------------------------------------------


def _no_zero(call: Call, terms: Terms) -> bool:
    """Integer division by a literal zero is an error in eager; by a tensor that holds one, too, and cannot be seen."""
    return terms.common.is_floating_point or call.arguments["other"] != 0


def _no_integer(call: Call, terms: Terms) -> bool:
    return terms.common.is_floating_point


def _small_exponent(call: Call, terms: Terms) -> bool:
    exponent = call.arguments["exponent"]
    return terms.common.is_floating_point or (isinstance(exponent, int) and 0 <= exponent <= 64)


def _rounds(call: Call, terms: Terms) -> bool:
    return call.arguments["rounding_mode"] is not None and _no_zero(call, terms)


# --- rows -------------------------------------------------------------------------------------------------------------


def _float(body: Compute, exact: frozenset[str] = _BOTH) -> Pointwise:
    return Pointwise(body, Promotion.INT_TO_FLOAT, exact=exact)


def _math(name: str) -> Pointwise:
    return _float(lambda b, x: b.math(name, x))


def _whole(name: str) -> Pointwise:
    """Rounding to whole numbers, which leaves integers as they are."""
    return Pointwise(lambda b, x: b.math(name, x) if x.floating else x)


def _truth(body: Compute, apart: str | None = None) -> Pointwise:
    return Pointwise(body, Promotion.ALWAYS_BOOL, apart)


def _compare(kind: Compare) -> Pointwise:
    return _truth(lambda b, x, y: b.compare(kind, x, y))


def _bitwise(name: str) -> Pointwise:
    return Pointwise(lambda b, x, y: b.binary(f"arith.{name}i", x, y))


def _logical(name: str) -> Pointwise:
    return _truth(lambda b, x, y: b.binary(f"arith.{name}i", b.convert(x, "i1"), b.convert(y, "i1")))


def _same() -> Pointwise:
    return Pointwise(lambda b, x, **_: x)


def _rows() -> Iterator[tuple[str, Pointwise]]:
    """Names of ops, and of overloads where not all are meant, with their rows."""
    yield from {
        "add": Pointwise(f.plus, exact=_CUDA),
        "sub": Pointwise(f.minus, exact=_CUDA),
        "rsub": Pointwise(lambda b, x, y, alpha=1: f.minus(b, y, x, alpha), exact=_CUDA),
        "mul": Pointwise(f.times, exact=_BOTH),
        "div.Tensor": _float(f.divide),
        "div.Scalar": _float(f.divide),
        "div.Tensor_mode": Pointwise(f.divide_rounded, exact=_BOTH, admits=_rounds),
        "div.Scalar_mode": Pointwise(f.divide_rounded, exact=_BOTH, admits=_rounds),
        "floor_divide": Pointwise(f.floor_divide, exact=_BOTH, admits=_no_zero),
        "remainder": Pointwise(f.remainder, admits=_no_zero),
        "fmod": Pointwise(f.fmod, admits=_no_zero),
        "pow.Tensor_Scalar": Pointwise(f.power, admits=_small_exponent),
        "pow.Tensor_Tensor": Pointwise(f.power, admits=_no_integer),
        "pow.Scalar": Pointwise(f.power_of_number, admits=_no_integer),
    }.items()
    yield from {
        "neg": Pointwise(lambda b, x: b.neg(x)),
        "abs": Pointwise(lambda b, x: b.math("absf" if x.floating else "absi", x)),
        "sign": Pointwise(f.sign),
        "square": Pointwise(f.times_itself),
        "reciprocal": _float(lambda b, x: b.div(1, x)),
        **{name: _math(name) for name in ("sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log1p")},
        **{name: _math(name) for name in ("sin", "cos", "tanh", "erf")},
        **{name: _whole(name) for name in ("ceil", "floor", "trunc")},
        "round.default": _whole("roundeven"),
    }.items()
    yield from {
        "sigmoid": _float(f.sigmoid),
        "silu": _float(f.silu),
        "gelu": _float(f.gelu),
        "mish": _float(f.mish),
        "log_sigmoid": _float(f.log_sigmoid),
        "softplus": _float(f.softplus),
        "relu": Pointwise(lambda b, x: f.at_least(b, x, 0)),
        "relu6": Pointwise(lambda b, x: f.clamp(b, x, 0, 6)),
        "hardtanh": Pointwise(lambda b, x, min_val, max_val: f.clamp(b, x, min_val, max_val)),
        "hardswish": Pointwise(f.hardswish),
        "hardsigmoid": Pointwise(f.hardsigmoid),
        "leaky_relu": Pointwise(f.leaky_relu, exact=_BOTH),
        "elu": Pointwise(f.elu, exact=_BOTH),
        "clamp": Pointwise(f.clamp),
        "clamp_min": Pointwise(f.at_least),
        "clamp_max": Pointwise(f.at_most),
        "maximum": Pointwise(lambda b, x, y: b.maximum(x, y)),
        "minimum": Pointwise(lambda b, x, y: b.minimum(x, y)),
        "max.other": Pointwise(lambda b, x, y: b.maximum(x, y)),
        "min.other": Pointwise(lambda b, x, y: b.minimum(x, y)),
    }.items()
    compare: tuple[Compare, ...] = ("eq", "ne", "lt", "le", "gt", "ge")
    yield from {
        **{name: _compare(name) for name in compare},
        **{f"logical_{name}": _logical(name) for name in ("and", "or", "xor")},
        **{f"bitwise_{name}": _bitwise(name) for name in ("and", "or", "xor")},
        **{f"__{name}__": _bitwise(name) for name in ("and", "or", "xor")},
        **{name: Pointwise(f.shift_left) for name in ("bitwise_left_shift", "__lshift__")},
        **{name: Pointwise(f.shift_right) for name in ("bitwise_right_shift", "__rshift__")},
        "logical_not": _truth(lambda b, x: b.compare("eq", x, 0)),
        "bitwise_not": Pointwise(lambda b, x: b.differ(x, True if x.type == "i1" else -1)),
        "isnan": _truth(lambda b, x: b.is_nan(x) if x.floating else b.constant(False, "i1")),
        "isinf": _truth(f.is_infinite),
        "where.self": Pointwise(lambda b, c, x, y: b.select(c, b.either_term(x), y), apart="condition"),
        "where.Scalar": Pointwise(lambda b, c, x, y: b.select(c, b.either_term(x), y), apart="condition"),
        "where.ScalarOther": Pointwise(lambda b, c, x, y: b.select(c, x, y), apart="condition"),
        "where.ScalarSelf": Pointwise(lambda b, c, x, y: b.select(c, x, y), apart="condition"),
        "masked_fill": Pointwise(lambda b, x, c, y: b.select(c, y, x), apart="mask"),
    }.items()
    yield from {
        "clone": _same(),
        "to.dtype": _same(),
        "to.dtype_layout": _same(),
        "_to_copy": _same(),
        "type_as": _same(),
    }.items()


_ALIASES: Final = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs",
    "fix": "trunc", "clip": "clamp", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "not_equal": "ne",
}  # fmt: skip
"""Other names of ops, with the same overloads."""


def _table() -> dict[Any, Pointwise]:
    table: dict[Any, Pointwise] = {}
    for name, row in _rows():
        op, _, overload = name.partition(".")
        packet = getattr(aten, op)
        for each in [overload] if overload else packet.overloads():
            target = getattr(packet, each)
            if _is_functional(target):
                table[target] = row
    for alias, name in _ALIASES.items():
        for overload in getattr(aten, alias).overloads():
            row = table.get(getattr(getattr(aten, name), overload, None))
            if row is not None:
                table[getattr(getattr(aten, alias), overload)] = row
    return table


def _is_functional(target: Any) -> bool:
    """Whether an overload returns one new tensor and takes nothing but tensors and plain values."""
    arguments, returns = target._schema.arguments, target._schema.returns
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
    kinds = {str(a.type) for a in arguments}
    return not writes and [str(r.type) for r in returns] == ["Tensor"] and "List[Tensor]" not in kinds


POINTWISE: Final[Mapping[Any, Pointwise]] = _table()
"""One row per overload."""
CASTS: Final = frozenset(
    {
        aten.clone.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
    }
)
"""Ops that only change the dtype or make a copy: no promotion takes place."""
