"""A compiled Triton kernel's TTIR as plain data.

Enters: the text that `CompiledKernel.asm["ttir"]` holds. Leaves: its functions, as operations in blocks in regions.
Triton's own MLIR bindings parse it, so that whatever Triton printed is read as Triton means it. They do not tell which
block a `cf` branch goes to; nothing here claims to know.
Invariant: values are equal exactly where the IR's are, within one module.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import CaptureError

_NAMED = re.compile(r'loc\("([^"]+)"\(')  # loc("x_ptr"("file.py":3:1)); a place without a name has a colon there


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value: an operation's result, or a block's argument."""

    number: int
    type: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. `pure` and `callee` are the attributes of these names; False and None where it has none."""

    name: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    regions: tuple[Region, ...]
    pure: bool
    callee: str | None


@dataclass(frozen=True, slots=True)
class Block:
    """Operations that run one after the other; the last one is the terminator."""

    arguments: tuple[Value, ...]
    operations: tuple[Operation, ...]

    @property
    def terminator(self) -> Operation:
        return self.operations[-1]


Region = tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """A `tt.func`. `names` are those of its arguments in the source, where Triton kept them; `body` may be empty."""

    name: str
    names: tuple[str, ...]
    body: Region


@dataclass(frozen=True, slots=True)
class Module:
    """`kernel` is the name of the function that is launched."""

    kernel: str
    functions: dict[str, Function]


def read_module(ttir: str) -> Module:
    """Parse TTIR.

    Raises:
        CaptureError: the installed Triton cannot parse it.
    """
    from triton._C.libtriton import ir, nvidia  # pyright: ignore[reportMissingImports]

    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:  # the bindings parse files only
        file.write(ttir)
        file.flush()
        try:
            module = ir.parse_mlir_module(file.name, context)
        except RuntimeError as error:
            raise CaptureError(
                "a Triton kernel's TTIR cannot be parsed",
                expected="text that the installed Triton printed",
                came=str(error),
                remedy="clear Triton's cache if it was filled by another version",
            ) from error
    reader = _Reader()
    module.walk(reader.visit)
    return Module(module.get_entry_func_name(), reader.functions)


class _Reader:
    """Builds operations from a walk that comes to what a region holds before it comes to the region's operation."""

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}
        self._blocks: dict[int, dict[int, tuple[Any, list[Operation]]]] = {}  # region -> block -> itself, operations

    def visit(self, operation: Any) -> None:
        regions = [operation.get_region(i) for i in range(operation.get_num_regions())]
        bodies = tuple(self._region(region.id()) for region in regions)
        name = operation.get_name()
        if name == "tt.func":
            symbol = operation.get_str_attr("sym_name")
            self.functions[symbol] = Function(symbol, self._names(regions[0].id()), bodies[0])
        block = operation.get_block()
        if block is None or name == "tt.func":
            return
        operands = tuple(_value(operation.get_operand(i)) for i in range(operation.get_num_operands()))
        results = tuple(_value(operation.get_result(i)) for i in range(operation.get_num_results()))
        pure, callee = operation.get_bool_attr("pure"), operation.get_flat_symbol_ref_attr("callee")
        blocks = self._blocks.setdefault(block.get_parent().id(), {})
        _, operations = blocks.setdefault(block.id(), (block, []))
        operations.append(Operation(name, operands, results, bodies, bool(pure), callee))

    def _region(self, region: int) -> Region:
        return tuple(
            Block(tuple(_value(argument) for argument in _arguments(block)), tuple(operations))
            for block, operations in self._blocks.get(region, {}).values()
        )

    def _names(self, region: int) -> tuple[str, ...]:
        entry = next(iter(self._blocks.get(region, {}).values()), None)
        places = [str(argument.get_loc()) for argument in _arguments(entry[0])] if entry else []
        named = [_NAMED.match(place) for place in places]
        return tuple(found[1] if found else f"argument {i}" for i, found in enumerate(named))


def _arguments(block: Any) -> list[Any]:
    return [block.arg(i) for i in range(block.get_num_arguments())]


def _value(value: Any) -> Value:
    return Value(value.id(), str(value.get_type()))
