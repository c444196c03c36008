"""The experts of a mixture alone: every form of `auxstream::moe_experts` against torch's grouped product, in one run.

    python -m auxstream.bench.experts [--batch B ...] [--sweep] [--json PATH]

Measures: device time per layer of one CUDA graph of LAYERS layers with weights of their own, which no cache holds, and
experts chosen at random per layer; variants interleaved. Floors are the bytes of the weights that are reached, at the
pace of a device copy measured beside. `--sweep`: every candidate tile of every kernel. Does not measure: the router,
the host, other layers' shapes. Needs a GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import experts_few as few
from ..kernels import experts_many as many
from ..kernels.experts_few import Activation, Launch, Tile, Work
from ..runtime.errors import AuxstreamError
from .harness import Figure, device_time, interleave, write

HIDDEN, INNER, EXPERTS, CHOICES = 2816, 704, 128, 8
LAYERS = 8
MOST_FEW, LEAST_MANY = 32, 8
ACTIVATION = Activation("gelu_tanh")


@dataclass(frozen=True, slots=True)
class Layer:
    """A call with its workspaces."""

    work: Work
    act: Tensor
    part: Tensor
    out: Tensor
    order: Tensor
    start: Tensor


def weights() -> list[tuple[Tensor, Tensor]]:
    """Both weights of every layer, at a scale that keeps values near one."""
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(LAYERS):
        up = torch.empty(EXPERTS, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16).normal_(0, HIDDEN**-0.5)
        down = torch.empty(EXPERTS, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16).normal_(0, INNER**-0.5)
        found.append((up, down))
    return found


def layers(stacked: list[tuple[Tensor, Tensor]], tokens: int) -> list[Layer]:
    """A call per layer, with random tokens and choices."""
    found: list[Layer] = []
    for up, down in stacked:
        hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        scores, chosen = torch.randn(tokens, EXPERTS, device="cuda").softmax(-1).topk(CHOICES)
        scale = scores / scores.sum(-1, keepdim=True)
        work = Work(hidden, chosen, scale, up, down, None, None, ACTIVATION, interleaved=False)
        act = few.activations(work).normal_()
        layer = Layer(work, act, few.parts(work).normal_(), torch.empty_like(hidden), *many.groups(work))
        many.group(work, layer.order, layer.start)()
        found.append(layer)
    return found


class Timed:
    """Launches of every layer in one CUDA graph."""

    def __init__(self, run: Callable[[Layer], object], calls: list[Layer]) -> None:
        self._kept = (run, calls)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(2):
                run(calls[0])
            stream.synchronize()
            with torch.cuda.graph(self._graph, stream=stream):
                for layer in calls:
                    run(layer)

    def __call__(self) -> float:
        """Microseconds per layer."""
        return device_time(self._graph.replay, 4) / LAYERS


# --- candidates -------------------------------------------------------------------------------------------------------


def up_one_tiles() -> list[Tile]:
    shapes = [(1, 256, 1), (2, 256, 2), (4, 256, 4), (8, 256, 8), (2, 256, 1), (4, 256, 2), (8, 256, 4), (2, 512, 4),
              (1, 512, 2), (4, 512, 8), (2, 128, 1), (4, 128, 2), (8, 128, 4), (4, 512, 4)]  # fmt: skip
    found = [Tile(*shape) for shape in shapes]
    found += [Tile(*shape, evict=False) for shape in shapes[:4]]
    found += [Tile(4, 256, 4, 3), Tile(4, 256, 4, 5), Tile(8, 256, 8, 4), Tile(8, 256, 4, 4), Tile(16, 256, 8, 4)]
    return found


def down_one_tiles() -> list[Tile]:
    shapes = [(1, 256, 2), (2, 256, 4), (4, 256, 8), (1, 256, 4), (2, 256, 8), (1, 256, 8), (1, 1024, 4), (1, 1024, 8),
              (2, 1024, 8), (2, 64, 2), (4, 64, 4), (8, 64, 8), (2, 64, 4), (4, 64, 8), (1, 64, 1), (2, 128, 4),
              (4, 128, 8), (1, 128, 2), (1, 128, 4), (8, 64, 16)]  # fmt: skip
    return [Tile(*shape) for shape in shapes] + [Tile(*shape, evict=False) for shape in shapes[1:3]]


def up_few_tiles() -> list[Tile]:
    found = [
        Tile(rows, cols, warps, stages)
        for rows in (16, 32, 64)
        for cols in (64, 128, 256)
        for stages in (3, 4, 6)
        for warps in (4, 8)
        if 36_000 <= (2 * rows + 16) * cols * 2 * (stages - 1) <= 112_000 and not (warps == 8 and rows < 32)
    ]
    return [*found, *(Tile(32, 128, 4, stages, evict=False) for stages in (4, 6)), Tile(16, 128, 2, 4)]


def down_few_tiles() -> list[Tile]:
    found = [
        Tile(rows, cols, warps, stages)
        for rows in (32, 64, 128)
        for cols in (64, 128)
        for stages in (3, 4, 6)
        for warps in (4, 8)
        if 16_000 <= (rows + 16) * cols * 2 * (stages - 1) <= 112_000 and not (warps == 8 and rows < 64)
    ]
    return [*found, Tile(16, 64, 2, 6), Tile(16, 128, 4, 4), Tile(64, 64, 4, 4, evict=False)]


def compile_all(launches: list[Launch]) -> None:
    """Side by side; what does not compile says so when it is launched."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        concurrent.futures.wait([pool.submit(launch.compile) for launch in launches])


