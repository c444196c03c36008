"""Attention at one query per row as one op, `auxstream::decode_attention`: two launches, or one if no keys are split.

Enters: queries [B, H, 1, D], keys [B, KV, C, D] and values [B, KV, C, DV] as they lie in their caches, and a mask.
Leaves: [B, H, 1, DV]. Invariant: H / KV queries share a head of keys, which is read once and never expanded; keys that
the mask hides are not read, nor their values; the same inputs give the same bits. `reference` says what is computed:

    scores  = softcap * tanh(q @ k.T * scale / softcap)  without a softcap, q @ k.T * scale
    weights = softmax(scores + mask)                     over the keys that are seen; a row that sees none gets zeros
    out     = weights @ v

A boolean mask is true where a key is seen. A mask of numbers hides what has the lowest number of its type, or -inf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..runtime.errors import CaptureError, InputError
from .ahead import make_ready
from .attention_plan import Plan, Sizes, plan
from .on_device import on_its_device
from .variants import next_power_of_two

_FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEAD: Final = 512
"""Numbers in a head."""
MOST_GROUP: Final = 64
"""Queries that share a head of keys."""
_MOST_NUMBERS: Final = 2**31
"""In one head of a cache: addresses within it are 32 bits."""


@dataclass(frozen=True, slots=True)
class Work:
    """One call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    """Of four dimensions that expand to [batch, heads, 1, keys]."""
    scale: float
    softcap: float | None = None

    @property
    def sizes(self) -> Sizes:
        batch, kv_heads, keys, d = self.k.shape
        group = self.q.shape[1] // kv_heads
        return Sizes(batch, kv_heads, group, keys, d, self.v.shape[3], self.k.element_size())

    @property
    def layout(self) -> Hashable:
        """All that launches depend on."""
        tensors = (self.q, self.k, self.v, self.mask)
        return (
            self.q.device, self.softcap,
            *((x.shape, x.stride(), x.dtype) if x is not None else None for x in tensors),
        )  # fmt: skip

    def mask_strides(self) -> tuple[int, int, int]:
        """From row to row, from head to head, from key to key; 0 where the mask is the same for all."""
        if self.mask is None:
            return 0, 0, 0
        strides = [0 if size == 1 else step for size, step in zip(self.mask.shape, self.mask.stride(), strict=True)]
        return strides[0], strides[1], strides[3]

    def out(self) -> Tensor:
        return self.q.new_empty((*self.q.shape[:3], self.v.shape[3]))


def refusal(work: Work) -> str:
    """Why no kernel does this; empty if one does. Asks for nothing but shapes, types and devices."""
    q, k, v, mask = work.q, work.k, work.v, work.mask
    if {q.dim(), k.dim(), v.dim()} != {4} or (mask is not None and mask.dim() != 4):
        return "tensors of other than four dimensions"
    batch, heads, queries, d = q.shape
    if queries != 1:
        return f"{queries} queries per row"
    if tuple(v.shape[:3]) != tuple(k.shape[:3]) or k.shape[0] != batch or k.shape[3] != d:
        return f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
    if not k.shape[1] or not k.shape[2] or not heads or heads % k.shape[1]:
        return f"{heads} heads of queries and {k.shape[1]} of {k.shape[2]} keys"
    if heads // k.shape[1] > MOST_GROUP or not 1 <= min(d, v.shape[3]) <= max(d, v.shape[3]) <= MOST_HEAD:
        return f"{heads // k.shape[1]} queries to a head of {d} and {v.shape[3]} numbers"
    if q.dtype not in _FLOATS or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        return f"queries in {q.dtype}, keys in {k.dtype}, values in {v.dtype}"
    for name, cache in (("keys", k), ("values", v)):
        if cache.stride(3) != 1 and cache.shape[3] != 1:
            return f"{name} whose numbers lie {cache.stride(3)} apart"
        if cache.shape[2] * cache.stride(2) >= _MOST_NUMBERS:
            return f"{name} that lie too far apart for one another: {cache.shape[2]} times {cache.stride(2)}"
    if mask is not None:
        if mask.dtype not in (torch.bool, *_FLOATS) or mask.device != q.device:
            return f"a mask of {mask.dtype} on {mask.device}"
        wanted = (batch, heads, 1, k.shape[2])
        if any(size not in (1, whole) for size, whole in zip(mask.shape, wanted, strict=True)):
            return f"a mask of {tuple(mask.shape)} for {wanted}"
    return ""


