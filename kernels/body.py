"""Scalar arithmetic as MLIR text: the body of one `linalg.generic`.

Enters: typed scalars and Python constants. Leaves: `arith` and `math` ops, one per line, and the scalar each defines.
Invariant: nothing is converted silently; a method that mixes types is refused by MLIR's verifier.
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
_WIDTH: Final = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32}


@dataclass(frozen=True, slots=True)
class Scalar:
    """An SSA value of a scalar type."""

    name: str
    type: str

    @property
    def floating(self) -> bool:
        return "f" in self.type


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

    def constant(self, value: float | int | bool, type: str) -> Scalar:
        """A literal. Floats are rounded to `type`; infinities and NaN go through their bits."""
        if type == "i1":
            return self.emit(f"arith.constant {'true' if value else 'false'}", type)
        if type.startswith("i"):
            return self.emit(f"arith.constant {int(value)} : {type}", type)
        if type != "f32":
            return self.convert(self.constant(value, "f32"), type)
        (bits,) = struct.unpack("<I", struct.pack("<f", _to_float32(float(value))))
        return self.emit(f"arith.constant 0x{bits:08X} : f32", type)

    def binary(self, op: str, x: Scalar, y: Scalar) -> Scalar:
        """`op` names an `arith` or `math` op of two operands of one type: "arith.addf"."""
        return self.emit(f"{op} {x.name}, {y.name} : {x.type}", x.type)

    def unary(self, op: str, x: Scalar) -> Scalar:
        return self.emit(f"{op} {x.name} : {x.type}", x.type)

    def add(self, x: Scalar, y: Scalar) -> Scalar:
        return self.binary("arith.addf" if x.floating else "arith.addi", x, y)

    def sub(self, x: Scalar, y: Scalar) -> Scalar:
        return self.binary("arith.subf" if x.floating else "arith.subi", x, y)

    def mul(self, x: Scalar, y: Scalar) -> Scalar:
        return self.binary("arith.mulf" if x.floating else "arith.muli", x, y)

    def div(self, x: Scalar, y: Scalar) -> Scalar:
        """True division of floats, correctly rounded."""
        return self.binary("arith.divf", x, y)

    def neg(self, x: Scalar) -> Scalar:
        return self.unary("arith.negf", x) if x.floating else self.sub(self.constant(0, x.type), x)

    def maximum(self, x: Scalar, y: Scalar) -> Scalar:
        """NaN if either is, as in torch."""
        return self.binary("arith.maximumf" if x.floating else "arith.maxsi", x, y)

    def minimum(self, x: Scalar, y: Scalar) -> Scalar:
        return self.binary("arith.minimumf" if x.floating else "arith.minsi", x, y)

    def compare(self, kind: Compare, x: Scalar, y: Scalar) -> Scalar:
        """Ordered on floats, so that NaN compares false; `ne` is unordered, so that it compares true."""
        if x.floating:
            predicate = "une" if kind == "ne" else f"o{kind}"
            return self.emit(f"arith.cmpf {predicate}, {x.name}, {y.name} : {x.type}", "i1")
        sign = "" if kind in ("eq", "ne") else ("u" if x.type == "i1" else "s")
        return self.emit(f"arith.cmpi {sign}{kind}, {x.name}, {y.name} : {x.type}", "i1")

    def select(self, condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
        return self.emit(f"arith.select {condition.name}, {x.name}, {y.name} : {x.type}", x.type)

    def convert(self, x: Scalar, type: str) -> Scalar:
        """A cast as torch makes it: floats round to nearest even, floats truncate to integers, bool is `!= 0`."""
        if x.type == type:
            return x
        if type == "i1":
            return self.compare("ne", x, self.constant(0, x.type))
        if x.floating and type.startswith("i"):
            return self._cast("arith.fptosi", self.convert(x, "f32"), type)
        if type.startswith("i"):
            if _WIDTH[type] < _WIDTH[x.type]:
                return self._cast("arith.trunci", x, type)
            return self._cast("arith.extui" if x.type == "i1" else "arith.extsi", x, type)
        if not x.floating:
            wide = self._cast("arith.uitofp" if x.type == "i1" else "arith.sitofp", x, "f32")
            return self.convert(wide, type)
        if _WIDTH[type] > _WIDTH[x.type]:
            return self._cast("arith.extf", x, type)
        if _WIDTH[type] == _WIDTH[x.type]:  # f16 to bf16 or back
            return self.convert(self.convert(x, "f32"), type)
        return self._cast("arith.truncf", x, type)

    def _cast(self, op: str, x: Scalar, type: str) -> Scalar:
        return self.emit(f"{op} {x.name} : {x.type} to {type}", type)


def _to_float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))
