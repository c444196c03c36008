"""The formulas of pointwise ops: what eager's kernels compute at one point, step by step.

Enters: a body and the operands of an op, scalars in the dtype eager computes in or Python numbers as eager takes them.
Leaves: the result, not yet rounded to the op's dtype. Invariant: the order of operations is that of eager's kernels,
fused multiply-adds included; where the CPU's and CUDA's differ it is CUDA's, or each device's own (`b.on_cuda`).
"""

from __future__ import annotations

import math

import torch

from .body import Number, Scalar, Term, to_float32
from .eager import EagerBody as Body


def plus(b: Body, x: Scalar, y: Term, alpha: Number = 1) -> Scalar:
    if x.type == "i1":
        return b.binary("arith.ori", x, y)
    if alpha == 1:
        return b.add(x, y)
    return b.fma(y, alpha, x) if x.floating else b.add(x, b.mul(b.of(y, x.type), alpha))


def minus(b: Body, x: Term, y: Term, alpha: Number = 1) -> Scalar:
    if alpha == 1:
        return b.sub(x, y)
    x = b.either_term(x)
    return b.fma(y, -alpha, x) if x.floating else b.sub(x, b.mul(b.of(y, x.type), alpha))


def times(b: Body, x: Scalar, y: Term) -> Scalar:
    return b.binary("arith.andi", x, y) if x.type == "i1" else b.mul(x, y)


def times_itself(b: Body, x: Scalar) -> Scalar:
    return times(b, x, x)


def divide(b: Body, x: Scalar, y: Term) -> Scalar:
    if isinstance(y, Scalar) or not b.on_cuda or y == 0:
        return b.div(x, y)
    return b.mul(x, 1.0 / float(y))


def _single(y: Term) -> Term:
    """A divisor as the kernels that round quotients take it: a number in float32, whose reciprocal then is too."""
    return y if isinstance(y, Scalar) else to_float32(y)


def divide_rounded(b: Body, x: Scalar, y: Term, rounding_mode: str = "floor") -> Scalar:
    if rounding_mode == "floor":
        return floor_divide(b, x, y)
    if not x.floating:
        return b.binary("arith.divsi", x, y)
    quotient = divide(b, x, _single(y))
    return b.math("trunc", b.step(quotient) if isinstance(y, Scalar) else quotient)


def floor_divide(b: Body, x: Scalar, y: Term) -> Scalar:
    """As torch (and Python) floor-divides floats: through the remainder, so that x == q * y + r holds."""
    if not x.floating:
        return b.binary("arith.floordivsi", x, y)
    divisor, y = _single(y), b.of(y, x.type)
    rest = b.binary("arith.remf", x, y)
    quotient = divide(b, b.sub(x, rest), divisor)
    quotient = b.select(_crossed(b, rest, y), b.sub(quotient, 1), quotient)
    floor = b.math("floor", quotient)
    floor = b.select(b.compare("gt", b.sub(quotient, floor), 0.5), b.add(floor, 1), floor)
    straight = divide(b, x, divisor)
    floor = b.select(b.compare("ne", quotient, 0), floor, b.binary("math.copysign", 0, straight))
    return b.select(b.compare("eq", y, 0), straight, floor)


def remainder(b: Body, x: Term, y: Term) -> Scalar:
    """The sign is the divisor's."""
    x, y = b.either_term(x), b.either_term(y)
    rest = fmod(b, x, y)
    return b.select(_crossed(b, rest, y), b.add(rest, y), rest)


def fmod(b: Body, x: Scalar, y: Term) -> Scalar:
    """The sign is the dividend's."""
    return b.binary("arith.remf" if x.floating else "arith.remsi", x, y)


def _crossed(b: Body, rest: Scalar, y: Scalar) -> Scalar:
    """Whether there is a rest whose sign is not the divisor's."""
    signs = b.differ(b.compare("lt", y, 0), b.compare("lt", rest, 0))
    return b.both(b.compare("ne", rest, 0), signs)


def power(b: Body, x: Scalar, exponent: Term) -> Scalar:
    """The exponents eager treats apart are exact or cheap; the rest is powf."""
    if isinstance(exponent, Scalar):
        return b.binary("math.powf", x, exponent)
    if not x.floating:
        return _integer_power(b, x, int(exponent))
    if b.terms.common is torch.float16 and not b.on_cuda and exponent not in (0, 1, 2):
        return b.binary("math.powf", x, exponent)
    match exponent:
        case 0:
            return b.constant(1, x.type)
        case 1:
            return x
        case 0.5:
            return b.math("sqrt", x)
        case 2:
            return b.mul(x, x)
        case 3:
            return b.mul(b.step(b.mul(x, x)), x)
        case -0.5:
            return b.math("rsqrt", x)
        case -1:
            return b.div(1, x)
        case -2:
            return b.div(1, b.step(b.mul(x, x)))
        case _:
            return b.binary("math.powf", x, exponent)


