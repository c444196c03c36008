"""A fused group as one MLIR function over rows: `linalg.generic`s on tensors.

Enters: values in row form and scalar bodies. Leaves: the text of a `func.func`. In row form a tensor has its leading
dimensions flattened into rows, whose number is dynamic (`?`, passed as %rows), and its last dimension as columns:

    full  tensor<?xWxT>   a value per row and column       row     tensor<?xT>   one per row
    col   tensor<WxT>     one per column                   scalar  tensor<T>     one

Invariant: the dynamic dimension always means rows, so the type alone tells the four apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

from .body import MLIR_TYPE, Body, Number, Scalar

Reduction = Literal["sum", "amax", "amin"]
NEUTRAL = {"sum": 0.0, "amax": float("-inf"), "amin": float("inf")}


class Kind(Enum):
    """How a value varies over the rows and columns of its group."""

    FULL = "full"
    ROW = "row"
    COL = "col"
    SCALAR = "scalar"


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the function, in row form. `width` is its number of columns, 1 where it has none."""

    name: str
    kind: Kind
    width: int
    dtype: torch.dtype

    @property
    def type(self) -> str:
        return tensor_type(self.kind, self.width, self.dtype)


def tensor_type(kind: Kind, width: int, dtype: torch.dtype) -> str:
    """The MLIR type of a value in row form."""
    dims = {Kind.FULL: f"?x{width}x", Kind.ROW: "?x", Kind.COL: f"{width}x", Kind.SCALAR: ""}
    return f"tensor<{dims[kind]}{MLIR_TYPE[dtype]}>"


_DOMAIN = {Kind.FULL: "(r, c)", Kind.ROW: "(r)", Kind.COL: "(c)", Kind.SCALAR: "()"}
_POINT = {Kind.FULL: "(r, c)", Kind.ROW: "(r)", Kind.COL: "(c)", Kind.SCALAR: "()"}


def _map(domain: Kind, kind: Kind) -> str:
    return f"affine_map<{_DOMAIN[domain]} -> {_POINT[kind]}>"


