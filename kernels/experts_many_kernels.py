"""Device code of the experts for tens to hundreds of tokens: pairs of a token and an expert, grouped by expert.

Enters: what `experts_kernels` takes. Leaves: the same. Invariant: a pair's place among the groups is a function of the
chosen experts alone, no two programs write one element, and the grid depends on shapes alone: a program goes through
all of its expert's pairs, however many there are.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl

from .experts_kernels import inner_values, outer_values, rounded


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
    COLS: tl.constexpr, STAGES: tl.constexpr, TURNS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS activations of one expert, for each of its pairs, TOKENS at a time; kept in the order of the groups."""
    blocks: tl.constexpr = (INNER + ROWS - 1) // ROWS
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * ROWS
    rows = first + tl.arange(0, ROWS)
    begin, end = tl.load(start + expert), tl.load(start + expert + 1)
    for tile in tl.range(begin, end, TOKENS, num_stages=1):
        places = tile + tl.arange(0, TOKENS)
        tokens = tl.load(order + places, mask=places < end, other=0) // K
        here = (places < end)[:, None]
        value = inner_values(
            x + tokens[:, None] * x_t, here, w + expert * w_e, bias + expert * b_e, first, w_n, w_k, w_u, b_n, b_u,
            TOKENS, HIDDEN, INNER, ROWS, COLS, STAGES, TURNS, BIAS, ACT, GATED, ALPHA, LIMIT, SHIFT,
        )  # fmt: skip
        at = act + places[:, None] * INNER + rows[None, :]
        tl.store(at, rounded(value, act.dtype.element_ty), mask=here & (rows[None, :] < INNER))


@triton.jit
def experts_down_many(
    act, order, start, scale, w, bias, part, w_e, w_n, w_k, b_e,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one expert for each of its pairs, weighted, in float32, at the pair's own place."""
    blocks: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * ROWS
    rows = first + tl.arange(0, ROWS)
    begin, end = tl.load(start + expert), tl.load(start + expert + 1)
    for tile in tl.range(begin, end, TOKENS, num_stages=1):
        places = tile + tl.arange(0, TOKENS)
        pairs = tl.load(order + places, mask=places < end, other=0)
        here = (places < end)[:, None]
        total = outer_values(
            act + places[:, None] * INNER, here, w + expert * w_e, bias + expert * b_e, first, w_n, w_k,
            TOKENS, HIDDEN, INNER, ROWS, COLS, STAGES, BIAS,
        )  # fmt: skip
        share = tl.load(scale + pairs, mask=places < end, other=0.0).to(tl.float32)
        at = part + pairs[:, None] * HIDDEN + rows[None, :]
        tl.store(at, total * share[:, None], mask=here & (rows[None, :] < HIDDEN))
