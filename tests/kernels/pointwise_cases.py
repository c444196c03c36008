"""Calls on which each pointwise row is tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from compare import EXACT, FLOAT32, FUNCTION, TIES, Bound
from one_op import DEVICE
from op_values import EVERY, FLOATS, HALVES, INTEGERS, Case, aten, scalar, values, without_zeros

_MIXED = (
    (torch.bfloat16, torch.float32), (torch.float32, torch.int64), (torch.bfloat16, torch.int64),
    (torch.float16, torch.bfloat16), (torch.bool, torch.float16), (torch.int32, torch.bool), (torch.int8, torch.int64),
)  # fmt: skip


def _unary(name: str, dtypes: Sequence[torch.dtype], bound: Bound = EXACT, **kwargs: Any) -> Iterator[Case]:
    for dtype in dtypes:
        yield Case(getattr(aten, name).default, (values(dtype, 1),), kwargs, bound)


def _binary(
    target: Any, dtypes: Sequence[torch.dtype], bound: Bound = EXACT, *, mixed: bool = True, **kwargs: Any
) -> Iterator[Case]:
    pairs = [(dtype, dtype) for dtype in dtypes]
    pairs += [pair for pair in _MIXED if mixed and set(pair) <= set(dtypes)]
    for one, other in pairs:
        yield Case(target, (values(one, 1), values(other, 2)), kwargs, bound)
    for dtype in [d for d in HALVES if d in dtypes and mixed]:  # without dimensions: promotes nothing
        yield Case(target, (values(dtype, 1), scalar(1.1, torch.float32)), kwargs, bound)
        yield Case(target, (scalar(1.1, torch.float32), values(dtype, 1)), kwargs, bound)


def _with_number(
    target: Any, dtypes: Sequence[torch.dtype], numbers: Sequence[Any], bound: Bound = EXACT, **kwargs: Any
) -> Iterator[Case]:
    for dtype, number in itertools.product(dtypes, numbers):
        yield Case(target, (values(dtype, 1), number), kwargs, bound)


def _arithmetic() -> Iterator[Case]:
    numbers = (1.1, 3, 0)
    for op in (aten.add, aten.mul, aten.multiply, aten.sub, aten.subtract, aten.rsub):
        takes_bool = "mul" in str(op) or op is aten.add
        dtypes = EVERY if takes_bool else EVERY[:-1]
        yield from _binary(op.Tensor, dtypes, mixed=takes_bool)
        yield from _with_number(op.Scalar, EVERY[:-1], numbers)
    yield from _binary(aten.sub.Tensor, FLOATS)
    yield from _with_number(aten.add.Tensor, FLOATS, numbers)
    for op in (aten.add, aten.sub, aten.subtract, aten.rsub):
        yield from _binary(op.Tensor, FLOATS, Bound(float32=FLOAT32), mixed=False, alpha=0.7)
        yield from _binary(op.Tensor, INTEGERS, mixed=False, alpha=3)
    yield from (Case(aten.add.Scalar, (values(dtype, 1), 1.1, 0.7), {}, FUNCTION) for dtype in FLOATS)
    for op in (aten.div, aten.divide, aten.true_divide):
        yield from _binary(op.Tensor, EVERY)
        yield from _with_number(op.Scalar, EVERY, (1.1, 3, 0, -2.0))
    yield from _rounded_division()
    for op in (aten.remainder, aten.fmod):
        yield from _binary(op.Tensor, FLOATS)
        yield from _with_number(op.Scalar, FLOATS, (1.1, 3, -2.5))
        yield from (Case(op.Tensor, (values(d, 1), without_zeros(values(d, 2)))) for d in INTEGERS)
        yield from _with_number(op.Scalar, INTEGERS, (3, -4))
    yield from (Case(aten.remainder.Scalar_Tensor, (7, without_zeros(values(d, 2)))) for d in (*FLOATS, torch.int64))
    yield from _powers()


def _rounded_division() -> Iterator[Case]:
    off = Bound(ulp=1, share=0.02, float32=FLOAT32)  # bfloat16 on the CPU rounds every step
    over = DEVICE == "cuda"  # the CPU's fmod is NaN where the quotient overflows
    for op in (aten.div, aten.divide):
        for mode in ("floor", "trunc"):
            for d in FLOATS:
                x, y = values(d, 1, extreme=over), values(d, 2, extreme=over)
                yield Case(op.Tensor_mode, (x, y), {"rounding_mode": mode}, off)
            for d in INTEGERS:
                yield Case(op.Tensor_mode, (values(d, 1), without_zeros(values(d, 2))), {"rounding_mode": mode})
            yield from _with_number(op.Scalar_mode, (*FLOATS, *INTEGERS), (3, -4), rounding_mode=mode)
            yield from _with_number(op.Scalar_mode, FLOATS, (1.1, 0.0), rounding_mode=mode)
    for d in FLOATS:
        yield Case(aten.floor_divide.default, (values(d, 1, extreme=over), values(d, 2, extreme=over)), {}, off)
    for d in INTEGERS:
        yield Case(aten.floor_divide.default, (values(d, 1), without_zeros(values(d, 2))))
    yield from _with_number(aten.floor_divide.Scalar, (*FLOATS, *INTEGERS), (3, -4))


def _powers() -> Iterator[Case]:
    for exponent in (0, 1, 2, 3, 0.5, -0.5, -1, -2, 2.5, 1.1):
        bound = FUNCTION if exponent in (0.5, -0.5, 2.5, 1.1) else EXACT
        yield from _with_number(aten.pow.Tensor_Scalar, FLOATS, (exponent,), bound)
    yield from _with_number(aten.pow.Tensor_Scalar, (*INTEGERS, torch.bool), (0, 2, 5))
    yield from _with_number(aten.pow.Tensor_Scalar, INTEGERS, (0.5, -1.0), FUNCTION)
    yield from _binary(aten.pow.Tensor_Tensor, FLOATS, FUNCTION)
    yield from (Case(aten.pow.Scalar, (base, values(d, 2)), {}, FUNCTION) for base in (2, 10000.0, 1) for d in FLOATS)


def _functions() -> Iterator[Case]:
    for name in ("neg", "negative", "abs", "absolute"):
        yield from _unary(name, EVERY[:-1])
    yield from _unary("sign", EVERY)
    yield from _unary("square", EVERY)
    yield from _unary("reciprocal", EVERY)
    yield from _unary("sqrt", (torch.bfloat16, torch.float32, *INTEGERS, torch.bool))
    yield from _unary("sqrt", (torch.float16,), FUNCTION)  # the CPU rounds once, others twice
    for name in ("rsqrt", "exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "tanh", "sigmoid"):
        yield from _unary(name, EVERY, FUNCTION)
    yield from _unary("erf", EVERY, ERF)
    for name in ("ceil", "floor", "trunc", "round", "fix"):
        yield from _unary(name, EVERY[:-1])
    for name in ("silu", "mish", "log_sigmoid", "softplus"):
        yield from _unary(name, FLOATS, FUNCTION)
    yield from (Case(aten.gelu.default, (values(d, 1, awkward=DEVICE == "cuda"),), {}, GELU) for d in FLOATS)
    yield from _unary("gelu", FLOATS, FUNCTION, approximate="tanh")
    for dtype in FLOATS:
        yield Case(aten.softplus.default, (values(dtype, 1), 0.7, 2), {}, FUNCTION)
        yield Case(aten.leaky_relu.default, (values(dtype, 1), 0.1))
        yield Case(aten.elu.default, (values(dtype, 1), 0.3, 1.1, 0.9), {}, FUNCTION)
        yield Case(aten.hardtanh.default, (values(dtype, 1), -0.3, 1.1))
    for name in ("elu", "leaky_relu", "hardswish", "hardsigmoid"):
        yield from _unary(name, FLOATS, FUNCTION if name == "elu" else EXACT)
    for name in ("relu", "relu6"):
        yield from _unary(name, (*FLOATS, *INTEGERS))
    yield from _unary("hardtanh", FLOATS)


ERF = FUNCTION if DEVICE == "cuda" else replace(FUNCTION, absolute=1e-6)
"""The CPU's erf is off near zero, by parts of one."""
GELU = replace(FUNCTION, absolute=1e-6) if DEVICE == "cuda" else replace(ERF, ulp=2, share=0.1)
"""The CPU has a formula of its own, with infinities where this one has numbers, and float16 rounded between steps. On
CUDA 1 + erf cancels from -5 down: what is left there is one unit of erf's last place, or two."""


