"""A small mixture of experts, as others write them: each layer has routed experts, and a shared one beside them.

Nothing in it speaks of streams. compile_moe.py and torch_compile.py compile it.
"""

import torch
from torch import Tensor, nn

HIDDEN, INNER, EXPERTS, CHOSEN = 64, 128, 8, 2


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 8)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 8)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).topk(CHOSEN)
        inner = torch.einsum("th,tkhi->tki", x, self.up[chosen]).relu()
        return (torch.einsum("tki,tkih->tkh", inner, self.down[chosen]) * share[..., None]).sum(1)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.routed, self.shared = nn.RMSNorm(HIDDEN), Routed(), Shared()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.routed(h) + self.shared(h)


class Model(nn.Module):
    """`forward(x)`: `[tokens, HIDDEN]` to the same."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
