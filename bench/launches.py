"""What the device did while a callable ran, as the profiler saw it: its launches by name, and by kind.

Enters: a callable that enqueues work, such as the replay of a graph. Leaves: kernels, copies and fills by name, how
many and how long; and how many there are of each kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

Launches = Mapping[str, tuple[float, float]]
"""Kernels of one run, by name: how many, and their time in all, in microseconds."""
ON_DEVICE: Final = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the events that are work on the device."""


def profiled(run: Callable[[], object]) -> list[dict[str, Any]]:
    """The events of a Chrome trace of one run, from its call to its end on the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"]


def launches_of(run: Callable[[], object], runs: int = 1) -> Launches:
    """What one run does, on average over a few."""
    run()

    def several() -> None:
        for _ in range(runs):
            run()

    found: dict[str, tuple[float, float]] = {}
    for event in profiled(several):
        if event.get("cat") in ON_DEVICE:
            calls, us = found.get(event["name"], (0.0, 0.0))
            found[event["name"]] = (calls + 1 / runs, us + event["dur"] / runs)
    return found


_KINDS: Final = (
    ("pointwise", ("triton_poi_", "triton_red_", "triton_per_", "triton_for_")),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("product", ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "triton_tem_", "triton_mm")),
    ("product", ("product_", "experts_up_", "experts_down_")),
    ("sort, top-k, scan", ("topk", "sort", "radix", "scan", "histogram", "kth", "router_select", "experts_group")),
    ("copy", ("memcpy", "memset")),
    ("pointwise", ("fused_", "elementwise", "reduce_kernel", "softmax", "index", "catarray", "scatter", "gather")),
    ("pointwise", ("experts_sum",)),
)
"""Parts of kernels' names, in lower case; the first that fits decides. Fused ones of ours begin with "fused_",
Inductor's with "triton_"; "pointwise" is elementwise work, reductions, and what moves elements by index."""
KINDS: Final = (*dict.fromkeys(kind for kind, _ in _KINDS), "other")


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    low = name.lower()
    if low.startswith("fused_"):
        return "pointwise"
    return next((kind for kind, words in _KINDS if any(word in low for word in words)), "other")


def by_kind(launches: Launches) -> dict[str, float]:
    """How many launches there are of each kind."""
    found = dict.fromkeys(KINDS, 0.0)
    for name, (count, _) in launches.items():
        found[kind_of(name)] += count
    return found
