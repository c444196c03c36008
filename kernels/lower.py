"""One FX node as MLIR: what each fusible op becomes inside its group's function.

Enters: a node of a fusible op, and its operands as values in row form. Leaves: the value of its result. Pointwise rows
come from `pointwise`; the table here holds the ops that reduce over, build, or pick columns. Composite ops (norms,
softmax) keep float32 between their steps and round once, as eager's kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._prims_common import elementwise_dtypes
from torch.fx import Node

from .body import MLIR_TYPE, Body, Scalar
from .build import GroupBuilder, Kind, Reduction, Value
from .pointwise import CASTS, CONDITIONS, POINTWISE, UNREAD

aten = torch.ops.aten
F32 = torch.float32


@dataclass(frozen=True, slots=True)
class Call:
    """A node with its arguments by schema name, defaults filled in."""

    node: Node
    arguments: Mapping[str, Any]

    @staticmethod
    def of(node: Node) -> Call:
        schema: Sequence[Any] = node.target._schema.arguments  # pyright: ignore
        given = dict(zip((argument.name for argument in schema), node.args, strict=False))
        given |= node.kwargs
        filled = {a.name: given.get(a.name, a.default_value) for a in schema}
        return Call(node, filled)

    @property
    def value(self) -> Tensor:
        return self.node.meta["val"]

    @property
    def source(self) -> Node:
        """The tensor a reduction reduces, or a view looks at."""
        return self.arguments["self"] if "self" in self.arguments else self.arguments["input"]

    def read(self) -> list[Node]:
        """The nodes whose elements the op reads, in the order of its schema."""
        ignored = UNREAD.get(self.node.target, frozenset())
        found: list[Node] = []
        for name, argument in self.arguments.items():
            if name not in ignored:
                found += [
                    x for x in (argument if isinstance(argument, list | tuple) else [argument]) if isinstance(x, Node)
                ]
        return found


Operand = Callable[[Node], Value]
"""The value of an operand, in row form."""


def lower(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    """Write one op into the group."""
    rule = ROWWISE.get(call.node.target)
    if rule is not None:
        return rule.lower(builder, call, operand)
    return _pointwise(builder, call, operand)


def _pointwise(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    row = POINTWISE[call.node.target]
    compute = compute_dtype(call)
    reads = call.read()
    values = [operand(node) for node in reads]

    def body(b: Body, *scalars: Scalar) -> Scalar:
        given = dict(zip(reads, scalars, strict=False)) if len(set(reads)) == len(reads) else None
        remaining = iter(scalars)
        operands: list[Scalar] = []
        attributes: dict[str, Any] = {}
        for argument in call.node.target._schema.arguments:  # pyright: ignore
            value = call.arguments[argument.name]
            if isinstance(value, Node):
                if argument.name in (UNREAD.get(call.node.target, ())):
                    continue
                scalar = given[value] if given is not None else next(remaining)
                wanted = "i1" if argument.name in CONDITIONS else (None if compute is None else MLIR_TYPE[compute])
                scalar = scalar if wanted is None else b.convert(scalar, wanted)
                if _is_operand(argument):
                    operands.append(scalar)
                else:
                    attributes[argument.name] = scalar
            elif _is_operand(argument) and isinstance(value, int | float):
                operands.append(b.constant(value, "f32" if compute is None else MLIR_TYPE[compute]))
            elif not _is_operand(argument):
                attributes[argument.name] = value
        return row.body(b, *operands, **attributes)

    return builder.pointwise(body, values, call.value.dtype)


def _is_operand(argument: Any) -> bool:
    """Tensors, and numbers that stand for one: what a body takes by position."""
    if argument.name in ("alpha", "beta", "threshold", "negative_slope", "exponent") or argument.kwarg_only:
        return argument.name == "other"
    kind = str(argument.type)
    return kind == "Tensor" or (kind in ("number", "Scalar") and argument.name in ("other", "self", "value"))


def compute_dtype(call: Call) -> torch.dtype | None:
    """The dtype a pointwise op computes in; None for one that converts nothing before its result."""
    if call.node.target in CASTS:
        return None
    names = {a.name: call.arguments[a.name] for a in call.node.target._schema.arguments}  # pyright: ignore
    parts: list[Any] = []
    for name, value in names.items():
        if name in CONDITIONS:
            continue
        if isinstance(value, Node):
            parts.append(value.meta["val"])
        elif isinstance(value, bool | int | float) and name in ("other", "self", "value", "exponent"):
            parts.append(value)
    return elementwise_dtypes(*parts, type_promotion_kind=POINTWISE[call.node.target].promotion)[0]


@dataclass(frozen=True, slots=True)
class Rowwise:
    """An op that needs more than a body. `admits` says whether these arguments can be expressed."""

    lower: Callable[[GroupBuilder, Call, Operand], Value]
    admits: Callable[[Call], bool]


def _last_dim(call: Call) -> bool:
    """Over the last dimension, and that one only."""
    dims = call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    rank = call.source.meta["val"].dim()
    return len(dims) == 1 and rank > 0 and dims[0] % rank == rank - 1


def _reduced(how: Reduction) -> Callable[[GroupBuilder, Call, Operand], Value]:
    def lower(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
        x = operand(call.arguments["self"])
        wide = _accumulator(call, x.dtype)
        return builder.reduce(how, builder.cast(x, wide), call.value.dtype)

    return lower


def _accumulator(call: Call, dtype: torch.dtype) -> torch.dtype:
    out = call.value.dtype
    if dtype.is_floating_point or out.is_floating_point:
        return F32
    return out


def _mean(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    x = builder.cast(operand(call.arguments["self"]), F32)
    return builder.cast(mean(builder, x), call.value.dtype)


def mean(builder: GroupBuilder, x: Value) -> Value:
    """The mean of a float32 value's columns."""
    total = builder.reduce("sum", x, F32)
    return builder.pointwise(lambda b, t: b.div(t, b.constant(x.width, "f32")), [total], F32)