def timed(runs: Mapping[str, Callable[[Layer], object]], calls: list[Layer], rounds: int) -> dict[str, Figure]:
    """Figures of those that run; the others' errors are printed."""
    ready: dict[str, Callable[[], float]] = {}
    for name, run in runs.items():
        try:
            ready[name] = Timed(run, calls)
        except Exception as error:  # a candidate may need more of a resource than there is
            print(f"    {name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}")
            torch.cuda.synchronize()
    return interleave(ready, rounds, "us")


def table(title: str, figures: Mapping[str, Figure], nbytes: float, most: int = 99) -> list[str]:
    """Prints the figures, fastest first, with the pace they read at; leaves the names in that order."""
    print(title)
    order = sorted(figures, key=lambda name: figures[name].median)
    for name in order[:most]:
        print(
            f"    {figures[name].median:8.2f} us  {nbytes / figures[name].median / 1e6:5.2f} TB/s  {name}", flush=True
        )
    return order


# --- what is measured -------------------------------------------------------------------------------------------------


def reached(calls: list[Layer]) -> float:
    """Experts that some token chose, a layer."""
    return sum(layer.work.chosen.unique().numel() for layer in calls) / len(calls)


def reference(work: Work) -> Tensor:
    """In float64, one expert after the other."""
    out = torch.zeros(work.hidden.shape, dtype=torch.float64, device=work.hidden.device)
    for expert in work.chosen.unique().tolist():
        tokens, choices = (work.chosen == expert).nonzero(as_tuple=True)
        gate, up = (work.hidden[tokens].double() @ work.up[expert].double().T).chunk(2, -1)
        inner = functional.gelu(gate, approximate="tanh") * up
        rows = inner @ work.down[expert].double().T * work.scale[tokens, choices, None].double()
        out.index_add_(0, tokens, rows)
    return out


