"""What two streams cost in memory: a captured prefill, with lifetimes across streams secured in each of the ways.

    python -m auxstream.bench.memory [--layers N] [--tokens T ...] [--unfused] [--json PATH]

Measures: bytes that the pool of a captured graph takes from the device, for the feed-forward blocks of
Gemma-4-26B-A4B (all layers over one layer's random weights), on one stream and on two; by what secures lifetimes:
nothing but events (UNSAFE), the graph's own references (`auto`), `record_stream` on all that crosses (`record`); with
torch's option to reuse recorded blocks in a capture on and off, each in a process of its own. A pool only grows while
it is captured into, so what it ends with is its peak. Passes if `auto` needs no more than events alone.
Does not measure: time, attention, the weights. Needs a GPU; `--device cpu --size tiny` tries it on the simulated
machine, where the allocator is a model and the option does not exist.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch.fx import GraphModule

from ..capture.compiler import warm_up_and_capture
from ..capture.graphs import CapturedGraph, CudaGraph
from ..capture.huggingface import build, gemma4_config
from ..capture.ledger import ledger
from ..capture.mark import mark_multi_stream_moe_shared_experts
from ..capture.schedule import insert_regions
from ..capture.trace import trace
from ..kernels import fuse_elementwise
from ..kernels.derive import copy_of
from ..kernels.launch import compile_ahead
from ..kernels.regions import lift_regions
from ..runtime.errors import AuxstreamWarning
from ..runtime.settings import Verify
from .blocks import FeedForward
from .command import CommandLine
from .harness import write

ONE, EVENTS, AUTO, RECORD = "one stream", "events only, UNSAFE", "auto", "record"
REUSE: Final = {"reuse off": "False", "reuse on": "True"}
"""Settings of the allocator, and their values of `graph_capture_record_stream_reuse`."""
PASSED: Final = "auto needs no more than events only"
MIB: Final = 1 << 20


def variants(fused: GraphModule) -> Iterator[tuple[str, GraphModule, Verify]]:
    """The marked graph on its streams, and whether its capture is to be proved."""
    yield ONE, copy_of(fused), "off"
    turned = copy_of(fused)
    insert_regions(turned)
    with lift_regions(turned):
        yield "one stream, order of two", copy_of(turned), "off"
    secured: dict[str, Callable[[GraphModule], object]] = {
        EVENTS: lambda gm: insert_regions(gm, unsafe_no_lifetime=True),
        AUTO: lambda gm: insert_regions(gm, handoff="auto"),
        RECORD: lambda gm: insert_regions(gm, handoff="record"),
    }
    for name, insert in secured.items():
        module = copy_of(fused)
        insert(module)
        yield name, module, "off" if name == EVENTS else "warn"


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every variant under this process's allocator: by variant within tokens and fusion."""
    device = torch.device(options.device)
    config = gemma4_config(1, options.size)
    config.vocab_size = 128  # embeddings are not what is measured
    layer: Any = build(config, device).model.layers[0]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    model = FeedForward([layer] * options.layers)
    results: dict[str, dict[str, Any]] = {}
    for tokens in options.tokens:
        hidden = torch.randn(1, tokens, config.hidden_size, device=device, dtype=torch.bfloat16)
        start = time.perf_counter()
        marked = trace(model, (hidden,)).graph_module
        mark_multi_stream_moe_shared_experts(marked)
        print(f"  {tokens} tokens, {options.layers} layers, traced in {time.perf_counter() - start:.1f} s", flush=True)
        for fusion in ("unfused",) if options.unfused else ("unfused", "fused everywhere"):
            module = copy_of(marked)
            if fusion != "unfused":
                compile_ahead(fuse_elementwise(module, safe=(("*", "1"),)).fusions)
            rows = results[f"{tokens} tokens, {fusion}"] = {}
            for name, variant, verify in variants(module):
                rows[name] = _row(variant, hidden, device, name, verify)
                print(_line(name, fusion, rows), flush=True)
    return results


