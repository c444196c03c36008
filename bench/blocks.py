"""The feed-forward of Gemma-4's decoder layers: whole, layer after layer, and each of its branches alone.

Enters: decoder layers. Leaves: modules over the same weights, and the bytes that one pass must read. The routed branch
is router and experts with their norms, the shared one the dense product with its own; both start from one residual.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

SHARED_ALONE: Final = "shared branch alone"
ROUTED_ALONE: Final = "routed branch alone"


def shared_branch(layer: Any, residual: Tensor) -> Tensor:
    return layer.post_feedforward_layernorm_1(layer.mlp(layer.pre_feedforward_layernorm(residual)))


def routed_branch(layer: Any, residual: Tensor) -> Tensor:
    flat = residual.reshape(-1, residual.shape[-1])
    _, weights, chosen = layer.router(flat)
    routed = layer.experts(layer.pre_feedforward_layernorm_2(flat), chosen, weights).reshape(residual.shape)
    return layer.post_feedforward_layernorm_2(routed)


def merged(layer: Any, residual: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
    return (residual + layer.post_feedforward_layernorm(shared + routed)) * layer.layer_scalar


class FeedForward(nn.Module):
    """What decoder layers do behind their attention, layer after layer."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor) -> Tensor:
        layers: Any = self.layers
        for layer in layers:
            hidden = merged(layer, hidden, shared_branch(layer, hidden), routed_branch(layer, hidden))
        return hidden


class Branches(nn.Module):
    """One branch of every layer, each with an input of its own, as if the rest of the layer took no time."""

    def __init__(self, layers: Any, branch: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shared = branch.endswith(SHARED_ALONE)

    def forward(self, residuals: list[Tensor]) -> list[Tensor]:
        layers: Any = self.layers
        one = shared_branch if self.shared else routed_branch
        return [one(layer, residual) for layer, residual in zip(layers, residuals, strict=True)]

    def residuals(self, batch: int) -> list[Tensor]:
        """Random inputs."""
        layers: Any = self.layers
        weights = [layer.pre_feedforward_layernorm.weight for layer in layers]
        return [torch.randn(batch, 1, len(w), dtype=torch.bfloat16, device=w.device) for w in weights]


@torch.no_grad()
def weight_bytes(model: FeedForward, hidden: Tensor) -> int:
    """Bytes of the weights that one pass reads: all of the shared branches and routers, and of the experts those that
    some token is sent to."""
    layers: Any = model.layers
    found = 0
    for layer in layers:
        flat = hidden.reshape(-1, hidden.shape[-1])
        reached = layer.router(flat)[2].unique().numel()
        whole = sum(weight.nbytes for part in (layer.mlp, layer.router) for weight in part.parameters())
        found += whole + sum(weight.nbytes // len(weight) * reached for weight in layer.experts.parameters())
        hidden = merged(layer, hidden, shared_branch(layer, hidden), routed_branch(layer, hidden))
    return found
