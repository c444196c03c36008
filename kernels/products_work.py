"""What products of few rows are, apart from how they are launched.

Enters: rows of activations, one to four weights that share them, biases, an activation. Leaves: `Work`, checked; the
same by torch. Invariant: `reference` is eager's own ops, so what it rounds is what eager rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

MOST_ROWS: Final = 32
MOST_WEIGHTS: Final = 4
MOST_SUMMED: Final = 16384
ACTIVATIONS: Final = ("silu", "gelu_tanh")
_TYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program works on at a time: rows of a weight and columns of them, by how many warps.

    For one row of activations, `ahead` says to ask for all weights before any is used. For several, `stages` is how far
    ahead columns are asked for, and `splits` how many programs share what is summed.
    """

    rows: int
    cols: int
    warps: int
    stages: int = 1
    splits: int = 1
    ahead: bool = False

    def __str__(self) -> str:
        how = f", {self.stages} stages" * (self.stages > 1) + f", {self.splits} splits" * (self.splits > 1)
        return f"{self.rows} x {self.cols}, {self.warps} warps{how}{', ahead' * self.ahead}"


@dataclass(frozen=True, slots=True)
class Work:
    """One call."""

    x: Tensor
    """[T, K], columns side by side"""
    weights: tuple[Tensor, ...]
    """Each [N, K], columns side by side"""
    biases: tuple[Tensor, ...] = ()
    """None, or one [N] per weight, contiguous"""
    activation: str | None = None
    """Of a gate and an up projection of one row: act(gate) * up is what leaves. "silu" or "gelu_tanh"."""

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def summed(self) -> int:
        return self.x.shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what leaves."""
        widths = tuple(weight.shape[0] for weight in self.weights)
        return widths[:1] if self.activation is not None else widths

    def outputs(self) -> list[Tensor]:
        return [self.x.new_empty(self.rows, width) for width in self.widths]


def row_class(rows: int) -> int:
    """The largest number of rows that runs what this one runs."""
    return 1 if rows == 1 else 16 if rows <= 16 else 32


def refusal(work: Work) -> str:
    """Why no kernel does this; empty if one does."""
    x, tensors = work.x, (work.x, *work.weights, *work.biases)
    if x.dtype not in _TYPES or any(t.dtype is not x.dtype or t.device != x.device for t in tensors):
        return f"types {', '.join(sorted({str(t.dtype) for t in tensors}))}: one float type on one device is needed"
    if not 1 <= len(work.weights) <= MOST_WEIGHTS or len(work.biases) not in (0, len(work.weights)):
        return f"{len(work.weights)} weights and {len(work.biases)} biases: 1 to {MOST_WEIGHTS}, all biased or none"
    if work.rows > MOST_ROWS or not 1 <= work.summed <= MOST_SUMMED:
        return f"{work.rows} rows of {work.summed}: at most {MOST_ROWS} of at most {MOST_SUMMED}"
    for weight in work.weights:
        if weight.dim() != 2 or not weight.shape[0] or weight.shape[1] != work.summed or weight.stride(1) != 1:
            return f"a weight {tuple(weight.shape)}, strides {weight.stride()}: [N, {work.summed}] in rows is needed"
    for bias, weight in zip(work.biases, work.weights, strict=False):
        if bias.shape != weight.shape[:1] or bias.stride(0) != 1:
            return f"a bias {tuple(bias.shape)}, strides {bias.stride()}: [{weight.shape[0]}], contiguous"
    if work.activation is not None:
        if work.activation not in ACTIVATIONS:
            return f"activation {work.activation!r}: {' or '.join(ACTIVATIONS)}"
        if work.rows > 1:
            return f"{work.rows} rows with an activation: at most one"
        if len(work.weights) != 2 or work.weights[0].shape != work.weights[1].shape:
            return f"{len(work.weights)} weights with an activation: a gate and an up projection of one shape"
    return ""


def reference(work: Work) -> list[Tensor]:
    """By torch's own ops."""
    biases = work.biases or [None] * len(work.weights)
    found = [functional.linear(work.x, *pair) for pair in zip(work.weights, biases, strict=True)]
    if work.activation is None:
        return found
    gate, up = found
    acted = functional.silu(gate) if work.activation == "silu" else functional.gelu(gate, approximate="tanh")
    return [acted * up]
