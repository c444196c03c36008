"""Values of a group's MLIR function as Triton statements, on demand.

Enters: the function and the access of each of its operands. Leaves: the name of a value at a point, and the statements
that compute it. A point is a row and a column: a slice or a concatenation of columns is its operand at other columns,
an indexed element its table at another row or column. Invariants: a value is computed once per point; what does not
depend on columns is written to `outer`, in front of whatever loop `lines` is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .expressions import TRITON_TYPE, expression, literal
from .function import (
    accumulator_of,
    body_of,
    combiner,
    first_column,
    is_reduction,
    over_columns,
    over_rows,
    shape_of,
    walks_rows,
    width_of,
)
from .geometry import Access


@dataclass(frozen=True, slots=True)
class Point:
    """Where a value is computed: expressions of row and column, and what must hold for the row to exist."""

    row: str
    col: str
    row_check: str
    shift: int = 0
    """Added to the column, so that a range check can tell which side may fail."""

    @property
    def column(self) -> str:
        if not self.shift:
            return self.col
        return f"({self.col} {'+' if self.shift > 0 else '-'} {abs(self.shift)})"

    def inside(self, width: int) -> str:
        """The check that the column lies in [0, width)."""
        below = f"({self.column} >= 0) & " if self.shift < 0 else ""
        return f"{below}({self.column} < {width})"


MAIN = Point("row", "col", "in_rows")
"""The point of a program's own rows and columns."""


class Values:
    """The statements written so far, and the names of the values they compute."""

    def __init__(self, function: Any, accesses: Mapping[str, Access], *, dense: bool) -> None:
        arguments = list(function.regions[0].blocks[0].arguments)
        self.arguments = {argument: f"in{i}" for i, argument in enumerate(arguments[1:])}
        self.accesses = accesses
        self.dense = dense
        """Whether operands are walked as one dimension, `start + col`."""
        self.tile = "(1,)" if dense else "(1, 1)"
        """The shape of a value that is the same everywhere."""
        self.outer: list[str] = []
        self.lines = self.outer
        self.ahead: list[str] | None = None
        """Where loads at the program's own rows are written, if not as they come; they depend on nothing else."""
        self.known: dict[Any, str] = {}
        self._count = 0

    def fresh(self, prefix: str = "t") -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def at(self, value: Any, point: Point) -> str:
        """The name of `value` at `point`."""
        columns = over_columns(value.type)
        key = (value, point.row if over_rows(value.type) else "", (point.col, point.shift) if columns else None)
        if key not in self.known:
            lines = self.lines
            if not columns and point.row == MAIN.row:
                self.lines = self.outer
            self.known[key] = self._compute(value, point)
            self.lines = lines
        return self.known[key]

    def keep(self, value: Any, name: str) -> None:
        """`name` holds the row value `value`, computed elsewhere."""
        self.known[value, MAIN.row, None] = name

    def forget_columns(self, before: Mapping[Any, str]) -> None:
        """Leave a loop over columns: what was computed in it is gone."""
        self.known = {key: name for key, name in self.known.items() if key in before or key[-1] is None}

    def _compute(self, value: Any, point: Point) -> str:
        if value in self.arguments:
            return self._load(self.arguments[value], value.type, point)
        op = value.owner
        match op.name:
            case "linalg.generic" if is_reduction(op):
                result = self.fresh()
                self.lines.append(f"{result} = {whole_row(op)}({self.reduced(op, point)})")
                return result
            case "linalg.generic":
                inner = body_of(op)
                return self._scalars(inner[:-1], self._operands(op, point), point, inner[-1].operands[0])
            case "linalg.fill":
                return literal(op.operands[0].owner.attributes["value"])
            case "tensor.extract_slice":
                return self.at(op.operands[0], replace(point, shift=point.shift + first_column(op)))
            case "tensor.concat":
                return self._concatenated(op, point)
            case name:
                raise KeyError(f"no Triton for {name}")

    def reduced(self, op: Any, point: Point) -> str:
        """The element a reduction takes in, neutral outside its columns; what fused into it is computed first."""
        inner = body_of(op)
        element = next(v for v in inner[-2].operands if v != accumulator_of(op))
        value = self._scalars(inner[:-2], self._operands(op, point), point, element)
        width = max(width_of(operand.type) for operand in op.operands)
        return f"tl.where({point.inside(width)}, {value}, {neutral(op)})"

    # --- memory ------------------------------------------------------------------------------------------------------

    def _load(self, name: str, type: Any, point: Point) -> str:
        result = self.fresh("x")
        address, mask = self.address(name, type, point), self.mask(type, point)
        lines = self.lines if self.ahead is None or point.row != MAIN.row else self.ahead
        lines.append(f"{result} = tl.load({address}{f', mask={mask}' if mask else ''})")
        return result

    def address(self, name: str, type: Any, point: Point) -> str:
        """The pointers of an operand at a point."""
        if not shape_of(type):
            return f"{name} + tl.zeros({self.tile}, tl.int32)"  # a tile of one, for all values are tiles
        if self.dense:
            return f"{name} + start + col"
        access, terms = self.accesses[name], [name]
        if over_rows(type):
            terms += _row_terms(name, access.levels, point.row)
        if over_columns(type):
            # Columns far apart may lie more than 2**31 elements behind the first.
            terms.append(point.column if access.unit else f"{point.column}.to(tl.int64) * {name}_c")
        elif over_rows(type) and not access.levels:
            terms.append("tl.zeros((ROWS, 1), tl.int32)")  # one row, and still a pointer per row
        return " + ".join(terms)

    def mask(self, type: Any, point: Point) -> str:
        """Which of those pointers exist; empty for all."""
        if self.dense:
            return "inside" if shape_of(type) else ""
        checks = [point.row_check] if over_rows(type) else []
        checks += [point.inside(width_of(type))] if over_columns(type) else []
        return " & ".join(checks)

    def _extracted(self, op: Any, names: dict[Any, str], point: Point) -> str:
        """An element at a row and column computed in the body: of a value, or of a table in memory. Outside of the
        table there is none: an error where kernels check (see `launch`), else undefined."""
        source, *indices = op.operands
        if source not in self.arguments:  # `build.gather` walks columns as they are
            return self.at(source, replace(point, row=f"({self._name(indices[0], names)})"))
        name = self.arguments[source]
        access = self.accesses[name]
        *rows, col = (self._name(index, names) for index in indices)  # a vector has no rows
        terms = [name, *(term for row in rows for term in _row_terms(name, access.levels, row))]
        terms.append(col if access.unit else f"{col} * {name}_c")
        terms.append("tl.zeros((1, 1), tl.int32)")  # passes may make every index a constant; masks are tiles
        limits = zip((*rows, col), shape_of(source.type), strict=True)
        known = [f"({at} >= 0) & ({at} < {size})" for at, size in limits if size != "?"]
        result, legal, here = self.fresh("x"), self.fresh(), self.mask(op.parent.results[0].type, point)
        self.lines += [
            f"{legal} = {' & '.join(known)}",
            f'tl.device_assert({legal}, "index out of range", mask={here})',
            f"{result} = tl.load({' + '.join(terms)}, mask={legal} & {here})",
        ]
        return result

    # --- scalars -----------------------------------------------------------------------------------------------------

    def _operands(self, op: Any, point: Point) -> dict[Any, str]:
        """Names of a generic's block arguments: its tensor operands at this point."""
        arguments = list(op.regions[0].blocks[0].arguments)[:-1]
        return {a: self.at(o, point) for a, o in zip(arguments, list(op.operands)[: len(arguments)], strict=True)}

    def _scalars(self, ops: Sequence[Any], names: dict[Any, str], point: Point, wanted: Any) -> str:
        for op in ops:
            match op.name:
                case "arith.constant":
                    text = literal(op.attributes["value"])
                case "linalg.index":
                    text = _index(op, point)
                case "tensor.extract":
                    text = self._extracted(op, names, point)
                case _:
                    text = self.fresh()
                    operands = [self._name(x, names) for x in op.operands]
                    self.lines.append(f"{text} = {expression(op, operands, few_rows=self.ahead is not None)}")
            names[op.results[0]] = text
        if getattr(wanted.owner, "name", "") == "arith.constant":  # a tile of its own, for there may be no other
            return f"tl.full({self.tile}, {self._name(wanted, names)}, {TRITON_TYPE[str(wanted.type)]})"
        return self._name(wanted, names)

    def _name(self, value: Any, names: Mapping[Any, str]) -> str:
        """A scalar's name; constants may have been moved out of the body."""
        return names[value] if value in names else literal(value.owner.attributes["value"])

    def _concatenated(self, op: Any, point: Point) -> str:
        starts = [0]
        for operand in op.operands:
            starts.append(starts[-1] + width_of(operand.type))
        parts = [
            self.at(operand, replace(point, shift=point.shift - start))
            for operand, start in zip(op.operands, starts, strict=False)
        ]
        name = parts[-1]
        for start, left in reversed(list(zip(starts[1:-1], parts[:-1], strict=True))):
            result = self.fresh()
            self.lines.append(f"{result} = tl.where({point.column} < {start}, {left}, {name})")
            name = result
        return name


