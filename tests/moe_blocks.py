"""Small mixture-of-experts layers in the forms real models take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

TOKENS, HIDDEN, INNER, EXPERTS = 3, 8, 6, 4


@torch.library.custom_op("auxstream_test::fused_moe", mutates_args=())
def fused_moe(x: Tensor, logits: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return routed_sum(x, *logits.softmax(-1).topk(2), up, down)


@fused_moe.register_fake
def _(x: Tensor, logits: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("auxstream_test::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return nn.functional.rms_norm(total, (HIDDEN,), weight), total


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def routed_sum(x: Tensor, scores: Tensor, chosen: Tensor, up: Tensor, down: Tensor) -> Tensor:
    inner = torch.einsum("th,tkhi->tki", x, up[chosen]).relu()
    return (torch.einsum("tki,tkih->tkh", inner, down[chosen]) * scores[..., None]).sum(1)


class Dense(nn.Module):
    """A shared expert: gate, up, down."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    def __init__(self, form: Literal["traced", "opaque", "latent", "values_only"] = "traced") -> None:
        super().__init__()
        self.form = form
        self.router = nn.Linear(HIDDEN, EXPERTS)
        width = HIDDEN // 2 if form == "latent" else HIDDEN
        self.w_up = nn.Parameter(torch.randn(EXPERTS, width, INNER))
        self.w_down = nn.Parameter(torch.randn(EXPERTS, INNER, width))
        if form == "latent":
            self.into, self.out = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.form == "opaque":
            return fused_moe(x, logits, self.w_up, self.w_down)
        scores, chosen = logits.softmax(-1).topk(2)
        if self.form == "values_only":
            # A scale taken from the top value, and every expert for every token: no routing.
            inner = torch.einsum("th,ehi->tei", x * scores.amax(-1, keepdim=True), self.w_up)
            return torch.einsum("tei,eih->th", inner, self.w_down)
        if self.form == "latent":
            return self.out(routed_sum(self.into(x), scores, chosen, self.w_up, self.w_down))
        return routed_sum(x, scores, chosen, self.w_up, self.w_down)


Merge = Callable[["Layer", Tensor, Tensor, Tensor], Tensor]
MERGES: dict[str, Merge] = {
    "plain": lambda layer, x, shared, routed: routed + shared,
    "in_place": lambda layer, x, shared, routed: shared.add_(routed),
    "in_place_on_routed": lambda layer, x, shared, routed: routed.add_(shared),
    "residual_behind": lambda layer, x, shared, routed: x + (shared + routed),
    "norm_behind": lambda layer, x, shared, routed: x + layer.norm(shared + routed),
    "cat": lambda layer, x, shared, routed: torch.cat([routed, shared]).view(2, TOKENS, HIDDEN).sum(0),
    "kwargs": lambda layer, x, shared, routed: torch.add(input=routed, other=shared, alpha=2),
}


class Layer(nn.Module):
    def __init__(
        self,
        *,
        merge: str = "plain",
        form: Literal["traced", "opaque", "latent", "values_only"] = "traced",
        shared_first: bool = True,
        gated: bool = False,
        pre_norm: bool = False,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.shared = shared if shared is not None else Dense()
        self.routed = Routed(form)
        self.norm = nn.RMSNorm(HIDDEN)
        self.shared_norm = nn.RMSNorm(HIDDEN) if pre_norm else nn.Identity()
        self.shared_gate = nn.Linear(HIDDEN, 1) if gated else None
        self.merge, self.shared_first = MERGES[merge], shared_first

    def dense(self, x: Tensor) -> Tensor:
        y = self.shared(self.shared_norm(x))
        return y if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * y

    def forward(self, x: Tensor) -> Tensor:
        if self.shared_first:
            shared = self.dense(x)
            routed = self.routed(x)
        else:
            routed = self.routed(x)
            shared = self.dense(x)
        return self.merge(self, x, shared, routed)


class Model(nn.Module):
    """An attention-like stretch ahead of each layer, as there is in every real model."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.mix = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        for mix, layer in zip(self.mix, self.layers, strict=True):
            x = x + mix(x).softmax(-1) @ mix(x).mT @ x
            x = layer(x)
        return x


class RoutedOnly(Layer):
    """Mixtral: no shared expert. The router's norm is its own, and the residual joins behind."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.routed(self.norm(x))
