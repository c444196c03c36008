"""Rows that are kept apart: what is proved holds in numbers, what mixes is not proved, and writes are named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_programs import RandomProgram
from torch import Tensor, nn
from torch.func import functional_call

from auxstream.capture.rows import Mixing, find_mixing
from auxstream.capture.trace import TracedGraph, trace
from auxstream.kernels.experts import moe_experts
from auxstream.kernels.products import skinny_linear
from auxstream.kernels.router import Rules, moe_router

ROWS, WIDTH = 3, 8


class Body(nn.Module):
    """`body` over weights, a table and a cache. `x` is [3, 8]; `y` [8, 3], a row to a column; `ids` [3]."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.table = nn.Embedding(16, WIDTH)
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5)
        self.register_buffer("cache", torch.zeros(16, WIDTH))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor, ids: Tensor) -> Any:
        return self.body(self, x, y, ids)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(WIDTH, ROWS, generator=generator)
    return x, y, torch.tensor([1, 2, 0])


IN_ROWS = (0, 1, 0)


def experts(x: Tensor, chosen: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """A mixture whose weights are made of `rows`, one expert each."""
    up = rows[:, None, :] * torch.ones(6, 1)
    flags = (False, 1.0, None, 0.0, False, False, False)
    return moe_experts()(x, chosen, scale, up, up.mT.contiguous(), None, None, "silu", *flags)


def route(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rules = Rules(product=torch.float32, softmax=True, top_k=2, out=torch.float32)
    return moe_router()(x, weight, None, None, None, *rules.fields)


# Per case: what it computes, and the dimension of the output's rows (None for no rows).
APART: dict[str, tuple[Callable[..., Tensor], int | None]] = {
    "a mlp": (lambda m, x, y, i: m.linear(F.silu(m.linear(x)) * x + m.scale), 0),
    "columns": (lambda m, x, y, i: m.linear.weight @ y, 1),
    "columns turned": (lambda m, x, y, i: m.linear(y.t()) + x, 0),
    "norms": (lambda m, x, y, i: m.norm(x) + F.rms_norm(x, (WIDTH,)), 0),
    "softmax in a row": (lambda m, x, y, i: x.softmax(-1) + y.softmax(0).t(), 0),
    "sums in a row": (lambda m, x, y, i: x.mean(-1, keepdim=True) * x.amax(1)[:, None] + x.sum(1)[:, None], 0),
    "a row's best": (lambda m, x, y, i: x.topk(2, -1)[0] + x.sort(-1).values[:, :2] + x.max(-1)[0][:, None], 0),
    "heads": (lambda m, x, y, i: x.view(ROWS, 2, 4).transpose(1, 2).reshape(ROWS, WIDTH), 0),
    "heads as rows": (lambda m, x, y, i: F.silu(x.view(ROWS * 2, 4)).view(ROWS, WIDTH), 0),
    "heads aside": (lambda m, x, y, i: x.view(ROWS, 2, 4).permute(1, 0, 2) * 2, 1),
    "split and joined": (lambda m, x, y, i: torch.cat([p * 2 for p in x.chunk(2, -1)][::-1], -1), 0),
    "stacked": (lambda m, x, y, i: torch.stack([x, x * 2], 1), 0),
    "stacked in front": (lambda m, x, y, i: torch.stack([x, x * 2]), 1),
    "one column": (lambda m, x, y, i: x[:, 3] + y[2] + x.unbind(1)[0], 0),
    "some columns": (lambda m, x, y, i: x[:, 2:6] * 3, 0),
    "embedded": (lambda m, x, y, i: m.table(i) + x, 0),
    "looked up": (lambda m, x, y, i: m.cache[i], 0),
    "gathered": (lambda m, x, y, i: x.gather(1, x.argsort(-1)), 0),
    "batched products": (lambda m, x, y, i: (x[:, :, None] @ x[:, None, :]) @ m.linear.weight, 0),
    "attention in a row": (
        lambda m, x, y, i: F.scaled_dot_product_attention(*[x.view(ROWS, 2, 4, 1) + k for k in range(3)]),
        0,
    ),
    "grouped attention": (
        lambda m, x, y, i: F.scaled_dot_product_attention(
            x.view(ROWS, 4, 1, 2), x.view(ROWS, 2, 2, 2), x.view(ROWS, 2, 2, 2), enable_gqa=True
        ),
        0,
    ),
    "experts": (lambda m, x, y, i: experts(x, torch.stack([i, i + 1], 1), x[:, :2], m.table.weight), 0),
    "a router": (lambda m, x, y, i: sum(route(x, m.table.weight)), 0),
    "a product of few rows": (lambda m, x, y, i: skinny_linear()(x, [m.linear.weight], [m.linear.bias])[0], 0),
    "masks": (lambda m, x, y, i: torch.where(x > 0, x, 1.0).masked_fill(i[:, None] > 1, 0.0), 0),
    "in place": (lambda m, x, y, i: (z := m.linear(x), z.add_(x), z.mul_(2))[0], 0),
    "in place through a view": (lambda m, x, y, i: (z := x * 2, z[:, :4].mul_(3), z)[2], 0),
    "an input in place": (lambda m, x, y, i: x.add_(1) * 2, 0),
    "positions": (lambda m, x, y, i: x + torch.arange(ROWS)[:, None], 0),
    "a constant": (lambda m, x, y, i: m.scale * 2, None),
    "a counter": (lambda m, x, y, i: (m.count.add_(1), m.linear(x))[1], 0),
    "random numbers": (lambda m, x, y, i: x + torch.rand(ROWS, WIDTH), 0),
}

MIXED: dict[str, tuple[Callable[..., Tensor], int | None]] = {
    "mean over rows": (lambda m, x, y, i: x - x.mean(0), 0),
    "mean of all": (lambda m, x, y, i: x * x.mean(), 0),
    "softmax over rows": (lambda m, x, y, i: x.softmax(0), 0),
    "one number": (lambda m, x, y, i: x.sum(), None),
    "attention among rows": (lambda m, x, y, i: (x @ x.t()).softmax(-1) @ x, 0),
    "sdpa among rows": (lambda m, x, y, i: F.scaled_dot_product_attention(x[None], x[None], x[None])[0], 0),
    "heads of rows, shared": (
        lambda m, x, y, i: F.scaled_dot_product_attention(
            m.scale[:6].view(1, 6, 1, 1), *[x.view(1, ROWS, WIDTH, 1)] * 2, enable_gqa=True
        ).view(2, ROWS),
        1,
    ),
    "experts of rows": (lambda m, x, y, i: experts(x, torch.stack([i, i], 1), x[:, :2], x), 0),
    "experts chosen in another order": (lambda m, x, y, i: experts(x, i.flip(0)[:, None], x[:, :1], m.table.weight), 0),
    "experts of columns": (lambda m, x, y, i: experts(y, y.long() % 3, y, m.table.weight[:, :3]), 1),
    "a router of rows": (lambda m, x, y, i: route(x, x)[1], 0),
    "a product with rows": (lambda m, x, y, i: skinny_linear()(x, [x], [])[0], 0),
    "sorted rows": (lambda m, x, y, i: x.sort(0)[0], 0),
    "running sums": (lambda m, x, y, i: x.cumsum(0), 0),
    "rows turned round": (lambda m, x, y, i: x.flip(0), 0),
    "rows into columns": (lambda m, x, y, i: x.t().reshape(ROWS, WIDTH), 0),
    "rows regrouped": (lambda m, x, y, i: x.view(2, 12).softmax(-1).view(ROWS, WIDTH), 0),
    "the last row": (lambda m, x, y, i: x + x[-1], 0),
    "the last row alone": (lambda m, x, y, i: x[-1], None),
    "some rows": (lambda m, x, y, i: x + F.pad(x[1:], (0, 0, 0, 1)), 0),
    "indexed rows": (lambda m, x, y, i: x[i.flip(0)], 0),
    "gathered rows": (lambda m, x, y, i: x.gather(0, i[:, None].expand(3, 8)), 0),
    "rows as a table": (lambda m, x, y, i: F.embedding(i, x), 0),
    "rows in other columns": (lambda m, x, y, i: x[:, :3] + y[:3], 0),
    "a product of both": (lambda m, x, y, i: x @ y @ x, 0),
    "joined rows": (lambda m, x, y, i: torch.cat([x[1:], x[:1]]), 0),
    "normed over all": (lambda m, x, y, i: F.layer_norm(x, (ROWS, WIDTH)), 0),
    "an input in place": (lambda m, x, y, i: (x.sub_(x.mean(0)), i * 2)[1], 0),
    "in place": (lambda m, x, y, i: (z := x * 2, z.add_(x.sum(0)), z)[2], 0),
    "in place through a view": (lambda m, x, y, i: (z := x * 2, z[0].add_(x[1]), z)[2], 0),
    "in place, seen before": (lambda m, x, y, i: (z := torch.zeros(3, 8), v := z[1:], z.copy_(x), v.sum() + x)[3], 0),
    "the wrong dimension": (lambda m, x, y, i: y * 2, 0),
    "called free": (lambda m, x, y, i: x * 2, None),
}


def mixing_of(body: Callable[..., Any], *outputs: int | None) -> Mixing:
    return find_mixing(trace(Body(body), inputs()), IN_ROWS, outputs)


@pytest.mark.parametrize("case", APART)
def test_rows_that_are_kept_apart_are_proved(case: str) -> None:
    body, dim = APART[case]
    found = mixing_of(body, dim)
    assert found == Mixing((), None, ())


@pytest.mark.parametrize("case", MIXED)
def test_rows_that_mix_are_not(case: str) -> None:
    body, dim = MIXED[case]
    found = mixing_of(body, dim)
    assert found.unproved == (("input 'x'",) if case == "an input in place" else ("output 0",))


@pytest.mark.parametrize("case", APART)
def test_what_is_proved_holds_in_numbers(case: str) -> None:
    body, dim = APART[case]
    assert leaks(trace(Body(body), inputs()), [dim]) == []


@pytest.mark.parametrize("case", [case for case in MIXED if case not in ("an input in place", "sorted rows")])
def test_and_what_mixes_shows_in_numbers(case: str) -> None:
    """The twin: the comparison above can fail."""
    body, dim = MIXED[case]
    assert leaks(trace(Body(body), inputs()), [dim]) == [0]


def leaks(traced: TracedGraph, dims: list[int | None]) -> list[int]:
    """Outputs in which something of another row shows, by changing one row at a time."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        with torch.no_grad():
            found = copy.deepcopy(traced.graph_module)(*(tensor.clone() for tensor in given))
        return found if isinstance(found, tuple) else (found,)

    before = run(*inputs())
    shown: set[int] = set()
    for row in range(ROWS):
        x, y, ids = inputs()
        x[row] = x[row].flip(0) * 3 - 1
        y[:, row] *= -2
        ids[row] = (ids[row] + 1) % ROWS
        others = torch.tensor([r for r in range(ROWS) if r != row])
        for number, (one, other, dim) in enumerate(zip(before, run(x, y, ids), dims, strict=True)):
            mine, theirs = (t if dim is None else t.index_select(dim, others) for t in (one, other))
            if not torch.equal(mine, theirs):
                shown.add(number)
    return sorted(shown)


class Squares(nn.Module):
    """A random program on four rows of four: no shape tells rows from columns."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.program = RandomProgram(seed)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.program(x)


def test_whatever_is_proved_of_random_programs_holds_in_numbers() -> None:
    proved = 0
    for seed in range(150):
        traced = trace(Squares(seed), (torch.randn(4, 4),))
        claims: list[tuple[int, int | None]] = []
        for dim in (None, 0, 1):
            found = find_mixing(traced, (0,), (dim,) * 4)
            claims += [(k, dim) for k in range(4) if f"output {k}" not in found.unproved]
        proved += sum(dim is not None and (k, None) not in claims for k, dim in claims)
        before = values(traced, None)
        for row in range(4):
            after = values(traced, row)
            others = torch.tensor([r for r in range(4) if r != row])
            for k, dim in claims:
                one, other = (v[k] if dim is None else v[k].index_select(dim, others) for v in (before, after))
                assert torch.equal(one.nan_to_num(), other.nan_to_num()), (seed, k, dim)
    assert proved > 30, "or the test says little"


def values(traced: TracedGraph, changed: int | None) -> tuple[Tensor, ...]:
    x = torch.linspace(-1, 1, 16).view(4, 4).clone()
    if changed is not None:
        x[changed] = torch.tensor([5.0, -3.0, 0.5, 9.0])
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in traced.graph_module.named_buffers()}
    return functional_call(traced.graph_module, state, (x,))


# --- writes -----------------------------------------------------------------------------------------------------------


def test_writes_of_rows_to_what_outlives_a_call_are_named() -> None:
    def cached(m: Body, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        m.count.add_(1)
        m.cache.index_copy_(0, ids, x)
        return m.linear(x)

    found = mixing_of(cached, 0)
    assert found.written == ("cache",), "the counter has nothing of any row in it"
    assert found.unproved == ()

    def read_back(m: Body, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        m.cache.index_copy_(0, ids, x)
        return m.cache[ids]

    assert mixing_of(read_back, 0).unproved == ("output 0",)


def test_inputs_without_rows_are_named_too() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache.add_(x.sum())
            return x * 2

    traced = trace(Written(), (torch.randn(3, 8), torch.zeros(4)))
    assert find_mixing(traced, (0, None), (0,)).written == ("cache",)


def test_the_first_op_that_may_mix_is_blamed() -> None:
    found = mixing_of(lambda m, x, y, i: (x - m.linear(x).mean(0, keepdim=True)).relu(), 0)
    assert found.blame is not None
    assert found.blame.target is torch.ops.aten.mean.dim


def test_an_unknown_op_proves_nothing() -> None:
    @torch.library.custom_op("auxstream_test::rows_unknown", mutates_args=())
    def unknown(x: Tensor) -> Tensor:
        return x * 2

    @unknown.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    assert mixing_of(lambda m, x, y, i: unknown(x), 0).unproved == ("output 0",)
    assert mixing_of(lambda m, x, y, i: unknown(m.scale), None).unproved == ()
