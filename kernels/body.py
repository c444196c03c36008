"""Scalar arithmetic as MLIR text: the body of one `linalg.generic`.

Enters: typed scalars and Python numbers. Leaves: `arith` and `math` ops, one per line, and the scalar each defines. A
number takes the type of the scalar it meets. Invariant: scalars are never converted silently; a method that mixes their
types is refused by MLIR's verifier.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal

import torch

MLIR_TYPE: Final = {
    torch.bool: "i1",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
}
"""The dtypes fused kernels know; a value of any other makes its op opaque."""

Compare = Literal["eq", "ne", "lt", "le", "gt", "ge"]
Number = bool | int | float
_WIDTH: Final = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32}


@dataclass(frozen=True, slots=True)
class Scalar:
    """An SSA value of a scalar type."""

    name: str
    type: str

    @property
    def floating(self) -> bool:
        return "f" in self.type

    @property
    def bits(self) -> int:
        return _WIDTH[self.type]


Term = Scalar | Number


class Body:
    """Writes the ops of one body, in order."""

    def __init__(self, prefix: str = "%s") -> None:
        self.lines: list[str] = []
        self._prefix = prefix

    def emit(self, text: str, type: str) -> Scalar:
        """One op; `text` is everything right of the equals sign."""
        name = f"{self._prefix}{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return Scalar(name, type)

    def constant(self, value: Number, type: str) -> Scalar:
        """A literal. Floats are rounded to `type`; infinities and NaN go through their bits."""
        if type == "i1":
            return self.emit(f"arith.constant {'true' if value else 'false'}", type)
        if type.startswith("i"):
            return self.emit(f"arith.constant {int(value)} : {type}", type)
        if type != "f32":
            return self.convert(self.constant(value, "f32"), type)
        (bits,) = struct.unpack("<I", struct.pack("<f", to_float32(value)))
        return self.emit(f"arith.constant 0x{bits:08X} : f32", type)

    def of(self, x: Term, type: str) -> Scalar:
        """A term as a scalar: a number becomes a constant of `type`."""
        return x if isinstance(x, Scalar) else self.constant(x, type)

    def binary(self, op: str, x: Term, y: Term) -> Scalar:
        """`op` names an `arith` or `math` op of two operands of one type: "arith.addf"."""
        a, b = self._pair(x, y)
        return self.emit(f"{op} {a.name}, {b.name} : {a.type}", a.type)

    def unary(self, op: str, x: Scalar) -> Scalar:
        return self.emit(f"{op} {x.name} : {x.type}", x.type)

    def math(self, name: str, x: Scalar) -> Scalar:
        """A function of the `math` dialect: "exp"."""
        return self.unary(f"math.{name}", x)

    def add(self, x: Term, y: Term) -> Scalar:
        return self._arithmetic("add", x, y)

    def sub(self, x: Term, y: Term) -> Scalar:
        return self._arithmetic("sub", x, y)

    def mul(self, x: Term, y: Term) -> Scalar:
        return self._arithmetic("mul", x, y)

    def div(self, x: Term, y: Term) -> Scalar:
        """True division of floats, correctly rounded."""
        return self.binary("arith.divf", x, y)

    def share(self, part: Scalar, total: Scalar) -> Scalar:
        """part / total, where part is from 0 to 1 and total, a row's, from 1 on: what a kernel may make use of."""
        return self.emit(f"arith.divf {part.name}, {total.name} fastmath<arcp> : {part.type}", part.type)

    def fma(self, x: Term, y: Term, z: Scalar) -> Scalar:
        """x * y + z of floats, rounded once."""
        a, b = self.of(x, z.type), self.of(y, z.type)
        return self.emit(f"math.fma {a.name}, {b.name}, {z.name} : {z.type}", z.type)

    def neg(self, x: Scalar) -> Scalar:
        return self.unary("arith.negf", x) if x.floating else self.sub(0, x)

    def both(self, x: Scalar, y: Scalar) -> Scalar:
        """Bitwise and; of truths, the logical one."""
        return self.binary("arith.andi", x, y)

    def either(self, x: Scalar, y: Scalar) -> Scalar:
        return self.binary("arith.ori", x, y)

    def differ(self, x: Scalar, y: Term) -> Scalar:
        """Bitwise exclusive or."""
        return self.binary("arith.xori", x, y)

    def maximum(self, x: Term, y: Term) -> Scalar:
        """NaN if either is, as in torch."""
        return self._extreme("max", "ori", x, y)

    def minimum(self, x: Term, y: Term) -> Scalar:
        return self._extreme("min", "andi", x, y)

    def compare(self, kind: Compare, x: Term, y: Term) -> Scalar:
        """Ordered on floats, so that NaN compares false; `ne` is unordered, so that it compares true."""
        a, b = self._pair(x, y)
        if a.floating:
            predicate = "une" if kind == "ne" else f"o{kind}"
            return self.emit(f"arith.cmpf {predicate}, {a.name}, {b.name} : {a.type}", "i1")
        sign = "" if kind in ("eq", "ne") else ("u" if a.type == "i1" else "s")
        return self.emit(f"arith.cmpi {sign}{kind}, {a.name}, {b.name} : {a.type}", "i1")

    def is_nan(self, x: Scalar) -> Scalar:
        return self.compare("ne", x, x)

    def select(self, condition: Scalar, x: Term, y: Term) -> Scalar:
        a, b = self._pair(x, y)
        return self.emit(f"arith.select {condition.name}, {a.name}, {b.name} : {a.type}", a.type)

    def convert(self, x: Scalar, type: str) -> Scalar:
        """A cast as torch makes it: floats round to nearest even, floats truncate to integers, bool is `!= 0`."""
        if x.type == type:
            return x
        if type == "i1":
            return self.compare("ne", self.convert(x, "f32") if x.floating else x, 0)
        if x.floating and type.startswith("i"):
            return self._cast("arith.fptosi", self.convert(x, "f32"), type)
        if type.startswith("i"):
            if _WIDTH[type] < x.bits:
                return self._cast("arith.trunci", x, type)
            return self._cast("arith.extui" if x.type == "i1" else "arith.extsi", x, type)
        if not x.floating:
            wide = self._cast("arith.uitofp" if x.type == "i1" else "arith.sitofp", x, "f32")
            return self.convert(wide, type)
        if _WIDTH[type] > x.bits:
            return self._cast("arith.extf", x, type)
        if _WIDTH[type] == x.bits:  # f16 to bf16 or back
            return self.convert(self.convert(x, "f32"), type)
        return self._cast("arith.truncf", x, type)

    def _cast(self, op: str, x: Scalar, type: str) -> Scalar:
        return self.emit(f"{op} {x.name} : {x.type} to {type}", type)

    def _pair(self, x: Term, y: Term) -> tuple[Scalar, Scalar]:
        type = x.type if isinstance(x, Scalar) else y.type if isinstance(y, Scalar) else None
        assert type is not None, f"two numbers meet: {x}, {y}"
        return self.of(x, type), self.of(y, type)

    def _arithmetic(self, name: str, x: Term, y: Term) -> Scalar:
        a, b = self._pair(x, y)
        return self.binary(f"arith.{name}{'f' if a.floating else 'i'}", a, b)

    def _extreme(self, name: str, of_truths: str, x: Term, y: Term) -> Scalar:
        a, b = self._pair(x, y)
        if a.type == "i1":
            return self.binary(f"arith.{of_truths}", a, b)
        return self.binary(f"arith.{name}imumf" if a.floating else f"arith.{name}si", a, b)


def to_float32(value: Number) -> float:
    """The nearest float32; beyond its range, infinity."""
    return float(torch.tensor(float(value), dtype=torch.float64).to(torch.float32))
