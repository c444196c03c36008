"""Device code of the router: products with the router's weight in parts, then one selection per token.

Enters: hidden states and the router's weight; scales and biases. Leaves: per token the experts chosen, best first, and
their weights. Invariants: every sum has one fixed order; whatever the scores are (NaN included), a token's choices are
experts, all of them different.

Note "the norm behind the product": the norm's factor is one number per token, so it is applied to the sums. Programs of
their own sum the squares; one that normalised before it multiplied would have to read whole rows.

Note "keys": float32 as int32 in the same order, NaN above infinity, as torch.topk has it. Equal keys: the lowest index
is first. A warp finds the largest int32 in one instruction, so a selection is one warp.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from . import device_math as dm

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
"""Below every key of a score."""
MINUS_INFINITY: tl.constexpr = tl.constexpr(-2139095041)
"""The key of -inf."""
PLACES: tl.constexpr = tl.constexpr(1 << 13)
"""A half-precision number's key is known without its last 13 bits, where an index has room."""


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return dm.to_bf16(x)
    elif dtype == tl.float16:
        return dm.to_f16(x)
    else:
        return x


@triton.jit
def _product(x, w, sums):
    return tl.dot(x, tl.trans(w), sums, input_precision="ieee")


@triton.jit
def _interpreted_product(x, w, sums):
    """The interpreter would multiply the bits of bfloat16."""
    return tl.dot(dm.to_f32(x), tl.trans(dm.to_f32(w)), sums, input_precision="ieee")


product = _interpreted_product if knobs.runtime.interpret else _product


# --- products ---------------------------------------------------------------------------------------------------------


