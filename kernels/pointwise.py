"""The table of pointwise ops: ATen overload -> MLIR body.

Enters: a node's schema and arguments. Leaves: the scalar function of its `linalg.generic`. Bodies see operands in the
dtype eager computes in (`float32` for bf16 and fp16), and their result is rounded to the node's dtype: eager's own
rounding points. An overload that is not here is opaque.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Promotion

from .body import Body, Compare, Scalar

aten = torch.ops.aten
Compute = Callable[..., Scalar]


@dataclass(frozen=True, slots=True)
class Pointwise:
    """One row. `body(b, *operands, **attributes)`: operands follow the schema, Python numbers among them become
    constants; attributes are the schema's other arguments, by name. `admits` may refuse arguments it cannot express."""

    body: Compute
    promotion: Promotion = Promotion.DEFAULT
    admits: Callable[[Mapping[str, Any]], bool] = lambda attributes: True


def _float(body: Compute) -> Pointwise:
    return Pointwise(body, Promotion.INT_TO_FLOAT)


def _math(name: str) -> Pointwise:
    return _float(lambda b, x: b.unary(f"math.{name}", x))


def _compare(kind: Compare) -> Pointwise:
    return Pointwise(lambda b, x, y: b.compare(kind, x, y), Promotion.ALWAYS_BOOL)


def _bitwise(name: str) -> Pointwise:
    return Pointwise(lambda b, x, y: b.binary(f"arith.{name}i", x, y), admits=lambda a: True)


def _truth(b: Body, x: Scalar) -> Scalar:
    return b.compare("ne", x, b.constant(0, x.type))


def _logical(name: str) -> Pointwise:
    return Pointwise(lambda b, x, y: b.binary(f"arith.{name}i", _truth(b, x), _truth(b, y)), Promotion.ALWAYS_BOOL)


def _add(b: Body, x: Scalar, y: Scalar, alpha: float = 1) -> Scalar:
    if x.type == "i1":
        return b.binary("arith.ori", x, y)
    return b.add(x, y if alpha == 1 else b.mul(y, b.constant(alpha, y.type)))


def _sub(b: Body, x: Scalar, y: Scalar, alpha: float = 1) -> Scalar:
    return b.sub(x, y if alpha == 1 else b.mul(y, b.constant(alpha, y.type)))


def _mul(b: Body, x: Scalar, y: Scalar) -> Scalar:
    return b.binary("arith.andi", x, y) if x.type == "i1" else b.mul(x, y)


def _div_mode(b: Body, x: Scalar, y: Scalar, rounding_mode: str | None = None) -> Scalar:
    if rounding_mode is None:
        return b.div(x, y)
    if not x.floating:
        return b.binary("arith.floordivsi" if rounding_mode == "floor" else "arith.divsi", x, y)
    if rounding_mode == "trunc":
        return b.unary("math.trunc", b.div(x, y))
    return _floor_divide(b, x, y)


def _floor_divide(b: Body, x: Scalar, y: Scalar) -> Scalar:
    """As torch (and Python) floor-divides floats: through the remainder, so that x == q * y + r holds."""
    if not x.floating:
        return b.binary("arith.floordivsi", x, y)
    zero, one, half = b.constant(0, x.type), b.constant(1, x.type), b.constant(0.5, x.type)
    rest = b.binary("arith.remf", x, y)
    quotient = b.div(b.sub(x, rest), y)
    crossed = b.binary(
        "arith.andi",
        b.compare("ne", rest, zero),
        b.binary("arith.xori", b.compare("lt", y, zero), b.compare("lt", rest, zero)),
    )
    quotient = b.select(crossed, b.sub(quotient, one), quotient)
    floor = b.unary("math.floor", quotient)
    floor = b.select(b.compare("gt", b.sub(quotient, floor), half), b.add(floor, one), floor)
    signed_zero = b.binary("math.copysign", zero, b.div(x, y))
    floor = b.select(b.compare("eq", quotient, zero), signed_zero, floor)
    return b.select(b.compare("eq", y, zero), b.div(x, y), floor)


def _remainder(b: Body, x: Scalar, y: Scalar) -> Scalar:
    """The sign is the divisor's."""
    zero = b.constant(0, x.type)
    rest = b.binary("arith.remf" if x.floating else "arith.remsi", x, y)
    crossed = b.binary(
        "arith.andi",
        b.compare("ne", rest, zero),
        b.binary("arith.xori", b.compare("lt", y, zero), b.compare("lt", rest, zero)),
    )
    return b.select(crossed, b.add(rest, y), rest)


def _pow_scalar(b: Body, x: Scalar, exponent: float) -> Scalar:
    """The exponents eager treats apart are exact or cheap; the rest is powf."""
    if not x.floating:
        result = b.constant(1, x.type)
        for _ in range(int(exponent)):
            result = b.mul(result, x)
        return result
    match float(exponent):
        case 0.0:
            return b.constant(1, x.type)
        case 1.0:
            return x
        case 0.5:
            return b.unary("math.sqrt", x)
        case 2.0:
            return b.mul(x, x)
        case 3.0:
            return b.mul(b.mul(x, x), x)
        case -0.5:
            return b.unary("math.rsqrt", x)
        case -1.0:
            return b.div(b.constant(1, x.type), x)
        case -2.0:
            return b.div(b.constant(1, x.type), b.mul(x, x))
        case _:
            return b.binary("math.powf", x, b.constant(exponent, x.type))


