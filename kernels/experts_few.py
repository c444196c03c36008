"""Launches of the experts' kernels for few tokens.

Enters: hidden states, chosen experts and their weights, and tiles. Leaves: the layer's output. Invariant: the grid
depends on shapes alone, so a launch can be captured; workspaces are tensors of this call. Numbers of tokens within one
class share their kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from . import experts_kernels as kernels
from .experts_work import Work
from .variants import next_power_of_two

MOST_FEW: Final = 32
"""Tokens that the form for few can take."""
_SUM_COLS: Final = 512


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program works on at a time: rows of a weight and columns of them, by how many warps, how far ahead."""

    rows: int
    cols: int
    warps: int
    stages: int = 1

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols}, {self.warps} warps" + (f", {self.stages} stages" if self.stages > 1 else "")


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


def row_class(tokens: int) -> int:
    """The largest number of tokens that runs what this one runs."""
    return 1 if tokens == 1 else max(16, next_power_of_two(tokens))


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
        "BIAS": work.up_bias is not None, **work.activation.constants(), "num_warps": tile.warps,
    }  # fmt: skip


def down_constants(work: Work, tile: Tile) -> dict[str, Any]:
    return {
        "HIDDEN": work.hidden.shape[1], "INNER": work.inner, "ROWS": tile.rows, "COLS": tile.cols,
        "BIAS": work.down_bias is not None, "num_warps": tile.warps,
    }  # fmt: skip


def either(bias: Tensor | None, other: Tensor) -> Tensor:
    return other if bias is None else bias


def _choices(work: Work) -> dict[str, Any]:
    return {"K": work.choices, "K2": next_power_of_two(work.choices)}


# --- one token --------------------------------------------------------------------------------------------------------


def up_one(work: Work, act: Tensor, tile: Tile) -> Launch:
    """The first product of one token's experts."""
    tensors = (work.hidden, work.chosen, work.up, either(work.up_bias, work.up), act)
    programs = work.pairs * -(-work.inner // tile.rows)
    return Launch(kernels.experts_up_one, programs, (*tensors, *up_strides(work)), up_constants(work, tile))


def down_one(work: Work, act: Tensor, out: Tensor, tile: Tile) -> Launch:
    """The second product of one token's experts, and their sum."""
    tensors = (act, work.chosen, work.scale, work.down, either(work.down_bias, work.down), out)
    programs = -(-work.hidden.shape[1] // tile.rows)
    options = down_constants(work, tile) | _choices(work)
    return Launch(kernels.experts_down_one, programs, (*tensors, *down_strides(work)), options)


# --- a few tokens -----------------------------------------------------------------------------------------------------


def by_pair(work: Work) -> bool:
    """Whether the grid has a slot per pair, or one per expert: whichever are fewer."""
    return work.pairs <= work.experts


def _slots(work: Work) -> tuple[int, dict[str, Any]]:
    """How many slots the grid has, and how kernels find a slot's expert."""
    most = row_class(max(2, work.tokens))
    found = _choices(work) | {"P2": next_power_of_two(most * work.choices), "PAIRS": by_pair(work), "TOKENS": most}
    return min(work.pairs, work.experts), found


def up_few(work: Work, act: Tensor, tile: Tile) -> Launch:
    """The first product of a few tokens' experts."""
    slots, found = _slots(work)
    tensors = (work.hidden, work.chosen, work.up, either(work.up_bias, work.up), act)
    programs = slots * -(-work.inner // tile.rows)
    numbers = (work.tokens, work.hidden.stride(0), *up_strides(work))
    options = up_constants(work, tile) | found | {"STAGES": tile.stages, "TURNS": work.turns}
    return Launch(kernels.experts_up_few, programs, (*tensors, *numbers), options)


def down_few(work: Work, act: Tensor, part: Tensor, tile: Tile) -> Launch:
    """The second product of a few tokens' experts."""
    slots, found = _slots(work)
    tensors = (act, work.chosen, work.scale, work.down, either(work.down_bias, work.down), part)
    programs = slots * -(-work.hidden.shape[1] // tile.rows)
    options = down_constants(work, tile) | found | {"STAGES": tile.stages}
    return Launch(kernels.experts_down_few, programs, (*tensors, work.tokens, *down_strides(work)), options)


def sum_of(work: Work, part: Tensor, out: Tensor, once: bool = True) -> Launch:
    """Each token's sum over its experts. `once`: of an expert chosen twice there is one row, else one per pair."""
    tokens, hidden = work.hidden.shape
    options = {**_choices(work), "HIDDEN": hidden, "COLS": _SUM_COLS, "ONCE": once, "num_warps": 4}
    return Launch(kernels.experts_sum, tokens * -(-hidden // _SUM_COLS), (part, work.chosen, out), options)


def activations(work: Work) -> Tensor:
    return torch.empty(work.pairs, work.inner, dtype=work.hidden.dtype, device=work.hidden.device)


def parts(work: Work) -> Tensor:
    return torch.empty(work.pairs, work.hidden.shape[1], dtype=torch.float32, device=work.hidden.device)
