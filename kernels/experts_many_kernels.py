"""Device code of the experts for tens to hundreds of tokens: pairs of a token and an expert, grouped by expert.

Enters: what `experts_kernels` takes. Leaves: the same. Invariant: a pair's place among the groups is a function of the
chosen experts alone, no two programs write one element, and the grid depends on shapes alone: a program goes through
all of its expert's pairs, however many there are.
"""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from .experts_kernels import activated, dot, rounded


@triton.jit(do_not_specialize=["P"])
def experts_group(chosen, order, start, P, P2: tl.constexpr, EXPERTS: tl.constexpr):
    """One expert's pairs, in their order, behind those of the experts before it."""
    expert = tl.program_id(0)
    pairs = tl.arange(0, P2)
    ids = tl.load(chosen + pairs, mask=pairs < P, other=EXPERTS).to(tl.int32)
    mine = ids == expert
    first = tl.sum((ids < expert).to(tl.int32), 0)
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(order + first + rank, pairs, mask=mine)
    tl.store(start + expert, first)
    if expert == EXPERTS - 1:
        tl.store(start + EXPERTS, first + tl.sum(mine.to(tl.int32), 0))


@triton.jit
def experts_up_many(
    x, order, start, w, bias, act, x_t, w_e, w_n, w_k, w_u, b_e, b_n, b_u,
    K: tl.constexpr, TOKENS: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS activations of one expert, for each of its pairs, TOKENS at a time; kept in the order of the groups."""
    blocks: tl.constexpr = (INNER + ROWS - 1) // ROWS
    expert = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    there = rows[None, :] < INNER
    gates = w + expert.to(tl.int64) * w_e + rows[None, :] * w_n + cols[:, None] * w_k
    begin, end = tl.load(start + expert), tl.load(start + expert + 1)
    for tile in tl.range(begin, end, TOKENS, num_stages=1):
        places = tile + tl.arange(0, TOKENS)
        tokens = tl.load(order + places, mask=places < end, other=0) // K
        here = (places < end)[:, None]
        inputs = x + tokens[:, None] * x_t + cols[None, :]
        g = tl.zeros([TOKENS, ROWS], tl.float32)
        u = tl.zeros([TOKENS, ROWS], tl.float32)
        for c in tl.range(0, HIDDEN, COLS, num_stages=STAGES):
            part = tl.load(inputs + c, mask=here & (cols[None, :] < HIDDEN - c), other=0.0)
            mask = there & (cols[:, None] < HIDDEN - c)
            g = dot(part, tl.load(gates + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first"), g)
            if GATED:
                u = dot(part, tl.load(gates + w_u + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first"), u)
        if BIAS:
            near = bias + expert.to(tl.int64) * b_e + rows * b_n
            g += tl.load(near, mask=rows < INNER, other=0.0).to(tl.float32)[None, :]
            if GATED:
                u += tl.load(near + b_u, mask=rows < INNER, other=0.0).to(tl.float32)[None, :]
        value = activated(g, u, ACT, GATED, ALPHA, LIMIT, SHIFT)
        at = act + places[:, None] * INNER + rows[None, :]
        tl.store(at, rounded(value, act.dtype.element_ty), mask=here & there)


@triton.jit
def experts_down_many(
    act, order, start, scale, w, bias, part, w_e, w_n, w_k, b_e,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one expert for each of its pairs, weighted, in float32, at the pair's own place."""
    blocks: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    expert = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    there = rows[None, :] < HIDDEN
    weights = w + expert.to(tl.int64) * w_e + rows[None, :] * w_n + cols[:, None] * w_k
    begin, end = tl.load(start + expert), tl.load(start + expert + 1)
    for tile in tl.range(begin, end, TOKENS, num_stages=1):
        places = tile + tl.arange(0, TOKENS)
        pairs = tl.load(order + places, mask=places < end, other=0)
        here = (places < end)[:, None]
        inputs = act + places[:, None] * INNER + cols[None, :]
        total = tl.zeros([TOKENS, ROWS], tl.float32)
        for c in tl.range(0, INNER, COLS, num_stages=STAGES):
            values = tl.load(inputs + c, mask=here & (cols[None, :] < INNER - c), other=0.0)
            mask = there & (cols[:, None] < INNER - c)
            weight = tl.load(weights + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first")
            total = dot(values, weight, total)
        if BIAS:
            near = bias + expert.to(tl.int64) * b_e + rows
            total += tl.load(near, mask=rows < HIDDEN, other=0.0).to(tl.float32)[None, :]
        share = tl.load(scale + pairs, mask=places < end, other=0.0).to(tl.float32)
        tl.store(part + pairs[:, None] * HIDDEN + rows[None, :], total * share[:, None], mask=here & there)
