"""Programs drawn from a seed whose numbers are small multiples of a power of two: whatever the order of a sum, the bits
are the same. So a fused graph must equal its original exactly, and a misread row shows."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

SHAPES = [(4, 4), (4, 4), (4,), (4, 1), (1, 4), (2, 4), (2, 2, 4), (8, 4), (1, 4, 4), (4, 2, 2)]
Move = Callable[["ExactProgram", random.Random, list[Tensor]], Tensor]


def rewarding(a: Tensor) -> Tensor:
    """Back to small numbers."""
    return a.clamp(-32, 32)


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes broadcast."""
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a.shape), reversed(b.shape), strict=False))


def _pair(rng: random.Random, pool: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two tensors that broadcast."""
    first = rng.choice(pool)
    return first, next(b for b in [*rng.sample(pool, len(pool)), first] if _meet(first, b) and first.dtype == b.dtype)


def _binary(program: ExactProgram, rng: random.Random, pool: list[Tensor]) -> Tensor:
    a, b = _pair(rng, pool)
    compute: list[Callable[[], Tensor]] = [
        lambda: a + b,
        lambda: torch.add(a, b, alpha=2),
        lambda: a - b,
        lambda: rewarding(a) * rewarding(b),
        lambda: torch.where(a > b, a, b),
        lambda: torch.maximum(a, b),
        lambda: torch.where((a >= 0) & (b != 1), a, b),
        lambda: a + b[..., :1] if b.dim() else a,
    ]
    return rewarding(rng.choice(compute)())


def _unary(program: ExactProgram, rng: random.Random, pool: list[Tensor]) -> Tensor:
    a = rng.choice(pool)
    compute: list[Callable[[], Tensor]] = [
        lambda: a * 0.5,
        lambda: a.relu(),
        lambda: -a,
        lambda: 1 - a,
        lambda: a.abs().floor(),
        lambda: a.to(torch.bfloat16).to(a.dtype) if a.dtype == torch.float32 else a.float().to(torch.bfloat16),
        lambda: a.clone(),
        lambda: (a > 1).to(a.dtype),
    ]
    return rng.choice(compute)()


def _reduce(program: ExactProgram, rng: random.Random, pool: list[Tensor]) -> Tensor:
    a = rng.choice([t for t in pool if t.dim()])
    keep = rng.random() < 0.5
    compute: list[Callable[[], Tensor]] = [
        lambda: a.sum(-1, keepdim=keep),
        lambda: a.amax(-1, keepdim=keep),
        lambda: a.amin(-1, keepdim=keep),
        lambda: a.mean(-1, keepdim=keep),
        lambda: a.sum(0),
        lambda: a.sum(-2) if a.dim() > 1 else a.sum(),
    ]
    return rewarding(rng.choice(compute)())


def _view(program: ExactProgram, rng: random.Random, pool: list[Tensor]) -> Tensor:
    a = rng.choice([t for t in pool if t.dim()])
    fitting = [shape for shape in SHAPES if torch.Size(shape).numel() == a.numel()]
    compute: list[Callable[[], Tensor]] = [
        lambda: a.reshape(rng.choice(fitting)) if fitting else a.reshape(-1),
        lambda: a.transpose(0, -1),
        lambda: a.unsqueeze(rng.choice([0, -1])) if a.dim() < 3 else a.squeeze(),
        lambda: a.expand(4, *a.shape[1:]) if a.shape[0] == 1 else a[:1].expand(4, *a.shape[1:]),
        lambda: a.expand(*a.shape[:-1], 4) if a.shape[-1] == 1 else a,
        lambda: a[..., : max(1, a.shape[-1] // 2)],
        lambda: rng.choice(a.chunk(2, dim=-1)),
        lambda: a[..., 1:].contiguous(),
        lambda: a[0] if a.dim() > 1 else a,
        lambda: a.contiguous().view(-1),
    ]
    return rng.choice(compute)()


def _join(program: ExactProgram, rng: random.Random, pool: list[Tensor]) -> Tensor:
    a = rng.choice([t for t in pool if t.dim()])
    rows = torch.arange(4) % a.shape[0]
    compute: list[Callable[[], Tensor]] = [
        lambda: torch.cat([a, a * 2], dim=-1)[..., :4],
        lambda: torch.cat([-a[..., a.shape[-1] // 2 :], a[..., : a.shape[-1] // 2]], dim=-1),
        lambda: a[rows],
        lambda: program.table[a.reshape(-1)[:4].abs().long() % 4].to(a.dtype),
        lambda: torch.nn.functional.embedding(a.reshape(-1)[:2].abs().long() % 4, program.table),
        lambda: a.gather(-1, (a.abs().long() % a.shape[-1])),
    ]
    return rng.choice(compute)()


def _opaque(program: ExactProgram, rng: random.Random, pool: list[Tensor]) -> Tensor:
    a = rng.choice([t for t in pool if t.dim()])
    compute: list[Callable[[], Tensor]] = [
        lambda: rewarding(a.reshape(-1, 1).float().expand(-1, 4) @ program.table),
        lambda: torch.sort(a, dim=-1, stable=True)[0],
        lambda: torch.sort(a, dim=-1, stable=True)[1].to(a.dtype),
        lambda: (torch.rand_like(a, dtype=torch.float32) * 4).floor().to(a.dtype),
        lambda: a.flip(-1),
        lambda: a.cumsum(-1).clamp(-32, 32),
    ]
    return rng.choice(compute)()


def _write(program: ExactProgram, rng: random.Random, pool: list[Tensor]) -> Tensor:
    a, b = _pair(rng, [t for t in pool if t.dim()])
    own = a.clone() if rng.random() < 0.5 else rng.choice([program.state, program.more])
    fits = b.to(own.dtype) if _meet(own, b) and (own + b).shape == own.shape else own * 2
    compute: list[Callable[[], Tensor]] = [
        lambda: own.add_(fits).clamp_(-32, 32),
        lambda: own.copy_(fits),
        lambda: own.mul_(0.5),
        lambda: own[..., :1].add_(1) + own,
        lambda: (own.sub_(fits), own.clone())[1].clamp_(-32, 32),
        lambda: own.reshape(-1)[:2].zero_() + own.sum(),
    ]
    return rng.choice(compute)()


MOVES: list[Move] = [_binary, _binary, _binary, _unary, _unary, _reduce, _reduce, _view, _view, _join, _opaque, _write]


class ExactProgram(nn.Module):
    """A straight line of elementwise ops, reductions, views, gathers, writes and opaque ops over two 4 x 4 inputs."""

    table: Tensor
    state: Tensor
    more: Tensor

    def __init__(self, seed: int, length: int = 24) -> None:
        super().__init__()
        self.seed, self.length = seed, length
        self.register_buffer("table", torch.arange(16.0).reshape(4, 4) % 5)
        self.register_buffer("state", torch.arange(16.0).reshape(4, 4) - 8)
        self.register_buffer("more", torch.arange(4.0))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        rng = random.Random(self.seed)
        pool = [x, y, self.table * 2, self.state, self.more + 1]
        for _ in range(self.length):
            made = rng.choice(MOVES)(self, rng, pool)
            if 0 < made.numel() <= 64 and made.dim() <= 3:
                pool.append(made)
        return tuple(value.clone() for value in pool[-4:])


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two inputs of small whole numbers."""
    x, y = torch.randint(-4, 5, (2, 4, 4), generator=generator).float()
    return x, y


class GrowingProgram(nn.Module):
    """The like over inputs whose leading dimension may be of any size: [n, 4, 4] and [n, 1, 4]."""

    table: Tensor
    seen: Tensor

    def __init__(self, seed: int, length: int = 20) -> None:
        super().__init__()
        self.seed, self.length = seed, length
        self.register_buffer("table", torch.arange(20.0).reshape(5, 4) % 7)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        rng = random.Random(self.seed)
        pool = [x, y, x.reshape(-1, 4) * 2]
        for _ in range(self.length):
            pool.append(rewarding(self.move(rng, pool)))
        return tuple(value.clone() for value in pool[-4:])

    def move(self, rng: random.Random, pool: list[Tensor]) -> Tensor:
        a = rng.choice(pool)
        alike = [b for b in pool if b.dim() == a.dim() and _grow_alike(a, b)]
        b, keep = rng.choice(alike), rng.random() < 0.5
        n = pool[0].shape[0]
        fours = a.reshape(n, -1).shape[1] % 4 == 0
        compute: list[Callable[[], Tensor]] = [
            lambda: a + b,
            lambda: torch.where(a > b, a, b * 0.5),
            lambda: torch.maximum(a, b) - 1,
            lambda: (a * 0.5).relu(),
            lambda: a.sum(-1, keepdim=keep) if a.dim() > 1 else -a,
            lambda: a.amax(-1, keepdim=True) + a if a.dim() > 1 else a.abs(),
            lambda: a.reshape(-1, 4) if fours else a,
            lambda: a.reshape(n, -1),
            lambda: a.reshape(n, -1, 4).transpose(1, 2).contiguous() if fours else a,
            lambda: a[..., : max(1, a.shape[-1] // 2)] if a.dim() > 1 else a,
            lambda: torch.cat([a, -a], -1)[..., : a.shape[-1]] if a.dim() > 1 else a.neg(),
            lambda: self.table[a.reshape(n, -1)[:, 0].abs().long() % 5],
            lambda: a.reshape(-1, 1) + self.table[1],
            lambda: a.reshape(n, -1)[:, :1].expand(n, 4) * 0.5,
            lambda: a.clone().add_(1).mul_(0.5),
            lambda: (self.seen.add_(1), a + self.seen[0])[1],
            lambda: a.new_ones(n, 4) + a.reshape(n, -1)[:, :1],
            lambda: a.flip(-1),
        ]
        return rng.choice(compute)()


def _grow_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes broadcast whatever the size of the growing dimension."""
    return all(
        str(m) == str(n) or (i > 0 and 1 in (m, n) and isinstance(m, int) and isinstance(n, int))
        for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True))
    )


def draw_growing(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    """Inputs of size n."""
    x = torch.randint(-4, 5, (n, 4, 4), generator=generator).float()
    return x, torch.randint(-4, 5, (n, 1, 4), generator=generator).float()
