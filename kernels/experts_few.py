"""Launches of the experts' kernels for few tokens.

Enters: hidden states, chosen experts and their weights, and tiles. Leaves: the layer's output. Invariant: the grid
depends on shapes alone, so a launch can be captured; workspaces are tensors of this call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import experts_kernels as kernels
from .variants import next_power_of_two


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program works on at a time: rows of a weight and columns of them, by how many warps, how far ahead."""

    rows: int
    cols: int
    warps: int
    stages: int = 0
    evict: bool = True
    ahead: int = 0
    late: int = 396

    def __str__(self) -> str:
        told = f"{self.rows} x {self.cols}, {self.warps} warps"
        told += f", {self.stages} stages" if self.stages else ""
        told += ", evict first" if self.evict else ""
        return told + (f", {self.ahead} x {self.late} ahead" if self.ahead else "")


@dataclass(frozen=True, slots=True)
class Activation:
    """act(min(gate, limit)) * (clamp(up, limit) + shift); without a gate, act of the only product.

    `name`: "silu" (x * sigmoid(alpha * x)), "gelu_tanh", "gelu" or "relu2" (the square of relu).
    """

    name: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def constants(self) -> dict[str, Any]:
        return {
            "ACT": self.name, "GATED": self.gated, "ALPHA": self.alpha, "LIMIT": self.limit, "SHIFT": self.shift,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """One call: what is read, and how it lies."""

    hidden: Tensor
    """[tokens, hidden]"""
    chosen: Tensor
    """[tokens, choices], contiguous"""
    scale: Tensor
    """[tokens, choices], contiguous"""
    up: Tensor
    """[experts, outputs, hidden], as a view: gates and ups, or ups alone"""
    down: Tensor
    """[experts, hidden, inner], as a view"""
    up_bias: Tensor | None
    """[experts, outputs]"""
    down_bias: Tensor | None
    """[experts, hidden]"""
    activation: Activation
    interleaved: bool
    """Whether gates and ups take turns among the outputs, or all gates come first."""

    @property
    def inner(self) -> int:
        return self.down.shape[2]

    @property
    def pairs(self) -> int:
        return self.chosen.numel()

    def gate_strides(self) -> tuple[int, int]:
        """From one gate to the next, and from a gate to its partner, in outputs."""
        return (2, 1) if self.interleaved else (1, self.inner)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, ready."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def __call__(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.options)

    def compile(self) -> Any:
        """Compile without launching."""
        return self.kernel.warmup(*self.arguments, grid=(self.programs,), **self.options)


def up_strides(work: Work) -> tuple[int, ...]:
    step, partner = work.gate_strides()
    expert, output, along = work.up.stride()
    strides = (expert, step * output, along, partner * output)
    return (*strides, *((work.up_bias.stride(0), step, partner) if work.up_bias is not None else (0, 0, 0)))


def down_strides(work: Work) -> tuple[int, ...]:
    return (*work.down.stride(), work.down_bias.stride(0) if work.down_bias is not None else 0)


def up_constants(work: Work, tile: Tile) -> dict[str, Any]:
    return {
        "HIDDEN": work.hidden.shape[1], "INNER": work.inner, "ROWS": tile.rows, "COLS": tile.cols,
        "STAGES": tile.stages, "EVICT": "evict_first" if tile.evict else "", "BIAS": work.up_bias is not None,
        **work.activation.constants(), "num_warps": tile.warps,
    }  # fmt: skip


def _choices(work: Work) -> dict[str, Any]:
    count = work.chosen.shape[1]
    return {"K": count, "K2": next_power_of_two(count)}


def either(bias: Tensor | None, other: Tensor) -> Tensor:
    return other if bias is None else bias


def up_one(work: Work, act: Tensor, tile: Tile) -> Launch:
    """The first product of one token's experts."""
    tensors = (work.hidden, work.chosen, work.up, either(work.up_bias, work.up), act, work.down)
    programs = work.pairs * -(-work.inner // tile.rows)
    options = up_constants(work, tile) | {"K": work.pairs, "LATE": tile.late, "AHEAD": tile.ahead}
    return Launch(kernels.experts_up_one, programs, (*tensors, *up_strides(work), work.down.stride(0)), options)


def down_one(work: Work, act: Tensor, out: Tensor, tile: Tile) -> Launch:
    """The second product of one token's experts, and their sum."""
    tensors = (act, work.chosen, work.scale, work.down, either(work.down_bias, work.down), out)
    hidden = work.hidden.shape[1]
    options = {
        "HIDDEN": hidden, "INNER": work.inner, **_choices(work), "ROWS": tile.rows, "COLS": tile.cols,
        "EVICT": "evict_first" if tile.evict else "", "BIAS": work.down_bias is not None, "num_warps": tile.warps,
    }  # fmt: skip
    return Launch(kernels.experts_down_one, -(-hidden // tile.rows), (*tensors, *down_strides(work)), options)


def both_one(work: Work, act: Tensor, out: Tensor, arrived: Tensor, up: Tile, down: Tile) -> Launch:
    """Both products of one token's experts. `arrived`: one int32, zero."""
    assert up.warps == down.warps
    assert (work.up_bias is None) == (work.down_bias is None)
    biases = either(work.up_bias, work.up), either(work.down_bias, work.down)
    tensors = (work.hidden, work.chosen, work.scale, work.up, biases[0], work.down, biases[1], act, out, arrived)
    hidden = work.hidden.shape[1]
    programs = work.pairs * -(-work.inner // up.rows) + -(-hidden // down.rows)
    options = {**up_constants(work, up), **_choices(work), "DOWN_ROWS": down.rows, "DOWN_COLS": down.cols}
    return Launch(kernels.experts_one, programs, (*tensors, *up_strides(work), *down_strides(work)), options)


def _slots(work: Work) -> tuple[int, dict[str, Any]]:
    """How many slots the grid has, and how kernels find a slot's expert."""
    experts = work.up.shape[0]
    tokens = work.hidden.shape[0]
    by_pair = work.pairs <= experts
    found = {
        "T": tokens, **_choices(work), "P2": next_power_of_two(work.pairs), "PAIRS": by_pair,
        "TOKENS": max(16, next_power_of_two(tokens)),
    }  # fmt: skip
    return min(work.pairs, experts), found


def up_few(work: Work, act: Tensor, tile: Tile) -> Launch:
    """The first product of a few tokens' experts."""
    slots, found = _slots(work)
    tensors = (work.hidden, work.chosen, work.up, either(work.up_bias, work.up), act)
    programs = slots * -(-work.inner // tile.rows)
    strides = (work.hidden.stride(0), *up_strides(work))
    return Launch(kernels.experts_up_few, programs, (*tensors, *strides), up_constants(work, tile) | found)


def down_few(work: Work, act: Tensor, part: Tensor, tile: Tile) -> Launch:
    """The second product of a few tokens' experts."""
    slots, found = _slots(work)
    tensors = (act, work.chosen, work.scale, work.down, either(work.down_bias, work.down), part)
    hidden = work.hidden.shape[1]
    options = {
        "HIDDEN": hidden, "INNER": work.inner, **found, "ROWS": tile.rows, "COLS": tile.cols, "STAGES": tile.stages,
        "EVICT": "evict_first" if tile.evict else "", "BIAS": work.down_bias is not None, "num_warps": tile.warps,
    }  # fmt: skip
    return Launch(kernels.experts_down_few, slots * -(-hidden // tile.rows), (*tensors, *down_strides(work)), options)


def sum_of(work: Work, part: Tensor, out: Tensor, cols: int = 512, once: bool = True) -> Launch:
    """Each token's sum over its experts. `once`: of an expert chosen twice there is one row, else one per pair."""
    tokens, hidden = work.hidden.shape
    options = {**_choices(work), "HIDDEN": hidden, "COLS": cols, "ONCE": once, "num_warps": 4}
    return Launch(kernels.experts_sum, tokens * -(-hidden // cols), (part, work.chosen, out), options)


def activations(work: Work) -> Tensor:
    return torch.empty(work.pairs, work.inner, dtype=work.hidden.dtype, device=work.hidden.device)


def parts(work: Work) -> Tensor:
    return torch.empty(work.pairs, work.hidden.shape[1], dtype=torch.float32, device=work.hidden.device)
