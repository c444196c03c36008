"""Reading the MLIR function of a group.

Enters: ops and types of the Python bindings. Leaves: what code generation and the reference need to know of them.
Invariant: a tensor type's dynamic dimension is rows, and its last static one columns (see `build`).
"""

from __future__ import annotations

from typing import Any, Final

COMBINERS: Final = ("arith.addf", "arith.addi", "arith.maximumf", "arith.minimumf", "arith.maxsi", "arith.minsi")
"""What reductions combine elements by."""


def operations(function: Any) -> list[Any]:
    """The ops of a function's only block."""
    return [op.operation for op in function.regions[0].blocks[0].operations]


def body_of(op: Any) -> list[Any]:
    """The scalar ops of a generic, its yield last."""
    return [inner.operation for inner in op.regions[0].blocks[0].operations]


def is_reduction(op: Any) -> bool:
    return op.name == "linalg.generic" and "reduction" in str(op.attributes["iterator_types"])


def shape_of(type: Any) -> list[str]:
    """Dimensions of a tensor type, "?" for rows; none for a scalar."""
    text = str(type)
    return text[len("tensor<") : -1].split("x")[:-1] if text.startswith("tensor") else []


def element_of(type: Any) -> str:
    """The scalar type of a tensor type."""
    return str(type)[len("tensor<") : -1].split("x")[-1]


def width_of(type: Any) -> int:
    """Columns of a type; 1 where it has none."""
    shape = shape_of(type)
    return int(shape[-1]) if shape and shape[-1] != "?" else 1


def over_rows(type: Any) -> bool:
    return "?" in shape_of(type)


def over_columns(type: Any) -> bool:
    shape = shape_of(type)
    return bool(shape) and shape[-1] != "?"


def first_column(op: Any) -> int:
    """Where a `tensor.extract_slice` of columns starts."""
    return int(str(op.attributes["static_offsets"]).split(":")[-1].strip(" >").split(",")[-1])


def walks_rows(op: Any) -> bool:
    """Whether a `linalg.index` counts rows: the first of two loops does, and an only one over rows."""
    generic, dim = op.parent, int(str(op.attributes["dim"]).split(":")[0])
    if str(generic.attributes["iterator_types"]).count("iterator_type") == 2:
        return dim == 0
    return over_rows(generic.results[0].type)


def accumulator_of(op: Any) -> Any:
    return list(op.regions[0].blocks[0].arguments)[-1]


def combiner(op: Any) -> str:
    """The scalar op by which a reduction takes one more element in."""
    last, accumulator = body_of(op)[-2], accumulator_of(op)
    plain = sum(operand == accumulator for inner in body_of(op) for operand in inner.operands) == 1
    assert last.name in COMBINERS, f"a reduction by {last.name}"
    assert plain, f"a reduction that is more than {last.name}"
    return last.name