def reference(work: Work, wide: torch.dtype = torch.float32, rounds: bool = True) -> Tensor:
    """By torch, in float32 or wider. `rounds`: the result to the type of the model; else it stays `wide`."""
    q, k, v, mask = work.q.to(wide), work.k.to(wide), work.v.to(wide), work.mask
    batch, heads, _, d = q.shape
    scores = (q.reshape(batch, k.shape[1], -1, d) @ k.mT).reshape(batch, heads, 1, -1) * work.scale
    if work.softcap is not None:
        scores = (scores / work.softcap).tanh() * work.softcap
    if mask is not None:
        sees = mask if mask.dtype is torch.bool else ~(mask <= torch.finfo(mask.dtype).min)
        scores = scores if mask.dtype is torch.bool else scores + mask
        scores = scores.masked_fill(~sees, float("-inf"))
        hidden = ~sees.any(-1, keepdim=True)
        scores = scores.masked_fill(hidden, 0.0)
        # Nothing that is not seen may matter, whatever it holds.
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        seen = sees.expand(batch, heads, 1, -1).unflatten(1, (k.shape[1], -1)).any(2)
        v = v.masked_fill(~seen[:, :, 0, :, None], 0.0)
    else:
        weights = scores.softmax(-1)
    found = weights.reshape(batch, k.shape[1], -1, k.shape[2]) @ v
    found = found.reshape(batch, heads, 1, -1)
    return found.to(work.q.dtype) if rounds else found


