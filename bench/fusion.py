"""What fused kernels cost: against eager, torch.compile, a device copy and an empty kernel, interleaved in one run.

    python -m auxstream.bench.fusion [--hidden N ...] [--rows M ...] [--quick] [--json PATH]

Measures: device time per call of one chain, replayed from a CUDA graph of CALLS calls, so that the host does not count.
Large shapes move at least 200 MB, far more than the L2 cache holds; decode-sized ones are warm, as they are between
the products of a decode step. Bytes are those a chain must read and write once. Does not measure: compile time (see
`models`), chains that meet a GEMM, other cards. Needs a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..capture.trace import trace
from ..kernels import fuse_elementwise
from .command import CommandLine
from .harness import Figure, interleave, write
from .replays import Chain

CALLS = 20
LARGE_BYTES = 256 << 20
COLUMNS = 4096
"""Of decode-sized shapes."""
TORCH = "torch.compile"


class ResidualRmsNorm(nn.Module):
    """As Hugging Face models write it: float32 inside, two roundings."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = x + residual
        wide = residual.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * self.weight.float()).type_as(x), residual


class SwiGlu(nn.Module):
    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up


class GeGlu(nn.Module):
    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * up


class ScaledSoftmax(nn.Module):
    """Scores times a scale, then softmax: two ops, so that there is something to fuse."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x * 0.125, dim=-1)


class ResidualLayerNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = x + residual
        return self.norm(residual), residual


@dataclass(frozen=True, slots=True)
class Fusible:
    """A chain of ops: its module, its inputs' columns per hidden unit, and the tensors it moves per row."""

    make: Callable[[int], nn.Module]
    inputs: tuple[int, ...]
    moved: int


CHAINS = {
    "residual + RMSNorm": Fusible(ResidualRmsNorm, (1, 1), 4),
    "SwiGLU": Fusible(lambda hidden: SwiGlu(), (2,), 3),
    "GEGLU": Fusible(lambda hidden: GeGlu(), (2,), 3),
    "scale + softmax": Fusible(lambda hidden: ScaledSoftmax(), (1,), 2),
    "residual + LayerNorm": Fusible(ResidualLayerNorm, (1, 1), 4),
}


def captured(run: Callable[[], object]) -> Callable[[], float]:
    """Microseconds per call of `run`, from a graph of CALLS calls."""
    return Chain(lambda _: run(), range(CALLS)).sample


def copy_of(moved: int) -> Callable[[], float]:
    """A device copy that reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return captured(lambda: target.copy_(source))


def variants(
    chain: Fusible, rows: int, hidden: int, compiled: bool
) -> tuple[dict[str, Callable[[], float]], dict[str, Any]]:
    """The ways to run a chain, and what was checked about them."""
    model = chain.make(hidden).to("cuda", torch.bfloat16)
    inputs = tuple(torch.randn(rows, hidden * width, device="cuda", dtype=torch.bfloat16) for width in chain.inputs)
    fused = trace(model, inputs).graph_module
    report = fuse_elementwise(fused)
    with torch.no_grad():
        expected, got = model(*inputs), fused(*inputs)
    expected, got = (value if isinstance(value, tuple) else (value,) for value in (expected, got))
    same = [torch.equal(a, b) for a, b in zip(expected, got, strict=True)]
    differing = max(float((a != b).float().mean()) for a, b in zip(expected, got, strict=True))
    checks = {"launches": len(report.fusions), "bits equal to eager": all(same), "share of differing bits": differing}
    runs = {"fused": captured(lambda: fused(*inputs)), "eager": captured(lambda: model(*inputs))}
    if compiled:
        theirs = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
        runs[TORCH] = captured(lambda: theirs(*inputs))
    return runs, checks


def large(chain: Fusible, hidden: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """One chain at a size where only bandwidth counts."""
    rows = LARGE_BYTES // (chain.moved * hidden * 2)
    moved = rows * hidden * 2 * chain.moved
    runs, checks = variants(chain, rows, hidden, compiled)
    runs["copy"] = copy_of(moved)
    figures = interleave(runs, rounds, "us")
    return {"shape": [rows, hidden], "moved_mb": moved / 1e6, **checks, **_compared(figures)}


def decode(chain: Fusible, rows: int, hidden: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """One chain at the size of a decode step."""
    runs, checks = variants(chain, rows, hidden, compiled)
    nothing = torch.empty(1, device="cuda")
    runs["empty kernel"] = captured(lambda: nothing.zero_())
    figures = interleave(runs, rounds, "us")
    over = figures["fused"].median - figures["empty kernel"].median
    return {"shape": [rows, hidden], **checks, **_compared(figures), "over an empty kernel": over}


def _compared(figures: dict[str, Figure]) -> dict[str, Any]:
    fused = figures["fused"].median
    found: dict[str, Any] = dict(figures)
    if TORCH in figures:
        found[f"of {TORCH}"] = figures[TORCH].median / fused
    if "copy" in figures:
        found["of a copy"] = figures["copy"].median / fused
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = {"rounds": 5, "hidden": [16384], "rows": [1], "no_compile": True}
    parser = CommandLine(__doc__, rounds=30, limit=560, quick=quick)
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="of the large shapes")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64], help="of decode-sized ones, of 4096 columns")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.options(arguments)
    left_out: list[str] = []
    results: dict[str, Any] = {"left out": left_out}
    cases = [(name, kind, size) for name in CHAINS for kind in ("large", "decode")
             for size in (options.hidden if kind == "large" else options.rows)]  # fmt: skip
    ratios: list[float] = []
    for name, kind, size in options.clock.in_time(cases, left_out, lambda case: "{}: {}, {}".format(*case)):
        chain, compiled = CHAINS[name], not options.no_compile
        if kind == "large":
            row = results[f"large: {name}, {size}"] = large(chain, size, options.rounds, compiled)
            said = f"{row['of a copy']:5.2f} of a copy"
        else:
            row = results[f"decode: {name}, {size} x {COLUMNS}"] = decode(
                chain, size, COLUMNS, options.rounds, compiled
            )
            said = f"{row['over an empty kernel']:5.2f} us over an empty kernel"
        if compiled:
            ratios.append(row[f"of {TORCH}"])
            said += f"  {ratios[-1]:5.2f} of {TORCH}"
        print(
            f"{name:22} {row['shape']!s:16} {row['fused'].median:8.2f} us  {said}  "
            f"{row['share of differing bits']:.1e} differ",
            flush=True,
        )
        write(options.json, "fusion", results)
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        results[f"{TORCH}'s time over ours"] = {"geometric mean": mean, "worst": min(ratios)}
        print(f"{TORCH}'s time over ours: geometric mean {mean:.3f}, worst {min(ratios):.3f}")
    write(options.json, "fusion", results)
    return results


if __name__ == "__main__":
    main()
