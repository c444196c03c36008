"""Device code of products of few rows with weights: every weight is read once, at the pace of memory.

Enters: rows of activations, one to four weights [N, K] that share them, and biases. Leaves: each weight's product; or,
of one row, a gate and an up projection, act(gate) * up, rounded wherever eager rounds. Invariant: programs write
disjoint elements, every sum is float32 and has one fixed order, and addresses depend on shapes alone.

A program's number says which weight it works on: weight i has the blocks before `e<i>`, `n<i>` outputs, and `s<i>` from
row to row; of fewer than four, the last ones have no blocks. `x_t` is from row to row of the activations.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from . import device_math as dm


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        return dm.to_bf16(x)
    elif tl.float16 == DTYPE:
        return dm.to_f16(x)
    else:
        return x


@triton.jit
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _interpreted_dot(a, b, total):
    """The interpreter would multiply the bits of bfloat16."""
    return tl.dot(dm.to_f32(a), dm.to_f32(b), total, input_precision="ieee")


dot = _interpreted_dot if knobs.runtime.interpret else _dot


@triton.jit
def _gated(g, u, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """act(g) * u as eager computes it op by op."""
    g = dm.to_f32(_rounded(g, DTYPE))
    if ACT == "silu":
        y = dm.div(g, 1.0 + dm.exp(-g))
    else:
        tl.static_assert(ACT == "gelu_tanh")
        inner = 0.7978845608028654 * dm.fma(g * 0.0 + 0.044715, g * g * g, g)
        y = 0.5 * g * (1.0 + dm.tanh(inner))
    return dm.to_f32(_rounded(y, DTYPE)) * dm.to_f32(_rounded(u, DTYPE))


@triton.jit
def _of(block, e0, e1, e2, a0, a1, a2, a3):
    """Of four, the one that belongs to the weight which the block lies in."""
    return tl.where(block >= e2, a3, tl.where(block >= e1, a2, tl.where(block >= e0, a1, a0)))


@triton.jit(do_not_specialize=["e0", "e1", "e2", "n0", "n1", "n2", "n3"])
def product_one(
    x, w0, w1, w2, w3, b0, b1, b2, b3, o0, o1, o2, o3, s0, s1, s2, s3, e0, e1, e2, n0, n1, n2, n3,
    K: tl.constexpr, BIASED: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of a single row. AHEAD: all weights are asked for before anything else is."""
    block = tl.program_id(0)
    weights = _of(block, e0, e1, e2, w0, w1, w2, w3)
    stride = _of(block, e0, e1, e2, s0, s1, s2, s3)
    n = _of(block, e0, e1, e2, n0, n1, n2, n3)
    rows = (block - _of(block, e0, e1, e2, 0, e0, e1, e2)) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    there = (rows[:, None] < n) & (cols[None, :] >= 0)
    from_here = rows[:, None].to(tl.int64) * stride + cols[None, :]
    ups_from_here = rows[:, None].to(tl.int64) * s1 + cols[None, :]
    inputs = x + rows[:, None] * 0 + cols[None, :]  # laid out as the weights are: no exchange between threads
    gates = ()
    ups = ()
    for c in tl.static_range(0, K, COLS):
        mask = there if c + COLS <= K else there & (cols[None, :] < K - c)
        gates = gates + (tl.load(weights + from_here + c, mask=mask, other=0.0, eviction_policy="evict_first"),)  # noqa: RUF005
        if ACT is not None:
            ups = ups + (tl.load(w1 + ups_from_here + c, mask=mask, other=0.0, eviction_policy="evict_first"),)  # noqa: RUF005
    if AHEAD:
        tl.debug_barrier()  # behind which no load is moved
    g = tl.zeros([ROWS, COLS], tl.float32)
    u = tl.zeros([ROWS, COLS], tl.float32)
    for i in tl.static_range((K + COLS - 1) // COLS):
        mask = cols[None, :] >= 0 if (i + 1) * COLS <= K else cols[None, :] < K - i * COLS
        part = dm.to_f32(tl.load(inputs + i * COLS, mask=mask, other=0.0))
        g = dm.fma(dm.to_f32(gates[i]), part, g)
        if ACT is not None:
            u = dm.fma(dm.to_f32(ups[i]), part, u)
    total = tl.sum(g, 1)
    if BIASED:
        total += dm.to_f32(tl.load(_of(block, e0, e1, e2, b0, b1, b2, b3) + rows, mask=rows < n, other=0.0))
    if ACT is not None:
        up = tl.sum(u, 1)
        if BIASED:
            up += dm.to_f32(tl.load(b1 + rows, mask=rows < n, other=0.0))
        total = _gated(total, up, ACT, x.dtype.element_ty)
    out = _of(block, e0, e1, e2, o0, o1, o2, o3)
    tl.store(out + rows, _rounded(total, x.dtype.element_ty), mask=rows < n)


@triton.jit(do_not_specialize=["T", "e0", "e1", "e2", "n0", "n1", "n2", "n3", "splits"])
def product_few(
    x, w0, w1, w2, w3, b0, b1, b2, b3, o0, o1, o2, o3, part, T, K, x_t, s0, s1, s2, s3, e0, e1, e2, n0, n1, n2, n3,
    splits, span,
    BIASED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of every row; if SPLIT, their sums over one of the `splits` spans of columns, kept in `part`."""
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    weights = _of(block, e0, e1, e2, w0, w1, w2, w3)
    stride = _of(block, e0, e1, e2, s0, s1, s2, s3)
    n = _of(block, e0, e1, e2, n0, n1, n2, n3)
    rows = (block - _of(block, e0, e1, e2, 0, e0, e1, e2)) * ROWS + tl.arange(0, ROWS)
    tokens, cols = tl.arange(0, TOKENS), split * span + tl.arange(0, COLS)
    there = rows[None, :] < n
    here = tokens[:, None] < T
    from_here = weights + rows[None, :].to(tl.int64) * stride + cols[:, None]
    inputs = x + tokens[:, None] * x_t + cols[None, :]
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for c in tl.range(0, span, COLS, num_stages=STAGES):
        at = tl.load(inputs + c, mask=here & (cols[None, :] < K - c), other=0.0)
        mask = there & (cols[:, None] < K - c)
        total = dot(at, tl.load(from_here + c, mask=mask, other=0.0, eviction_policy="evict_first"), total)
    if SPLIT:
        width = n0 + n1 + n2 + n3
        column = _of(block, e0, e1, e2, 0, n0, n0 + n1, n0 + n1 + n2)
        to = part + (split * T + tokens)[:, None] * width + (column + rows)[None, :]
        tl.store(to, total, mask=here & there)
    else:
        if BIASED:
            bias = _of(block, e0, e1, e2, b0, b1, b2, b3)
            total += dm.to_f32(tl.load(bias + rows, mask=rows < n, other=0.0))[None, :]
        out = _of(block, e0, e1, e2, o0, o1, o2, o3)
        tl.store(out + tokens[:, None] * n + rows[None, :], _rounded(total, x.dtype.element_ty), mask=here & there)


@triton.jit(do_not_specialize=["T", "e0", "e1", "e2", "n0", "n1", "n2", "n3", "splits"])
def product_sum(
    part, b0, b1, b2, b3, o0, o1, o2, o3, T, e0, e1, e2, n0, n1, n2, n3, splits,
    BIASED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one row: the spans' sums, added up in their order."""
    token, block = tl.program_id(0), tl.program_id(1)
    width = n0 + n1 + n2 + n3
    n = _of(block, e0, e1, e2, n0, n1, n2, n3)
    rows = (block - _of(block, e0, e1, e2, 0, e0, e1, e2)) * ROWS + tl.arange(0, ROWS)
    mine = part + token * width + _of(block, e0, e1, e2, 0, n0, n0 + n1, n0 + n1 + n2) + rows
    total = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        total += tl.load(mine + split * T * width, mask=rows < n, other=0.0)
    out = _of(block, e0, e1, e2, o0, o1, o2, o3)
    if BIASED:
        total += dm.to_f32(tl.load(_of(block, e0, e1, e2, b0, b1, b2, b3) + rows, mask=rows < n, other=0.0))
    tl.store(out + token * n + rows, _rounded(total, out.dtype.element_ty), mask=rows < n)