def _bounds() -> Iterator[Case]:
    for op in (aten.clamp, aten.clip):
        for dtype in (*FLOATS, *INTEGERS):
            x = values(dtype, 1)
            yield from (Case(op.default, (x, *bounds)) for bounds in ((-1, 2), (None, 2), (-1,), (3, -3)))
            yield Case(op.Tensor, (x, values(dtype, 2), values(dtype, 3)), {}, TIES)
            yield Case(op.Tensor, (x, None, values(dtype, 3)), {}, TIES)
        yield from (Case(op.default, (values(dtype, 1), -0.7, math.nan)) for dtype in FLOATS)
        yield from (Case(op.default, (values(dtype, 1), -0.7, 1.1)) for dtype in (*FLOATS, torch.int32))
    for op in (aten.clamp_min, aten.clamp_max):
        yield from _with_number(op.default, (*FLOATS, *INTEGERS), (1,))
        yield from _with_number(op.default, (*FLOATS, torch.int64), (1.1,))
        yield from _binary(op.Tensor, (*FLOATS, *INTEGERS), TIES)
    for target in (aten.maximum.default, aten.minimum.default, aten.max.other, aten.min.other):
        yield from _binary(target, EVERY, TIES)


def _truths() -> Iterator[Case]:
    names = ("eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater", "greater_equal")
    for op in (getattr(aten, name) for name in names):
        yield from _binary(op.Tensor, EVERY)
        yield from _with_number(op.Scalar, EVERY, (1, 0.1))
    for name in ("and", "or", "xor"):
        yield from _binary(getattr(aten, f"logical_{name}").default, EVERY)
        for op in (getattr(aten, f"bitwise_{name}"), getattr(aten, f"__{name}__")):
            yield from _binary(op.Tensor, (*INTEGERS, torch.bool))
            yield from _with_number(op.Scalar, INTEGERS, (5, -1))
            yield from _with_number(op.Scalar, (torch.bool,), (True,))
        op = getattr(aten, f"bitwise_{name}").Scalar_Tensor
        yield from (Case(op, (6, values(dtype, 1))) for dtype in INTEGERS)
    yield from _unary("bitwise_not", (*INTEGERS, torch.bool))
    for name in ("logical_not", "isnan", "isinf"):
        yield from _unary(name, EVERY)
    for side in ("left", "right"):
        op, dunder = getattr(aten, f"bitwise_{side}_shift"), getattr(aten, f"__{side[0]}shift__")
        for dtype in INTEGERS:
            x, by = values(dtype, 1), values(dtype, 2).clamp(0, 7)
            yield from (Case(target, (x, by)) for target in (op.Tensor, dunder.Tensor))
            yield from (Case(target, (x, 3)) for target in (op.Tensor_Scalar, dunder.Scalar))
            yield Case(op.Scalar_Tensor, (5, by))


