"""Ops that need a whole row: reductions over the last dimension, norms, softmax; and concatenation along it.

Enters: a call, and its operands in row form. Leaves: the value of its result. Composite ops (norms, softmax) keep
float32 between their steps and round once, as eager's kernels do; sums are added up in another order than eager's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from .body import Body, Scalar
from .build import GroupBuilder, Kind, Reduction, Value
from .call import Call, aten
from .use import Operand, Use

F32 = torch.float32


@dataclass(frozen=True, slots=True)
class Rowwise:
    """One row. `admits` says whether a call's arguments can be expressed, `use` how an operand meets it."""

    lower: Callable[[GroupBuilder, Call, Operand], Value]
    admits: Callable[[Call], bool]
    use: Callable[[Call, Node], Use]


def _source_or_weight(call: Call, node: Node) -> Use:
    """The reduced tensor by rows and columns; a weight or bias by columns."""
    return Use.full(node) if node is call.source else Use.columns(node)


def _last_dim(call: Call) -> bool:
    """Over the last dimension, and that one only."""
    dims = call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    rank = call.tensor("self").dim()
    return len(dims) == 1 and rank > 0 and dims[0] % rank == rank - 1


def _over(lower: Callable[[GroupBuilder, Call, Operand], Value]) -> Rowwise:
    return Rowwise(lower, _last_dim, _source_or_weight)


