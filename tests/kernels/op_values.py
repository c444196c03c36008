"""Arguments for trying ops: a call with its bound, ordinary numbers and the awkward ones of each dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from compare import EXACT, Bound
from one_op import DEVICE, Arguments, Call
from torch import Tensor

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
EVERY = (*FLOATS, *INTEGERS, torch.bool)
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.bool: "bool"}


@dataclass(frozen=True)
class Case:
    """One call."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    bound: Bound = EXACT

    @property
    def given(self) -> Arguments:
        return self.args, self.kwargs

    @property
    def call(self) -> Call:
        return self.target, self.given

    def __str__(self) -> str:
        given = [_name(a) for a in (*self.args, *self.kwargs.values())]
        return f"{str(self.target).removeprefix('aten.')}({', '.join(given)})"


def _name(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_name, value))}]"
    if not isinstance(value, Tensor):
        return str(value).removeprefix("torch.")
    return NAMES.get(value.dtype, str(value.dtype)[6:]) + ("" if value.dim() else "[]")


_AWKWARD = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, 7.0, 1e-3, 2e-6, 300.0, -4e4)
_NOT_FINITE = (math.inf, -math.inf, math.nan)
ROWS, COLUMNS = 6, 96


def values(dtype: torch.dtype, seed: int = 0, *, awkward: bool = True, extreme: bool = True) -> Tensor:
    """[6, 96]: random numbers, and in half of it the awkward ones of the dtype, mixed so that each meets each.

    The size is a multiple of any vector's: eager on the CPU computes remainders with other functions.
    """
    draw = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        found = torch.rand(ROWS, COLUMNS, generator=draw) < 0.5
    elif dtype.is_floating_point:
        found = torch.randn(ROWS, COLUMNS, generator=draw) * 3
        if awkward:
            extremes = (torch.finfo(dtype).max, torch.finfo(dtype).tiny) if extreme else ()
            chosen, flat = (*_AWKWARD, *_NOT_FINITE, *extremes), found.view(-1)
            for i in range(flat.numel() // 2):
                flat[i] = chosen[(i * (1 + 2 * seed) + seed * (i // len(chosen))) % len(chosen)]
    else:
        limits = torch.iinfo(dtype)
        found = torch.randint(-9, 10, (ROWS, COLUMNS), generator=draw)
        if awkward:
            found[0, :6] = torch.tensor([limits.max, limits.min + 1, limits.max - 1, 100, -100, limits.max // 2])
            found = found[:, torch.randperm(COLUMNS, generator=draw)]
    return found.to(dtype).to(DEVICE)


def without_zeros(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)


def scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A tensor without dimensions."""
    return torch.tensor(value, dtype=dtype, device=DEVICE)