def _sigmoid(b: Body, x: Scalar) -> Scalar:
    one = b.constant(1, x.type)
    return b.div(one, b.add(one, b.unary("math.exp", b.neg(x))))


def _silu(b: Body, x: Scalar) -> Scalar:
    return b.div(x, b.add(b.constant(1, x.type), b.unary("math.exp", b.neg(x))))


def _gelu(b: Body, x: Scalar, approximate: str = "none") -> Scalar:
    half, one = b.constant(0.5, x.type), b.constant(1, x.type)
    if approximate == "none":
        inner = b.unary("math.erf", b.mul(x, b.constant(math.sqrt(0.5), x.type)))
        return b.mul(b.mul(x, half), b.add(one, inner))
    cube = b.mul(b.mul(x, x), x)
    inner = b.mul(b.constant(math.sqrt(2 / math.pi), x.type), b.add(x, b.mul(b.constant(0.044715, x.type), cube)))
    return b.mul(b.mul(half, x), b.add(one, b.unary("math.tanh", inner)))


def _softplus(b: Body, x: Scalar, beta: float = 1, threshold: float = 20) -> Scalar:
    scaled = b.mul(x, b.constant(beta, x.type))
    soft = b.div(b.unary("math.log1p", b.unary("math.exp", scaled)), b.constant(beta, x.type))
    return b.select(b.compare("gt", scaled, b.constant(threshold, x.type)), x, soft)


def _leaky_relu(b: Body, x: Scalar, negative_slope: float = 0.01) -> Scalar:
    scaled = b.mul(x, b.constant(negative_slope, x.type))
    return b.select(b.compare("gt", x, b.constant(0, x.type)), x, scaled)


def _clamp(b: Body, x: Scalar, min: Any = None, max: Any = None) -> Scalar:
    low = x if min is None else b.maximum(x, min if isinstance(min, Scalar) else b.constant(min, x.type))
    return low if max is None else b.minimum(low, max if isinstance(max, Scalar) else b.constant(max, x.type))


def _sign(b: Body, x: Scalar) -> Scalar:
    zero, one = b.constant(0, x.type), b.constant(1, x.type)
    negative = b.select(b.compare("lt", x, zero), b.neg(one), zero)
    return b.select(b.compare("gt", x, zero), one, negative)


