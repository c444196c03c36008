"""How eager takes the operands of a pointwise call: what they are promoted to, and where they are rounded.

Enters: a call and its row of the table. Leaves: `Terms`, and bodies that convert scalars and numbers by them.
Invariant: whatever eager rounds to a half-precision dtype on the call's device is rounded here, and nothing else:

    a tensor          to the common dtype, then computed on in float32
    a Python number   likewise; only to float32 where the op's kernel takes it as such (`exact`, per device)
    a tensor without  likewise; on the CPU multiplication and division keep their second operand
      dimensions
    x / number        on CUDA x * (1 / number), the reciprocal taken in float64 and rounded to float32; rounded to whole
                      numbers, x * (1 / number) of the number rounded to float32
    pow 3, pow -2     every step rounded: bfloat16 everywhere, float16 on CUDA
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as Promotion
from torch._prims_common import elementwise_dtypes

from .body import MLIR_TYPE, Body, Number, Scalar, Term

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of one call."""

    common: torch.dtype
    """What the operands are promoted to."""
    device: str
    exact: bool
    """Whether numbers are not rounded to `common` where it is narrower than float32."""

    @property
    def compute(self) -> torch.dtype:
        """What eager computes in."""
        return torch.float32 if self.common in HALF else self.common

    @property
    def stepwise(self) -> bool:
        """Whether chains of operators in one kernel round at every step."""
        return self.common is torch.bfloat16 or (self.common is torch.float16 and self.device == "cuda")

    def number(self, value: Number) -> Number:
        """A Python number as the kernel sees it."""
        if not self.common.is_floating_point:
            return bool(value) if self.common is torch.bool else int(value)
        if self.exact:
            return float(value)  # float32 as soon as it becomes a constant
        return float(torch.tensor(float(value), dtype=torch.float64).to(torch.float32).to(self.common))


class EagerBody(Body):
    """A body with the terms of its call."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self.terms = terms

    @property
    def on_cuda(self) -> bool:
        return self.terms.device == "cuda"

    def operand(self, x: Scalar, *, exact: bool = False) -> Scalar:
        """A tensor's element in the dtype the call computes in."""
        x = x if exact else self.convert(x, MLIR_TYPE[self.terms.common])
        return self.convert(x, MLIR_TYPE[self.terms.compute])

    def step(self, x: Scalar) -> Scalar:
        """A result between two operators of one kernel."""
        return self.operand(x) if self.terms.stepwise else x

    def either_term(self, x: Term) -> Scalar:
        """A scalar, also where two numbers meet."""
        return self.of(x, MLIR_TYPE[self.terms.compute])


def common_dtype(parts: list[Tensor | Number], promotion: Promotion) -> torch.dtype:
    """What eager promotes operands to, before it computes."""
    kinds = tuple((part.dtype, part.dim() > 0) if isinstance(part, Tensor) else type(part) for part in parts)
    return _promoted(kinds, Promotion.DEFAULT if promotion is Promotion.ALWAYS_BOOL else promotion)


@functools.cache
def _promoted(kinds: tuple[tuple[torch.dtype, bool] | type[Number], ...], promotion: Promotion) -> torch.dtype:
    """By the operands' dtypes and whether they have dimensions, or their Python types: nothing else counts."""
    given: list[Any] = [
        torch.empty((1,) if kind[1] else (), dtype=kind[0], device="meta") if isinstance(kind, tuple) else kind(1)
        for kind in kinds
    ]
    return elementwise_dtypes(*given, type_promotion_kind=promotion)[1]