def _index(op: Any, point: Point) -> str:
    """A `linalg.index`: the row, or the column."""
    return point.row if walks_rows(op) else f"{point.column}.to(tl.int64)"


def _row_terms(name: str, levels: int, row: str) -> list[str]:
    """Terms of a row's offset, from the sizes and strides that `geometry` passes, the outermost first."""
    terms: list[str] = []
    rest = row
    for level in range(levels - 1, 0, -1):
        terms.insert(0, f"{rest} % {name}_n{level} * {name}_s{level}")
        rest = f"{rest} // {name}_n{level}"
    return [f"{rest} * {name}_s0", *terms] if levels else []


# --- reductions -------------------------------------------------------------------------------------------------------


def combined(op: Any, so_far: str, value: str) -> str:
    """One step of a reduction."""
    return {
        "arith.addf": f"{so_far} + {value}",
        "arith.addi": f"{so_far} + {value}",
        "arith.maximumf": f"dm.maximum({so_far}, {value})",
        "arith.minimumf": f"dm.minimum({so_far}, {value})",
        "arith.maxsi": f"tl.maximum({so_far}, {value})",
        "arith.minsi": f"tl.minimum({so_far}, {value})",
    }[combiner(op)]


def whole_row(op: Any) -> str:
    """The device function that reduces a tile to one value per row."""
    kind = combiner(op)
    return "dm.row_sum" if "add" in kind else ("dm.row_max" if "max" in kind else "dm.row_min")


def neutral(op: Any) -> str:
    """What a reduction starts from: the value its output was filled with."""
    filled = op.operands[len(op.operands) - 1].owner
    if filled.name == "linalg.fill":
        return literal(filled.operands[0].owner.attributes["value"])
    return literal(body_of(filled)[-1].operands[0].owner.attributes["value"])  # a fill that passes made a generic
