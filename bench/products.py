"""Products of few rows with weights: one launch for weights that share their input, against cuBLAS.

    python -m auxstream.bench.products [--shapes NAME ...] [--rows M ...] [--sweep] [--compile] [--json PATH]

Measures: device time per call of one CUDA graph of calls with weights of their own, which no cache holds; variants
interleaved. "cuBLAS" is torch's linear per weight, without what follows it; "eager" is that and the tail. Floors are
the bytes of the weights at the pace of a read measured beside. Errors are against float64. `--sweep`: every candidate
tile, fastest first; without it, those that users measure. Does not measure: the host, what runs beside. Needs a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.ahead import make_ready
from ..kernels.products_launch import Launch, launches, run
from ..kernels.products_tiles import every, likely
from ..kernels.products_work import Tile, Work, reference
from .command import CommandLine
from .harness import Figure, interleave, write
from .replays import Chain, paces

_COLD: Final = 192 << 20
"""Bytes of weights that a graph goes round: several times what an L2 cache holds."""
_MOST_CALLS: Final = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Weights that share an input of K columns, by their numbers of rows; and what follows a pair of them."""

    summed: int
    widths: tuple[int, ...]
    activation: str | None = None

    @property
    def nbytes(self) -> int:
        return 2 * self.summed * sum(self.widths)


SHAPES: Final[Mapping[str, Shape]] = {
    "qkv": Shape(2816, (4096, 2048, 2048)),
    "qk full": Shape(2816, (8192, 1024)),
    "q": Shape(2816, (4096,)),
    "k": Shape(2816, (2048,)),
    "o": Shape(4096, (2816,)),
    "o full": Shape(8192, (2816,)),
    "gate, up": Shape(2816, (2112, 2112)),
    "gated": Shape(2816, (2112, 2112), "gelu_tanh"),
    "down": Shape(2112, (2816,)),
    "router": Shape(2816, (128,)),
    "head": Shape(2816, (262144,)),
}
"""Of Gemma-4-26B-A4B."""


def there_is(shape: Shape, rows: int) -> bool:
    """A kernel: what follows a pair is of one row."""
    return shape.activation is None or rows == 1


