"""Results against eager's: bit for bit, or within a bound that is said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32 = 2e-6
"""What a float32 result may be off, in parts of the operands' magnitude."""


@dataclass(frozen=True)
class Bound:
    """How far a result may be from eager's.

    In half precision: `ulp` units in the last place, for at most `share` of the distinct results. In float32: `float32`
    parts of the larger of the result and the operands. All zero: bit for bit, but for the payloads of NaN.
    """

    ulp: int = 0
    share: float = 0.0
    float32: float = 0.0
    absolute: float = 0.0
    """What a half-precision result may be off in any case."""
    subnormal: bool = True
    """Whether results below the least normal number are compared at all."""
    zero_signs: bool = True
    """Whether the signs of zeros count."""


EXACT = Bound()
FUNCTION = Bound(ulp=1, share=0.02, float32=FLOAT32, subnormal=False)
"""Of a transcendental function: eager on the CPU has several implementations of each, one ulp apart in float32."""
TIES = Bound(zero_signs=False)


def disagreement(ours: Tensor, eager: Tensor, bound: Bound = EXACT, magnitude: float = 0.0) -> str | None:
    """What is wrong with a result, in words; None if nothing is. `magnitude` is that of the operands."""
    form, wanted = ((x.dtype, tuple(x.shape), _strides(x)) for x in (ours, eager))
    if form != wanted:
        return f"dtype, shape and strides are {form}, eager has {wanted}"
    if not eager.dtype.is_floating_point:
        return _first(ours, eager, ours != eager, "differs")
    if bool((ours.isnan() != eager.isnan()).any()):
        return _first(ours, eager, ours.isnan() != eager.isnan(), "is NaN or not")
    special = ~torch.isfinite(eager) | ~torch.isfinite(ours)
    same = (ours == eager) | (ours.isnan() & eager.isnan())
    if not bound.subnormal:
        same |= torch.maximum(ours.abs(), eager.abs()) < 2 * torch.finfo(eager.dtype).tiny
    if bool((special & ~same).any()) and not (bound.ulp and eager.dtype != torch.float32):
        return _first(ours, eager, special & ~same, "is not finite alike")
    if bound.zero_signs:
        wrong = (ours == 0) & (eager == 0) & (torch.signbit(ours) != torch.signbit(eager))
        if bool(wrong.any()):
            return _first(ours, eager, wrong, "is a zero of the other sign")
    if eager.dtype == torch.float32:
        scale = torch.maximum(eager.abs(), torch.tensor(magnitude, device=eager.device))
        return _first(ours, eager, ~same & ~((ours - eager).abs() <= bound.float32 * scale), "is too far off")
    same |= (ours.double() - eager.double()).abs() <= bound.absolute
    apart = ulp_apart(ours, eager).masked_fill(same, 0)
    if len(eager[apart > 0].unique()) > bound.share * len(eager.unique()):
        return _first(ours, eager, apart > 0, "is one of too many that differ")
    return _first(ours, eager, apart > bound.ulp, "is too many ulp off")


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of the dimensions one can walk along."""
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


def ulp_apart(one: Tensor, other: Tensor) -> Tensor:
    """How many floats of their dtype apart two tensors are, element by element; both zeros are one."""
    return (_ordered(one) - _ordered(other)).abs()


def _ordered(x: Tensor) -> Tensor:
    """Floats as integers one apart."""
    bits = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16).to(torch.int64)
    return torch.where(bits < 0, -(bits & (0x7FFFFFFF if x.dtype == torch.float32 else 0x7FFF)), bits)


def _first(ours: Tensor, eager: Tensor, wrong: Tensor, what: str) -> str | None:
    if not bool(wrong.any()):
        return None
    where = tuple(wrong.nonzero()[0].tolist())
    share, one, other = f"{int(wrong.sum())} of {wrong.numel()}", ours[where].item(), eager[where].item()
    return f"{share}: {one!r} at {where} {what}, eager has {other!r}"
