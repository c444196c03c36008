"""The feed-forward blocks of a mixture-of-experts decode step: fusion and overlap against torch.compile, in one run.

    python -m auxstream.bench.ffn [--layers N] [--batch B ...] [--json PATH]

Measures: device time per layer of router, experts, dense branch and norms of Gemma-4-26B-A4B (random weights), each
variant one CUDA graph, replayed interleaved; and the kernels each graph launches, by name. The overlapped graphs must
equal the serial ones of the same kernels bit for bit. Does not measure: attention, the host, compile time. Needs a GPU
and the extra `hf`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..capture.huggingface import build, gemma4_config
from ..capture.mark import mark_multi_stream_moe_shared_experts
from ..capture.schedule import insert_regions
from ..capture.trace import trace
from ..kernels import fuse_elementwise
from ..kernels.derive import copy_of
from .blocks import FeedForward
from .command import CommandLine
from .harness import interleave, write
from .launches import by_kind
from .replays import Captured
from .torch_compile import rival

FUSIONS = ("unfused", "fused on the caller", "fused everywhere")


def graphs(model: FeedForward, hidden: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every combination of fusion and streams, from one trace."""
    traced = trace(model, (hidden,)).graph_module
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for fusion in FUSIONS:
        for streams in ("one stream", "aux stream"):
            gm = copy_of(traced)
            mark_multi_stream_moe_shared_experts(gm)
            if fusion != "unfused":
                fuse_elementwise(gm, safe=(("*", "1"),) if fusion == "fused everywhere" else ())
            if streams == "aux stream":
                insert_regions(gm)
            found[f"{fusion}, {streams}"] = gm
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = CommandLine(__doc__, rounds=30, limit=300, quick={"layers": 2, "rounds": 5, "no_compile": True})
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.options(arguments)
    decoder = build(gemma4_config(options.layers, "full"), torch.device("cuda"))
    model = FeedForward(decoder.model.layers)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    left_out: list[str] = []
    results: dict[str, Any] = {"left out": left_out}
    for batch in options.clock.in_time(options.batch, left_out, "batch {}".format):
        hidden = torch.randn(batch, 1, 2816, device="cuda", dtype=torch.bfloat16)
        runs = {name: Captured(run, hidden) for name, run in graphs(model, hidden).items()}
        if not options.no_compile:
            found = rival(model, (hidden,), "default", options.clock, needs=5, for_others=10)
            if isinstance(found, str):
                left_out.append(f"torch.compile, batch {batch}: {found}")
                print(left_out[-1][:300], flush=True)
            else:
                runs["torch.compile, one stream"] = Captured(found[0])
        for run in runs.values():
            run.graph.replay()
        equal = {
            fusion: torch.equal(runs[f"{fusion}, one stream"].out, runs[f"{fusion}, aux stream"].out)
            for fusion in FUSIONS
        }
        figures = interleave({name: run.sample for name, run in runs.items()}, options.rounds, "us")
        print(f"batch {batch}, {options.layers} layers, us per layer")
        for name, figure in figures.items():
            kernels = runs[name].launches()
            per_layer = figure.median / options.layers
            counts = (
                by_kind(kernels)["pointwise"] / options.layers,
                sum(c for c, _ in kernels.values()) / options.layers,
            )
            results[f"batch {batch}: {name}"] = {
                "us per layer": per_layer,
                "step": figure,
                "pointwise launches per layer": counts[0],
                "launches per layer": counts[1],
                "kernels": kernels,
            }
            print(f"  {name:34} {per_layer:7.1f}   {counts[0]:5.1f} pointwise of {counts[1]:5.1f} launches", flush=True)
        results[f"batch {batch}: overlapped equals serial"] = equal
        print(f"  overlapped equals serial, bit for bit: {equal}")
        write(options.json, "ffn", results)
    write(options.json, "ffn", results)
    return results


if __name__ == "__main__":
    main()
