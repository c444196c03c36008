"""Small blocks of attention and what may run beside it, for steps that are captured in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from moe_blocks import Dense, Layer
from torch import Tensor, nn
from torch.fx import GraphModule

HIDDEN, HEADS = 8, 2


@torch.library.custom_op("auxstream_test::paged_attention", mutates_args=("cache",))
def paged_attention(q: Tensor, k: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Writes keys into the cache, and returns two results, of which one may go unused."""
    cache[: k.shape[0]] = k
    scores = torch.softmax(q @ cache.t(), -1)
    return scores @ cache, scores.sum(-1)


@paged_attention.register_fake
def _(q: Tensor, k: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0])


class Attention(nn.Module):
    """Causal attention over the rows of [T, HIDDEN]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(-1, HEADS, HIDDEN // HEADS).transpose(0, 1)[None] for part in self.qkv(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out[0].transpose(0, 1).reshape(-1, HIDDEN).tanh()).tanh()


class Paged(nn.Module):
    """Attention as a serving engine has it: one op, which writes its cache."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.register_buffer("cache", torch.randn(12, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        out, _ = paged_attention(self.q(x), self.k(x), self.cache)
        return self.o(out)


class Block(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, mlp: nn.Module | None = None, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.attention, self.mlp = attention or Attention(), mlp or Dense()
        self.norm, self.norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm_2(x))


class Parallel(Block):
    """Attention beside feed-forward, both from one norm."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + (self.attention(h) + self.mlp(h))


class Shortcut(nn.Module):
    """LongCat: a slow branch beside what follows it, attention included."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.slow = Attention(), Stack(*(Block() for _ in range(blocks))), Dense()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        slow = self.slow(x)
        return self.second(x) + slow


class Late(nn.Module):
    """The result of one branch is read when the next branch has been forked."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.first, self.second = Attention(), Attention(), Dense(), Dense()

    def forward(self, x: Tensor) -> Tensor:
        attended = self.one(x)
        first = self.first(x)
        y = attended + first
        attended = self.two(y) * first
        return attended + self.second(y)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def shared_expert_block() -> Block:
    return Block(mlp=Layer())


def mark_paths(gm: GraphModule, ends: Sequence[str]) -> None:
    """Make each module whose path ends so a region of its own."""
    for node in gm.graph.nodes:
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        for path in (entry[0] for entry in stack.values()):
            if path.endswith(tuple(ends)) and node.op == "call_function":
                node.meta["auxstream"] = path


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "no region": (lambda: Stack(Block(), Block()), ()),
    "within a piece": (lambda: Stack(shared_expert_block(), shared_expert_block()), (".shared",)),
    "beside attention": (lambda: Stack(Parallel(), Parallel(), Parallel()), (".mlp",)),
    "attention beside": (lambda: Stack(Parallel(), Parallel()), (".attention",)),
    "both sides": (lambda: Stack(Parallel(), Parallel()), (".attention", ".mlp")),
    "beside a block": (lambda: Stack(Shortcut(), Shortcut()), (".slow",)),
    "beside two blocks": (lambda: Stack(Shortcut(2)), (".slow",)),
    "read late": (lambda: Late(), ("first", "second")),
    "regions beside a region": (lambda: Stack(Shortcut(), Parallel()), (".slow", ".mlp")),
}
"""Models, and which of their modules are regions."""
