"""Where the addresses that a Triton kernel touches come from: a forward dataflow over its TTIR.

Enters: a module as `triton_ir` reads it. Leaves: the effects of its kernel, in terms of the kernel's arguments.
Invariant: doubt counts as an access. An operation not known here that takes an address reads and writes through it.

Origins flow through arithmetic, selects, loops, branches and calls, to a fixed point; then every operation that touches
memory is asked for the origins of its address. 64-bit integers have origins as well, for they can be made addresses.

Note "where cf branches lead": the IR's bindings do not tell. All that a function's branches pass on reaches every
argument of the same type in that function's later blocks, which is never less than what happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from .triton_ir import Block, Function, Module, Operation, Region, Value

READS: Final = {"tt.load", "tt.atomic_load", "tt.atomic_poll", "tt.descriptor_load", "tt.descriptor_gather"}
WRITES: Final = {"tt.store", "tt.atomic_store", "tt.descriptor_store", "tt.descriptor_scatter"}
BOTH: Final = {"tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_reduce"}
ACCESSES: Final = READS | WRITES | BOTH  # what they access is their first operand

# An address in the first operand; numbers in the others.
DISPLACED: Final = {"tt.addptr", "tt.advance", "tt.make_tensor_ptr", "tt.make_tensor_descriptor"}
# Code that is not MLIR: may take an integer for an address, unless it is declared pure.
OPAQUE: Final = {"tt.elementwise_inline_asm", "tt.extern_elementwise"}
# Whatever comes in may come out, and memory is left alone.
CARRIES: Final = {
    "tt.int_to_ptr", "tt.ptr_to_int", "tt.bitcast", "tt.splat", "tt.unsplat", "tt.broadcast", "tt.expand_dims",
    "tt.reshape", "tt.trans", "tt.cat", "tt.join", "tt.split", "tt.gather", "tt.reduce", "tt.reduce.return", "tt.scan",
    "tt.scan.return", "tt.map_elementwise", "tt.map_elementwise.return", "tt.return", "tt.print", "tt.assert",
}  # fmt: skip
CARRYING_DIALECTS: Final = ("arith.", "math.", "scf.", "cf.", "ub.")
KNOWN: Final = ACCESSES | DISPLACED | CARRIES | {"tt.call"}


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a value may come from: a function's argument, or memory read through it (`loaded`).

    `address`: it is known to be one. A 64-bit number that is not may still be made one.
    """

    argument: int
    loaded: bool = False
    address: bool = True


@dataclass(frozen=True, slots=True)
class Effect:
    """An access through an argument, or through a pointer `loaded` from there; None: through no argument at all."""

    argument: int | None
    loaded: bool
    reads: bool
    writes: bool
    why: str = ""  # it was assumed; empty: the operation says so itself

    def text(self, names: Sequence[str]) -> str:
        """What is assumed here; empty where nothing is."""
        does = " and ".join(["read"] * self.reads + ["written"] * self.writes)
        why = f": {self.why}" if self.why else ""
        if self.argument is None:
            return f"memory is {does} at an address that comes from no parameter{why}"
        if self.loaded:
            return f"{names[self.argument]}: memory is {does} through a pointer read from memory there{why}"
        return f"{names[self.argument]}: taken as {does}{why}" if self.why else ""


@dataclass(frozen=True, slots=True)
class _Summary:
    """What a call does, in terms of the function's arguments."""

    effects: frozenset[Effect]
    results: tuple[frozenset[_Origin], ...]


def effects_of(module: Module) -> frozenset[Effect]:
    """What the module's kernel does to memory."""
    summary = _Summaries(module).of(module.kernel)
    assert summary is not None, module.kernel
    return summary.effects


