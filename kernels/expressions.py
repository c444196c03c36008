"""Scalar MLIR ops as Triton expressions.

Enters: the name of an `arith` or `math` op, its operands' names. Leaves: one Triton expression. Invariant: the same
rounding as the MLIR op: division and square root correctly rounded, transcendental functions as the CUDA math library
computes them (`device_math`, written `dm` in generated files), NaN carried by maximum and minimum.
"""

from __future__ import annotations

from typing import Any, Final

TRITON_TYPE: Final = {
    "i1": "tl.int1",
    "i8": "tl.int8",
    "i16": "tl.int16",
    "i32": "tl.int32",
    "i64": "tl.int64",
    "index": "tl.int64",
    "f16": "tl.float16",
    "bf16": "tl.bfloat16",
    "f32": "tl.float32",
}

EXPRESSIONS: Final = {
    "arith.addf": "{0} + {1}",
    "arith.subf": "{0} - {1}",
    "arith.mulf": "{0} * {1}",
    "arith.divf": "dm.div({0}, {1})",
    "arith.negf": "{0} * -1.0",  # Triton's unary minus is 0 - x, which loses the sign of zero
    "arith.remf": "dm.fmod({0}, {1})",
    "arith.maximumf": "dm.maximum({0}, {1})",
    "arith.minimumf": "dm.minimum({0}, {1})",
    "arith.addi": "{0} + {1}",
    "arith.subi": "{0} - {1}",
    "arith.muli": "{0} * {1}",
    "arith.divsi": "dm.div_trunc({0}, {1})",
    "arith.floordivsi": "dm.div_floor({0}, {1})",
    "arith.remsi": "dm.rem_trunc({0}, {1})",
    "arith.maxsi": "tl.maximum({0}, {1})",
    "arith.minsi": "tl.minimum({0}, {1})",
    "arith.andi": "{0} & {1}",
    "arith.ori": "{0} | {1}",
    "arith.xori": "{0} ^ {1}",
    "arith.shli": "{0} << {1}",
    "arith.shrsi": "{0} >> {1}",
    "arith.select": "tl.where({0}, {1}, {2})",
    "math.absf": "tl.abs({0})",
    "math.absi": "tl.abs({0})",
    "math.ceil": "dm.ceil({0})",
    "math.copysign": "dm.copysign({0}, {1})",
    "math.cos": "dm.cos({0})",
    "math.erf": "dm.erf({0})",
    "math.exp": "dm.exp({0})",
    "math.exp2": "dm.exp2({0})",
    "math.expm1": "dm.expm1({0})",
    "math.floor": "dm.floor({0})",
    "math.fma": "dm.fma({0}, {1}, {2})",
    "math.log": "dm.log({0})",
    "math.log1p": "dm.log1p({0})",
    "math.log2": "dm.log2({0})",
    "math.powf": "dm.pow({0}, {1})",
    "math.roundeven": "dm.round_even({0})",
    "math.rsqrt": "dm.rsqrt({0})",
    "math.sin": "dm.sin({0})",
    "math.sqrt": "dm.sqrt({0})",
    "math.tanh": "dm.tanh({0})",
    "math.trunc": "dm.trunc({0})",
}
"""Ops whose result depends on their operands alone."""

_LEAST_NORMAL: Final = 2.0**-126

_CASTS: Final = frozenset(
    f"arith.{name}"
    for name in ("extf", "truncf", "sitofp", "uitofp", "fptosi", "extsi", "extui", "trunci", "index_cast")
)
_COMPARISONS: Final = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Numbers of `arith`'s predicates, in its own order.
FLOAT_PREDICATES: Final = (
    "false", "oeq", "ogt", "oge", "olt", "ole", "one", "ord", "ueq", "ugt", "uge", "ult", "ule", "une", "uno", "true",
)  # fmt: skip
INTEGER_PREDICATES: Final = ("eq", "ne", "slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge")
_NEGATED: Final = {"eq": "ne", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


def expression(op: Any, operands: list[str], *, few_rows: bool) -> str:
    """The Triton expression of one scalar op, given its operands as Triton names or literals.

    A share of a row's total (`Body.share`) divides once a row where there are few rows, and the divisions are what a
    kernel takes its time with. Where memory is, the products in their place were measured slower (one H100, rows of
    16,384: 130 us for 98), though they are half the instructions.

    Raises KeyError for an op no row of the table knows.
    """
    name = op.name
    if name in _CASTS:
        target = str(op.results[0].type)
        if name == "arith.extf":
            return f"dm.to_f32({operands[0]})"
        if target in ("bf16", "f16"):  # of an integer by way of float32, as in eager
            wide = operands[0] if name == "arith.truncf" else f"{operands[0]}.to(tl.float32)"
            return f"dm.to_{target}({wide})"
        return f"{operands[0]}.to({TRITON_TYPE[target]})"
    if name == "arith.cmpf":
        return _compare_floats(FLOAT_PREDICATES[int(op.attributes["predicate"])], *operands)
    if name == "arith.cmpi":
        kind = INTEGER_PREDICATES[int(op.attributes["predicate"])]
        return f"{operands[0]} {_COMPARISONS[kind[-2:]]} {operands[1]}"
    if name == "arith.divf" and few_rows and "arcp" in str(op.attributes["fastmath"]):
        return f"dm.share({operands[0]}, {operands[1]})"
    return EXPRESSIONS[name].format(*operands)


def _compare_floats(kind: str, x: str, y: str) -> str:
    if kind == "une":
        return f"{x} != {y}"
    if kind == "uno":
        return f"({x} != {x}) | ({y} != {y})"
    if kind == "one":
        return f"({x} < {y}) | ({x} > {y})"
    if kind.startswith("o"):
        return f"{x} {_COMPARISONS[kind[1:]]} {y}"
    return f"({x} {_COMPARISONS[_NEGATED[kind[1:]]]} {y}) == 0"  # unordered: true unless the opposite holds


def literal(attribute: Any) -> str:
    """An `arith.constant` as Python source."""
    text = str(attribute)
    if text in ("true", "false"):
        return text.capitalize()
    value = attribute.value
    if isinstance(value, float):
        if value != value:
            return 'float("nan")'
        if value in (float("inf"), float("-inf")):
            return f'float("{value}")'
        if 0 < abs(value) < _LEAST_NORMAL:  # Triton would take it for a float64
            return f"tl.cast({value!r}, tl.float32)"
        return repr(value)
    return str(value)
