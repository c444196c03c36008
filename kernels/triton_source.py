"""From the MLIR function of a group to the Triton source of its kernel.

Enters: a function of `linalg.generic`s over rows (see `build`), the access of every operand, and a form. Leaves: the
source of one `@triton.jit` function.

    flat      no rows: every operand is dense, or one element, and walked as one dimension
    blocks    no reductions: a program per ROWS x BLOCK tile
    resident  a program holds whole rows (BLOCK >= columns)
    ahead     the same, but it asks for all it reads before the first reduction, where nothing else hides that wait
    tiled     a program walks its rows in BLOCKs, once per level of reductions and once to write

Invariant: all forms compute each element by the same operations in the same order; only how a reduction's partial
results add up differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from .expressions import TRITON_TYPE
from .function import body_of, element_of, is_reduction, operations, over_columns, over_rows, shape_of, width_of
from .geometry import Access
from .triton_values import MAIN, Values, combined, neutral, whole_row

Form = Literal["flat", "blocks", "resident", "ahead", "tiled"]


def triton_source(function: Any, inputs: Sequence[Access], outputs: Sequence[Access], form: Form, name: str) -> str:
    """The kernel of `function` (an MLIR `func.func`) as Python source, without imports."""
    writer = _Writer(function, inputs, outputs, form)
    {
        "flat": writer.flat,
        "blocks": writer.blocks,
        "resident": writer.resident,
        "ahead": writer.ahead,
        "tiled": writer.tiled,
    }[form]()
    return writer.source(name)


def has_reductions(function: Any) -> bool:
    """Whether the group reduces over columns."""
    return any(is_reduction(op) for op in operations(function))


def columns(function: Any) -> int:
    """The columns of the group: those of its widest value that is no table."""
    values = [value for op in operations(function) for value in op.results]
    tables = {op.operands[0] for generic in operations(function) for op in _bodies(generic) if "extract" in op.name}
    values += [a for a in function.regions[0].blocks[0].arguments if a not in tables]
    return max((width_of(value.type) for value in values), default=1)


def _bodies(op: Any) -> list[Any]:
    return body_of(op) if op.name == "linalg.generic" else []


_COLUMNS: Final = "col = tl.arange(0, BLOCK)[None, :]"


class _Writer:
    def __init__(self, function: Any, inputs: Sequence[Access], outputs: Sequence[Access], form: Form) -> None:
        self.function = function
        self.form: Form = form
        self.width = columns(function)
        self.accesses = {f"in{i}": access for i, access in enumerate(inputs)}
        self.accesses |= {f"out{i}": access for i, access in enumerate(outputs)}
        self.results = list(operations(function)[-1].operands)
        self.values = Values(function, self.accesses, dense=form == "flat")
        self.text = self.values.outer

    def source(self, name: str) -> str:
        if self.form == "flat":
            rest = ["n_elements", "BLOCK: tl.constexpr"]
        else:
            numbers = [p for operand, access in self.accesses.items() for p in access.parameters(operand)]
            rest = ["n_rows", *numbers, "ROWS: tl.constexpr", "BLOCK: tl.constexpr"]
        lines = ["@triton.jit", f"def {name}({', '.join([*self.accesses, *rest])}):"]
        return "\n".join([*lines, *(f"    {line}" for line in self.text)]) + "\n"

    # --- forms -------------------------------------------------------------------------------------------------------

    def flat(self) -> None:
        self.text += [
            "start = tl.program_id(0).to(tl.int64) * BLOCK",
            "col = tl.arange(0, BLOCK)",
            "inside = start + col < n_elements",
        ]
        for number in range(len(self.results)):
            self._store(number)

    def blocks(self) -> None:
        self.text.append(f"across = tl.cdiv({self.width}, BLOCK)")
        self._rows("(tl.program_id(0) // across)")
        self.text.append("col = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)[None, :]")
        for number in range(len(self.results)):
            self._store(number)

    def resident(self) -> None:
        self._rows("tl.program_id(0)")
        self.text.append(_COLUMNS)
        for number in range(len(self.results)):
            self._store(number)

    def ahead(self) -> None:
        self.values.ahead = []
        self.resident()
        place = self.text.index(_COLUMNS) + 1
        self.text[place:place] = self.values.ahead

    def tiled(self) -> None:
        self._rows("tl.program_id(0)")
        for stage in self._stages():
            self._reduce(stage)
        wide = [number for number, value in enumerate(self.results) if over_columns(value.type)]
        if wide:
            self._loop(lambda: [self._store(number) for number in wide])
        for number in range(len(self.results)):
            if number not in wide:
                self._store(number)

    def _rows(self, program: str) -> None:
        self.text += [
            f"row = {program}.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]",
            "in_rows = row < n_rows",
        ]

    def _store(self, number: int) -> None:
        value = self.results[number]
        name = self.values.at(value, MAIN)
        address = self.values.address(f"out{number}", value.type, MAIN)
        mask = self.values.mask(value.type, MAIN)
        if self.form != "flat" and shape_of(value.type):
            tile = f"({'ROWS' if over_rows(value.type) else 1}, {'BLOCK' if over_columns(value.type) else 1})"
            name = f"tl.broadcast_to({name}, {tile})"
        self.values.lines.append(f"tl.store({address}, {name}{f', mask={mask}' if mask else ''})")

    # --- loops over columns ------------------------------------------------------------------------------------------

    def _stages(self) -> list[list[Any]]:
        """Reductions by depth: each stage needs only those before it."""
        depth: dict[Any, int] = {}
        stages: list[list[Any]] = []
        for op in operations(self.function)[:-1]:
            read = [*op.operands, *(operand for inner in _bodies(op) for operand in inner.operands)]
            below = max((depth.get(value, 0) for value in read), default=0)
            if is_reduction(op):
                stages += [[] for _ in range(below + 1 - len(stages))]
                stages[below].append(op)
                below += 1
            for result in op.results:
                depth[result] = below
        return stages

    def _reduce(self, stage: Sequence[Any]) -> None:
        """One loop for all reductions of a stage."""
        names = [self.values.fresh("acc") for _ in stage]
        for op, name in zip(stage, names, strict=True):
            element = TRITON_TYPE[element_of(op.results[0].type)]
            self.text.append(f"{name} = tl.full((ROWS, BLOCK), {neutral(op)}, {element})")

        def body() -> None:
            for op, name in zip(stage, names, strict=True):
                value = self.values.reduced(op, MAIN)
                self.values.lines.append(f"{name} = {combined(op, name, value)}")

        self._loop(body)
        for op, name in zip(stage, names, strict=True):
            result = self.values.fresh()
            self.text.append(f"{result} = {whole_row(op)}({name})")
            self.values.keep(op.results[0], result)

    def _loop(self, body: Callable[[], object]) -> None:
        before, inside = dict(self.values.known), list[str]()
        self.values.lines = inside
        body()
        self.values.lines = self.text
        self.text.append(f"for start in range(0, {self.width}, BLOCK):")
        self.text.append("    col = start + tl.arange(0, BLOCK)[None, :]")
        self.text += [f"    {line}" for line in inside]
        self.values.forget_columns(before)
