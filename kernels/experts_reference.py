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
    """One expert after the other. `rounds`: activations and output to the type of the model; else they stay `wide`."""
    out = torch.zeros(work.hidden.shape, dtype=wide, device=work.hidden.device)
    for expert in work.chosen.unique().tolist():
        tokens, choices = (work.chosen == expert).nonzero(as_tuple=True)
        rows = work.hidden[tokens].to(wide) @ work.up[expert].to(wide).T
        if work.up_bias is not None:
            rows = rows + work.up_bias[expert].to(wide)
        rows = activate(rows, work.activation, work.interleaved)
        rows = (rows.to(work.hidden.dtype) if rounds else rows).to(wide) @ work.down[expert].to(wide).T
        if work.down_bias is not None:
            rows = rows + work.down_bias[expert].to(wide)
        out.index_add_(0, tokens, rows * work.scale[tokens, choices, None].to(wide))
    return out.to(work.hidden.dtype) if rounds else out
