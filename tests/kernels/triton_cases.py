"""Triton kernels that reach memory in every way there is, each with what it reads and writes, known from its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Case:
    """A kernel, how it is compiled, and what is true of it.

    `touched`: per pointer parameter "r", "w", "rw" or "", in the order of the parameters (names are for the reader:
    Triton renames a parameter that is given to a variable). `assumed`: a part of each thing that must be assumed, and
    nothing else may be. `positions`: of these parameters; one after the other if not given.
    """

    kernel: Any
    signature: Mapping[str, Any]
    touched: Mapping[str, str]
    assumed: tuple[str, ...] = ()
    positions: tuple[int, ...] | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    arch: int = 90


CASES: dict[str, Case] = {}


def case(signature: str, touched: Mapping[str, str], *assumed: str, **more: Any) -> Callable[[Any], Any]:
    """Register a kernel whose parameters have the types of `signature`, in order; `-` is a constant."""

    def register(kernel: Any) -> Any:
        types = zip(kernel.arg_names, signature.split(), strict=True)
        chosen = {name: type_of(kind) for name, kind in types if kind != "-"}
        CASES[kernel.fn.__name__] = Case(kernel, chosen, touched, assumed, **more)
        return kernel

    return register


def type_of(kind: str) -> Any:
    """A type as Triton's signatures have it; `(a;b)` is a tuple."""
    return tuple(kind[1:-1].split(";")) if kind.startswith("(") else kind


# --- straight lines ---------------------------------------------------------------------------------------------------


@case("*fp32 *fp32 *fp32 i32", {"x": "r", "y": "r", "out": "w"})
@triton.jit
def elementwise(x, y, out, n):
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)


@case("*fp32 i32", {"x": "rw"})
@triton.jit
def in_place(x, n):
    at = tl.arange(0, 64)
    tl.store(x + at, tl.load(x + at) * n)


@case("*fp32 *fp32 *fp32", {"x": "r", "unused": "", "out": "w"})
@triton.jit
def unused_pointer(x, unused, out):
    tl.store(out, tl.load(x))


@case("*fp32 - i32 i32 *fp32", {"x": "r", "out": "w"}, positions=(0, 2), constants={"BLOCK": 64, "one": 1})
@triton.jit
def constants_between(x, BLOCK: tl.constexpr, one, n, out):
    at = tl.arange(0, BLOCK) * one
    tl.store(out + at, tl.load(x + at) + n)


@case("(*fp32;*fp32;i32) *fp32", {"ptrs.0": "r", "ptrs.1": "w", "out": "w"}, positions=(0, 1, 3))
@triton.jit
def pointers_in_a_tuple(ptrs, out):
    value = tl.load(ptrs[0] + ptrs[2])
    tl.store(ptrs[1], value)
    tl.store(out, value)


@case("*fp32 *fp32 i32", {"x": "r", "out": "w"})
@triton.jit
def shapes(x, out, n):
    row, col = tl.arange(0, 16), tl.arange(0, 32)
    there = tl.trans(x + row[:, None] * n + col[None, :])
    tl.store(tl.reshape(out + tl.arange(0, 512), (32, 16)), tl.load(there))


@case("*fp32 *i64 *fp32", {"table": "r", "index": "r", "out": "w"})
@triton.jit
def gathered(table, index, out):
    at = tl.arange(0, 64)
    tl.store(out + at, tl.load(table + tl.load(index + at) * 3))


@case("*i64 *i64 *i64", {"x": "r", "total": "w", "running": "w"})
@triton.jit
def reduced(x, total, running):
    at = tl.arange(0, 64)
    value = tl.load(x + at)
    tl.store(total, tl.sum(value))
    tl.store(running + at, tl.cumsum(value))


@case("*fp32 *fp32 i32", {"x": "r", "out": "w"})
@triton.jit(debug=True)
def printed_and_asserted(x, out, n):
    tl.device_assert(n < 7, "n")
    tl.device_print("x", x)
    tl.store(out, tl.load(x))


# --- loops, branches, choices -----------------------------------------------------------------------------------------


@case("*fp32 *fp32 i32", {"x": "r", "out": "w"})
@triton.jit
def walking_loop(x, out, n):
    source, target = x + tl.arange(0, 64), out + tl.arange(0, 64)
    for _ in range(n):
        tl.store(target, tl.load(source))
        source += 64
        target += 64


@case("*fp32 *fp32 *fp32 i32", {"a": "r", "b": "rw", "c": "rw"})
@triton.jit
def rotating_loop(a, b, c, n):
    """The first turn reads a and writes b; the second reads b and writes c; then c is read and b is written."""
    source, target, spare = a, b, c
    for _ in range(n):
        tl.store(target, tl.load(source) + 1)
        source, target, spare = target, spare, target


@case("*fp32 *fp32 *fp32 i32", {"x": "r", "a": "w", "b": "w"})
@triton.jit
def written_behind_a_loop(x, a, b, n):
    target = a
    for i in range(n):
        if tl.load(x + i) > 0:
            target = b + i
    tl.store(target, 1.0)


