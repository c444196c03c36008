"""A callable in a CUDA graph, and the kernels that one replay of it launches, by kind.

Enters: a callable and the tensors it is called with. Leaves: its device time per replay, and its launches by name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from .harness import device_time

Launches = dict[str, tuple[int, float]]
"""Kernels of one replay, by name: how many, and their time in all, in microseconds."""


class Captured:
    """A callable in a CUDA graph, with what it reads kept alive."""

    def __init__(self, run: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.kept = (run, inputs)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run(*inputs)
            stream.synchronize()
            with torch.cuda.graph(self.graph, stream=stream):
                self.out = run(*inputs)

    def sample(self) -> float:
        """Microseconds per replay."""
        return device_time(self.graph.replay, 10)

    def launches(self) -> Launches:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.graph.replay()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        found: Launches = {}
        for event in events:
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
                count, us = found.get(event["name"], (0, 0.0))
                found[event["name"]] = (count + 1, us + event["dur"])
        return found


_KINDS: Final = (
    ("pointwise", ("triton_poi_", "triton_red_", "triton_per_", "triton_for_")),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("product", ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "triton_tem_", "triton_mm", "product_")),
    ("sort, top-k, scan", ("topk", "sort", "radix", "scan", "histogram", "kth")),
    ("copy", ("memcpy", "memset")),
    ("pointwise", ("fused_", "elementwise", "reduce_kernel", "softmax", "index", "catarray", "scatter", "gather")),
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


def by_kind(launches: Mapping[str, tuple[int, float]]) -> dict[str, int]:
    """How many launches there are of each kind."""
    found = dict.fromkeys(KINDS, 0)
    for name, (count, _) in launches.items():
        found[kind_of(name)] += count
    return found
