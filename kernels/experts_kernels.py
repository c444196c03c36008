"""Device code of the experts for few tokens: each expert that is reached is read once, at the pace of memory.

Enters: hidden states, the experts chosen per token, and both weights of every expert. Leaves: per pair of a token and
an expert its activations, then its output rows, or for one token the sum of them. Invariant: programs write disjoint
elements, every sum has one fixed order, and no address depends on anything but the chosen experts.

Strides say how weights lie: `e` from expert to expert, `n` from one output to the next, `k` along what is summed over,
`u` from a gate's row to its partner's. Sums are float32; activations are rounded once, to the type of the model.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from . import device_math as dm

NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def activated(
    g, u, ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """act(gate) * (up + SHIFT), both clamped before if there is a limit; act(gate) alone without a gate."""
    if LIMIT is not None:
        g = tl.minimum(g, LIMIT, propagate_nan=NAN)
    if ACT == "silu":
        y = g * tl.sigmoid(g * ALPHA)
    elif ACT == "gelu_tanh":  # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        y = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif ACT == "gelu":
        y = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "relu2")
        y = tl.maximum(g, 0.0, propagate_nan=NAN)
        y = y * y
    if GATED:
        if LIMIT is not None:
            u = tl.minimum(tl.maximum(u, -LIMIT, propagate_nan=NAN), LIMIT, propagate_nan=NAN)
        y = y * (u + SHIFT)
    return y


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """To the nearest of that type, in the interpreter too."""
    if tl.bfloat16 == DTYPE:
        return dm.to_bf16(x)
    else:
        return x.to(DTYPE)


@triton.jit
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _wide_dot(a, b, total):
    """The interpreter multiplies bfloat16 by the integers it keeps it in."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total)


dot = _wide_dot if knobs.runtime.interpret else _dot


# --- one token --------------------------------------------------------------------------------------------------------