def grouped(layer: Layer) -> Tensor:
    """The sorted, grouped form that models run by default, in torch ops."""
    work = layer.work
    tokens, choices = work.chosen.shape
    ids, order = torch.sort(work.chosen.reshape(-1))
    counts = torch.histc(ids.int(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    gate, up = torch._grouped_mm(work.hidden[order // choices], work.up.mT, offs=offsets).chunk(2, -1)
    inner = functional.gelu(gate, approximate="tanh") * up
    rows = torch._grouped_mm(inner, work.down.mT, offs=offsets) * work.scale.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return rows[back].view(tokens, choices, -1).sum(1).to(work.hidden.dtype)


def error_of(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def pair_one(up: Tile, down: Tile) -> Callable[[Layer], object]:
    def run(layer: Layer) -> Tensor:
        few.up_one(layer.work, layer.act, up)()
        few.down_one(layer.work, layer.act, layer.out, down)()
        return layer.out

    return run


def joined(up: Tile, down: Tile) -> Callable[[Layer], object]:
    def run(layer: Layer) -> Tensor:
        arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
        few.both_one(layer.work, layer.act, layer.out, arrived, up, down)()
        return layer.out

    return run


def pair_few(up: Tile, down: Tile) -> Callable[[Layer], object]:
    def run(layer: Layer) -> Tensor:
        few.up_few(layer.work, layer.act, up)()
        few.down_few(layer.work, layer.act, layer.part, down)()
        few.sum_of(layer.work, layer.part, layer.out)()
        return layer.out

    return run


def pair_many(up: tuple[int, Tile], down: tuple[int, Tile]) -> Callable[[Layer], object]:
    def run(layer: Layer) -> Tensor:
        many.group(layer.work, layer.order, layer.start)()
        up_many(layer, *up)()
        down_many(layer, *down)()
        few.sum_of(layer.work, layer.part, layer.out, once=False)()
        return layer.out

    return run


def up_many(layer: Layer, tokens: int, tile: Tile) -> Launch:
    return many.up_many(layer.work, layer.order, layer.start, layer.act, tile, tokens)


def down_many(layer: Layer, tokens: int, tile: Tile) -> Launch:
    return many.down_many(layer.work, layer.order, layer.start, layer.act, layer.part, tile, tokens)


def up_many_tiles(per_expert: float) -> list[tuple[int, Tile]]:
    tiles = [Tile(*shape) for shape in ((32, 64, 4, 4), (32, 64, 4, 6), (32, 128, 4, 3), (32, 128, 4, 4),
             (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (64, 128, 8, 3))]  # fmt: skip
    wide = [
        Tile(*shape) for shape in ((64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4))
    ]
    counts = [tokens for tokens in (16, 32, 64, 128) if per_expert <= tokens <= 16 * max(per_expert, 2)]
    return [(tokens, tile) for tokens in counts for tile in (tiles if tokens <= 32 else wide)]


def down_many_tiles(per_expert: float) -> list[tuple[int, Tile]]:
    tiles = [Tile(*shape) for shape in ((64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3),
             (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (32, 128, 4, 4))]  # fmt: skip
    wide = [
        Tile(*shape) for shape in ((64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3))
    ]
    counts = [tokens for tokens in (16, 32, 64, 128) if per_expert <= tokens <= 16 * max(per_expert, 2)]
    return [(tokens, tile) for tokens in counts for tile in (tiles if tokens <= 32 else wide)]


def sweep_many(calls: list[Layer], rounds: int) -> dict[str, Callable[[Layer], object]]:
    """The grouped form's candidates, and the best of them together."""
    first, count = calls[0], reached(calls)
    per_expert = first.work.pairs / count
    up_bytes, down_bytes = count * 2 * INNER * HIDDEN * 2, count * INNER * HIDDEN * 2
    ups = {f"{c[0]} tokens, {c[1]}": c for c in up_many_tiles(per_expert)}
    downs = {f"{c[0]} tokens, {c[1]}": c for c in down_many_tiles(per_expert)}
    compile_all([up_many(first, *c) for c in ups.values()] + [down_many(first, *c) for c in downs.values()])
    group = {"group": lambda layer: many.group(layer.work, layer.order, layer.start)()}
    table("  many tokens, groups", timed(group, calls, rounds), first.order.nbytes)
    runs = {n: lambda layer, c=c: up_many(layer, *c)() for n, c in ups.items()}
    best_up = table("  many tokens, up", timed(runs, calls, rounds), up_bytes)[:3]
    runs = {n: lambda layer, c=c: down_many(layer, *c)() for n, c in downs.items()}
    best_down = table("  many tokens, down", timed(runs, calls, rounds), down_bytes)[:3]
    return {f"many: {u} | {d}": pair_many(ups[u], downs[d]) for u in best_up for d in best_down}


def sweep(calls: list[Layer], rounds: int) -> dict[str, Callable[[Layer], object]]:
    """Every candidate of both kernels alone, then the best of them together. Leaves the whole calls worth comparing."""
    first, count = calls[0], reached(calls)
    up_bytes, down_bytes = count * 2 * INNER * HIDDEN * 2, count * INNER * HIDDEN * 2
    found: dict[str, Callable[[Layer], object]] = {}
    if first.work.hidden.shape[0] == 1:
        ups, downs = {str(t): t for t in up_one_tiles()}, {str(t): t for t in down_one_tiles()}
        compile_all([few.up_one(first.work, first.act, tile) for tile in ups.values()])
        compile_all([few.down_one(first.work, first.act, first.out, tile) for tile in downs.values()])
        runs = {n: lambda layer, t=t: few.up_one(layer.work, layer.act, t)() for n, t in ups.items()}
        best_up = table("  one token, up", timed(runs, calls, rounds), up_bytes)[:3]
        runs = {n: lambda layer, t=t: few.down_one(layer.work, layer.act, layer.out, t)() for n, t in downs.items()}
        best_down = table("  one token, down", timed(runs, calls, rounds), down_bytes)[:3]
        for up in (ups[name] for name in best_up):
            for down in (downs[name] for name in best_down):
                found[f"pair: {up} | {down}"] = pair_one(up, down)
        for ahead, late in ((64, 396), (128, 396), (256, 396), (64, 132), (256, 132), (512, 132), (64, 1408)):
            tile = ups[best_up[0]]
            tile = Tile(tile.rows, tile.cols, tile.warps, tile.stages, tile.evict, ahead, late)
            found[f"pair: {tile} | {best_down[0]}"] = pair_one(tile, downs[best_down[0]])
        for up in (Tile(4, 256, 4), Tile(8, 256, 8), Tile(2, 256, 2)):
            for down in (Tile(2, 256, 4), Tile(4, 256, 4), Tile(1, 1024, 4), Tile(2, 256, 8), Tile(4, 256, 8),
                         Tile(1, 256, 2), Tile(2, 64, 2), Tile(4, 64, 4)):  # fmt: skip
                if up.warps == down.warps:
                    found[f"joined: {up} | {down}"] = joined(up, down)
    some = 4 if first.work.hidden.shape[0] == 1 else 1
    ups, downs = {str(t): t for t in up_few_tiles()[::some]}, {str(t): t for t in down_few_tiles()[::some]}
    compile_all([few.up_few(first.work, first.act, tile) for tile in ups.values()])
    compile_all([few.down_few(first.work, first.act, first.part, tile) for tile in downs.values()])
    runs = {n: lambda layer, t=t: few.up_few(layer.work, layer.act, t)() for n, t in ups.items()}
    best_up = table("  few tokens, up", timed(runs, calls, rounds), up_bytes)[:3]
    runs = {n: lambda layer, t=t: few.down_few(layer.work, layer.act, layer.part, t)() for n, t in downs.items()}
    best_down = table("  few tokens, down", timed(runs, calls, rounds), down_bytes)[:3]
    runs = {
        str(cols): lambda layer, c=cols: few.sum_of(layer.work, layer.part, layer.out, c)() for cols in (256, 512, 1024)
    }
    table("  few tokens, sum", timed(runs, calls, rounds), first.part.nbytes)
    for up in (ups[name] for name in best_up):
        for down in (downs[name] for name in best_down):
            found[f"few: {up} | {down}"] = pair_few(up, down)
    return found


def pace() -> dict[str, float]:
    """TB/s of a copy and of a sum over one GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    words = source.view(torch.float32)
    runs = {"copy": lambda: device_time(lambda: target.copy_(source), 5), "read": lambda: device_time(words.sum, 5)}
    figures = interleave(runs, 7, "us")
    return {
        "copy": 2 * source.nbytes / figures["copy"].median / 1e6,
        "read": source.nbytes / figures["read"].median / 1e6,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 1, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="every candidate tile of every kernel")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise AuxstreamError("bench.experts measures CUDA graphs", came="no GPU", remedy="run it on a machine with one")
    torch.manual_seed(0)
    results: dict[str, Any] = {"TB/s": pace()}
    print(f"{torch.cuda.get_device_name()}: {results['TB/s']}")
    stacked = weights()
    for tokens in options.batch:
        calls = layers(stacked, tokens)
        count = reached(calls)
        nbytes = count * 3 * INNER * HIDDEN * 2
        floor = nbytes / results["TB/s"]["copy"] / 1e6
        print(f"batch {tokens}: {count:.1f} experts, floor {floor:.1f} us")
        found = sweep(calls, options.rounds) if tokens <= MOST_FEW else {}
        if tokens >= LEAST_MANY:
            found |= sweep_many(calls, options.rounds)
        found["grouped"] = grouped
        figures = timed(found, calls, options.rounds)
        exact = reference(calls[0].work)
        order = table("  whole", figures, nbytes)
        errors = {name: error_of(found[name](calls[0]), exact) for name in (*order[:4], "grouped")}
        print("  error against float64:", {name: f"{error:.5f}" for name, error in errors.items()})
        results[f"batch {tokens}"] = {"experts": count, "floor us": floor, "errors": errors, **figures}
    write(options.json, "experts", results)
    return results


if __name__ == "__main__":
    main()
