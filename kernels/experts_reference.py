"""What `auxstream::moe_experts` computes, by torch alone: the implementation on a CPU, and what kernels are compared
with.

Enters: one call's tensors. Leaves: the layer's output. Invariant: products and sums are float32 (or wider, if asked);
activations are rounded once, to the type of the model, as the kernels do, and so is the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from .experts_work import Activation, Work


def activate(rows: Tensor, activation: Activation, interleaved: bool) -> Tensor:
    """The activation between the products, of rows of gates and ups (or of ups alone)."""
    if not activation.gated:
        gate, up = rows, None
    elif interleaved:
        gate, up = rows[..., ::2], rows[..., 1::2]
    else:
        gate, up = rows.chunk(2, -1)
    limit = activation.limit
    if limit is not None:
        gate = gate.clamp(max=limit)
    if activation.name == "silu":
        found = functional.silu(gate) if activation.alpha == 1.0 else gate * torch.sigmoid(gate * activation.alpha)
    elif activation.name == "relu2":
        found = functional.relu(gate).square()
    else:
        found = functional.gelu(gate, approximate="tanh" if activation.name == "gelu_tanh" else "none")
    if up is None:
        return found
    if limit is not None:
        up = up.clamp(-limit, limit)
    return found * (up + activation.shift if activation.shift else up)


def reference(work: Work, wide: torch.dtype = torch.float32, rounds: bool = True) -> Tensor:
    """Expert by expert, and token by token: a token's bits do not depend on which others are there. `rounds`:
    activations and output to the type of the model; else they stay `wide`."""
    out = torch.zeros(work.hidden.shape, dtype=wide, device=work.hidden.device)
    hidden, scale = work.hidden.to(wide), work.scale.to(wide)
    for expert in work.chosen.unique().tolist():
        up, down = work.up[expert].to(wide), work.down[expert].to(wide)
        for token, choice in (work.chosen == expert).nonzero().tolist():
            rows = up @ hidden[token].clone()  # at an address like every other's: libraries add up by alignment
            if work.up_bias is not None:
                rows = rows + work.up_bias[expert].to(wide)
            rows = activate(rows, work.activation, work.interleaved)
            rows = down @ (rows.to(work.hidden.dtype) if rounds else rows).to(wide)
            if work.down_bias is not None:
                rows = rows + work.down_bias[expert].to(wide)
            out[token] += rows * scale[token, choice]
    return out.to(work.hidden.dtype) if rounds else out
