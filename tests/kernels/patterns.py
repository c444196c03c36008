"""What models are made of: chains of ops as functions of tensors, with arguments of a given size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from compare import EXACT, FUNCTION, Bound
from one_op import DEVICE
from rowwise_cases import SUM
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """A function, and what makes its arguments: `make(rows, width, dtype)`."""

    function: Callable[..., Any]
    make: Callable[[int, int, torch.dtype], Sequence[Tensor]]
    bound: Bound = EXACT
    kernels: int = 1
    """How many kernels it becomes."""


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + 17 * len(shape))
    return (torch.randn(shape, generator=draw) * scale).to(dtype).to(DEVICE)


def _rows(count: int, *extra: str) -> Callable[[int, int, torch.dtype], list[Tensor]]:
    """`count` tensors of rows x width; then "weight" for a vector of width."""

    def make(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
        found = [randn(rows, width, dtype=dtype, seed=i, scale=2) for i in range(count)]
        return found + [randn(width, dtype=dtype, seed=10 + i) for i, _ in enumerate(extra)]

    return make


# --- norms ------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x + residual, (x.shape[-1],), weight, 1e-6)


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)
    return (wide * (1.0 + weight.float())).type_as(x)


def residual_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, llama_norm(total, weight)


def layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias)


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()


# --- feed-forward -----------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_of_chunks(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def clipped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def softcap(x: Tensor) -> Tensor:
    return torch.tanh(x / 30.0) * 30.0


# --- attention --------------------------------------------------------------------------------------------------------


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x * 0.125, -1, dtype=torch.float32).to(x.dtype)


def masked_softmax(x: Tensor, keep: Tensor) -> Tensor:
    return torch.softmax(torch.where(keep > 0, x, torch.full([], -math.inf, device=x.device, dtype=x.dtype)), -1)


def log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x.float(), -1)


def causal(x: Tensor, position: Tensor) -> Tensor:
    sees = torch.arange(x.shape[-1], device=x.device) <= position[:, None]
    return torch.where(sees, x, -1e4) * 0.5


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        one, other = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((-other, one), dim=-1) * sin

    return turned(q), turned(k)


def _heads(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q and k as attention has them, transposed views; cos and sin one per position."""
    q, k = (randn(2, rows, heads, width, dtype=dtype, seed=heads).transpose(1, 2) for heads in (4, 2))
    angles = randn(2, rows, width // 2, dtype=torch.float32, scale=3)
    angles = torch.cat((angles, angles), -1)
    return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]


# --- losses, routers, tables ------------------------------------------------------------------------------------------


def mse(x: Tensor, y: Tensor) -> Tensor:
    return ((x.float() - y.float()) ** 2).mean(-1)


def routed(x: Tensor, bias: Tensor) -> Tensor:
    scores = torch.sigmoid(x.float())
    choice = scores + bias.float()
    best = choice.amax(-1, keepdim=True)
    return torch.where(choice < best, torch.zeros_like(scores), scores) / (scores.sum(-1, keepdim=True) + 1e-20)


def embedded(table: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return llama_norm(F.embedding(ids, table) * 8.0, weight)


def _table(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    ids = torch.randint(11, (2, rows), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return [randn(11, width, dtype=dtype), ids, randn(width, dtype=dtype, seed=5)]


def scaled_by_choice(x: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    """Weights of chosen experts, each times its expert's scale."""
    picked = torch.gather(torch.softmax(x.float(), -1), -1, chosen)
    return (picked / picked.sum(-1, keepdim=True)).to(x.dtype) * scale[chosen]


def _chosen(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    chosen = torch.randint(width, (rows, 4), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return [randn(rows, width, dtype=dtype), randn(width, dtype=dtype, seed=1), chosen]


def _with_positions(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [randn(rows, width, dtype=dtype), torch.arange(rows, device=DEVICE) * 3]


PATTERNS: dict[str, Pattern] = {
    "rms_norm": Pattern(rms_norm, _rows(2, "weight"), SUM),
    "llama_norm": Pattern(llama_norm, _rows(1, "weight"), SUM),
    "gemma_norm": Pattern(gemma_norm, _rows(1, "weight"), SUM, kernels=2),
    "residual_and_norm": Pattern(residual_and_norm, _rows(2, "weight"), SUM),
    "layer_norm": Pattern(layer_norm, _rows(2, "weight", "bias"), SUM),
    "standardized": Pattern(standardized, _rows(1), SUM),
    "swiglu": Pattern(swiglu, _rows(2), FUNCTION),
    "swiglu_of_chunks": Pattern(swiglu_of_chunks, lambda r, w, d: [randn(r, 2 * w, dtype=d)], FUNCTION),
    "geglu": Pattern(geglu, _rows(2), replace(FUNCTION, absolute=2e-6)),
    "clipped_swiglu": Pattern(clipped_swiglu, _rows(2), FUNCTION),
    "softcap": Pattern(softcap, _rows(1), FUNCTION),
    "softmax": Pattern(softmax, _rows(1), SUM),
    "masked_softmax": Pattern(masked_softmax, _rows(2), SUM),
    "log_softmax": Pattern(log_softmax, _rows(1), SUM),
    "causal": Pattern(causal, _with_positions),
    "rope": Pattern(rope, _heads, kernels=2),
    "mse": Pattern(mse, _rows(2), SUM),
    "routed": Pattern(routed, _rows(1, "bias"), SUM),
    "embedded": Pattern(embedded, _table, SUM),
    "scaled_by_choice": Pattern(scaled_by_choice, _chosen, SUM, kernels=2),
}
