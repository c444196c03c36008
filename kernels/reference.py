"""A group's MLIR function, executed by torch.

Enters: the function and its operands in row form. Leaves: its results in row form. Every scalar op becomes the torch op
on whole tensors, so this is what runs where there is no GPU, and what Triton's kernels are compared with. Invariant:
float32 arithmetic with the function's own rounding points, and eager's functions for what is not plain arithmetic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .body import MLIR_TYPE
from .expressions import FLOAT_PREDICATES, INTEGER_PREDICATES
from .function import combiner, walks_rows, width_of

_DTYPE: Final = {name: dtype for dtype, name in MLIR_TYPE.items()} | {"index": torch.int64}

_TORCH: Final[dict[str, Callable[..., Tensor]]] = {
    "arith.addf": torch.add,
    "arith.subf": torch.sub,
    "arith.mulf": torch.mul,
    "arith.divf": torch.div,
    "arith.negf": torch.neg,
    "arith.remf": torch.fmod,
    "arith.maximumf": torch.maximum,
    "arith.minimumf": torch.minimum,
    "arith.addi": torch.add,
    "arith.subi": torch.sub,
    "arith.muli": torch.mul,
    "arith.divsi": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "arith.floordivsi": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "arith.remsi": torch.fmod,
    "arith.maxsi": torch.maximum,
    "arith.minsi": torch.minimum,
    "arith.andi": torch.bitwise_and,
    "arith.ori": torch.bitwise_or,
    "arith.xori": torch.bitwise_xor,
    "arith.shli": torch.bitwise_left_shift,
    "arith.shrsi": torch.bitwise_right_shift,
    "arith.select": torch.where,
    "math.absf": torch.abs,
    "math.absi": torch.abs,
    "math.ceil": torch.ceil,
    "math.copysign": torch.copysign,
    "math.cos": torch.cos,
    "math.erf": torch.erf,
    "math.exp": torch.exp,
    "math.exp2": torch.exp2,
    "math.expm1": torch.expm1,
    "math.floor": torch.floor,
    "math.fma": lambda x, y, z: (x.double() * y.double() + z.double()).float(),
    "math.log": torch.log,
    "math.log1p": torch.log1p,
    "math.log2": torch.log2,
    "math.powf": torch.pow,
    "math.roundeven": torch.round,
    "math.rsqrt": torch.rsqrt,
    "math.sin": torch.sin,
    "math.sqrt": torch.sqrt,
    "math.tanh": torch.tanh,
    "math.trunc": torch.trunc,
}
_COMPARE: Final = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_NEGATED: Final = {"eq": "ne", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


def evaluate(function: Any, rows: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run an MLIR function over `rows` rows. Full values are [rows, columns], row values [rows, 1], column values
    [1, columns], scalars [1, 1]; tables keep their shape."""
    return _Evaluator(function, rows, inputs).run()