# --- launching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Launches:
    """Both launches of one layout of inputs, ready but for pointers."""

    part: Any
    part_grid: tuple[int, int, int]
    part_options: dict[str, Any]
    whole: Any
    """None if one program sees all keys."""
    whole_grid: tuple[int, int]
    whole_options: dict[str, Any]
    numbers: tuple[int, ...]
    """Strides, then how many keys, splits and turns there are."""
    splits: int

    def __call__(self, work: Work, out: Tensor) -> None:
        self.see(work, out, *(parts := self.workspace(work, out)))
        if self.whole is not None:
            self.combine(out, *parts)

    def workspace(self, work: Work, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each part's sum of values, largest score, and sum of weights."""
        if self.whole is None:
            return out, out, out
        rows = out.shape[0] * out.shape[1]
        parts = out.new_empty((rows, self.splits, out.shape[3]), dtype=torch.float32)
        peaks, totals = out.new_empty((2, rows, self.splits), dtype=torch.float32).unbind()
        return parts, peaks, totals

    def see(self, work: Work, out: Tensor, parts: Tensor, peaks: Tensor, totals: Tensor) -> None:
        self.part[self.part_grid](*self._seen(work, parts, peaks, totals), **self.part_options)

    def combine(self, out: Tensor, parts: Tensor, peaks: Tensor, totals: Tensor) -> None:
        self.whole[self.whole_grid](parts, peaks, totals, out, self.splits, **self.whole_options)

    def warmups(self, work: Work) -> list[Callable[[], Any]]:
        """What compiles each kernel for tensors like these at aligned addresses; they may be fake."""
        part = work.q.dtype if self.whole is None else torch.float32
        given = (None if x is None else x.dtype for x in (work.q, work.k, work.v, work.mask))
        seen = (*given, part, part, part, work.scale, *self.numbers)
        found = [functools.partial(self.part.warmup, *seen, grid=self.part_grid, **self.part_options)]
        if self.whole is not None:
            whole = (part, part, part, work.q.dtype, self.splits)
            found.append(functools.partial(self.whole.warmup, *whole, grid=self.whole_grid, **self.whole_options))
        return found

    def _seen(self, work: Work, *parts: Tensor) -> tuple[Any, ...]:
        return work.q, work.k, work.v, work.mask, *parts, work.scale, *self.numbers


def compile_ahead(works: Iterable[Work]) -> None:
    """Compile, side by side, the kernels of calls on one GPU; on a CPU there are none. Their tensors may be fake."""
    layouts = {work.layout: work for work in works if work.q.is_cuda}
    if layouts:
        warmups = [warmup for work in layouts.values() for warmup in settle(work).warmups(work)]
        make_ready(warmups, next(iter(layouts.values())).q.device)


def settle(work: Work, chosen: Plan | None = None) -> Launches:
    """The launches for inputs laid out like these; by the plan of their sizes, or the one given."""
    from . import attention_kernels as kernels

    sizes, mask = work.sizes, work.mask
    cut = chosen or plan(sizes)
    strides = (*work.q.stride()[:2], *work.k.stride()[:3], *work.v.stride()[:3], *work.mask_strides())
    direct = cut.splits == 1
    kind = kernels.NONE if mask is None else kernels.BOOL if mask.dtype is torch.bool else kernels.FLOAT
    part_options: dict[str, Any] = {
        "GROUP": sizes.group, "GROUP_2": _block(sizes.group), "D": sizes.d, "D_2": _block(sizes.d), "DV": sizes.dv,
        "DV_2": _block(sizes.dv), "BLOCK": cut.block, "SCAN": cut.scan(sizes.keys), "STAGES": cut.stages,
        "MASK": kind, "PER_HEAD": work.mask_strides()[1] != 0,
        "LOWEST": torch.finfo(mask.dtype).min if mask is not None and mask.dtype is not torch.bool else 0.0,
        "SOFTCAP": work.softcap, "DIRECT": direct, "num_warps": cut.warps,
        "enable_fp_fusion": True,
    }  # fmt: skip
    whole_options = {"DV": sizes.dv, "COLS": cut.cols, "SPLITS_2": next_power_of_two(cut.splits)}
    return Launches(
        part=kernels.attention_part,
        part_grid=(cut.splits, sizes.kv_heads, sizes.batch),
        part_options=part_options,
        whole=None if direct else kernels.attention_whole,
        whole_grid=(work.q.shape[0] * work.q.shape[1], -(-sizes.dv // cut.cols)),
        whole_options=whole_options | {"num_warps": cut.whole_warps, "enable_fp_fusion": True},
        numbers=(*strides, sizes.keys, cut.splits, cut.turns(sizes.keys)),
        splits=cut.splits,
    )


def _block(size: int) -> int:
    """A size tensor cores take."""
    return max(16, next_power_of_two(size))


class Attention:
    """What launches; remembers launches by the layout of the inputs."""

    def __init__(self) -> None:
        self._settled: dict[Any, Launches] = {}

    def __call__(self, work: Work) -> Tensor:
        out = work.out()
        if not out.numel():
            return out
        key = work.layout
        found = self._settled.get(key)
        if found is None:
            found = self._settled[key] = self._settle(work)
        found(work, out)
        return out

    def _settle(self, work: Work) -> Launches:
        _require(work)
        if work.q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                "decode_attention meets a new input layout inside a capture",
                expected="a layout it was launched with before: compiling inside a capture is not safe",
                came=f"queries {tuple(work.q.shape)}, keys {tuple(work.k.shape)} with strides {work.k.stride()}",
                remedy="run the graph once with these shapes before capturing it (auxstream.compile does)",
            )
        return settle(work)


def _require(work: Work) -> None:
    if why := refusal(work):
        raise InputError(
            "decode_attention has no kernel for this",
            expected="q [B, H, 1, D], k [B, KV, C, D], v [B, KV, C, DV], all bfloat16, float16 or float32 on one "
            "device, and a mask that expands to [B, H, 1, C]",
            came=why,
            remedy="keep the model's own attention",
        )


# --- the op -----------------------------------------------------------------------------------------------------------

_SCHEMA: Final = (
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float? softcap=None) -> Tensor"
)


def work_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Work:
    """A call as kernels take it."""
    if mask is not None and mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    return Work(q if q.stride(-1) == 1 else q.contiguous(), k, v, mask, scale, softcap)


def _on_cuda(attention: Attention, *arguments: Any) -> Tensor:
    return attention(work_of(*arguments))


def _on_cpu(*arguments: Any) -> Tensor:
    work = work_of(*arguments)
    _require(work)
    return reference(work)


def _fake(*arguments: Any) -> Tensor:
    work = work_of(*arguments)
    _require(work)
    return work.out()


@functools.cache
def decode_attention() -> Any:
    """The op `auxstream::decode_attention`, as its schema says."""
    library = _library()
    library.define(_SCHEMA)
    library.impl("decode_attention", on_its_device(functools.partial(_on_cuda, Attention())), "CUDA")
    library.impl("decode_attention", _on_cpu, "CPU")
    torch.library.register_fake("auxstream::decode_attention", _fake, lib=library)
    return torch.ops.auxstream.decode_attention.default


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("auxstream", "FRAGMENT")