def _choices() -> Iterator[Case]:
    condition = values(torch.bool, 5)
    for one, other in (*((d, d) for d in EVERY), *_MIXED):
        yield Case(aten.where.self, (condition, values(one, 1), values(other, 2)))
    for dtype in EVERY:
        x = values(dtype, 1)
        number = True if dtype is torch.bool else 5 if dtype in INTEGERS else -0.1
        yield Case(aten.where.ScalarOther, (condition, x, number))
        yield Case(aten.where.ScalarSelf, (condition, number, x))
        yield Case(aten.masked_fill.Scalar, (x, condition, number))
        yield Case(aten.masked_fill.Tensor, (x, condition, scalar(number, dtype)))
    yield from (Case(aten.where.ScalarOther, (condition, values(d, 1), -math.inf)) for d in FLOATS)
    yield from (Case(aten.where.Scalar, (condition, *numbers)) for numbers in ((1, 2), (0.1, -math.inf)))


def _casts() -> Iterator[Case]:
    for one, other in itertools.product(EVERY, EVERY):
        whole = other in INTEGERS and one not in (*INTEGERS, torch.bool)  # out of range is undefined
        x = values(one, 1, awkward=not whole)
        if one is not other:
            yield Case(aten.to.dtype, (x, other))
            yield Case(aten.type_as.default, (x, values(other, 2)))
            yield Case(aten.to.dtype_layout, (x,), {"dtype": other})
        yield Case(aten._to_copy.default, (x,), {"dtype": other})
    yield from (Case(aten.clone.default, (values(dtype, 1),)) for dtype in EVERY)


def pointwise_cases() -> Iterator[Case]:
    """For every pointwise row at least one case."""
    for family in (_arithmetic, _functions, _bounds, _truths, _choices, _casts):
        yield from family()