class _Evaluator:
    def __init__(self, function: Any, rows: int, inputs: Sequence[Tensor]) -> None:
        block = function.regions[0].blocks[0]
        self.ops = [op.operation for op in block.operations]
        self.rows = rows
        self.known: dict[Any, Tensor] = dict(zip(list(block.arguments)[1:], inputs, strict=True))
        self.device = inputs[0].device

    def run(self) -> list[Tensor]:
        for op in self.ops[:-1]:
            if op.name == "arith.constant":
                self.known[op.results[0]] = self._constant(op)
            elif op.name == "linalg.fill":
                self.known[op.results[0]] = self.known[op.operands[0]]
            elif op.name == "tensor.extract_slice":
                self.known[op.results[0]] = self._columns(op)
            elif op.name == "tensor.concat":
                parts = [self.known[operand] for operand in op.operands]
                self.known[op.results[0]] = torch.cat(parts, dim=1)
            elif op.name == "linalg.generic":
                self.known[op.results[0]] = self._generic(op)
            else:
                assert op.name == "tensor.empty", f"no reference for {op.name}"
        return [self.known[operand] for operand in self.ops[-1].operands]

    def _constant(self, op: Any) -> Tensor:
        text = str(op.attributes["value"])
        value = text == "true" if text in ("true", "false") else op.attributes["value"].value
        return torch.tensor([[value]], dtype=_DTYPE[str(op.results[0].type)], device=self.device)

    def _columns(self, op: Any) -> Tensor:
        offsets = [int(x) for x in str(op.attributes["static_offsets"]).split(":")[-1].strip(" >").split(",")]
        sizes = [int(x) for x in str(op.attributes["static_sizes"]).split(":")[-1].strip(" >").split(",")]
        return self.known[op.operands[0]][:, offsets[-1] : offsets[-1] + sizes[-1]]

    def _generic(self, op: Any) -> Tensor:
        block = op.regions[0].blocks[0]
        arguments, inner = list(block.arguments), [o.operation for o in block.operations]
        names = dict(self.known)
        names |= {
            a: self.known[o] for a, o in zip(arguments[:-1], list(op.operands)[: len(arguments) - 1], strict=True)
        }
        if "reduction" not in str(op.attributes["iterator_types"]):
            self._scalars(inner[:-1], names, op)
            return self._shaped(names[inner[-1].operands[0]], op)
        combine = combiner(op)
        self._scalars(inner[:-2], names, op)
        value = names[next(operand for operand in inner[-2].operands if operand != arguments[-1])]
        # Passes may have made it the same for all rows or columns, which is no reason to add it up once.
        value = value.expand(self.rows, max(width_of(operand.type) for operand in op.operands))
        if combine in ("arith.addf", "arith.addi"):
            return value.sum(dim=1, keepdim=True, dtype=value.dtype)
        return value.amax(dim=1, keepdim=True) if "max" in combine else value.amin(dim=1, keepdim=True)

    def _shaped(self, value: Tensor, op: Any) -> Tensor:
        """A body's result over the whole domain of its generic."""
        shape = str(op.results[0].type)[len("tensor<") : -1].split("x")[:-1]
        wide = bool(shape) and shape[-1] != "?"
        return value.expand(self.rows if "?" in shape else 1, int(shape[-1]) if wide else 1)

    def _scalars(self, ops: Sequence[Any], names: dict[Any, Tensor], generic: Any) -> None:
        for op in ops:
            operands = [names[operand] for operand in op.operands if operand in names]
            names[op.results[0]] = self._scalar(op, operands, generic)

    def _scalar(self, op: Any, operands: list[Tensor], generic: Any) -> Tensor:
        if op.name == "arith.constant":
            return self._constant(op)
        if op.name == "linalg.index":
            return self._index(op, generic)
        if op.name == "tensor.extract":
            return _element(*operands)
        if op.name == "arith.cmpf":
            return _compare_floats(FLOAT_PREDICATES[int(op.attributes["predicate"])], *operands)
        if op.name == "arith.cmpi":
            return _COMPARE[INTEGER_PREDICATES[int(op.attributes["predicate"])][-2:]](*operands)
        if op.name in _TORCH:
            return _TORCH[op.name](*operands)
        return _cast(operands[0], _DTYPE[str(op.results[0].type)])  # what is left are casts

    def _index(self, op: Any, generic: Any) -> Tensor:
        if walks_rows(op):
            return torch.arange(self.rows, device=self.device)[:, None]
        width = max(width_of(value.type) for value in (*generic.operands, *generic.results))
        return torch.arange(width, device=self.device)[None, :]


def _element(table: Tensor, *at: Tensor) -> Tensor:
    """`table[row, column]`; a table that is a column value has one row."""
    row, column = at if len(at) == 2 else (torch.zeros_like(at[0]), at[0])
    for index, size in zip((row, column), table.shape, strict=True):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise IndexError(f"an index from {int(index.min())} to {int(index.max())} into a dimension of size {size}")
    return table[row, column]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    half = dtype in (torch.float16, torch.bfloat16)
    return x.to(torch.float32).to(dtype) if half else x.to(dtype)  # integers by way of float32, as in eager


def _compare_floats(kind: str, x: Tensor, y: Tensor) -> Tensor:
    if kind == "uno":
        return x.isnan() | y.isnan()
    if kind == "one":
        return (x < y) | (x > y)
    if kind == "une":
        return x != y
    if kind.startswith("o"):
        return _COMPARE[kind[1:]](x, y)
    return ~_COMPARE[_NEGATED[kind[1:]]](x, y)