class GroupBuilder:
    """Writes the function of one group."""

    def __init__(self) -> None:
        self.inputs: list[Value] = []
        self._lines: list[str] = []
        self._count = 0

    def input(self, kind: Kind, width: int, dtype: torch.dtype) -> Value:
        """One more argument of the function."""
        value = Value(f"%in{len(self.inputs)}", kind, width, dtype)
        self.inputs.append(value)
        return value

    def table(self, rows: int, width: int, dtype: torch.dtype) -> Value:
        """An argument that is indexed, not walked: `rows` x `width`. Its type has no dynamic dimension."""
        value = Table(f"%in{len(self.inputs)}", Kind.FULL, width, dtype, rows)
        self.inputs.append(value)
        return value

    def pointwise(
        self,
        compute: Callable[..., Scalar],
        operands: Sequence[Value],
        dtype: torch.dtype,
        body: Body | None = None,
    ) -> Value:
        """`compute(body, *scalars)` at every point of the operands' common domain, cast to `dtype`."""
        kind, width = domain_of(operands)
        body = body or Body()
        scalars = [Scalar(f"%a{i}", MLIR_TYPE[operand.dtype]) for i, operand in enumerate(operands)]
        result = body.convert(compute(body, *scalars), MLIR_TYPE[dtype])
        return self._generic(kind, width, dtype, operands, body, result)

    def reduce(self, how: Reduction, operand: Value, dtype: torch.dtype) -> Value:
        """Over the columns, in the operand's own dtype (make it f32 first); the result has one value per row."""
        assert operand.kind is Kind.FULL, f"{how} of {operand}: only full values have columns to reduce"
        body = Body()
        element = Scalar("%a0", MLIR_TYPE[operand.dtype])
        so_far = Scalar("%o", element.type)
        combine = {"sum": body.add, "amax": body.maximum, "amin": body.minimum}[how]
        result = combine(element, so_far)
        start = self._constant(_neutral(how, operand.dtype), operand.dtype)
        empty = self._empty(Kind.ROW, 1, operand.dtype)
        filled = self._name()
        row = tensor_type(Kind.ROW, 1, operand.dtype)
        self._lines.append(f"{filled} = linalg.fill ins({start} : {element.type}) outs({empty} : {row}) -> {row}")
        out = Value(self._name(), Kind.ROW, 1, operand.dtype)
        maps = f"{_map(Kind.FULL, Kind.FULL)}, {_map(Kind.FULL, Kind.ROW)}"
        self._write_generic(out, maps, '"parallel", "reduction"', [operand], filled, body, result)
        return self.cast(out, dtype)

    def cast(self, operand: Value, dtype: torch.dtype) -> Value:
        """The same values in another dtype."""
        if operand.dtype == dtype:
            return operand
        return self.pointwise(lambda body, x: x, [operand], dtype)

    def columns(self, operand: Value, start: int, width: int) -> Value:
        """Columns [start, start + width) of a full or column value."""
        if (start, width) == (0, operand.width):
            return operand
        out = Value(self._name(), operand.kind, width, operand.dtype)
        full = operand.kind is Kind.FULL
        where = f"[0, {start}] [%rows, {width}] [1, 1]" if full else f"[{start}] [{width}] [1]"
        self._lines.append(f"{out.name} = tensor.extract_slice {operand.name}{where} : {operand.type} to {out.type}")
        return out

    def concatenate(self, operands: Sequence[Value]) -> Value:
        """Side by side along the columns; all full, or all column values."""
        first = operands[0]
        out = Value(self._name(), first.kind, sum(operand.width for operand in operands), first.dtype)
        names = ", ".join(operand.name for operand in operands)
        types = ", ".join(operand.type for operand in operands)
        dim = 1 if first.kind is Kind.FULL else 0
        self._lines.append(f"{out.name} = tensor.concat dim({dim}) {names} : ({types}) -> {out.type}")
        return out

    def repeat_columns(self, operand: Value, width: int) -> Value:
        """A row or scalar value as a full or column one of `width` equal columns."""
        kind = Kind.FULL if operand.kind is Kind.ROW else Kind.COL
        body = Body()
        return self._generic(kind, width, operand.dtype, [operand], body, Scalar("%a0", MLIR_TYPE[operand.dtype]))

    def repeat_rows(self, operand: Value) -> Value:
        """A column or scalar value as a full or row one."""
        kind = Kind.FULL if operand.kind is Kind.COL else Kind.ROW
        body = Body()
        scalar = Scalar("%a0", MLIR_TYPE[operand.dtype])
        return self._generic(kind, operand.width, operand.dtype, [operand], body, scalar)

    def iota(self, width: int, dtype: torch.dtype, compute: Callable[[Body, Scalar], Scalar]) -> Value:
        """A column value computed from each column's number (an i64)."""
        body = Body()
        column = body.emit("linalg.index 0 : index", "index")
        number = body.emit(f"arith.index_cast {column.name} : index to i64", "i64")
        result = body.convert(compute(body, number), MLIR_TYPE[dtype])
        return self._generic(Kind.COL, width, dtype, [], body, result)

    def constant(self, value: Number, dtype: torch.dtype) -> Value:
        """A scalar value."""
        body = Body()
        return self._generic(Kind.SCALAR, 1, dtype, [], body, body.constant(value, MLIR_TYPE[dtype]))

    def gather(self, table: Value, index: Value, *, along: Literal["rows", "columns"], wraps: bool) -> Value:
        """`table[index, :]` for an index per row, or `table[row, index]` for an index per point.

        A table that is a column value has one row. With `wraps`, negative indices count from the end.
        """
        body = Body()
        i, type = Scalar("%a0", MLIR_TYPE[index.dtype]), MLIR_TYPE[index.dtype]
        if wraps:
            limit = table.rows if isinstance(table, Table) else table.width
            i = body.select(body.compare("lt", i, 0), body.add(i, limit), i)
        at = body.emit(f"arith.index_cast {i.name} : {type} to index", "index")
        kind, width = (index.kind, index.width) if along == "columns" else (Kind.FULL, table.width)
        if along == "columns" and table.kind is Kind.FULL and kind in (Kind.COL, Kind.SCALAR):
            kind = Kind.FULL
        where = [at.name]
        if along == "rows":
            where.append(body.emit("linalg.index 1 : index", "index").name)
        elif table.kind is Kind.FULL:
            where.insert(0, body.emit("linalg.index 0 : index", "index").name)
        element = body.emit(f"tensor.extract {table.name}[{', '.join(where)}] : {table.type}", MLIR_TYPE[table.dtype])
        return self._generic(kind, width, table.dtype, [index], body, element)

    def finish(self, name: str, outputs: Sequence[Value]) -> str:
        """The function that returns `outputs`."""
        arguments = ", ".join(["%rows: index", *(f"{value.name}: {value.type}" for value in self.inputs)])
        types = ", ".join(value.type for value in outputs)
        names = ", ".join(value.name for value in outputs)
        body = "\n".join(f"  {line}" for line in self._lines)
        return f"func.func @{name}({arguments}) -> ({types}) {{\n{body}\n  return {names} : {types}\n}}\n"

    def _generic(
        self, kind: Kind, width: int, dtype: torch.dtype, operands: Sequence[Value], body: Body, result: Scalar
    ) -> Value:
        out = Value(self._name(), kind, width, dtype)
        maps = ", ".join([*(_map(kind, operand.kind) for operand in operands), _map(kind, kind)])
        dims = {Kind.FULL: 2, Kind.ROW: 1, Kind.COL: 1, Kind.SCALAR: 0}[kind]
        iterators = ", ".join(['"parallel"'] * dims)
        self._write_generic(out, maps, iterators, operands, self._empty(kind, width, dtype), body, result)
        return out

    def _write_generic(
        self, out: Value, maps: str, iterators: str, operands: Sequence[Value], into: str, body: Body, result: Scalar
    ) -> None:
        names = ", ".join(operand.name for operand in operands)
        types = ", ".join(operand.type for operand in operands)
        ins = f"ins({names} : {types}) " if operands else ""
        arguments = [f"%a{i}: {MLIR_TYPE[operand.dtype]}" for i, operand in enumerate(operands)]
        arguments.append(f"%o: {MLIR_TYPE[out.dtype]}")
        self._lines += [
            f"{out.name} = linalg.generic {{indexing_maps = [{maps}], iterator_types = [{iterators}]}} "
            f"{ins}outs({into} : {out.type}) {{",
            f"^bb0({', '.join(arguments)}):",
            *(f"  {line}" for line in body.lines),
            f"  linalg.yield {result.name} : {result.type}",
            f"}} -> {out.type}",
        ]

    def _empty(self, kind: Kind, width: int, dtype: torch.dtype) -> str:
        name = self._name()
        rows = "%rows" if kind in (Kind.FULL, Kind.ROW) else ""
        self._lines.append(f"{name} = tensor.empty({rows}) : {tensor_type(kind, width, dtype)}")
        return name

    def _constant(self, value: Number, dtype: torch.dtype) -> str:
        body = Body(prefix=f"%k{self._count}_")
        self._count += 1
        name = body.constant(value, MLIR_TYPE[dtype]).name
        self._lines += body.lines
        return name

    def _name(self) -> str:
        self._count += 1
        return f"%v{self._count}"


@dataclass(frozen=True, slots=True)
class Table(Value):
    """A value that is indexed: its number of rows is its own, not the group's."""

    rows: int

    @property
    def type(self) -> str:
        return f"tensor<{self.rows}x{self.width}x{MLIR_TYPE[self.dtype]}>"


def domain_of(operands: Sequence[Value]) -> tuple[Kind, int]:
    """The kind and width of a pointwise result; widths must agree where there are columns."""
    kinds = {operand.kind for operand in operands}
    widths = {operand.width for operand in operands if operand.kind in (Kind.FULL, Kind.COL)}
    assert len(widths) <= 1, f"columns of different widths meet: {operands}"
    width = widths.pop() if widths else 1
    if Kind.FULL in kinds or {Kind.ROW, Kind.COL} <= kinds:
        return Kind.FULL, width
    if Kind.ROW in kinds:
        return Kind.ROW, 1
    if Kind.COL in kinds:
        return Kind.COL, width
    return Kind.SCALAR, 1


def _neutral(how: Reduction, dtype: torch.dtype) -> float | int:
    if how == "sum" or dtype.is_floating_point:
        return 0 if how == "sum" else NEUTRAL[how]
    limits = torch.iinfo(dtype)
    return limits.min if how == "amax" else limits.max
