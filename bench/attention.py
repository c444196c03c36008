"""Attention at one query per row over static caches: one op against torch's own, as models call it and ungrouped.

    python -m auxstream.bench.attention [--layers NAME ...] [--batch B ...] [--context C ...] [--sweep] [--json PATH]

Measures: device time per layer of a CUDA graph of several layers with caches of their own, of which none lies in the
chip's cache when a replay begins; every variant in turn. "as models do": keys and values copied for every query that
shares them, then `scaled_dot_product_attention`; "enable_gqa": the same without the copies; "parts": the op's first
kernel alone. Of `context` positions some are seen: the first ones, or in a layer with a window those behind the last.
Floors are the bytes of the keys and values that are seen, at the pace of a sum over a GiB measured beside. Also how far
each variant is from float64. `--sweep`: every candidate plan, fastest first. Does not measure: eager launches, the
projections before and behind, what writes the caches, flex_attention (it needs its block mask made anew for each
position, by a dozen kernels). Needs a GPU.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.ahead import make_ready
from ..kernels.attention import Work, decode_attention, reference, settle
from ..kernels.attention_plan import Plan, Sizes, plan, splits_for
from .command import CommandLine
from .harness import interleave, write
from .replays import Chain, flusher, paces

_MOST_LAYERS, _ENOUGH = 16, 1 << 30
Run = Callable[[Work], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's heads."""

    heads: int
    kv_heads: int
    d: int
    dv: int
    window: int | None = None

    def sizes(self, batch: int, context: int) -> Sizes:
        return Sizes(batch, self.kv_heads, self.heads // self.kv_heads, context, self.d, self.dv, 2)

    def seen_bytes(self, batch: int, seen: int) -> int:
        return batch * self.kv_heads * seen * (self.d + self.dv) * 2

    def work(self, batch: int, context: int, seen: int) -> Work:
        """With random caches, and queries that make a few keys matter."""
        like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        q = torch.randn(batch, self.heads, 1, self.d, **like)
        k = torch.empty(batch, self.kv_heads, context, self.d, **like).normal_()
        v = torch.empty(batch, self.kv_heads, context, self.dv, **like).normal_()
        return Work(q, k, v, self.mask(batch, context, seen), self.d**-0.5)

    def mask(self, batch: int, context: int, seen: int) -> Tensor:
        key = torch.arange(context, device="cuda")
        first = 0 if self.window is None else context - seen
        return ((key >= first) & (key < first + seen)).expand(batch, 1, 1, context).contiguous()


LAYERS: Final[Mapping[str, Layer]] = {
    "gemma4 sliding": Layer(16, 8, 256, 256, window=1024),
    "gemma4 full": Layer(16, 2, 512, 512),
    "qwen3": Layer(32, 4, 128, 128),
    "latent": Layer(16, 16, 192, 128),
}


def expanded(work: Work) -> Tensor:
    """As transformers' `sdpa_attention_forward` does."""
    group = work.sizes.group
    k, v = (
        (x[:, :, None].expand(-1, -1, group, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])) for x in (work.k, work.v)
    )
    return functional.scaled_dot_product_attention(work.q, k, v, attn_mask=work.mask, scale=work.scale)


def grouped(work: Work) -> Tensor:
    return functional.scaled_dot_product_attention(
        work.q, work.k, work.v, attn_mask=work.mask, scale=work.scale, enable_gqa=True
    )


def by_op(work: Work) -> Tensor:
    return decode_attention()(work.q, work.k, work.v, work.mask, work.scale)


def by_plan(cut: Plan, like: Work) -> Run:
    found = settle(like, cut)

    def run(work: Work) -> Tensor:
        out = work.out()
        found(work, out)
        return out

    return run


def parts_only(cut: Plan, like: Work) -> Run:
    found = settle(like, cut)

    def run(work: Work) -> Tensor:
        out = work.out()
        found.see(work, out, *found.workspace(work, out))
        return out

    return run


