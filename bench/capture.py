"""What a proof costs where a graph is captured: the Gemma-4 decode step, captured with and without it, in one run.

    python -m auxstream.bench.capture [--layers N] [--rounds N] [--json PATH]

Measures: wall time of a whole capture as `compile` makes it (one rehearsal, capture, instantiation), without a proof
and with every node proved, unfused and fused everywhere; and what was proved.
Does not measure: tracing, fusing, compiling kernels. Needs a GPU and the extra `hf`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..capture.compiler import warm_up_and_capture
from ..capture.huggingface import DecodeStep, build, gemma4_config
from ..capture.mark import mark_multi_stream_moe_shared_experts
from ..capture.proof import Report
from ..capture.schedule import insert_regions
from ..capture.trace import trace
from ..kernels import fuse_elementwise
from ..runtime.settings import Verify
from .command import CommandLine
from .harness import interleave, write


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = CommandLine(__doc__, rounds=5, limit=300, quick={"layers": 4, "rounds": 2})
    parser.add_argument("--layers", type=int, default=30)
    options = parser.options(arguments)
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda")
    step = DecodeStep(build(gemma4_config(options.layers, "full"), device), 1, 1024)
    ids, position = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((1, 1), (1,)))
    left_out: list[str] = []
    results: dict[str, Any] = {"left out": left_out}
    for fusion in options.clock.in_time(("fused everywhere", "unfused"), left_out):
        traced = trace(step, (ids, position))
        module = traced.graph_module
        mark_multi_stream_moe_shared_experts(module)
        if fusion != "unfused":
            start = time.perf_counter()
            summary = fuse_elementwise(module, safe=(("*", "1"),)).summary
            results[f"{fusion}: fuse, s"] = time.perf_counter() - start
            print(f"{summary}; {time.perf_counter() - start:.2f} s")
        insert_regions(module)
        reports: list[Report] = []

        def capture(verify: Verify, run: Any = module, mutated: Any = traced, reports: Any = reports) -> float:
            start = time.perf_counter()
            inputs, written = (ids, position), mutated.written_tensors()
            captured, _ = warm_up_and_capture(run, inputs, written, device, name="step", verify=verify, warmup=1)
            torch.cuda.synchronize()
            reports[:] = [captured.report]
            return (time.perf_counter() - start) * 1e3

        variants: dict[str, Callable[[], float]] = {
            f"{fusion}: captured": lambda capture=capture: capture("off"),
            f"{fusion}: captured and proved": lambda capture=capture: capture("error"),
        }
        figures = interleave(variants, options.rounds, "ms")
        plain, proved = (figure.median for figure in figures.values())
        (report,) = reports
        results |= figures
        results[f"{fusion}: ratio"] = proved / plain
        results[f"{fusion}: nodes"] = sum(bool(node.kernel) for node in report.nodes)
        results[f"{fusion}: races, unattributed"] = (len(report.races), len(report.unattributed))
        for name, figure in figures.items():
            print(f"  {name:36} {figure}")
        print(f"  ratio {proved / plain:.2f}\n{report}", flush=True)
        write(options.json, "capture", results)
    write(options.json, "capture", results)
    return results


if __name__ == "__main__":
    main()
