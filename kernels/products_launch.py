"""Launches of the kernels of products of few rows.

Enters: rows, the weights that share them, and a tile. Leaves: each weight's product. Invariant: grids depend on shapes
alone, so a launch can be captured; workspaces are tensors of this call. Numbers of rows within one class share kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from . import products_kernels as kernels
from .products_work import MOST_WEIGHTS, Tile, Work, row_class

_SUM_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, ready."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)

    def compile(self) -> Any:
        """Compile without launching."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


def launches(work: Work, outputs: Sequence[Tensor], tile: Tile) -> list[Launch]:
    """What computes the outputs, in order: one launch, or two where sums are split."""
    if work.rows == 1:
        return [_one(work, outputs, tile)]
    if tile.splits == 1:
        return [_few(work, outputs, outputs[0], tile)]  # the workspace is not touched
    width = sum(weight.shape[0] for weight in work.weights)
    part = torch.empty(tile.splits, work.rows, width, dtype=torch.float32, device=work.x.device)
    return [_few(work, outputs, part, tile), _sum(work, outputs, part, tile)]


def run(work: Work, tile: Tile) -> list[Tensor]:
    outputs = work.outputs()
    for launch in launches(work, outputs, tile):
        launch()
    return outputs


def _one(work: Work, outputs: Sequence[Tensor], tile: Tile) -> Launch:
    blocks, sizes = _cut(work, tile.rows)
    strides = _four([weight.stride(0) for weight in work.weights])
    arguments = (work.x, *_four(work.weights), *_biases(work), *_four(outputs), *strides, *sizes)
    constants = {"K": work.summed, "ROWS": tile.rows, "COLS": tile.cols, "AHEAD": tile.ahead, "ACT": work.activation}
    return Launch(kernels.product_one, (blocks,), arguments, _options(work, tile) | constants)


def _few(work: Work, outputs: Sequence[Tensor], part: Tensor, tile: Tile) -> Launch:
    blocks, sizes = _cut(work, tile.rows)
    span = -(-work.summed // (tile.splits * tile.cols)) * tile.cols
    tensors = (work.x, *_four(work.weights), *_biases(work), *_four(outputs), part)
    strides = (work.x.stride(0), *_four([weight.stride(0) for weight in work.weights]))
    arguments = (*tensors, work.rows, work.summed, *strides, *sizes, tile.splits, span)
    constants = {"TOKENS": row_class(work.rows), "ROWS": tile.rows, "COLS": tile.cols, "STAGES": tile.stages}
    options = _options(work, tile) | constants | {"SPLIT": tile.splits > 1}
    return Launch(kernels.product_few, (blocks * tile.splits,), arguments, options)


def _sum(work: Work, outputs: Sequence[Tensor], part: Tensor, tile: Tile) -> Launch:
    blocks, sizes = _cut(work, _SUM_ROWS)
    arguments = (part, *_biases(work), *_four(outputs), work.rows, *sizes, tile.splits)
    options = _options(work, tile) | {"ROWS": _SUM_ROWS, "num_warps": 4}
    return Launch(kernels.product_sum, (work.rows, blocks), arguments, options)


def _cut(work: Work, rows: int) -> tuple[int, tuple[int, ...]]:
    """How many blocks of `rows` there are; where each weight's end, and how many rows each has."""
    ends, end = list[int](), 0
    for width in work.widths:
        end += -(-width // rows)
        ends.append(end)
    ends += [end] * (MOST_WEIGHTS - len(ends))
    widths = [*work.widths, *[0] * (MOST_WEIGHTS - len(work.widths))]
    return end, (*ends[:3], *widths)


def _options(work: Work, tile: Tile) -> dict[str, Any]:
    options = {"BIASED": bool(work.biases), "num_warps": tile.warps}
    return options | {"enable_fp_fusion": False, "enable_reflect_ftz": False}


def _biases(work: Work) -> tuple[Tensor, ...]:
    return _four(work.biases or work.weights)


def _four(given: Sequence[Any]) -> tuple[Any, ...]:
    """As many as the kernels take: the last ones stand for none."""
    return (*given, *[given[-1]] * (MOST_WEIGHTS - len(given)))