class _Summaries:
    """One summary per function, made when it is first called."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._made: dict[str, _Summary | None] = {}

    def of(self, name: str | None) -> _Summary | None:
        """None for a function with no body here, and for one that is being summarised: it calls itself."""
        function = self._module.functions.get(name or "")
        if function is None or not function.body:
            return None
        if function.name not in self._made:
            self._made[function.name] = None
            self._made[function.name] = _Flow(function, self).summary()
        return self._made[function.name]


class _Flow:
    """The dataflow of one function. Origins only ever grow, so that it comes to an end."""

    def __init__(self, function: Function, summaries: _Summaries) -> None:
        self._function = function
        self._summaries = summaries
        self._origins: dict[Value, frozenset[_Origin]] = {}
        self._grown = True

    def summary(self) -> _Summary:
        body = self._function.body
        for i, argument in enumerate(body[0].arguments):
            self._reach(argument, {_Origin(i, address=is_address(argument))})
        while self._grown:
            self._grown = False
            self._region(body)
        returns = [block.terminator.operands for block in body if block.terminator.name == "tt.return"]
        effects = frozenset(effect for operation in _of_region(body) for effect in self._effects(operation))
        return _Summary(effects, tuple(self._all(values) for values in zip(*returns, strict=True)))

    # Origins of values.

    def _all(self, values: Iterable[Value]) -> frozenset[_Origin]:
        return frozenset().union(*(self._origins.get(value, ()) for value in values))

    def _addresses(self, values: Iterable[Value]) -> frozenset[_Origin]:
        return frozenset(origin for origin in self._all(values) if origin.address)

    def _taken(self, value: Value) -> frozenset[_Origin]:
        """Origins of a value taken for an address."""
        return frozenset(replace(origin, address=True) for origin in self._all([value]))

    def _reach(self, value: Value, origins: Iterable[_Origin]) -> None:
        known = self._origins.get(value, frozenset())
        grown = known.union(origins) if _holds_addresses(value) else known
        if grown != known:
            self._origins[value] = grown
            self._grown = True

    def _bind(self, targets: Sequence[Value], values: Sequence[Value]) -> None:
        for target, value in zip(targets, values, strict=True):
            self._reach(target, self._all([value]))

    # From operands to results.

    def _region(self, region: Region) -> None:
        for block in region:
            for operation in block.operations:
                self._flow(operation)
        if len(region) > 1:  # see the note "where cf branches lead"
            passed = [v for block in region if block.terminator.name != "tt.return" for v in block.terminator.operands]
            for argument in [argument for block in region[1:] for argument in block.arguments]:
                self._reach(argument, self._all(value for value in passed if value.type == argument.type))

    def _flow(self, operation: Operation) -> None:
        operands, results = operation.operands, operation.results
        match operation.name:
            case "scf.for":
                (block,), initial = operation.regions[0], operands[3:]
                self._bind(block.arguments[1:], initial)
                self._region(operation.regions[0])
                self._bind(block.arguments[1:], block.terminator.operands)
                self._bind(results, initial)
                self._bind(results, block.terminator.operands)
            case "scf.while":
                (before,), (after,) = operation.regions
                self._bind(before.arguments, operands)
                self._region((before,))
                self._bind(after.arguments, before.terminator.operands[1:])
                self._region((after,))
                self._bind(before.arguments, after.terminator.operands)
                self._bind(results, before.terminator.operands[1:])
            case "scf.if":
                for block in _blocks(operation):
                    self._region((block,))
                    self._bind(results, block.terminator.operands)
            case "tt.call":
                for result, origins in zip(results, self._returned(operation), strict=False):  # none: it never returns
                    self._reach(result, origins)
            case _:
                origins = self._carried(operation)
                for block in _blocks(operation):
                    for argument in block.arguments:
                        self._reach(argument, origins)
                for region in operation.regions:
                    self._region(region)
                origins |= self._all(value for block in _blocks(operation) for value in block.terminator.operands)
                for result in results:
                    self._reach(result, origins | self._loaded(operation, result))

    def _carried(self, operation: Operation) -> frozenset[_Origin]:
        """What an operation with no flow of its own hands on."""
        first, others = operation.operands[:1], operation.operands[1:]
        if operation.name in DISPLACED:
            return self._taken(first[0]) | self._addresses(others)
        if operation.name == "tt.int_to_ptr":
            return self._taken(first[0])
        if operation.name.startswith("arith.") and operation.name != "arith.select":
            return self._addresses(operation.operands) or self._all(operation.operands)  # a number displaces an address
        return self._all(others if operation.name in ACCESSES else operation.operands)

    def _loaded(self, operation: Operation, result: Value) -> frozenset[_Origin]:
        """What an operation brings from memory."""
        if operation.name in ACCESSES:
            origins = self._taken(operation.operands[0])
        elif _is_known(operation):
            return frozenset()
        else:
            origins = self._all(operation.operands)
        return frozenset(_Origin(origin.argument, True, is_address(result)) for origin in origins)

    def _returned(self, call: Operation) -> list[frozenset[_Origin]]:
        summary = self._summaries.of(call.callee)
        if summary is None:
            origins = self._all(call.operands)
            return [origins | {replace(origin, loaded=True) for origin in origins}] * len(call.results)
        return [
            frozenset(
                _Origin(mine.argument, True, theirs.address)
                if theirs.loaded
                else replace(mine, address=mine.address or theirs.address)
                for theirs in origins
                for mine in self._all([call.operands[theirs.argument]])
            )
            for origins in summary.results
        ]

    # From operations to memory.

    def _effects(self, operation: Operation) -> Iterator[Effect]:
        name, operands = operation.name, operation.operands
        if name in ACCESSES:
            yield from self._accesses(operands[0], name not in WRITES, name not in READS)
            if name not in READS:
                for origin in self._addresses(operands[1:]):
                    yield Effect(origin.argument, origin.loaded, True, True, f"{name} puts its address into memory")
        elif name == "tt.call":
            yield from self._called(operation)
        elif not _is_known(operation):
            why = f"{name} takes it, and what that does is not known"
            numbers = name in OPAQUE and not operation.pure
            for value in operands:
                for origin in self._taken(value) if numbers else self._addresses([value]):
                    yield Effect(origin.argument, origin.loaded, True, True, why)

    def _accesses(self, address: Value, reads: bool, writes: bool, why: str = "") -> Iterator[Effect]:
        origins = self._taken(address)
        for origin in origins:
            yield Effect(origin.argument, origin.loaded, reads, writes, why)
        if not origins:
            yield Effect(None, False, reads, writes, why)

    def _called(self, call: Operation) -> Iterator[Effect]:
        summary = self._summaries.of(call.callee)
        if summary is None:
            why = f"a call of {call.callee} takes it, and what that does is not known"
            for value in call.operands:
                for origin in self._taken(value):
                    yield Effect(origin.argument, origin.loaded, True, True, why)
            return
        for effect in summary.effects:
            if effect.argument is None:
                yield effect
                continue
            for mine in self._accesses(call.operands[effect.argument], effect.reads, effect.writes, effect.why):
                yield replace(mine, loaded=mine.loaded or (effect.loaded and mine.argument is not None))


def is_address(value: Value) -> bool:
    return "!tt.ptr" in value.type or "!tt.tensordesc" in value.type


def _holds_addresses(value: Value) -> bool:
    return is_address(value) or value.type in ("i64", "index") or "xi64" in value.type


def _is_known(operation: Operation) -> bool:
    return operation.name in KNOWN or operation.name.startswith(CARRYING_DIALECTS)


def _blocks(operation: Operation) -> Iterator[Block]:
    for region in operation.regions:
        yield from region


def _of_region(region: Region) -> Iterator[Operation]:
    for block in region:
        for operation in block.operations:
            yield operation
            for inner in operation.regions:
                yield from _of_region(inner)


def operations_of(module: Module) -> Iterator[Operation]:
    for function in module.functions.values():
        yield from _of_region(function.body)
