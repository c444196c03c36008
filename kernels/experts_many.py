"""Launches of the experts' kernels for tens to hundreds of tokens, as `experts_few` has them for few, and torch's
grouped product for more."""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor

from . import experts_many_kernels as kernels
from .experts_few import Launch, Tile, down_constants, down_strides, either, row_class, up_constants, up_strides
from .experts_reference import activate
from .experts_work import Work
from .variants import next_power_of_two

MOST_PAIRS: Final = 4096
"""Pairs that are grouped at a time."""


def groups(work: Work) -> tuple[Tensor, Tensor]:
    """Workspace: pairs by expert, and where each expert's begin."""
    device = work.hidden.device
    order = torch.empty(work.pairs, dtype=torch.int32, device=device)
    return order, torch.empty(work.experts + 1, dtype=torch.int32, device=device)


def group(work: Work, order: Tensor, start: Tensor) -> Launch:
    """Fill the workspace."""
    most = next_power_of_two(row_class(work.tokens) * work.choices)
    options = {"P2": most, "EXPERTS": work.experts, "num_warps": 4}
    return Launch(kernels.experts_group, work.experts, (work.chosen, order, start, work.pairs), options)


def up_many(work: Work, order: Tensor, start: Tensor, act: Tensor, tile: Tile, tokens: int) -> Launch:
    """The first product, `tokens` pairs at a time."""
    tensors = (work.hidden, order, start, work.up, either(work.up_bias, work.up), act)
    programs = work.experts * -(-work.inner // tile.rows)
    options = up_constants(work, tile) | {
        "K": work.choices, "TOKENS": tokens, "STAGES": tile.stages, "TURNS": work.turns,
    }  # fmt: skip
    strides = (work.hidden.stride(0), *up_strides(work))
    return Launch(kernels.experts_up_many, programs, (*tensors, *strides), options)


def down_many(work: Work, order: Tensor, start: Tensor, act: Tensor, part: Tensor, tile: Tile, tokens: int) -> Launch:
    """The second product, `tokens` pairs at a time."""
    tensors = (act, order, start, work.scale, work.down, either(work.down_bias, work.down), part)
    programs = work.experts * -(-work.hidden.shape[1] // tile.rows)
    options = down_constants(work, tile) | {"TOKENS": tokens, "STAGES": tile.stages}
    return Launch(kernels.experts_down_many, programs, (*tensors, *down_strides(work)), options)


def groupable(work: Work) -> bool:
    """Whether torch multiplies by groups here without asking the host: bfloat16, in steps of 16 bytes."""
    strides = (work.hidden.shape[1], work.inner, *(s for w in (work.up, work.down) for s in w.stride() if s != 1))
    return work.hidden.dtype == torch.bfloat16 and all(stride % 8 == 0 for stride in strides)


def grouped(work: Work) -> Tensor:
    """By torch's grouped product, sorted as models do it; every step in torch ops, rounded to the model's type."""
    ids, order = torch.sort(work.chosen.reshape(-1))
    offsets = torch.searchsorted(ids, torch.arange(work.experts, device=ids.device), right=True, out_int32=True)
    product = cast(Any, torch)._grouped_mm
    rows = product(work.hidden[order // work.choices], work.up.mT, offs=offsets)
    if work.up_bias is not None:
        rows = rows.add_(work.up_bias[ids])
    rows = product(activate(rows, work.activation, work.interleaved), work.down.mT, offs=offsets)
    if work.down_bias is not None:
        rows = rows.add_(work.down_bias[ids])
    rows = rows * work.scale.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    out = rows[back].view(work.tokens, work.choices, -1).sum(1, dtype=torch.float32)
    return out.to(work.hidden.dtype)
