"""From the MLIR function of a group to the Triton source of its kernel.

Enters: a function of `linalg.generic`s over rows (see `build`), the access of every operand, and a form. Leaves: the
source of one `@triton.jit` function. Values are computed on demand, from the outputs back, at a point (row, column):
a slice or a concatenation of columns is its operand at other columns, an indexed row its table at another row.

Forms:
    flat      no rows: every operand is dense and walked as one dimension
    blocks    no reductions: a program per ROWS x BLOCK tile
    resident  a program holds whole rows (BLOCK >= columns)
    tiled     a program walks its rows in BLOCKs, once per level of reductions and once to write

Invariant: each value is computed once per point and loop; what does not depend on columns is computed outside loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .expressions import TRITON_TYPE, expression, literal
from .geometry import Access

Form = Literal["flat", "blocks", "resident", "tiled"]


@dataclass(frozen=True, slots=True)
class _Point:
    """Where a value is computed: names of the row and the column, and what must hold for it to exist."""

    row: str
    col: str
    checks: tuple[str, ...] = ()
    shift: int = 0

    def shifted(self, by: int) -> _Point:
        return _Point(self.row, self.col, self.checks, self.shift + by)

    @property
    def column(self) -> str:
        return self.col if not self.shift else f"({self.col} {'+' if self.shift > 0 else '-'} {abs(self.shift)})"


def triton_source(function: Any, inputs: Sequence[Access], outputs: Sequence[Access], form: Form, name: str) -> str:
    """The kernel of `function` (an MLIR `func.func`) as Python source, without imports."""
    return _Writer(function, inputs, outputs, form).source(name)


def has_reductions(function: Any) -> bool:
    """Whether the group reduces over columns."""
    return any(_is_reduction(op) for op in _ops(function))


def columns(function: Any) -> int:
    """The widest value of the group."""
    widths = [_width(value.type) for op in _ops(function) for value in op.results]
    widths += [_width(argument.type) for argument in _block(function).arguments if _is_tensor(argument.type)]
    return max(widths, default=1)


def _block(function: Any) -> Any:
    return function.regions[0].blocks[0]


def _ops(function: Any) -> list[Any]:
    return [op.operation for op in _block(function).operations]


def _is_tensor(type: Any) -> bool:
    return str(type).startswith("tensor")


def _is_reduction(op: Any) -> bool:
    return op.name == "linalg.generic" and "reduction" in str(op.attributes["iterator_types"])


def _shape(type: Any) -> list[str]:
    """Dimensions of a tensor type, "?" for rows."""
    return str(type)[len("tensor<") : -1].split("x")[:-1]


def _width(type: Any) -> int:
    if not _is_tensor(type):
        return 1
    shape = _shape(type)
    return int(shape[-1]) if shape and shape[-1] != "?" else 1


def _over_rows(type: Any) -> bool:
    return "?" in _shape(type)


def _over_columns(type: Any) -> bool:
    shape = _shape(type)
    return bool(shape) and shape[-1] != "?"


def _element(type: Any) -> str:
    return str(type)[len("tensor<") : -1].split("x")[-1] if _is_tensor(type) else str(type)


class _Writer:
    def __init__(self, function: Any, inputs: Sequence[Access], outputs: Sequence[Access], form: Form) -> None:
        self.function = function
        self.form: Form = form
        self.width = columns(function)
        self.accesses = {f"in{i}": access for i, access in enumerate(inputs)}
        self.accesses |= {f"out{i}": access for i, access in enumerate(outputs)}
        block = _block(function)
        self.arguments = {argument: f"in{i - 1}" for i, argument in enumerate(block.arguments) if i}
        self.results = list(_ops(function)[-1].operands)
        self.known: dict[Any, str] = {}
        self.outer: list[str] = []
        self.lines = self.outer
        self.count = 0

    def source(self, name: str) -> str:
        getattr(self, f"_{self.form}")()
        integers = [p for operand, access in self.accesses.items() for p in access.parameters(operand)]
        constants = ["BLOCK: tl.constexpr"] if self.form == "flat" else ["ROWS: tl.constexpr", "BLOCK: tl.constexpr"]
        size = "n_elements" if self.form == "flat" else "n_rows"
        integers = [] if self.form == "flat" else integers
        parameters = ", ".join([*self.accesses, size, *integers, *constants])
        return "\n".join(["@triton.jit", f"def {name}({parameters}):", *(f"    {line}" for line in self.outer)]) + "\n"

    # --- forms -------------------------------------------------------------------------------------------------------

    def _flat(self) -> None:
        self.outer += [
            "start = tl.program_id(0).to(tl.int64) * BLOCK",
            "col = tl.arange(0, BLOCK)",
            "here = start + col < n_elements",
        ]
        point = _Point("", "col", ("here",))
        for i, value in enumerate(self.results):
            self.outer.append(f"tl.store(out{i} + start + col, {self._stored(value, point)}, mask=here)")

    def _rows(self, program: str) -> None:
        self.outer += [
            f"row = {program} * ROWS + tl.arange(0, ROWS)[:, None]",
            "in_rows = row < n_rows",
        ]

    def _blocks(self) -> None:
        self.outer.append(f"across = tl.cdiv({self.width}, BLOCK)")
        self._rows("(tl.program_id(0) // across).to(tl.int64)")
        self.outer.append("col = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)[None, :]")
        self._store_all(_Point("row", "col", ("in_rows",)))

    def _resident(self) -> None:
        self._rows("tl.program_id(0).to(tl.int64)")
        self.outer.append("col = tl.arange(0, BLOCK)[None, :]")
        self._store_all(_Point("row", "col", ("in_rows",)))

    def _tiled(self) -> None:
        self._rows("tl.program_id(0).to(tl.int64)")
        for stage in self._stages():
            self._reduce_in_a_loop(stage)
        point = _Point("row", "col", ("in_rows",))
        wide = [i for i, value in enumerate(self.results) if _over_columns(value.type)]
        if wide:
            with_columns = [(i, self.results[i]) for i in wide]
            self._loop(lambda: [self._store(i, value, point) for i, value in with_columns])
        for i, value in enumerate(self.results):
            if i not in wide:
                self._store(i, value, point)

    def _store_all(self, point: _Point) -> None:
        for i, value in enumerate(self.results):
            self._store(i, value, point)

    def _store(self, number: int, value: Any, point: _Point) -> None:
        name = f"out{number}"
        what = self._stored(value, point)
        where = self._address(name, value.type, point)
        mask = self._mask(value.type, point)
        shape = f"tl.broadcast_to({what}, ({'ROWS' if _over_rows(value.type) else 1}, {'BLOCK' if _over_columns(value.type) else 1}))"
        self.lines.append(f"tl.store({where}, {shape}, mask={mask})")

    def _stored(self, value: Any, point: _Point) -> str:
        return self._at(value, point)

    # --- reductions in loops -----------------------------------------------------------------------------------------

    def _stages(self) -> list[list[Any]]:
        """Reductions by depth: each stage needs only those before it."""
        depth: dict[Any, int] = {}
        stages: list[list[Any]] = []
        for op in _ops(self.function)[:-1]:
            inner = [v for v in self._read_by(op)]
            below = max((depth.get(value, 0) for value in inner), default=0)
            if _is_reduction(op):
                while len(stages) <= below:
                    stages.append([])
                stages[below].append(op)
                below += 1
            for result in op.results:
                depth[result] = below
        return stages

    def _read_by(self, op: Any) -> list[Any]:
        """Operands of an op, those of its body included."""
        found = list(op.operands)
        for region in op.regions:
            for block in region.blocks:
                for inner in block.operations:
                    found += list(inner.operation.operands)
        return found

    def _reduce_in_a_loop(self, stage: list[Any]) -> None:
        point = _Point("row", "col", ("in_rows",))
        accumulators: list[str] = []
        for op in stage:
            name = self._fresh("acc")
            element = TRITON_TYPE[_element(op.results[0].type)]
            self.outer.append(f"{name} = tl.full((ROWS, BLOCK), {self._neutral(op)}, {element})")
            accumulators.append(name)

        def body() -> None:
            for op, name in zip(stage, accumulators, strict=True):
                value = self._guarded(op, point)
                self.lines.append(f"{name} = {self._combined(op, name, value)}")

        self._loop(body)
        for op, name in zip(stage, accumulators, strict=True):
            result = self._fresh()
            self.outer.append(f"{result} = {self._whole_row(op)}({name})")
            self.known[op.results[0], "row", None] = result

    def _loop(self, body: Any) -> None:
        """Write `body` into a loop over the columns; values that depend on columns are forgotten behind it."""
        inside: list[str] = []
        before = dict(self.known)
        self.lines = inside
        body()
        self.lines = self.outer
        self.outer.append(f"for start in range(0, {self.width}, BLOCK):")
        self.outer.append("    col = start + tl.arange(0, BLOCK)[None, :]")
        self.outer += [f"    {line}" for line in inside]
        self.known = {key: name for key, name in self.known.items() if key in before or key[-1] is None}

    def _neutral(self, op: Any) -> str:
        """What the reduction starts from, read off the `linalg.fill` of its output."""
        filled = op.operands[len(op.operands) - 1].owner
        while filled.name == "linalg.generic" and not _is_reduction(filled):  # a fill that passes made a generic
            inner = [o.operation for o in filled.regions[0].blocks[0].operations]
            return literal(inner[-1].operands[0].owner.attributes["value"])
        return literal(filled.operands[0].owner.attributes["value"])

    def _combiner(self, op: Any) -> str:
        inner = [o.operation for o in op.regions[0].blocks[0].operations]
        return inner[-1].operands[0].owner.name

    def _combined(self, op: Any, so_far: str, value: str) -> str:
        return {
            "arith.addf": f"{so_far} + {value}",
            "arith.addi": f"{so_far} + {value}",
            "arith.maximumf": f"dm.maximum({so_far}, {value})",
            "arith.minimumf": f"dm.minimum({so_far}, {value})",
            "arith.maxsi": f"tl.maximum({so_far}, {value})",
            "arith.minsi": f"tl.minimum({so_far}, {value})",
        }[self._combiner(op)]

    def _whole_row(self, op: Any) -> str:
        kind = self._combiner(op)
        return "dm.row_sum" if "add" in kind else ("dm.row_max" if "max" in kind else "dm.row_min")

    def _guarded(self, op: Any, point: _Point) -> str:
        """The reduced element, neutral outside the columns; what fused into the reduction is computed first."""
        block = op.regions[0].blocks[0]
        inner = [o.operation for o in block.operations]
        combine = inner[-1].operands[0].owner
        accumulator = list(block.arguments)[-1]
        element = next(v for v in combine.operands if v != accumulator)
        names = self._arguments(op, point)
        value = self._scalars(inner[:-2], names, point, element)
        width = max(_width(v.type) for v in op.operands)
        return f"tl.where({self._inside(width, point)}, {value}, {self._neutral(op)})"

    # --- values ------------------------------------------------------------------------------------------------------

    def _at(self, value: Any, point: _Point) -> str:
        """The name of `value` at `point`, computed if it is not there yet."""
        type = value.type
        key = (
            value,
            point.row if _over_rows(type) else None,
            (point.col, point.shift) if _over_columns(type) else None,
        )
        if key not in self.known:
            lines = self.lines
            if key[2] is None and point.row in ("row", ""):
                self.lines = self.outer  # the same for all columns: outside the loop
            name = self._compute(value, point)
            self.lines = lines
            self.known[key] = name
        return self.known[key]

    def _compute(self, value: Any, point: _Point) -> str:
        if value in self.arguments:
            return self._load(self.arguments[value], value.type, point)
        op = value.owner
        if op.name == "linalg.generic":
            return self._reduction(op, point) if _is_reduction(op) else self._generic(op, point)
        if op.name == "tensor.extract_slice":
            offsets = [int(x) for x in str(op.attributes["static_offsets"]).split(":")[-1].strip(" >").split(",")]
            return self._at(op.operands[0], point.shifted(offsets[-1]))
        if op.name == "tensor.concat":
            return self._concat(op, point)
        if op.name == "linalg.fill":
            return literal(op.operands[0].owner.attributes["value"])
        raise KeyError(f"no Triton for {op.name}")

    def _load(self, name: str, type: Any, point: _Point) -> str:
        result = self._fresh("x")
        if self.form == "flat":
            dense = _over_columns(type) or _over_rows(type)
            text = f"tl.load({name} + start + col, mask=here)" if dense else f"tl.load({name})"
        else:
            mask = self._mask(type, point)
            guard = f", mask={mask}" if mask != "None" else ""
            text = f"tl.load({self._address(name, type, point)}{guard})"
        self.lines.append(f"{result} = {text}")
        return result

    def _address(self, name: str, type: Any, point: _Point) -> str:
        access = self.accesses[name]
        terms = [name]
        if _over_rows(type):
            terms += self._row_offset(name, access.levels, point.row)
        if _over_columns(type):
            terms.append(point.column if access.unit else f"{point.column} * {name}_c")
        if not _over_columns(type) and not _over_rows(type):
            return name
        if not _over_columns(type):
            terms.append("tl.zeros((ROWS, 1), tl.int32)") if not access.levels else None
        return " + ".join(terms)

    def _row_offset(self, name: str, levels: int, row: str) -> list[str]:
        """Terms of the offset of a row, the innermost level last: sizes and strides as `geometry` passes them."""
        if not levels:
            return []
        terms: list[str] = []
        rest = row
        for level in range(levels - 1, 0, -1):
            terms.append(f"({rest} % {name}_n{level}) * {name}_s{level}")
            rest = f"({rest} // {name}_n{level})"
        return [f"{rest} * {name}_s0", *reversed(terms)]

    def _mask(self, type: Any, point: _Point) -> str:
        checks: list[str] = []
        if _over_rows(type):
            checks += point.checks
        if _over_columns(type):
            inside = self._inside(_width(type), point)
            checks += [inside] if inside != "True" else []
        return " & ".join(f"({check})" if " " in check else check for check in checks) or "None"

    def _inside(self, width: int, point: _Point) -> str:
        """Whether the point's column lies in [0, width)."""
        below = f"({point.column} >= 0) & " if point.shift < 0 else ""
        return f"{below}({point.column} < {width})"

    def _concat(self, op: Any, point: _Point) -> str:
        parts: list[tuple[int, str]] = []
        start = 0
        for operand in op.operands:
            parts.append((start, self._at(operand, point.shifted(-start))))
            start += _width(operand.type)
        name = parts[-1][1]
        for (begin, _), (_, left) in zip(reversed(parts[1:]), reversed(parts[:-1]), strict=True):
            result = self._fresh()
            self.lines.append(f"{result} = tl.where({point.column} < {begin}, {left}, {name})")
            name = result
        return name

    def _reduction(self, op: Any, point: _Point) -> str:
        assert self.form == "resident", "loops reduce before they write"
        result = self._fresh()
        guarded = self._guarded(op, point)
        self.lines.append(f"{result} = {self._whole_row(op)}({guarded})")
        return result

    def _generic(self, op: Any, point: _Point) -> str:
        inner = [o.operation for o in op.regions[0].blocks[0].operations]
        names = self._arguments(op, point)
        return self._scalars(inner[:-1], names, point, inner[-1].operands[0])

    def _arguments(self, op: Any, point: _Point) -> dict[Any, str]:
        """Names of a generic's block arguments: its tensor operands at this point."""
        arguments = list(op.regions[0].blocks[0].arguments)
        return {
            a: self._at(o, point) for a, o in zip(arguments[:-1], list(op.operands)[: len(arguments) - 1], strict=True)
        }

    def _scalars(self, ops: Sequence[Any], names: dict[Any, str], point: _Point, wanted: Any) -> str:
        for op in ops:
            if op.name == "arith.constant":
                names[op.results[0]] = literal(op.attributes["value"])
            elif op.name == "linalg.index":
                both = len(_shape(self._generic_type(op))) == 2
                dim = int(str(op.attributes["dim"]).split(":")[0])
                rows = dim == 0 and (both or _over_rows(self._generic_type(op)))
                names[op.results[0]] = point.row if rows else f"{point.column}.to(tl.int64)"
            elif op.name == "tensor.extract":
                names[op.results[0]] = self._extract(op, names, point)
            else:
                name = self._fresh()
                text = expression(op, [self._name(operand, names, point) for operand in op.operands])
                self.lines.append(f"{name} = {text}")
                names[op.results[0]] = name
        return self._name(wanted, names, point)

    def _generic_type(self, op: Any) -> Any:
        return op.parent.results[0].type

    def _name(self, value: Any, names: dict[Any, str], point: _Point) -> str:
        if value in names:
            return names[value]
        op = value.owner  # a constant that passes hoisted out of the body
        assert op.name == "arith.constant", f"a body uses {value}"
        return literal(op.attributes["value"])

    def _extract(self, op: Any, names: dict[Any, str], point: _Point) -> str:
        """An element at indices computed in the body: of a table in memory."""
        source, *indices = op.operands
        name = self.arguments[source]
        access = self.accesses[name]
        row, col = (self._name(index, names, point) for index in indices)
        height, width = (int(x) if x != "?" else 0 for x in _shape(source.type))
        checks = [*point.checks, f"({col} >= 0) & ({col} < {width})"]
        if height:
            checks.append(f"({row} >= 0) & ({row} < {height})")
        column = f"({col})" if access.unit else f"({col}) * {name}_c"
        result = self._fresh("x")
        mask = " & ".join(f"({check})" for check in checks)
        offset = " + ".join(self._row_offset(name, access.levels, f"({row})"))
        self.lines.append(f"{result} = tl.load({name} + {offset} + {column}, mask={mask})")
        return result

    def _fresh(self, prefix: str = "t") -> str:
        self.count += 1
        return f"{prefix}{self.count}"