@triton.jit
def experts_up_one(
    x, chosen, w, bias, act, w_e, w_n, w_k, w_u, b_e, b_n, b_u,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BIAS: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS activations of one choice's expert. Unrolled: all weights are asked for before the first is waited for."""
    blocks: tl.constexpr = (INNER + ROWS - 1) // ROWS
    slot = tl.program_id(0) // blocks
    expert = tl.load(chosen + slot).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    there = (rows[:, None] < INNER) & (cols[None, :] >= 0)
    inputs = x + rows[:, None] * 0 + cols[None, :]  # laid out as the weights are: no exchange between threads
    gates = w + expert * w_e + rows[:, None] * w_n + cols[None, :] * w_k
    g = tl.zeros([ROWS, COLS], tl.float32)
    u = tl.zeros([ROWS, COLS], tl.float32)
    for c in tl.static_range(0, HIDDEN, COLS):
        mask = there if c + COLS <= HIDDEN else there & (cols[None, :] < HIDDEN - c)
        part = tl.load(inputs + c, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gates + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first")
        g += gate.to(tl.float32) * part
        if GATED:
            up = tl.load(gates + w_u + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first")
            u += up.to(tl.float32) * part
    gate_sum, up_sum = tl.sum(g, 1), tl.sum(u, 1)
    if BIAS:
        near = bias + expert * b_e + rows * b_n
        gate_sum += tl.load(near, mask=rows < INNER, other=0.0).to(tl.float32)
        if GATED:
            up_sum += tl.load(near + b_u, mask=rows < INNER, other=0.0).to(tl.float32)
    value = activated(gate_sum, up_sum, ACT, GATED, ALPHA, LIMIT, SHIFT)
    tl.store(act + slot * INNER + rows, rounded(value, act.dtype.element_ty), mask=rows < INNER)


@triton.jit
def experts_down_one(
    act, chosen, scale, w, bias, out, w_e, w_n, w_k, b_e,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of the one token, summed over its experts."""
    slots = tl.arange(0, K2)
    expert = tl.load(chosen + slots, mask=slots < K, other=0).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    there = (slots[:, None, None] < K) & (rows[None, :, None] < HIDDEN)
    share = tl.load(scale + slots, mask=slots < K, other=0.0).to(tl.float32)
    weights = w + expert[:, None, None] * w_e + rows[None, :, None] * w_n + cols[None, None, :] * w_k
    inputs = act + slots[:, None, None] * INNER + rows[None, :, None] * 0 + cols[None, None, :]
    total = tl.zeros([K2, ROWS, COLS], tl.float32)
    for c in tl.static_range(0, INNER, COLS):
        mask = there & (cols[None, None, :] < INNER - c)
        weight = tl.load(weights + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first")
        total += weight.to(tl.float32) * tl.load(inputs + c, mask=mask, other=0.0).to(tl.float32)
    each = tl.sum(total, 2)
    if BIAS:
        near = bias + expert[:, None] * b_e + rows[None, :]
        each += tl.load(near, mask=(slots[:, None] < K) & (rows[None, :] < HIDDEN), other=0.0).to(tl.float32)
    value = tl.sum(each * share[:, None], 0)
    tl.store(out + rows, rounded(value, out.dtype.element_ty), mask=rows < HIDDEN)


# --- several tokens of one expert -------------------------------------------------------------------------------------


@triton.jit
def product(
    total, inputs, here, weights, first, w_n, w_k, N, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """total + inputs @ rows of weights, from `first` on and below N."""
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, COLS)
    near = weights + rows[None, :] * w_n + cols[:, None] * w_k
    for c in tl.range(0, WIDTH, COLS, num_stages=STAGES):
        part = tl.load(inputs + (c + cols)[None, :], mask=here & (cols[None, :] < WIDTH - c), other=0.0)
        mask = (rows[None, :] < N) & (cols[:, None] < WIDTH - c)
        total = dot(part, tl.load(near + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first"), total)
    return total


@triton.jit
def two_products(
    g, u, inputs, here, weights, first, w_n, w_k, w_u, N, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The same with two weights, `w_u` apart, over one pass of the inputs."""
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, COLS)
    near = weights + rows[None, :] * w_n + cols[:, None] * w_k
    for c in tl.range(0, WIDTH, COLS, num_stages=STAGES):
        part = tl.load(inputs + (c + cols)[None, :], mask=here & (cols[None, :] < WIDTH - c), other=0.0)
        mask = (rows[None, :] < N) & (cols[:, None] < WIDTH - c)
        g = dot(part, tl.load(near + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first"), g)
        u = dot(part, tl.load(near + w_u + c * w_k, mask=mask, other=0.0, eviction_policy="evict_first"), u)
    return g, u


@triton.jit
def inner_values(
    inputs, here, weights, bias, first, w_n, w_k, w_u, b_n, b_u,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr, TURNS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS activations of one expert for each row at `inputs`. TURNS: gates and ups lie in turns, as one matrix."""
    g = tl.zeros([TOKENS, ROWS], tl.float32)
    u = tl.zeros([TOKENS, ROWS], tl.float32)
    if TURNS:
        both = tl.zeros([TOKENS, 2 * ROWS], tl.float32)
        both = product(both, inputs, here, weights, 2 * first, w_u, w_k, 2 * INNER, HIDDEN, 2 * ROWS, COLS, STAGES)
        g, u = tl.split(tl.reshape(both, [TOKENS, ROWS, 2]))
    elif GATED:
        g, u = two_products(g, u, inputs, here, weights, first, w_n, w_k, w_u, INNER, HIDDEN, ROWS, COLS, STAGES)
    else:
        g = product(g, inputs, here, weights, first, w_n, w_k, INNER, HIDDEN, ROWS, COLS, STAGES)
    if BIAS:
        rows = first + tl.arange(0, ROWS)
        g += tl.load(bias + rows * b_n, mask=rows < INNER, other=0.0).to(tl.float32)[None, :]
        if GATED:
            u += tl.load(bias + rows * b_n + b_u, mask=rows < INNER, other=0.0).to(tl.float32)[None, :]
    return activated(g, u, ACT, GATED, ALPHA, LIMIT, SHIFT)


@triton.jit
def outer_values(
    inputs, here, weights, bias, first, w_n, w_k,
    TOKENS: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one expert for each of the rows at `inputs`."""
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    total = product(total, inputs, here, weights, first, w_n, w_k, HIDDEN, INNER, ROWS, COLS, STAGES)
    if BIAS:
        rows = first + tl.arange(0, ROWS)
        total += tl.load(bias + rows, mask=rows < HIDDEN, other=0.0).to(tl.float32)[None, :]
    return total


# --- a few tokens -----------------------------------------------------------------------------------------------------


@triton.jit
def _first_use(chosen, slot, P, PAIRS: tl.constexpr, P2: tl.constexpr):
    """The slot's expert, or -1 if an earlier slot has it or no token chose it. Slots are pairs, or experts."""
    pairs = tl.arange(0, P2)
    ids = tl.load(chosen + pairs, mask=pairs < P, other=-1).to(tl.int32)
    if PAIRS:
        expert = tl.load(chosen + slot).to(tl.int32)
        used = tl.sum(((ids == expert) & (pairs < slot)).to(tl.int32), 0) == 0
    else:
        expert = slot
        used = tl.sum((ids == expert).to(tl.int32), 0) > 0
    return tl.where(used, expert, -1)


@triton.jit
def _mine(chosen, expert, T, K: tl.constexpr, K2: tl.constexpr, TOKENS: tl.constexpr):
    """Per token the first of its choices that is this expert, or K2."""
    tokens, choices = tl.arange(0, TOKENS), tl.arange(0, K2)
    mask = (tokens[:, None] < T) & (choices[None, :] < K)
    ids = tl.load(chosen + tokens[:, None] * K + choices[None, :], mask=mask, other=-1).to(tl.int32)
    return tl.min(tl.where(ids == expert, choices[None, :], K2), 1)


@triton.jit
def _share(chosen, scale, expert, T, K: tl.constexpr, K2: tl.constexpr, TOKENS: tl.constexpr):
    """Per token its weight for this expert."""
    tokens, choices = tl.arange(0, TOKENS), tl.arange(0, K2)
    mask = (tokens[:, None] < T) & (choices[None, :] < K)
    at = tokens[:, None] * K + choices[None, :]
    ids = tl.load(chosen + at, mask=mask, other=-1).to(tl.int32)
    scales = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(tl.where(ids == expert, scales, 0.0), 1)


@triton.jit(do_not_specialize=["T"])
def experts_up_few(
    x, chosen, w, bias, act, T, x_t, w_e, w_n, w_k, w_u, b_e, b_n, b_u,
    K: tl.constexpr, K2: tl.constexpr, P2: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    TURNS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS activations of one expert, for each of its tokens."""
    blocks: tl.constexpr = (INNER + ROWS - 1) // ROWS
    expert = _first_use(chosen, tl.program_id(0) // blocks, T * K, PAIRS, P2)
    if expert >= 0:
        first = (tl.program_id(0) % blocks) * ROWS
        choice = _mine(chosen, expert, T, K, K2, TOKENS)
        tokens, rows = tl.arange(0, TOKENS), first + tl.arange(0, ROWS)
        here = (choice < K)[:, None]
        value = inner_values(
            x + tokens[:, None] * x_t, here, w + expert.to(tl.int64) * w_e, bias + expert.to(tl.int64) * b_e, first,
            w_n, w_k, w_u, b_n, b_u, TOKENS, HIDDEN, INNER, ROWS, COLS, STAGES, TURNS, BIAS, ACT, GATED, ALPHA, LIMIT,
            SHIFT,
        )  # fmt: skip
        at = act + (tokens * K + choice)[:, None] * INNER + rows[None, :]
        tl.store(at, rounded(value, act.dtype.element_ty), mask=here & (rows[None, :] < INNER))


@triton.jit(do_not_specialize=["T"])
def experts_down_few(
    act, chosen, scale, w, bias, part, T, w_e, w_n, w_k, b_e,
    K: tl.constexpr, K2: tl.constexpr, P2: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one expert for each of its tokens, weighted, in float32."""
    blocks: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    expert = _first_use(chosen, tl.program_id(0) // blocks, T * K, PAIRS, P2)
    if expert >= 0:
        first = (tl.program_id(0) % blocks) * ROWS
        choice = _mine(chosen, expert, T, K, K2, TOKENS)
        pairs, rows = tl.arange(0, TOKENS) * K + choice, first + tl.arange(0, ROWS)
        here = (choice < K)[:, None]
        total = outer_values(
            act + pairs[:, None] * INNER, here, w + expert.to(tl.int64) * w_e, bias + expert.to(tl.int64) * b_e, first,
            w_n, w_k, TOKENS, HIDDEN, INNER, ROWS, COLS, STAGES, BIAS,
        )  # fmt: skip
        share = _share(chosen, scale, expert, T, K, K2, TOKENS)
        at = part + pairs[:, None] * HIDDEN + rows[None, :]
        tl.store(at, total * share[:, None], mask=here & (rows[None, :] < HIDDEN))


@triton.jit
def experts_sum(
    part, chosen, out, K: tl.constexpr, K2: tl.constexpr, HIDDEN: tl.constexpr, COLS: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """A token's output: its experts' rows, added up. ONCE: an expert chosen twice has one row, at its first place."""
    blocks: tl.constexpr = (HIDDEN + COLS - 1) // COLS
    token = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    choices = tl.arange(0, K2)
    mask = (choices < K)[:, None] & (cols[None, :] < HIDDEN)
    if ONCE:
        ids = tl.load(chosen + token * K + choices, mask=choices < K, other=-1).to(tl.int32)
        others = tl.load(chosen + token * K + choices, mask=choices < K, other=-1).to(tl.int32)
        again = tl.sum(((ids[:, None] == others[None, :]) & (choices[None, :] < choices[:, None])).to(tl.int32), 1)
        mask &= (again == 0)[:, None]
    rows = tl.load(part + (token * K + choices)[:, None] * HIDDEN + cols[None, :], mask=mask, other=0.0)
    tl.store(out + token * HIDDEN + cols, rounded(tl.sum(rows, 0), out.dtype.element_ty), mask=cols < HIDDEN)
