"""What a fused kernel is, apart from the memory it is launched on.

Enters: a group's MLIR and how each operand meets it. Leaves: `KernelSpec`, a frozen value that can be hashed, printed
and turned into a `torch.library` op. Invariant: two groups with equal specs are one op and one file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..runtime.errors import InputError
from .geometry import Layout, layout, table_layout

GENERATOR: int = 1
"""Part of every key; to be raised whenever the same MLIR shall give other source."""


@dataclass(frozen=True, slots=True)
class Size:
    """A size that is known only at launch: the op's `sizes[number]`."""

    number: int

    def __str__(self) -> str:
        return f"s{self.number}"


Dim = int | Size
Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """An input: the shape its group uses it in (broadcast), and what its last dimension is."""

    dtype: torch.dtype
    used: Shape
    role: Literal["columns", "rows", "table"]

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}[{', '.join(map(str, self.used))}] as {self.role}"

    def takes(self, tensor: Tensor, sizes: Sequence[int]) -> bool:
        """Whether a tensor can be broadcast to the shape this operand is used in."""
        used, shape = sized(self.used, sizes), tuple(tensor.shape)
        if self.role == "table":
            return shape == used
        wanted = (1,) * (len(shape) - len(used)) + used[max(0, len(used) - len(shape)) :]
        return all(size in (1, want) for size, want in zip(shape, wanted, strict=True))

    def in_rows(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """The tensor as [rows, columns], with 1 for rows or columns it does not vary over."""
        used = sized(self.used, sizes)
        if self.role == "table":
            return tensor
        wide = self._spread(tensor, used)
        return wide.reshape(-1, used[-1] if used and self.role == "columns" else 1)

    def laid_out(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """The tensor broadcast to the shape it is used in, in memory of its own."""
        return self._spread(tensor, sized(self.used, sizes)).contiguous()

    @staticmethod
    def _spread(tensor: Tensor, used: Sequence[int]) -> Tensor:
        surplus = max(0, tensor.dim() - len(used))  # leading dimensions of size 1
        return tensor.reshape(tensor.shape[surplus:]).expand(tuple(used))


@dataclass(frozen=True, slots=True)
class Result:
    """An output: its shape, and its dimensions from the slowest to the fastest in memory."""

    dtype: torch.dtype
    shape: Shape
    order: tuple[int, ...]
    role: Literal["columns", "rows"]

    def __str__(self) -> str:
        order = "" if self.order == tuple(range(len(self.shape))) else f" in order {self.order}"
        return f"{str(self.dtype)[6:]}[{', '.join(map(str, self.shape))}]{order} by {self.role}"

    def allocate(self, like: Tensor, sizes: Sequence[int]) -> Tensor:
        """A new tensor, dense, in this order, on the device of `like`. Also what the fake op returns."""
        shape = sized(self.shape, sizes)
        return like.new_empty_strided(shape, dense_strides(shape, self.order), dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One fused kernel. `mlir` is its function after the passes; `rows` multiply to the number of rows."""

    title: str
    mlir: str
    rows: Shape
    inputs: tuple[Operand, ...]
    outputs: tuple[Result, ...]
    key: str = field(init=False, repr=False, compare=False)
    """A digest of everything the op's behaviour depends on."""

    def __post_init__(self) -> None:
        facts = (GENERATOR, self.mlir, self.rows, self.inputs, self.outputs)
        object.__setattr__(self, "key", hashlib.sha256(repr(facts).encode()).hexdigest())

    def __str__(self) -> str:
        lines = [f"{self.name}: rows {' x '.join(map(str, self.rows)) or '1'}"]
        lines += [f"  in{i}: {operand}" for i, operand in enumerate(self.inputs)]
        lines += [f"  out{i}: {result}" for i, result in enumerate(self.outputs)]
        return "\n".join(lines)

    @property
    def name(self) -> str:
        """The op's name: readable, and unique by content."""
        return f"{self.title}_{self.key[:12]}"

    def row_count(self, sizes: Sequence[int]) -> int:
        return math.prod(sized(self.rows, sizes))

    def layouts(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Layout | None]:
        """How each operand lies in memory; None for one that must be copied first.

        Raises InputError for an input of another shape: a kernel would read memory that is not the tensor's.
        """
        found: list[Layout | None] = []
        for operand, tensor in zip(self.inputs, inputs, strict=True):
            if not operand.takes(tensor, sizes):
                raise InputError(
                    f"fused kernel {self.name} was made for inputs of another shape",
                    expected=f"what broadcasts to {sized(operand.used, sizes)}",
                    came=str(tuple(tensor.shape)),
                    remedy="call the graph with the shapes it was traced with, or trace it again",
                )
            if operand.role == "table":
                found.append(table_layout(tensor.stride() if tensor.dim() == 2 else (tensor.stride(0), 1)))
            else:
                used = sized(operand.used, sizes)
                found.append(layout(tensor.shape, tensor.stride(), used, operand.role == "columns"))
        for result, tensor in zip(self.outputs, outputs, strict=True):
            found.append(layout(tensor.shape, tensor.stride(), tensor.shape, result.role == "columns"))
        return found


def sized(shape: Shape, sizes: Sequence[int]) -> tuple[int, ...]:
    """A shape with its launch-time sizes filled in."""
    return tuple(sizes[dim.number] if isinstance(dim, Size) else dim for dim in shape)


def dense_strides(shape: Sequence[Any], order: Sequence[int]) -> tuple[Any, ...]:
    """Strides of a dense tensor whose dimensions lie in `order`, the slowest first."""
    strides: list[Any] = [1] * len(shape)
    step: Any = 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return tuple(strides)
