"""One call of a mixture's experts as plain data, and whether any form does it.

Enters: the tensors of a call and what their numbers mean. Leaves: a `Work`, or the reason why there is no form for it.
Invariant: a `Work` that `require` let pass is what kernels, torch's grouped product and the reference all compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..runtime.errors import InputError

ACTIVATIONS: Final = ("silu", "gelu_tanh", "gelu", "relu2")
MOST_CHOICES: Final = 64
_FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)
_MOST_NUMBERS: Final = 2**31
"""Numbers in one expert's weight: addresses within it are 32 bits."""


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
    """[tokens, hidden], columns side by side"""
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
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def experts(self) -> int:
        return self.up.shape[0]

    @property
    def inner(self) -> int:
        return self.down.shape[2]

    @property
    def choices(self) -> int:
        return self.chosen.shape[1]

    @property
    def pairs(self) -> int:
        return self.chosen.numel()

    @property
    def turns(self) -> bool:
        """Whether gates and ups take turns: without a gate there is nothing to take turns with."""
        return self.interleaved and self.activation.gated

    def gate_strides(self) -> tuple[int, int]:
        """From one gate to the next, and from a gate to its partner, in outputs."""
        return (2, 1) if self.turns else (1, self.inner)


def refusal(work: Work) -> str:
    """Why no form does this; empty if one does. Asks for nothing but shapes, types and devices."""
    hidden, chosen, up, down, activation = work.hidden, work.chosen, work.up, work.down, work.activation
    tokens, width, inner, experts = hidden.shape[0], hidden.shape[1], down.shape[2], up.shape[0]
    outputs = (2 if activation.gated else 1) * inner
    if not experts or not width or not inner:
        return f"{experts} experts from {width} over {inner}"
    for name, tensor, shape in (
        ("choices", chosen, (tokens, chosen.shape[1])),
        ("weights of the choices", work.scale, (tokens, chosen.shape[1])),
        ("a first weight (experts, outputs, inputs)", up, (experts, outputs, width)),
        ("a second weight (experts, outputs, inputs)", down, (experts, width, inner)),
        ("a first bias", work.up_bias, (experts, outputs)),
        ("a second bias", work.down_bias, (experts, width)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return f"{name} of {tuple(tensor.shape)} where {shape} is needed"
        if tensor.device != hidden.device:
            return f"{name} on {tensor.device}, hidden states on {hidden.device}"
        if tensor is not chosen and tensor.dtype not in _FLOATS:
            return f"{name} in {tensor.dtype}"
    if hidden.dtype not in _FLOATS or not hidden.dtype == up.dtype == down.dtype:
        return f"hidden states in {hidden.dtype} and weights in {up.dtype} and {down.dtype}"
    if chosen.dtype not in (torch.int64, torch.int32):
        return f"choices in {chosen.dtype}"
    if not 1 <= chosen.shape[1] <= MOST_CHOICES:
        return f"{chosen.shape[1]} choices per token"
    if max(outputs, inner) * width >= _MOST_NUMBERS:
        return f"experts of {outputs} x {width} numbers"
    if activation.name not in ACTIVATIONS or (activation.alpha != 1.0 and activation.name != "silu"):
        return f"{activation}"
    return ""


def require(work: Work) -> None:
    if why := refusal(work):
        raise refused(why)


def refused(why: str) -> InputError:
    return InputError(
        "moe_experts has no form for this",
        expected="hidden [T, H], chosen and scale [T, K], up [E, 2I, H] (or [E, I, H] without a gate), down "
        "[E, H, I], or both transposed, all bfloat16, float16 or float32 on one device",
        came=why,
        remedy="keep the model's own experts",
    )