def _row(module: GraphModule, hidden: torch.Tensor, device: torch.device, name: str, verify: Verify) -> dict[str, Any]:
    """Capture one variant, and let it go again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AuxstreamWarning)  # a proof that failed shows in the table
        start = time.perf_counter()
        graph, _ = warm_up_and_capture(module, (hidden,), (), device, name=name, verify=verify, warmup=1)
        seconds = time.perf_counter() - start
    row = {
        "reserved": graph.memory.reserved,
        "used by stream": dict(ledger({None: graph}, ()).buckets[0].streams),
        "proved": None if verify == "off" else graph.report.ok,
        "report": str(graph.report) if verify != "off" and not graph.report.ok else "",
        "capture, s": seconds,
        **_segments(graph),
    }
    del graph
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _segments(graph: CapturedGraph) -> dict[str, Any]:
    """What the allocator itself lists for the graph's pool: an account apart from the graph's own."""
    if not isinstance(graph, CudaGraph):
        return {}
    pool = tuple(graph.cuda_graph.pool())
    found = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) == pool]
    by_stream: dict[int, int] = {}
    for segment in found:
        by_stream[segment["stream"]] = by_stream.get(segment["stream"], 0) + segment["total_size"]
    sizes = sorted(by_stream.values(), reverse=True)
    return {"segments": sum(sizes), "segments by stream": sizes}


def _line(name: str, fusion: str, rows: dict[str, Any]) -> str:
    row, one, events = rows[name], rows[ONE]["reserved"], rows.get(EVENTS, {}).get("reserved")
    used = ", ".join(f"{stream} {nbytes / MIB:,.2f}" for stream, nbytes in row["used by stream"].items())
    said = {None: "", True: "proved", False: "NOT PROVED"}[row["proved"]]
    against = "" if events is None else f"{row['reserved'] / events:5.3f} of events only"
    size = f"{row['reserved'] / MIB:9.2f} MiB  {row['reserved'] / one:6.3f}"
    return f"    {fusion:16} {name:24} {size}  {against:21} {said:10} used: {used}"


def judged(results: dict[str, dict[str, Any]]) -> bool:
    """Whether `auto` was proved and needs no more than events alone, everywhere; said line by line."""
    verdicts: list[bool] = []
    for where, rows in results.items():
        auto, events, proved = rows[AUTO]["reserved"], rows[EVENTS]["reserved"], rows[AUTO]["proved"]
        verdicts.append(auto <= events and proved)
        said = "passes" if verdicts[-1] else "FAILS"
        print(f"{where}: auto {auto / MIB:,.2f} MiB, events only {events / MIB:,.2f} MiB: {said}")
        if not proved:
            print(rows[AUTO]["report"])
    return bool(verdicts) and all(verdicts)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = {"layers": 8, "tokens": [2048], "unfused": True}
    parser = CommandLine(__doc__, rounds=None, limit=480, quick=quick, devices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--unfused", action="store_true", help="leave fused graphs out")
    parser.add_argument("--here", action="store_true", help="measure in this process, as its allocator is set")
    options = parser.options(arguments)
    left_out: list[str] = []
    results: dict[str, Any] = {}
    if options.here:
        results = measure(options)
        write(options.json, "memory", results)
        return results
    if options.device == "cpu":
        results = measure(options)
    else:
        for setting in options.clock.in_time(REUSE, left_out):
            print(setting, flush=True)
            measured = _in_a_process(REUSE[setting], options)
            results |= {f"{setting}, {where}": rows for where, rows in measured.items()}
            write(options.json, "memory", results)
    results[PASSED] = judged(results)
    if left_out:
        results["left out"] = left_out
    write(options.json, "memory", results)
    return results


def _in_a_process(reuse: str, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` where the allocator has the option set so: it is read when torch starts."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # where both are set, one of them counts
        settings = [f"{name}=graph_capture_record_stream_reuse:{reuse}" for name in names]
        command = ["env", *settings, sys.executable, "-m", "auxstream.bench.memory", "--here", "--json", str(figures)]
        command += ["--layers", str(options.layers), "--size", options.size]
        command += ["--tokens", *map(str, options.tokens), *(["--unfused"] if options.unfused else [])]
        subprocess.run(command, check=True, timeout=max(1.0, options.clock.left()))
        return json.loads(figures.read_text())["results"]


if __name__ == "__main__":
    sys.exit(0 if main().get(PASSED, True) else 1)