@case("*fp32 *fp32 *fp32 i32", {"a": "r", "b": "r", "out": "w"})
@triton.jit
def while_loop(a, b, out, n):
    source, total = a, 0.0
    while n > 0:
        total += tl.load(source)
        source = b + n
        n -= 1
    tl.store(out, total)


@case("*fp32 *fp32 i32", {"x": "r", "out": "w"})
@triton.jit
def stored_on_condition(x, out, n):
    if n > 3:
        tl.store(out, tl.load(x))


@case("*fp32 *fp32 *fp32 i32", {"x": "r", "a": "w", "b": "w"})
@triton.jit
def selected(x, a, b, n):
    tl.store(tl.where(n > 3, a, b), tl.load(x))


@case("*fp32 *fp32 *fp32 i32", {"x": "r", "a": "w", "b": "w"})
@triton.jit
def selected_by_element(x, a, b, n):
    at = tl.arange(0, 64)
    tl.store(tl.where(at > n, a + at, b + at), tl.load(x + at))


@case("*fp32 *fp32 *fp32 i32", {"x": "r", "a": "rw", "b": "w"})
@triton.jit
def chosen_by_branch(x, a, b, n):
    if n > 3:  # noqa: SIM108
        target = a + tl.load(a).to(tl.int32)
    else:
        target = b
    tl.store(target, tl.load(x))


@case("*fp32 *fp32 *fp32 i32", {"x": "r", "a": "w", "b": "w"})
@triton.jit
def returning_early(x, a, b, n):
    target = a + n
    if n > 3:
        target = b
        if n > 7:
            return
        target += 1
    tl.store(target, tl.load(x))


# --- calls ------------------------------------------------------------------------------------------------------------


@triton.jit(noinline=True)
def copies(source, target):
    tl.store(target, tl.load(source))
    return source


@triton.jit(noinline=True)
def copies_twice(source, target, n):
    tl.store(copies(source, target + n) + n, 2.0)


@case("*fp32 *fp32 *fp32", {"x": "r", "out": "w", "other": "w"})
@triton.jit
def calling(x, out, other):
    copies(x, out)
    copies(x, other)


@case("*fp32 *fp32 *fp32 i32", {"x": "rw", "out": "w", "unused": ""})
@triton.jit
def calling_deep(x, out, unused, n):
    copies_twice(x, out, n)


@triton.jit(noinline=True)
def reads_at(address):
    return tl.load(address.to(tl.pointer_type(tl.int64)))


@case("*fp32 i64 *i64", {"x": "r", "address": "r", "out": "w"}, "address: an integer", positions=(0, 1, 2))
@triton.jit
def calling_with_integers(x, address, out):
    tl.store(out, reads_at(x.to(tl.int64)) + reads_at(address))


# --- atomics ----------------------------------------------------------------------------------------------------------


@case("*i32 *fp32 *i32 *i32 i32", {"a": "rw", "b": "rw", "c": "rw", "out": "w"})
@triton.jit
def atomics(a, b, c, out, n):
    tl.atomic_add(b + tl.arange(0, 64), 1.0)
    tl.store(out, tl.atomic_cas(a + n, 0, 1) + tl.atomic_xchg(c, 1))


if VERSION >= (3, 9):

    @case("*i32 *i32 *i32 *i32", {"a": "r", "b": "w", "c": "r", "out": "w"})
    @triton.jit
    def atomic_loads_and_stores(a, b, c, out):
        tl.atomic_poll(c, 1)
        tl.atomic_store(b, 1)
        tl.store(out, tl.atomic_load(a))


# --- integers and tables of pointers ----------------------------------------------------------------------------------


@case("*fp32 *fp32 i64", {"x": "r", "out": "w"})
@triton.jit
def through_integers(x, out, n):
    number = x.to(tl.int64) + n * 4
    tl.store(out, tl.load(number.to(tl.pointer_type(tl.float32))))


@case("i64 *fp32 i64", {"address": "r", "out": "w"}, "address: an integer, taken for an address", positions=(0, 1))
@triton.jit
def integer_parameter(address, out, n):
    tl.store(out, tl.load(address.to(tl.pointer_type(tl.float32)) + n))


@case(
    "*fp32 i64 i64 *fp32",
    {"x": "r", "address": "r", "out": "w"},
    "an integer, taken for an address",
    positions=(0, 1, 3),
)
@triton.jit
def integer_or_pointer(x, address, n, out):
    number = x.to(tl.int64)
    if n > 3:
        number = address
    tl.store(out, tl.load(number.to(tl.pointer_type(tl.float32))))


@case("*i64 *fp32 i32", {"table": "r", "out": "w"}, "table: memory is read through a pointer read from memory")
@triton.jit
def table_read(table, out, n):
    source = tl.load(table + n).to(tl.pointer_type(tl.float32))
    tl.store(out, tl.load(source))