def stack(shape: Shape, rows: int) -> list[Work]:
    """Calls with weights of their own."""
    calls = min(_MOST_CALLS, -(-_COLD // shape.nbytes))
    found: list[Work] = []
    for _ in range(calls):
        x = torch.randn(rows, shape.summed, device="cuda", dtype=torch.bfloat16)
        weights = [torch.randn(n, shape.summed, device="cuda", dtype=torch.bfloat16) for n in shape.widths]
        found.append(Work(x, tuple(weight.mul_(shape.summed**-0.5) for weight in weights), (), shape.activation))
    return found


def cublas(work: Work) -> list[Tensor]:
    return [functional.linear(work.x, weight) for weight in work.weights]


def eager(work: Work) -> list[Tensor]:
    """With what follows."""
    return reference(work)


def exact(work: Work) -> list[Tensor]:
    found = [work.x.double() @ weight.double().T for weight in work.weights]
    if work.activation is None:
        return found
    return [functional.gelu(found[0], approximate="tanh") * found[1]]


def by(tile: Tile) -> Callable[[Work], list[Tensor]]:
    return lambda work: run(work, tile)


def error(call: Callable[[Work], list[Tensor]], works: Sequence[Work]) -> float:
    """Against float64, relative, over some calls."""
    pairs = [(a.double(), b) for work in works for a, b in zip(call(work), exact(work), strict=True)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def compile_all(jobs: Sequence[tuple[Work, Tile]]) -> None:
    """Side by side, each kernel once."""
    todo: dict[Any, Launch] = {}
    for work, tile in jobs:
        for launch in launches(work, work.outputs(), tile):
            key = (launch.kernel.fn.__name__, repr(sorted(launch.options.items(), key=str)))
            todo[key] = launch
    make_ready([launch.compile for launch in todo.values()], torch.device("cuda"))
    print(f"{len(todo)} kernels compiled for {len(jobs)} candidates", flush=True)


def timed(variants: Mapping[str, Callable[[Work], object]], calls: Sequence[Work], rounds: int) -> dict[str, Figure]:
    """Figures of those that run; the others' errors are printed."""
    ready: dict[str, Callable[[], float]] = {}
    for name, call in variants.items():
        try:
            ready[name] = Chain(call, calls, replays=3).sample
        except Exception as failure:  # a candidate may need more of a resource than there is
            print(f"    {name}: {type(failure).__name__}: {' '.join(str(failure).split())[:100]}")
            torch.cuda.synchronize()
    return interleave(ready, rounds, "us")


def measure(name: str, rows: int, read: float, options: argparse.Namespace) -> dict[str, Any]:
    """One shape at one number of rows."""
    shape, began = SHAPES[name], time.perf_counter()
    calls = stack(shape, rows)
    tiles = {str(tile): tile for tile in (every(calls[0]) if options.sweep else likely(calls[0]))}
    floor = shape.nbytes / read / 1e6
    picked = list(tiles)
    found: dict[str, Any] = {"floor us": floor}
    if options.sweep:
        figures = timed({key: by(tile) for key, tile in tiles.items()}, calls, 3)
        found["sweep"] = figures
        picked = sorted(figures, key=lambda key: figures[key].median)[: options.show]
    variants: dict[str, Callable[[Work], list[Tensor]]] = {"cuBLAS": cublas}
    if shape.activation is not None:
        variants["eager"] = eager
    if options.compile:
        torch._dynamo.reset()
        variants["torch.compile"] = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    variants |= {key: by(tiles[key]) for key in picked}
    figures = timed(variants, calls, options.rounds)
    found |= figures
    print(f"{name}, {rows} rows, {len(calls)} calls: floor {floor:.2f} us, {len(tiles)} candidates")
    for key in sorted(figures, key=lambda key: figures[key].median):
        median = figures[key].median
        print(f"    {median:8.2f} us  {shape.nbytes / median / 1e6:5.2f} TB/s  {floor / median:4.0%}  {key}")
    checked = ("eager" if shape.activation is not None else "cuBLAS", *picked[:3])
    found["errors"] = {key: error(variants[key], calls[:4]) for key in checked if key in figures}
    print("    errors:", {key: f"{value:.6f}" for key, value in found["errors"].items()})
    print(f"    ({time.perf_counter() - began:.1f} s)", flush=True)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = CommandLine(__doc__, rounds=12, limit=300, quick={"rounds": 5, "rows": [1]})
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--show", type=int, default=10, help="how many of the best candidates to measure again")
    parser.add_argument("--sweep", action="store_true", help="every candidate tile")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    options = parser.options(arguments)
    torch.manual_seed(0)
    read = paces()["read"]
    print(f"{torch.cuda.get_device_name()}: {read:.2f} TB/s read")
    left_out: list[str] = []
    results: dict[str, Any] = {"TB/s": read, "left out": left_out}
    jobs: list[tuple[Work, Tile]] = []
    cells = [(name, rows) for name in options.shapes for rows in options.rows if there_is(SHAPES[name], rows)]
    for shape, rows in ((SHAPES[name], rows) for name, rows in cells):
        x = torch.empty(rows, shape.summed, device="cuda", dtype=torch.bfloat16)
        weights = tuple(torch.empty(n, shape.summed, device="cuda", dtype=torch.bfloat16) for n in shape.widths)
        work = Work(x, weights, (), shape.activation)
        jobs += [(work, tile) for tile in (every(work) if options.sweep else likely(work))]
    compile_all(jobs)
    del jobs
    for name, rows in options.clock.in_time(cells, left_out, lambda cell: f"{cell[0]}, {cell[1]} rows"):
        results[f"{name}, {rows} rows"] = measure(name, rows, read, options)
        write(options.json, "products", results)
    write(options.json, "products", results)
    return results


if __name__ == "__main__":
    main()
