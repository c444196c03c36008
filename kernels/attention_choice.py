"""Whether attention at one query per row is worth its own op here: measured against torch's, once per layout and card.

Enters: a call's layout. Leaves: a `Choice`. Invariant: torch's own form is kept unless ours takes less than
WORTHWHILE of its time; nothing is measured inside a capture, nor without a GPU: there the op is taken on trust.

All keys are seen while measuring: with fewer, the op's part of the time shrinks, and torch's does not.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from . import store, tune
from .attention import Attention, Work

Choice = Literal["own", "grouped", "kept"]
"""Our op; torch's over caches that are not expanded; the graph as it was."""
WORTHWHILE: Final = 0.9
_BEYOND_CACHES: Final = 128 << 20
_MOST_TRIALS: Final = 8


def choose(like: Work) -> Choice:
    """The choice for calls laid out like this one, whose tensors may be fake."""
    if like.q.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return "own"
    key = _key(like)
    known = store.read_choice(key)
    if known in ("own", "grouped", "kept"):
        return known
    found = fastest(times(like))
    store.write_choice(key, found)
    return found


def fastest(times: Mapping[Choice, float]) -> Choice:
    """What is worth its while: torch's grouped form against its expanded one, ours against the better of them."""
    best: Choice = "grouped" if times.get("grouped", float("inf")) < WORTHWHILE * times["kept"] else "kept"
    return "own" if times["own"] < WORTHWHILE * times[best] else best


def times(like: Work) -> Mapping[Choice, float]:
    """Microseconds per call."""
    trials, attention = _trials(like), Attention()
    runs: dict[Choice, Callable[[Work], Tensor]] = {"kept": expanded, "own": attention}
    if like.softcap is None and like.sizes.group > 1:
        runs["grouped"] = grouped
    with torch.no_grad():
        return tune.measure({choice: _Round(run, trials) for choice, run in runs.items()}, ())


def expanded(work: Work) -> Tensor:
    """As models do: every query's head has its own copy of keys and values."""
    group = work.sizes.group
    k, v = (_repeated(x, group) if group > 1 else x for x in (work.k, work.v))
    if work.softcap is None:
        return functional.scaled_dot_product_attention(work.q, k, v, attn_mask=work.mask, scale=work.scale)
    scores = (work.q @ k.mT * work.scale / work.softcap).tanh() * work.softcap
    scores = scores if work.mask is None else scores + work.mask
    return scores.softmax(-1, dtype=torch.float32).to(work.q.dtype) @ v


def grouped(work: Work) -> Tensor:
    """By torch, over caches as they are."""
    return functional.scaled_dot_product_attention(
        work.q, work.k, work.v, attn_mask=work.mask, scale=work.scale, enable_gqa=True
    )


def _repeated(x: Tensor, group: int) -> Tensor:
    batch, heads, keys, d = x.shape
    return x[:, :, None].expand(batch, heads, group, keys, d).reshape(batch, heads * group, keys, d)


class _Round:
    """One call after the other, round and round, as `tune` launches them."""

    def __init__(self, run: Callable[[Work], Tensor], trials: Sequence[Work]) -> None:
        self._run, self._trials = run, itertools.cycle(trials)

    def __call__(self, _: Sequence[Tensor]) -> None:
        self._run(next(self._trials))


def _trials(like: Work) -> list[Work]:
    """Calls on caches of their own, together larger than what a card keeps close."""
    each = sum(x.numel() * x.element_size() for x in (like.k, like.v))
    count = max(1, min(_MOST_TRIALS, -(-_BEYOND_CACHES // each)))
    return [
        Work(_made(like.q), _made(like.k), _made(like.v), _seen(like.mask), like.scale, like.softcap)
        for _ in range(count)
    ]


def _made(like: Tensor) -> Tensor:
    """Random numbers that lie as these do, whether or not several are one in memory."""
    behind = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
    return torch.randn(behind, dtype=like.dtype, device=like.device).as_strided(like.shape, like.stride())


def _seen(mask: Tensor | None) -> Tensor | None:
    """A mask that hides nothing."""
    if mask is None:
        return None
    found = torch.full((), mask.dtype is torch.bool, dtype=mask.dtype, device=mask.device)
    behind = 1 + sum((size - 1) * step for size, step in zip(mask.shape, mask.stride(), strict=True))
    return found.repeat(behind).as_strided(mask.shape, mask.stride())


def _key(like: Work) -> str:
    """A file name for the choice."""
    tensors = (like.q, like.k, like.v, like.mask)
    facts: list[Any] = [like.softcap is None, torch.__version__]
    facts += [None if x is None else (tuple(x.shape), x.stride(), str(x.dtype)) for x in tensors]
    device = torch.cuda.get_device_name(like.q.device).replace(" ", "_")
    return f"decode_attention-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}-{device}"
