"""Programs drawn from a seed, for tests that compare any order of a graph with its own."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn


class RandomProgram(nn.Module):
    """A straight line of views, copies, in-place writes, random numbers and sums over buffers, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        for name in "ab":
            self.register_buffer(name, torch.arange(16.0).reshape(4, 4) + ord(name))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rng = random.Random(self.seed)
        pool = [self.a, self.b, x.clone()]
        moves: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda s, t: s + t,
            lambda s, t: s.add_(t.detach() * 0.5),
            lambda s, t: s.t(),
            lambda s, t: s.t().reshape(4, 4),
            lambda s, t: s.reshape(4, 4),
            lambda s, t: s.type_as(t),
            lambda s, t: s[1:3].mul_(0.5).sum() + t,
            lambda s, t: s.copy_(t.clone()),
            lambda s, t: torch.cat([p.clone() for p in s.chunk(2)] + [t[:0]]),
            lambda s, t: s.unbind()[1].expand(4, 4).clone().add_(t),
            lambda s, t: torch.rand_like(s) + t,
            lambda s, t: torch.where(s > t, s, t),
            lambda s, t: torch.nn.functional.dropout(s, 0.5, False),
            lambda s, t: s.index_copy_(0, torch.tensor([2]), t[:1].clone()),
            lambda s, t: torch.add(s, t, out=torch.empty(4, 4)),
        ]
        for _ in range(14):
            pool.append(rng.choice(moves)(rng.choice(pool), rng.choice(pool)))
        return tuple(value.clone() for value in pool[-4:])