def _source(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    """The reduced tensor; where eager casts it to the dtype it was asked for, rounded to that."""
    x = operand(call.source)
    if call.arguments.get("dtype") is None:
        return x
    return builder.cast(x, call.value.dtype)


# --- reductions -------------------------------------------------------------------------------------------------------


def _sum(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    out = call.value.dtype
    x = _source(builder, call, operand)
    return builder.reduce("sum", builder.cast(x, F32 if out.is_floating_point else out), out)


def _extreme(how: Reduction) -> Callable[[GroupBuilder, Call, Operand], Value]:
    def lower(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
        x = operand(call.source)
        wide = F32 if x.dtype.is_floating_point else torch.int32 if x.dtype is torch.bool else x.dtype
        return builder.reduce(how, builder.cast(x, wide), call.value.dtype)

    return lower


def _truths(how: Reduction) -> Callable[[GroupBuilder, Call, Operand], Value]:
    """any and all, as the largest and the smallest of zeros and ones."""

    def lower(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
        truth = builder.cast(builder.cast(operand(call.source), torch.bool), torch.int32)
        return builder.reduce(how, truth, torch.bool)

    return lower


def _mean(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    source = _source(builder, call, operand) if _on_cuda(call) else operand(call.source)
    average = mean(builder, builder.cast(source, F32), on_cuda=_on_cuda(call))
    return builder.cast(average, call.value.dtype)


def mean(builder: GroupBuilder, x: Value, *, less: float = 0, on_cuda: bool) -> Value:
    """The sum of a float32 value's columns over their number `less` some; CUDA multiplies by the reciprocal."""
    total, count = builder.reduce("sum", x, F32), max(0.0, x.width - less)
    if on_cuda and count:
        return builder.pointwise(lambda b, t: b.mul(t, 1 / count), [total], F32)
    return builder.pointwise(lambda b, t: b.div(t, count), [total], F32)


def _on_cuda(call: Call) -> bool:
    return call.value.device.type == "cuda"


def _variance(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    return builder.cast(_spread(builder, call, operand), call.value.dtype)


def _deviation(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    variance = _spread(builder, call, operand)
    return builder.pointwise(lambda b, v: b.math("sqrt", v), [variance], call.value.dtype)


def _spread(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    centred = _centred(builder, builder.cast(operand(call.source), F32), on_cuda=_on_cuda(call))
    return _squares(builder, centred, less=_correction(call), on_cuda=_on_cuda(call))


def _correction(call: Call) -> float:
    given = call.arguments
    correction = given["correction"] if "correction" in given else int(given["unbiased"])
    return 1 if correction is None else float(correction)


def _centred(builder: GroupBuilder, x: Value, *, on_cuda: bool) -> Value:
    return builder.pointwise(lambda b, v, m: b.sub(v, m), [x, mean(builder, x, on_cuda=on_cuda)], F32)


def _squares(builder: GroupBuilder, x: Value, *, less: float = 0, on_cuda: bool) -> Value:
    square = builder.pointwise(lambda b, v: b.mul(v, v), [x], F32)
    return mean(builder, square, less=less, on_cuda=on_cuda)


# --- norms ------------------------------------------------------------------------------------------------------------


def _rms_norm(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    x = builder.cast(operand(call.source), F32)
    eps = call.arguments["eps"]
    eps = torch.finfo(F32).eps if eps is None else eps
    scale = _rsqrt(builder, _squares(builder, x, on_cuda=_on_cuda(call)), eps)
    normal = builder.pointwise(lambda b, v, s: b.mul(v, s), [x, scale], F32)
    return _scaled(builder, call, operand, normal)


def _layer_norm(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    centred = _centred(builder, builder.cast(operand(call.source), F32), on_cuda=_on_cuda(call))
    scale = _rsqrt(builder, _squares(builder, centred, on_cuda=_on_cuda(call)), call.arguments["eps"])
    normal = builder.pointwise(lambda b, v, s: b.mul(v, s), [centred, scale], F32)
    return _scaled(builder, call, operand, normal)


def _rsqrt(builder: GroupBuilder, x: Value, eps: float) -> Value:
    return builder.pointwise(lambda b, v: b.math("rsqrt", b.add(v, eps)), [x], F32)


def _scaled(builder: GroupBuilder, call: Call, operand: Operand, x: Value) -> Value:
    """Weight and bias, where there are any: a fused multiply-add if both."""
    weight, bias = call.arguments["weight"], call.arguments.get("bias")
    given = [builder.cast(operand(node), F32) for node in (weight, bias) if isinstance(node, Node)]

    def affine(b: Body, v: Scalar, *w: Scalar) -> Scalar:
        if len(w) == 2:
            return b.fma(v, w[0], w[1])
        return v if not w else b.mul(v, w[0]) if isinstance(weight, Node) else b.add(v, w[0])

    return builder.pointwise(affine, [x, *given], call.value.dtype)


def _norm(lower: Callable[[GroupBuilder, Call, Operand], Value]) -> Rowwise:
    return Rowwise(lower, lambda call: len(call.arguments["normalized_shape"]) == 1, _source_or_weight)


# --- softmax ----------------------------------------------------------------------------------------------------------


def _shifted(builder: GroupBuilder, call: Call, operand: Operand) -> tuple[Value, Value, Value]:
    """A row less its maximum, its exponentials, and their sum, in float32."""
    x = builder.cast(_source(builder, call, operand), F32)
    top = builder.reduce("amax", x, F32)
    shifted = builder.pointwise(lambda b, v, m: b.sub(v, m), [x, top], F32)
    powers = builder.pointwise(lambda b, v: b.math("exp", v), [shifted], F32)
    return shifted, powers, builder.reduce("sum", powers, F32)


def _softmax(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    _, powers, total = _shifted(builder, call, operand)
    return builder.pointwise(lambda b, part, whole: b.share(part, whole), [powers, total], call.value.dtype)


def _log_softmax(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    shifted, _, total = _shifted(builder, call, operand)
    return builder.pointwise(lambda b, v, t: b.sub(v, b.math("log", t)), [shifted, total], call.value.dtype)


# --- concatenation ----------------------------------------------------------------------------------------------------


def _cat(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    parts = [builder.cast(operand(part), call.value.dtype) for part in call.arguments["tensors"]]
    wide = [
        builder.repeat_columns(value, part.meta["val"].shape[-1]) if value.kind in (Kind.ROW, Kind.SCALAR) else value
        for value, part in zip(parts, call.arguments["tensors"], strict=True)
    ]
    if any(value.kind is Kind.FULL for value in wide):
        wide = [value if value.kind is Kind.FULL else builder.repeat_rows(value) for value in wide]
    return builder.concatenate(wide)


def _cats_columns(call: Call) -> bool:
    parts = [part.meta["val"] for part in call.arguments["tensors"]]
    rank = call.value.dim()
    widths = all(part.dim() == rank and isinstance(part.shape[-1], int) and part.shape[-1] > 1 for part in parts)
    return rank > 0 and widths and len(parts) > 1 and call.arguments["dim"] % rank == rank - 1


ROWWISE: Final[Mapping[Any, Rowwise]] = {
    aten.sum.dim_IntList: _over(_sum),
    aten.mean.dim: _over(_mean),
    aten.amax.default: _over(_extreme("amax")),
    aten.amin.default: _over(_extreme("amin")),
    aten.any.dim: _over(_truths("amax")),
    aten.all.dim: _over(_truths("amin")),
    aten.var.correction: _over(_variance),
    aten.var.dim: _over(_variance),
    aten.std.correction: _over(_deviation),
    aten.std.dim: _over(_deviation),
    aten.softmax.int: _over(_softmax),
    aten._softmax.default: _over(_softmax),
    aten.log_softmax.int: _over(_log_softmax),
    aten._log_softmax.default: _over(_log_softmax),
    aten.rms_norm.default: _norm(_rms_norm),
    aten.layer_norm.default: _norm(_layer_norm),
    aten.cat.default: Rowwise(_cat, _cats_columns, lambda call, node: Use.full(node)),
}
"""One row per overload that reduces over, or joins, columns."""

CONCATENATION: Final = aten.cat.default
REDUCING: Final = frozenset(target for target in ROWWISE if target is not CONCATENATION)
"""Ops that need the whole row."""
ROW_RESULT: Final = frozenset(
    target for target in REDUCING if any(a.name == "keepdim" for a in target._schema.arguments)
)
"""Reducing ops that leave one value per row; the others keep the columns."""