def _rms_norm(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    source = call.arguments["input"]
    x = builder.cast(operand(source), F32)
    eps = call.arguments["eps"]
    eps = torch.finfo(source.meta["val"].dtype).eps if eps is None else eps
    square = builder.pointwise(lambda b, v: b.mul(v, v), [x], F32)
    scale = builder.pointwise(
        lambda b, m: b.unary("math.rsqrt", b.add(m, b.constant(eps, "f32"))), [mean(builder, square)], F32
    )
    return _scaled(builder, call, operand, builder.pointwise(lambda b, v, s: b.mul(v, s), [x, scale], F32))


def _layer_norm(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    x = builder.cast(operand(call.arguments["input"]), F32)
    centred = builder.pointwise(lambda b, v, m: b.sub(v, m), [x, mean(builder, x)], F32)
    square = builder.pointwise(lambda b, v: b.mul(v, v), [centred], F32)
    eps = call.arguments["eps"]
    scale = builder.pointwise(
        lambda b, m: b.unary("math.rsqrt", b.add(m, b.constant(eps, "f32"))), [mean(builder, square)], F32
    )
    return _scaled(builder, call, operand, builder.pointwise(lambda b, v, s: b.mul(v, s), [centred, scale], F32))


def _scaled(builder: GroupBuilder, call: Call, operand: Operand, x: Value) -> Value:
    weight, bias = call.arguments["weight"], call.arguments.get("bias")
    if isinstance(weight, Node):
        x = builder.pointwise(lambda b, v, w: b.mul(v, b.convert(w, "f32")), [x, operand(weight)], F32)
    if isinstance(bias, Node):
        x = builder.pointwise(lambda b, v, w: b.add(v, b.convert(w, "f32")), [x, operand(bias)], F32)
    return builder.cast(x, call.value.dtype)


def _over_last(call: Call) -> bool:
    shape = call.arguments["normalized_shape"]
    return len(shape) == 1


def _shifted(builder: GroupBuilder, call: Call, operand: Operand) -> tuple[Value, Value, Value]:
    """A row less its maximum, its exponentials, and their sum, in float32."""
    x = builder.cast(operand(call.arguments["self"]), F32)
    top = builder.reduce("amax", x, F32)
    shifted = builder.pointwise(lambda b, v, m: b.sub(v, m), [x, top], F32)
    powers = builder.pointwise(lambda b, v: b.unary("math.exp", v), [shifted], F32)
    return shifted, powers, builder.reduce("sum", powers, F32)


def _softmax(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    _, powers, total = _shifted(builder, call, operand)
    return builder.pointwise(lambda b, v, t: b.div(v, t), [powers, total], call.value.dtype)


def _log_softmax(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    shifted, _, total = _shifted(builder, call, operand)
    return builder.pointwise(lambda b, v, t: b.sub(v, b.unary("math.log", t)), [shifted, total], call.value.dtype)


def _cat(builder: GroupBuilder, call: Call, operand: Operand) -> Value:
    values = [builder.cast(operand(part), call.value.dtype) for part in call.arguments["tensors"]]
    if any(value.kind is Kind.FULL for value in values):
        values = [value if value.kind is Kind.FULL else builder.repeat_rows(value) for value in values]
    return builder.concatenate(values)


def _cats_columns(call: Call) -> bool:
    parts = [part.meta["val"] for part in call.arguments["tensors"]]
    rank = call.value.dim()
    widths = all(part.dim() == rank and isinstance(part.shape[-1], int) and part.shape[-1] > 1 for part in parts)
    return rank > 0 and widths and len(parts) > 1 and call.arguments["dim"] % rank == rank - 1


ROWWISE: Final[Mapping[Any, Rowwise]] = {
    aten.sum.dim_IntList: Rowwise(_reduced("sum"), _last_dim),
    aten.amax.default: Rowwise(_reduced("amax"), _last_dim),
    aten.amin.default: Rowwise(_reduced("amin"), _last_dim),
    aten.mean.dim: Rowwise(_mean, _last_dim),
    aten.rms_norm.default: Rowwise(_rms_norm, _over_last),
    aten.layer_norm.default: Rowwise(_layer_norm, _over_last),
    aten.softmax.int: Rowwise(_softmax, _last_dim),
    aten._softmax.default: Rowwise(_softmax, _last_dim),
    aten.log_softmax.int: Rowwise(_log_softmax, _last_dim),
    aten._log_softmax.default: Rowwise(_log_softmax, _last_dim),
    aten.cat.default: Rowwise(_cat, _cats_columns),
}
"""One row per overload that reduces over, joins or picks columns."""

CONCATENATION: Final = aten.cat.default
REDUCING: Final = frozenset(target for target in ROWWISE if target is not CONCATENATION)
"""Ops that need the whole row."""
ROW_RESULT: Final = frozenset({aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.mean.dim})
"""Reducing ops that leave one value per row; the others keep the columns."""
FREE: Final = frozenset[Any]()
"""Ops that read nothing: computed wherever they are used."""


def fusible(node: Node) -> bool:
    """Whether the table has a row for this node and its dtypes."""
    if node.op != "call_function" or (node.target not in POINTWISE and node.target not in ROWWISE):
        return False
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in MLIR_TYPE or not _is_strided(value):
        return False
    call = Call.of(node)
    for source in call.read():
        other = source.meta.get("val")
        if not isinstance(other, Tensor) or other.dtype not in MLIR_TYPE or other.device != value.device:
            return False
        if not _is_strided(other):
            return False
    if node.target in ROWWISE:
        return ROWWISE[node.target].admits(call)
    return _admits_pointwise(call)


def _is_strided(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_complex() and not value.is_quantized


def _admits_pointwise(call: Call) -> bool:
    row = POINTWISE[call.node.target]
    if any(isinstance(value, complex | torch.SymInt | torch.SymFloat) for value in call.arguments.values()):
        return False
    if any(isinstance(v, Node) and not isinstance(v.meta.get("val"), Tensor) for v in call.arguments.values()):
        return False
    if not call.read() or not row.admits(call.arguments):
        return False
    if call.arguments.get("dtype") is not None and call.arguments["dtype"] not in MLIR_TYPE:
        return False
    if call.node.target in CASTS:
        return True
    return compute_dtype(call) in MLIR_TYPE
