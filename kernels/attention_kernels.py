"""Device code of attention at one query per row: keys are split among programs, and the parts put together.

Enters: queries, the caches of keys and values, and a mask of the keys. Leaves: per row and head the weighted sum of the
values. Invariant: a key's mask is read before the key, and no byte of a key or value that nobody sees is read; programs
write disjoint elements, and every sum has one fixed order.

A program takes a row, a head of keys and the queries' heads that share it, and every SPLITS-th block of BLOCK keys: the
keys that are seen lie side by side, so each program gets its share of them wherever they are. Scores, sums and parts
are float32, and weights nearly as good. Strides are named `b`, `h` and `n`: from row to row, from head to head, from
key to key; a head's numbers lie side by side.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from . import device_math as dm

LOG2E = tl.constexpr(1.4426950408889634)
NONE, BOOL, FLOAT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _interpreted_product(a, b):
    """The interpreter would multiply the bits of bfloat16."""
    return tl.dot(dm.to_f32(a), dm.to_f32(b), input_precision="ieee")


product = _interpreted_product if knobs.runtime.interpret else _product


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        return dm.to_bf16(x)
    else:
        return x.to(DTYPE)


@triton.jit
def _weighed(weight, values):
    """weight @ values; weights in two roundings, of which the second is that of what the first left over."""
    if values.dtype == tl.float32:
        return product(weight, values)
    else:
        high = _rounded(weight, values.dtype)
        low = _rounded(weight - dm.to_f32(high), values.dtype)
        return product(high, values) + product(low, values)


@triton.jit
def _sees(mask, key, keys, LOWEST: tl.constexpr, MASK: tl.constexpr):
    """Which keys are there to see, and what is added to their scores."""
    if MASK == BOOL:
        sees = tl.load(mask, mask=key < keys, other=0) != 0
        return sees, sees
    else:
        added = dm.to_f32(tl.load(mask, mask=key < keys, other=LOWEST))
        return (added > LOWEST) | (added != added), added


@triton.jit
def _turns_seen(mask, m_n, keys, split, splits, turns, LOWEST: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
                MASK: tl.constexpr):  # fmt: skip
    """From which to which of its turns a program sees anything."""
    first, last = turns, 0
    for start in range(0, turns * BLOCK, SCAN):
        at = start + tl.arange(0, SCAN)
        turn = at // BLOCK
        key = (turn * splits + split) * BLOCK + at % BLOCK
        there = tl.where(turn < turns, key, keys)
        sees, _ = _sees(mask + key * m_n, there, keys, LOWEST, MASK)
        sees = sees & (there < keys)
        first = tl.minimum(first, tl.min(tl.where(sees, turn, turns), axis=0))
        last = tl.maximum(last, tl.max(tl.where(sees, turn + 1, 0), axis=0))
    return first, last


@triton.jit(do_not_specialize=["scale", "keys", "splits", "turns"])
def attention_part(
    q, k, v, mask, out, peaks, totals, scale, q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_n, keys, splits,
    turns,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, D: tl.constexpr, D_2: tl.constexpr, DV: tl.constexpr,
    DV_2: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr, STAGES: tl.constexpr, MASK: tl.constexpr,
    PER_HEAD: tl.constexpr, LOWEST: tl.constexpr, SOFTCAP: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """One program's keys. DIRECT: there is one program for all keys, and `out` is the result; else a part of it, the
    largest of its scores (times log2 e) and the sum of its weights."""
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, n, d, e = tl.arange(0, GROUP_2), tl.arange(0, BLOCK), tl.arange(0, D_2), tl.arange(0, DV_2)
    heads = head * GROUP + g
    queries = q + row * q_b + heads[:, None] * q_h + d[None, :]
    query = tl.load(queries, mask=(g[:, None] < GROUP) & (d[None, :] < D), other=0.0)
    k += row * k_b + head.to(tl.int64) * k_h
    v += row * v_b + head.to(tl.int64) * v_h
    first, last = 0, turns
    if MASK != NONE:
        mask += row * m_b
        if not PER_HEAD:
            first, last = _turns_seen(mask, m_n, keys, split, splits, turns, LOWEST, BLOCK, SCAN, MASK)
    peak = tl.full([GROUP_2], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_2], tl.float32)
    result = tl.zeros([GROUP_2, DV_2], tl.float32)
    for turn in tl.range(first, last, num_stages=STAGES):
        key = (turn * splits + split) * BLOCK + n
        there = key < keys
        sees = there[None, :]
        if MASK != NONE:
            if PER_HEAD:
                known = tl.where(g[:, None] < GROUP, key[None, :], keys)
                sees, added = _sees(mask + heads[:, None] * m_h + key[None, :] * m_n, known, keys, LOWEST, MASK)
                sees = sees & (known < keys)
                there = tl.max(sees.to(tl.int32), axis=0) > 0
            else:
                seen, more = _sees(mask + key * m_n, key, keys, LOWEST, MASK)
                there = there & seen
                sees, added = there[None, :], more[None, :]
        known_keys = tl.load(k + key[:, None] * k_n + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0)
        values = tl.load(v + key[:, None] * v_n + e[None, :], mask=there[:, None] & (e[None, :] < DV), other=0.0)
        score = product(query, tl.trans(known_keys)) * scale
        if SOFTCAP is not None:
            score = dm.tanh(score * (1.0 / SOFTCAP)) * SOFTCAP
        if MASK == FLOAT:
            score += added
        score = tl.where(sees, score, float("-inf")) * LOG2E
        higher = tl.maximum(peak, tl.max(score, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - level[:, None])
        fade = tl.exp2(peak - level)
        total = total * fade + tl.sum(weight, axis=1)
        result = result * fade[:, None] + _weighed(weight, values)
        peak = higher
    rows = row * tl.num_programs(1) * GROUP + heads
    stored = (g[:, None] < GROUP) & (e[None, :] < DV)
    if DIRECT:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + rows[:, None] * DV + e[None, :], _rounded(result, out.dtype.element_ty), mask=stored)
    else:
        part = rows * splits + split
        tl.store(peaks + part, peak, mask=g < GROUP)
        tl.store(totals + part, total, mask=g < GROUP)
        tl.store(out + part[:, None] * DV + e[None, :], result, mask=stored & (total != 0.0)[:, None])


@triton.jit(do_not_specialize=["splits"])
def attention_whole(
    parts, peaks, totals, out, splits, DV: tl.constexpr, COLS: tl.constexpr, SPLITS_2: tl.constexpr
):  # fmt: skip
    """COLS numbers of one row and head, from all its parts. Parts that saw no key hold nothing, and are not read."""
    row, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    split = tl.arange(0, SPLITS_2)
    peak = tl.load(peaks + row * splits + split, mask=split < splits, other=float("-inf"))
    total = tl.load(totals + row * splits + split, mask=split < splits, other=0.0)
    saw = total != 0.0
    highest = tl.max(peak, axis=0)
    share = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    whole = tl.sum(share * total, axis=0)
    inside = saw[:, None] & (e[None, :] < DV)
    part = tl.load(parts + (row * splits + split)[:, None] * DV + e[None, :], mask=inside, other=0.0)
    result = tl.sum(part * share[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * DV + e, _rounded(result, out.dtype.element_ty), mask=e < DV)