POINTWISE: Final[Mapping[Any, Pointwise]] = {
    aten.add.Tensor: Pointwise(_add),
    aten.add.Scalar: Pointwise(_add),
    aten.sub.Tensor: Pointwise(_sub),
    aten.sub.Scalar: Pointwise(_sub),
    aten.rsub.Tensor: Pointwise(lambda b, x, y, alpha=1: _sub(b, y, x, alpha)),
    aten.rsub.Scalar: Pointwise(lambda b, x, y, alpha=1: _sub(b, y, x, alpha)),
    aten.mul.Tensor: Pointwise(_mul),
    aten.mul.Scalar: Pointwise(_mul),
    aten.div.Tensor: _float(lambda b, x, y: b.div(x, y)),
    aten.div.Scalar: _float(lambda b, x, y: b.div(x, y)),
    aten.floor_divide.default: Pointwise(_floor_divide),
    aten.div.Tensor_mode: Pointwise(_div_mode, admits=lambda a: a.get("rounding_mode") is not None),
    aten.div.Scalar_mode: Pointwise(_div_mode, admits=lambda a: a.get("rounding_mode") is not None),
    aten.remainder.Tensor: Pointwise(_remainder),
    aten.remainder.Scalar: Pointwise(_remainder),
    aten.neg.default: Pointwise(lambda b, x: b.neg(x)),
    aten.abs.default: Pointwise(lambda b, x: b.unary("math.absf" if x.floating else "math.absi", x)),
    aten.sign.default: Pointwise(_sign),
    aten.square.default: Pointwise(lambda b, x: b.mul(x, x)),
    aten.reciprocal.default: _float(lambda b, x: b.div(b.constant(1, x.type), x)),
    aten.pow.Tensor_Scalar: Pointwise(_pow_scalar, admits=lambda a: True),
    aten.pow.Tensor_Tensor: Pointwise(lambda b, x, y: b.binary("math.powf", x, y)),
    aten.sqrt.default: _math("sqrt"),
    aten.rsqrt.default: _math("rsqrt"),
    aten.exp.default: _math("exp"),
    aten.exp2.default: _math("exp2"),
    aten.expm1.default: _math("expm1"),
    aten.log.default: _math("log"),
    aten.log2.default: _math("log2"),
    aten.log1p.default: _math("log1p"),
    aten.sin.default: _math("sin"),
    aten.cos.default: _math("cos"),
    aten.tanh.default: _math("tanh"),
    aten.erf.default: _math("erf"),
    aten.ceil.default: Pointwise(lambda b, x: b.unary("math.ceil", x) if x.floating else x),
    aten.floor.default: Pointwise(lambda b, x: b.unary("math.floor", x) if x.floating else x),
    aten.trunc.default: Pointwise(lambda b, x: b.unary("math.trunc", x) if x.floating else x),
    aten.round.default: Pointwise(lambda b, x: b.unary("math.roundeven", x) if x.floating else x),
    aten.sigmoid.default: _float(_sigmoid),
    aten.silu.default: _float(_silu),
    aten.gelu.default: _float(_gelu),
    aten.relu.default: Pointwise(lambda b, x: b.maximum(x, b.constant(0, x.type))),
    aten.relu6.default: Pointwise(lambda b, x: _clamp(b, x, 0, 6)),
    aten.hardtanh.default: Pointwise(lambda b, x, min_val=-1, max_val=1: _clamp(b, x, min_val, max_val)),
    aten.softplus.default: _float(_softplus),
    aten.leaky_relu.default: Pointwise(_leaky_relu),
    aten.clamp.default: Pointwise(_clamp),
    aten.clamp.Tensor: Pointwise(_clamp),
    aten.clamp_min.default: Pointwise(lambda b, x, min: _clamp(b, x, min)),
    aten.clamp_max.default: Pointwise(lambda b, x, max: _clamp(b, x, None, max)),
    aten.maximum.default: Pointwise(lambda b, x, y: b.maximum(x, y)),
    aten.minimum.default: Pointwise(lambda b, x, y: b.minimum(x, y)),
    aten.eq.Tensor: _compare("eq"),
    aten.eq.Scalar: _compare("eq"),
    aten.ne.Tensor: _compare("ne"),
    aten.ne.Scalar: _compare("ne"),
    aten.lt.Tensor: _compare("lt"),
    aten.lt.Scalar: _compare("lt"),
    aten.le.Tensor: _compare("le"),
    aten.le.Scalar: _compare("le"),
    aten.gt.Tensor: _compare("gt"),
    aten.gt.Scalar: _compare("gt"),
    aten.ge.Tensor: _compare("ge"),
    aten.ge.Scalar: _compare("ge"),
    aten.logical_and.default: _logical("and"),
    aten.logical_or.default: _logical("or"),
    aten.logical_xor.default: _logical("xor"),
    aten.logical_not.default: Pointwise(lambda b, x: b.compare("eq", x, b.constant(0, x.type)), Promotion.ALWAYS_BOOL),
    aten.bitwise_and.Tensor: _bitwise("and"),
    aten.bitwise_and.Scalar: _bitwise("and"),
    aten.bitwise_or.Tensor: _bitwise("or"),
    aten.bitwise_or.Scalar: _bitwise("or"),
    aten.bitwise_xor.Tensor: _bitwise("xor"),
    aten.bitwise_xor.Scalar: _bitwise("xor"),
    aten.__and__.Tensor: _bitwise("and"),
    aten.__or__.Tensor: _bitwise("or"),
    aten.__xor__.Tensor: _bitwise("xor"),
    aten.bitwise_not.default: Pointwise(
        lambda b, x: b.binary("arith.xori", x, b.constant(True if x.type == "i1" else -1, x.type))
    ),
    aten.isnan.default: Pointwise(
        lambda b, x: b.compare("ne", x, x) if x.floating else b.constant(False, "i1"), Promotion.ALWAYS_BOOL
    ),
    aten.where.self: Pointwise(lambda b, c, x, y: b.select(c, x, y)),
    aten.where.ScalarOther: Pointwise(lambda b, c, x, y: b.select(c, x, y)),
    aten.where.ScalarSelf: Pointwise(lambda b, c, x, y: b.select(c, x, y)),
    aten.masked_fill.Scalar: Pointwise(lambda b, x, c, y: b.select(c, y, x)),
    aten.masked_fill.Tensor: Pointwise(lambda b, x, c, y: b.select(c, y, x)),
    aten.clone.default: Pointwise(lambda b, x, memory_format=None: x),
    aten.to.dtype: Pointwise(lambda b, x, dtype, non_blocking=False, copy=False, memory_format=None: x),
    aten._to_copy.default: Pointwise(lambda b, x, **_: x),
    aten.type_as.default: Pointwise(lambda b, x: x),
    aten.to.dtype_layout: Pointwise(lambda b, x, **_: x),
}
"""One row per overload. Operand names of conditions (`where`, `masked_fill`) keep their own dtype."""

CONDITIONS: Final = frozenset({"condition", "mask"})
"""Schema names of operands that are not promoted."""
UNREAD: Final = {aten.type_as.default: frozenset({"other"})}
"""Tensor arguments that an op looks at but does not read."""
CASTS: Final = frozenset(
    {aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout, aten.clone.default}
)
"""Ops that only change the dtype or make a copy: no promotion takes place."""