@case("*i64 *fp32 i32", {"table": "r", "x": "r"}, "table: memory is written through a pointer read from memory")
@triton.jit
def table_written(table, x, n):
    target = tl.load(table + n).to(tl.pointer_type(tl.float32))
    tl.store(target, tl.load(x))


@case("*fp32 *i64", {"x": "rw", "out": "w"}, "x: taken as read and written: tt.store puts its address into memory")
@triton.jit
def address_stored(x, out):
    tl.store(out, x.to(tl.int64))


@case("*fp32", {"out": "w"}, "memory is read at an address that comes from no parameter")
@triton.jit
def fixed_address(out):
    tl.store(out, tl.load(tl.cast(4096, tl.int64).to(tl.pointer_type(tl.float32))))


# --- code that is not MLIR --------------------------------------------------------------------------------------------


@case("*fp32 *fp32", {"x": "rw", "out": "w"}, "x: taken as read and written: tt.elementwise_inline_asm takes it")
@triton.jit
def assembly(x, out):
    value = tl.inline_asm_elementwise("ld.global.b32 $0, [$1];", "=r,l", [x], dtype=tl.float32, is_pure=False, pack=1)
    tl.store(out, value)


@case("i64 *fp32", {"address": "rw", "out": "w"}, "address: taken as read and written", "address: an integer")
@triton.jit
def assembly_with_an_integer(address, out):
    value = tl.inline_asm_elementwise(
        "ld.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.float32, is_pure=False, pack=1
    )
    tl.store(out, value)


@case("*i64 *i64", {"x": "r", "out": "w"})
@triton.jit
def pure_assembly_on_values(x, out):
    value = tl.load(x)
    tl.store(out, tl.inline_asm_elementwise("not.b64 $0, $1;", "=l,l", [value], dtype=tl.int64, is_pure=True, pack=1))


# --- descriptors and block pointers -----------------------------------------------------------------------------------


@case(
    "*fp32 *fp32 i32", {"x": "r", "out": "w", "global scratch": "rw"}, "global scratch: the launcher's",
    positions=(0, 1, 3),
)  # fmt: skip
@triton.jit
def descriptors(x, out, n):
    source = tl.make_tensor_descriptor(x, [n, n], [n, 1], [16, 16])
    target = tl.make_tensor_descriptor(out, [n, n], [n, 1], [16, 16])
    for i in range(0, n, 16):
        target.store([i, 16], source.load([16, i]))


@case("*fp32 *fp32 i32", {"x": "r", "out": "w"}, arch=80)
@triton.jit
def descriptors_without_tma(x, out, n):
    source = tl.make_tensor_descriptor(x, [n, n], [n, 1], [16, 16])
    target = tl.make_tensor_descriptor(out, [n, n], [n, 1], [16, 16])
    target.store([0, 16], source.load([16, 0]))


@case("*fp32 *fp32 i32", {"x": "r", "out": "rw", "global scratch": "rw"}, "global scratch", positions=(0, 1, 3))
@triton.jit
def descriptor_reduced(x, out, n):
    at = tl.arange(0, 16)
    target = tl.make_tensor_descriptor(out, [n, n], [n, 1], [16, 16])
    target.atomic_add([0, 16], tl.load(x + at[:, None] + at[None, :]))


@case(
    "*fp32 *fp32 *i32 i32", {"x": "r", "out": "w", "index": "r", "global scratch": "rw"}, "global scratch",
    positions=(0, 1, 2, 4), arch=100,
)  # fmt: skip
@triton.jit
def descriptor_gathered(x, out, index, n):
    rows = tl.load(index + tl.arange(0, 32))
    source = tl.make_tensor_descriptor(x, [n, n], [n, 1], [1, 16])
    target = tl.make_tensor_descriptor(out, [n, n], [n, 1], [1, 16])
    target.scatter(source.gather(rows, 0), rows, 0)


@case(
    "tensordesc<fp32[16,16]> tensordesc<fp32[16,16]> *fp32", {"source": "r", "target": "w", "out": "w"},
    "source: its bytes are those of a tensor descriptor", "target: its bytes are those of a tensor descriptor",
    positions=(0, 5, 10),
)  # fmt: skip
@triton.jit
def descriptors_from_the_host(source, target, out):
    target.store([0, 16], source.load([16, 0]))
    tl.store(out, 1.0)


if VERSION < (3, 8):  # later ones have no block pointers

    @case("*fp32 *fp32 i32", {"x": "r", "out": "w"})
    @triton.jit
    def block_pointers(x, out, n):
        source = tl.make_block_ptr(x, (n, n), (n, 1), (0, 0), (16, 16), (1, 0))
        target = tl.make_block_ptr(out, (n, n), (n, 1), (0, 0), (16, 16), (1, 0))
        for _ in range(n):
            tl.store(target, tl.load(source, boundary_check=(0, 1)))
            source = tl.advance(source, (0, 16))