def stack_of(layer: Layer, batch: int, context: int) -> list[Work]:
    each = layer.seen_bytes(batch, context)
    return [layer.work(batch, context, context) for _ in range(max(2, min(_MOST_LAYERS, _ENOUGH // each)))]


def with_seen(layer: Layer, stack: Sequence[Work], seen: int) -> list[Work]:
    batch, context = stack[0].k.shape[0], stack[0].k.shape[2]
    mask = layer.mask(batch, context, seen)
    return [replace(work, mask=mask) for work in stack]


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def measure(layer: Layer, stack: Sequence[Work], seen: int, flush: Tensor, pace: float, rounds: int) -> dict[str, Any]:
    """One number of keys that are seen: every variant."""
    batch, context = stack[0].k.shape[0], stack[0].k.shape[2]
    works, cut = with_seen(layer, stack, seen), plan(layer.sizes(batch, context))
    runs: dict[str, Run] = {"as models do": expanded, "enable_gqa": grouped, "auxstream::decode_attention": by_op}
    chains = {name: Chain(run, works, flush=flush) for name, run in runs.items()}
    chains["parts"] = Chain(parts_only(cut, works[0]), works, flush=flush)
    figures = interleave({name: chain.sample for name, chain in chains.items()}, rounds, "us")
    floor = layer.seen_bytes(batch, seen) / pace / 1e6
    print(f"  {seen} seen, floor {floor:.2f} us")
    found: dict[str, Any] = {"floor us": floor}
    exact = reference(works[0], torch.float64, rounds=False) if context * batch <= 8192 else None
    for name, figure in figures.items():
        found[name] = {"us per layer": figure}
        line = f"    {name:28} {figure}"
        if exact is not None and name in runs:
            found[name]["error"] = error(runs[name](works[0]), exact)
            line += f"   error {found[name]['error']:.2e}"
        print(line, flush=True)
    return found


# --- the sweep --------------------------------------------------------------------------------------------------------

_CUTS: Final = (
    (16, 2, 1), (16, 4, 1), (16, 4, 3), (16, 4, 4), (32, 4, 1), (32, 4, 2), (32, 4, 3), (32, 8, 1), (32, 8, 2),
    (32, 8, 3), (64, 4, 1), (64, 4, 2), (64, 8, 1), (64, 8, 2), (64, 8, 3), (128, 8, 1),
)  # fmt: skip
"""Keys, warps, stages."""


def candidates(sizes: Sizes) -> Iterator[Plan]:
    for block, warps, stages in _CUTS:
        tile = block * (sizes.d + sizes.dv) * sizes.size
        if not 8192 <= tile <= 64 * 1024 * (1 + warps // 8) or tile * max(1, stages - 1) > 140 * 1024:
            continue
        splits = {splits_for(sizes, block, programs) for programs in (132, 264, 528, 1056)}
        for count in sorted(splits):
            cut = Plan(block, count, warps, stages)
            if stages == 1 or cut.turns(sizes.keys) > 1:
                yield cut


def compile_ahead(works: Sequence[tuple[Plan, Work]]) -> None:
    """Side by side, kernels that plans share once."""
    kernels: dict[Any, tuple[Plan, Work]] = {}
    for cut, work in works:
        sizes = work.sizes
        one = (sizes.d, sizes.dv, sizes.group, cut.block, cut.warps, cut.stages, cut.scan(sizes.keys), cut.splits == 1)
        kernels.setdefault(one, (cut, work))
    warmups = [warmup for cut, work in kernels.values() for warmup in settle(work, cut).warmups(work)]
    make_ready(warmups, works[0][1].q.device)
    print(f"{len(kernels)} kernels compiled", flush=True)


def sweep(layer: Layer, stack: Sequence[Work], seen: Sequence[int], flush: Tensor, pace: float) -> dict[str, Any]:
    """Every candidate, for each number of keys that are seen; the best again with other ways to put parts together."""
    batch, context = stack[0].k.shape[0], stack[0].k.shape[2]
    sizes, works = layer.sizes(batch, context), {count: with_seen(layer, stack, count) for count in seen}
    times: dict[Plan, dict[int, float]] = {}

    def timed(cut: Plan) -> dict[int, float]:
        run, found = by_plan(cut, stack[0]), dict[int, float]()
        for count, some in works.items():
            chain = Chain(run, some, flush=flush)
            found[count] = statistics.median(chain.sample() for _ in range(5))
        return found

    for cut in candidates(sizes):
        times[cut] = timed(cut)
    floors = {count: layer.seen_bytes(batch, count) / pace / 1e6 for count in seen}
    ranked = sorted(times, key=lambda cut: statistics.geometric_mean(times[cut].values()))
    floor = "  ".join(f"{count}: {time:.2f}" for count, time in floors.items())
    print(f"  floors {floor}; by plan {plan(sizes)}")
    for cut in ranked:
        print("  " + "  ".join(f"{time:8.2f}" for time in times[cut].values()) + f"  {cut}", flush=True)
    again: dict[str, dict[int, float]] = {}
    if ranked[0].splits > 1:
        for cols, warps in ((64, 2), (64, 4), (128, 2), (128, 8), (256, 4), (256, 8)):
            again[f"{cols} columns, {warps} warps"] = timed(replace(ranked[0], cols=cols, whole_warps=warps))
    for name, found in again.items():
        print("  " + "  ".join(f"{time:8.2f}" for time in found.values()) + f"  {ranked[0]}, then {name}", flush=True)
    return {"floors": floors, "all": {str(cut): times[cut] for cut in ranked}, "again": again}


# --- all of it --------------------------------------------------------------------------------------------------------


def seen_of(layer: Layer, context: int, given: Sequence[int]) -> list[int]:
    most = context if layer.window is None else min(context, layer.window)
    return sorted({min(count, most) for count in (*given, context)})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = {"rounds": 5, "batch": [1], "context": [1024], "seen": [1000]}
    parser = CommandLine(__doc__, rounds=10, limit=300, quick=quick)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS)[:2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--seen", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--sweep", action="store_true", help="also try every way to cut the keys")
    options = parser.options(arguments)
    torch.manual_seed(0)
    flush, pace, left_out = flusher(), paces()["read"], list[str]()
    results: dict[str, Any] = {"read TB/s": pace, "left out": left_out}
    print(f"{torch.cuda.get_device_name()}: {pace:.2f} TB/s read")
    cases = list(itertools.product(options.layers, options.context, options.batch))
    if options.sweep:
        ahead: list[tuple[Plan, Work]] = []
        for name, context in itertools.product(options.layers, options.context):
            like = LAYERS[name].work(1, context, context)
            for batch in options.batch:
                ahead += [(cut, like) for cut in candidates(LAYERS[name].sizes(batch, context))]
        compile_ahead(ahead)

    def label_of(case: tuple[str, int, int]) -> str:
        return "{}, context {}, batch {}".format(*case)

    for name, context, batch in options.clock.in_time(cases, left_out, label_of):
        layer, label = LAYERS[name], label_of((name, context, batch))
        stack, seen = stack_of(layer, batch, context), seen_of(layer, context, options.seen)
        print(f"{label}, {len(stack)} layers: {plan(layer.sizes(batch, context))}")
        for count in seen:
            results[f"{label}, {count} seen"] = measure(layer, stack, count, flush, pace, options.rounds)
        if options.sweep:
            results[f"{label}: sweep"] = sweep(layer, stack, [seen[0], seen[-1]], flush, pace)
        del stack
        write(options.json, "attention", results)
    write(options.json, "attention", results)
    return results


if __name__ == "__main__":
    main()