@triton.jit
def _squares(
    hidden, squares, tokens, hidden_stride,
    H: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sums of squares over SPAN columns of BLOCK_T tokens."""
    split = tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    square = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, SPAN, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        columns = split * SPAN + column
        there = (rows[:, None] < tokens) & (column < SPAN)[None, :] & (columns < H)[None, :]
        x = tl.load(hidden + rows[:, None].to(tl.int64) * hidden_stride + columns[None, :], mask=there, other=0.0)
        square += tl.sum(dm.to_f32(x) * dm.to_f32(x), axis=1)
    tl.store(squares + rows * tl.cdiv(H, SPAN) + split, square, mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens"])
def router_product_few(
    hidden, weight, scale, partial, squares, tokens, hidden_stride, weight_stride,
    H: tl.constexpr, E: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, NORMED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """BLOCK_E experts' products over SPAN columns with BLOCK_T tokens, one after the other, in float32.

    All that is read has the weight's layout, rows of the same columns: nothing passes through shared memory.
    """
    if NORMED and tl.program_id(0) * BLOCK_E >= E:
        _squares(hidden, squares, tokens, hidden_stride, H, SPAN, BLOCK_K, BLOCK_T)
        return
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(1)
    column = tl.broadcast_to(tl.arange(0, BLOCK_K)[None, :], [BLOCK_E, BLOCK_K])
    columns = split * SPAN + column
    inside = (column < SPAN) & (columns < H)
    w = tl.load(weight + experts[:, None] * weight_stride + columns, mask=(experts[:, None] < E) & inside, other=0.0)
    if SCALED:
        factors = dm.to_f32(tl.load(scale + columns, mask=inside, other=0.0))
    for i in tl.static_range(BLOCK_T):
        token = tl.program_id(2) * BLOCK_T + i
        row = hidden + token.to(tl.int64) * hidden_stride
        x = dm.to_f32(tl.load(row + columns, mask=inside & (columns * 0 + token < tokens), other=0.0))
        if SCALED:
            x = x * factors
        sums = tl.sum(dm.to_f32(w) * x, axis=1)
        to = partial + (token * tl.cdiv(H, SPAN) + split) * E + experts
        tl.store(to, sums, mask=(experts < E) & (experts * 0 + token < tokens))


@triton.jit(do_not_specialize=["tokens"])
def router_product_many(
    hidden, weight, scale, partial, squares, tokens, hidden_stride, weight_stride,
    H: tl.constexpr, E: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, NORMED: tl.constexpr, SCALED: tl.constexpr, OPERANDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_E experts' products over SPAN columns with BLOCK_T tokens at once.

    OPERANDS: "half": both rounded to the weight's type; "split": a float32 weight as three bfloat16 that add up to it,
    so that products with bfloat16 are exact; "wide": float32.
    """
    if NORMED and tl.program_id(0) * BLOCK_E >= E:
        _squares(hidden, squares, tokens, hidden_stride, H, SPAN, BLOCK_K, BLOCK_T)
        return
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(1)
    tokens_here = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = hidden + tokens_here[:, None].to(tl.int64) * hidden_stride
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in tl.range(0, SPAN, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        columns = split * SPAN + column
        inside = (column < SPAN) & (columns < H)
        there = (experts[:, None] < E) & inside[None, :]
        w = tl.load(weight + experts[:, None] * weight_stride + columns[None, :], mask=there, other=0.0)
        x = tl.load(rows + columns[None, :], mask=(tokens_here[:, None] < tokens) & inside[None, :], other=0.0)
        if SCALED:
            x = dm.to_f32(x) * dm.to_f32(tl.load(scale + columns, mask=inside, other=0.0))[None, :]
            if OPERANDS == "half":
                x = _rounded(x, w.dtype)
        if OPERANDS == "half":
            sums = product(x, w, sums)
        elif OPERANDS == "split":
            high = dm.to_bf16(w)
            rest = w - dm.to_f32(high)
            middle = dm.to_bf16(rest)
            low = dm.to_bf16(rest - dm.to_f32(middle))
            sums = product(x, low, sums)
            sums = product(x, middle, sums)
            sums = product(x, high, sums)
        else:
            sums = product(dm.to_f32(x), dm.to_f32(w), sums)
    to = partial + (tokens_here[:, None] * tl.cdiv(H, SPAN) + split) * E + experts[None, :]
    tl.store(to, sums, mask=(tokens_here[:, None] < tokens) & (experts[None, :] < E))


# --- the selection ----------------------------------------------------------------------------------------------------


@triton.jit
def _key(x):
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # there is one zero
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST + 1)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _within_best_groups(
    key, at, GROUPS: tl.constexpr, GROUPS_2: tl.constexpr, SIZE_2: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """The keys of the KEPT groups whose two best scores have the largest sums; -inf in the place of all others."""
    keys = tl.reshape(key, [GROUPS_2, SIZE_2])
    places = tl.reshape(at, [GROUPS_2, SIZE_2])
    best = tl.max(keys, axis=1)
    place = tl.min(tl.where(keys == best[:, None], places, GROUPS_2 * SIZE_2), axis=1)
    second = tl.max(tl.where(places == place[:, None], LOWEST, keys), axis=1)
    group = tl.arange(0, GROUPS_2)
    left = tl.where(group < GROUPS, _key(_value(best) + _value(second)), LOWEST)
    kept = group < 0
    for _ in tl.static_range(KEPT):
        chosen = tl.min(tl.where(left == tl.max(left, axis=0), group, GROUPS_2), axis=0)
        kept = kept | (group == chosen)
        left = tl.where(group == chosen, LOWEST, left)
    return tl.reshape(tl.where(kept[:, None], keys, MINUS_INFINITY), [GROUPS_2 * SIZE_2])


@triton.jit(do_not_specialize=["eps", "factor", "routed_scale"])
def router_select(
    partial, squares, bias, expert_scale, index, weights, eps, factor, routed_scale,
    H: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, SPLITS_2: tl.constexpr, product_type: tl.constexpr,
    NORMED: tl.constexpr, SOFTMAX: tl.constexpr, BIASED: tl.constexpr, GROUPS: tl.constexpr, GROUPS_2: tl.constexpr,
    SIZE_2: tl.constexpr, KEPT: tl.constexpr, TOP_K: tl.constexpr, TOP_K_2: tl.constexpr, RENORMALISED: tl.constexpr,
    SMALLEST: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One token: sums of the products' parts, scores, the best experts and their weights."""
    token = tl.program_id(0)
    at = tl.arange(0, GROUPS_2 * SIZE_2)
    if SIZE_2 * GROUPS == E:
        expert = at
        there = at < E
    else:
        expert = at // SIZE_2 * (E // GROUPS) + at % SIZE_2
        there = (at % SIZE_2 < E // GROUPS) & (at // SIZE_2 < GROUPS)
    if NORMED:
        split = tl.arange(0, SPLITS_2)
        square = tl.load(squares + token * SPLITS + split, mask=split < SPLITS, other=0.0)
    mine = partial + token * SPLITS * E + expert
    logits = tl.load(mine, mask=there, other=0.0)
    for split in tl.static_range(1, SPLITS):
        logits += tl.load(mine + split * E, mask=there, other=0.0)
    if BIASED:
        correction = dm.to_f32(tl.load(bias + expert, mask=there, other=0.0))
    if NORMED:
        logits = logits * dm.rsqrt(tl.sum(square, axis=0) * (1.0 / H) + eps)
    logits = dm.to_f32(_rounded(logits * factor, product_type))

    key = tl.where(there, _key(logits), LOWEST)
    if SOFTMAX:  # taken in the order of the logits
        scores = tl.where(there, dm.exp(logits - _value(tl.max(key, axis=0))), 0.0)
        whole = tl.sum(scores, axis=0)
        if BIASED:
            key = tl.where(there, _key(dm.share(scores, whole) + correction), LOWEST)
    else:
        scores = dm.div(1.0, 1.0 + dm.exp(-logits))
        key = tl.where(there, _key(scores + correction if BIASED else scores), LOWEST)
    if GROUPS > 1:
        key = tl.where(there, _within_best_groups(key, at, GROUPS, GROUPS_2, SIZE_2, KEPT), LOWEST)

    number = tl.arange(0, TOP_K_2)
    place = tl.zeros([TOP_K_2], tl.int32)
    if SOFTMAX and not BIASED and GROUPS == 1 and product_type != tl.float32:
        key = tl.where(there, (key & -PLACES) | (PLACES - 1 - at), LOWEST)
        for k in tl.static_range(TOP_K):
            best = tl.max(key, axis=0)
            place = tl.where(number == k, PLACES - 1 - (best & (PLACES - 1)), place)
            key = tl.where(key == best, LOWEST, key)
    else:
        for k in tl.static_range(TOP_K):
            best = tl.min(tl.where(key == tl.max(key, axis=0), at, GROUPS_2 * SIZE_2), axis=0)
            place = tl.where(number == k, best, place)
            key = tl.where(at == best, LOWEST, key)

    picked = number < TOP_K
    chosen = place
    if SIZE_2 * GROUPS != E:
        chosen = place // SIZE_2 * (E // GROUPS) + place % SIZE_2
    tl.store(index + token.to(tl.int64) * TOP_K + number, chosen.to(tl.int64), mask=picked)
    if SCALED:
        own_scale = dm.to_f32(tl.load(expert_scale + chosen, mask=picked, other=0.0))
    out = tl.gather(scores, place, 0)
    if SOFTMAX:
        out = dm.share(out, whole)
    if RENORMALISED:
        total = tl.sum(tl.where(picked, out, 0.0), axis=0) + SMALLEST
        out = dm.div(out, total)
    out = out * routed_scale
    if SCALED:
        out = out * own_scale
    tl.store(weights + token.to(tl.int64) * TOP_K + number, _rounded(out, weights.dtype.element_ty), mask=picked)
