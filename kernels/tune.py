"""Which variant of a kernel is fastest here, measured once per shape class and remembered on disk.

Enters: launches by variant, and the tensors to try them on. Leaves: the fastest. Invariant: nothing is measured inside
a capture, and with one candidate nothing is measured at all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import store

Choice = TypeVar("Choice")
"""Whose text is what is remembered."""
Launch = TypeVar("Launch", bound=Callable[[Sequence[Tensor]], Any])
_LAUNCHES, _ROUNDS = 20, 5


def choose(key: str, launches: Mapping[Choice, Launch], tensors: Sequence[Tensor]) -> Launch:
    """The launch to keep. `tensors` are the kernel's operands; its outputs are overwritten."""
    if len(launches) == 1:
        return next(iter(launches.values()))
    known = store.read_choice(key)
    for variant, launch in launches.items():
        if str(variant) == known:
            return launch
    times = measure(launches, tensors)
    best = min(times, key=lambda variant: times[variant])
    store.write_choice(key, str(best))
    return launches[best]


def measure(launches: Mapping[Choice, Launch], tensors: Sequence[Tensor]) -> dict[Choice, float]:
    """Microseconds per launch of each variant, replayed from a CUDA graph so that the host does not count."""
    graphs: dict[Choice, torch.cuda.CUDAGraph] = {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for variant, launch in launches.items():
            launch(tensors)  # compiles
            graph = graphs[variant] = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(_LAUNCHES):
                launch(tensors)
            graph.capture_end()
        samples: dict[Choice, list[float]] = {variant: [] for variant in graphs}
        for _ in range(_ROUNDS):
            for variant, graph in graphs.items():
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                samples[variant].append(start.elapsed_time(stop) * 1000 / _LAUNCHES)
    torch.cuda.current_stream().wait_stream(stream)
    return {variant: statistics.median(values) for variant, values in samples.items()}