def _integer_power(b: Body, x: Scalar, exponent: int) -> Scalar:
    """By squaring; products wrap, as eager's do."""
    result: Scalar | None = None
    while exponent:
        if exponent & 1:
            result = x if result is None else b.mul(result, x)
        exponent >>= 1
        x = b.mul(x, x) if exponent else x
    return b.constant(1, x.type) if result is None else result


def power_of_number(b: Body, base: Number, exponent: Scalar) -> Scalar:
    return b.constant(1, exponent.type) if base == 1 else b.binary("math.powf", base, exponent)


def shift_left(b: Body, x: Term, y: Term) -> Scalar:
    x, y = b.either_term(x), b.either_term(y)
    legal = b.both(b.compare("ge", y, 0), b.compare("lt", y, x.bits))
    return b.select(legal, b.binary("arith.shli", x, b.select(legal, y, 0)), 0)


def shift_right(b: Body, x: Term, y: Term) -> Scalar:
    x, y = b.either_term(x), b.either_term(y)
    legal = b.both(b.compare("ge", y, 0), b.compare("lt", y, x.bits))
    return b.binary("arith.shrsi", x, b.select(legal, y, x.bits - 1))


def sign(b: Body, x: Scalar) -> Scalar:
    """Zero for zeros of both signs, and for NaN."""
    if x.type == "i1":
        return x
    negative = b.select(b.compare("lt", x, 0), b.constant(-1, x.type), 0)
    return b.select(b.compare("gt", x, 0), 1, negative)


def at_least(b: Body, x: Scalar, low: Term) -> Scalar:
    """Where the two are equal, x: the sign of a zero is kept."""
    clamped = b.select(b.compare("lt", x, low), low, x)
    return _or_nan(b, clamped, low)


def at_most(b: Body, x: Scalar, high: Term) -> Scalar:
    clamped = b.select(b.compare("gt", x, high), high, x)
    return _or_nan(b, clamped, high)


def _or_nan(b: Body, x: Scalar, bound: Term) -> Scalar:
    if isinstance(bound, Scalar):
        return b.select(b.is_nan(bound), bound, x) if bound.floating else x
    return b.of(bound, x.type) if bound != bound else x


def clamp(b: Body, x: Scalar, low: Term | None = None, high: Term | None = None) -> Scalar:
    """NaN if any of the three is; the upper bound where the bounds cross."""
    x = x if low is None else at_least(b, x, low)
    return x if high is None else at_most(b, x, high)


def sigmoid(b: Body, x: Scalar) -> Scalar:
    return b.div(1, _one_plus_exp_minus(b, x))


def silu(b: Body, x: Scalar) -> Scalar:
    return b.div(x, _one_plus_exp_minus(b, x))


def _one_plus_exp_minus(b: Body, x: Scalar) -> Scalar:
    return b.add(1, b.math("exp", b.neg(x)))


def gelu(b: Body, x: Scalar, approximate: str = "none") -> Scalar:
    if approximate == "none":
        inner = b.math("erf", b.mul(x, math.sqrt(0.5)))
        return b.mul(b.mul(x, 0.5), b.add(1, inner))
    cube = b.mul(b.mul(x, x), x)
    inner = b.mul(math.sqrt(2 / math.pi), b.fma(0.044715, cube, x))
    return b.mul(b.mul(0.5, x), b.add(1, b.math("tanh", inner)))


def softplus(b: Body, x: Scalar, beta: Number = 1, threshold: Number = 20) -> Scalar:
    scaled = x if beta == 1 else b.mul(x, beta)
    soft = b.math("log1p", b.math("exp", scaled))
    return b.select(b.compare("gt", scaled, threshold), x, soft if beta == 1 else b.div(soft, beta))


def mish(b: Body, x: Scalar) -> Scalar:
    return b.mul(x, b.math("tanh", b.math("log1p", b.math("exp", x))))


def log_sigmoid(b: Body, x: Scalar) -> Scalar:
    folded = b.math("log1p", b.math("exp", b.neg(b.math("absf", x))))
    return b.sub(b.minimum(x, 0), folded)


def leaky_relu(b: Body, x: Scalar, negative_slope: Number = 0.01) -> Scalar:
    return b.select(b.compare("gt", x, 0), x, b.mul(x, negative_slope))


def elu(b: Body, x: Scalar, alpha: Number = 1, scale: Number = 1, input_scale: Number = 1) -> Scalar:
    negative = b.mul(b.math("expm1", b.mul(x, input_scale)), to_float32(alpha) * to_float32(scale))
    return b.select(b.compare("le", x, 0), negative, b.mul(x, scale))


def hardswish(b: Body, x: Scalar) -> Scalar:
    return _sixth(b, b.mul(x, clamp(b, b.add(x, 3), 0, 6)))


def hardsigmoid(b: Body, x: Scalar) -> Scalar:
    return _sixth(b, clamp(b, b.add(x, 3), 0, 6))


def _sixth(b: Body, x: Scalar) -> Scalar:
    return b.mul(x, 1 / 6) if b.on_cuda else b.div(x, 6)


def is_infinite(b: Body, x: Scalar) -> Scalar:
    return b.compare("eq", b.math("absf", x), math.inf) if x.floating else b.constant(False, "i1")
