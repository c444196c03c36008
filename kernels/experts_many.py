"""Launches of the experts' kernels for tens to hundreds of tokens, as `experts_few` has them for few."""

from __future__ import annotations

import torch
from torch import Tensor

from . import experts_many_kernels as kernels
from .experts_few import Launch, Tile, Work, down_strides, either, up_constants, up_strides
from .variants import next_power_of_two


def groups(work: Work) -> tuple[Tensor, Tensor]:
    """Workspace: pairs by expert, and where each expert's begin."""
    device = work.hidden.device
    order = torch.empty(work.pairs, dtype=torch.int32, device=device)
    return order, torch.empty(work.up.shape[0] + 1, dtype=torch.int32, device=device)


def group(work: Work, order: Tensor, start: Tensor) -> Launch:
    """Fill the workspace."""
    experts = work.up.shape[0]
    options = {"P": work.pairs, "P2": next_power_of_two(work.pairs), "EXPERTS": experts, "num_warps": 4}
    return Launch(kernels.experts_group, experts, (work.chosen, order, start), options)


def up_many(work: Work, order: Tensor, start: Tensor, act: Tensor, tile: Tile, tokens: int) -> Launch:
    """The first product, `tokens` pairs at a time."""
    tensors = (work.hidden, order, start, work.up, either(work.up_bias, work.up), act)
    programs = work.up.shape[0] * -(-work.inner // tile.rows)
    options = up_constants(work, tile) | {"K": work.chosen.shape[1], "TOKENS": tokens}
    strides = (work.hidden.stride(0), *up_strides(work))
    return Launch(kernels.experts_up_many, programs, (*tensors, *strides), options)


def down_many(work: Work, order: Tensor, start: Tensor, act: Tensor, part: Tensor, tile: Tile, tokens: int) -> Launch:
    """The second product, `tokens` pairs at a time."""
    tensors = (act, order, start, work.scale, work.down, either(work.down_bias, work.down), part)
    hidden = work.hidden.shape[1]
    programs = work.up.shape[0] * -(-hidden // tile.rows)
    options = {
        "TOKENS": tokens, "HIDDEN": hidden, "INNER": work.inner, "ROWS": tile.rows, "COLS": tile.cols,
        "STAGES": tile.stages, "EVICT": "evict_first" if tile.evict else "", "BIAS": work.down_bias is not None,
        "num_warps": tile.warps,
    }  # fmt: skip
    return Launch(kernels.experts_down_many, programs, (*tensors, *down_strides(work)), options)
