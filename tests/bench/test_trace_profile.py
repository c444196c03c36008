"""Events of a Chrome trace become launches: of graphs, and of nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auxstream.bench.trace_profile import Session, launches_in, launches_of_replays


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


EVENTS = [
    {"ph": "M", "name": "process_name"},
    event("cuda_runtime", "cudaLaunchKernel", 0, 5, correlation=3),
    event("kernel", "eager", 6, 2, correlation=3, stream=7),
    event("cuda_runtime", "cudaGraphLaunch", 20, 5, correlation=9),
    event("cuda_runtime", "cudaGraphLaunch", 9, 7, correlation=4),  # around the next, and nothing's own
    event("cuda_driver", "cuGraphLaunch", 10, 5, correlation=5),
    event("kernel", "_Z6kernelILi4EEvPf", 31.5, 2.25, correlation=9, stream=13),
    event("gpu_memset", "Memset (Device)", 30, 1, correlation=9, stream=7),
    event("kernel", "b", 16, 2, correlation=5, stream=7, **{"graph node id": 12}),
    event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 15, 1, correlation=5, stream=7, **{"graph node id": 11}),
    event("kernel", "of a launch before", 1, 1, correlation=1, stream=7),
]


def test_launches_are_found_in_order_with_their_kernels() -> None:
    first, second = launches_in(EVENTS)
    assert [(kernel.name, kernel.start, kernel.end, kernel.stream, kernel.node) for kernel in first.kernels] == [
        ("memcpy", 15, 16, 7, 11),
        ("b", 16, 18, 7, 12),
    ]
    assert [(kernel.name, kernel.end, kernel.node) for kernel in second.kernels] == [
        ("memset", 31, None),
        ("void kernel<4>(float*)", 33.75, None),
    ]


def test_a_trace_without_graphs_has_no_launch() -> None:
    assert launches_in(EVENTS[:3]) == []


@pytest.mark.gpu
def test_a_graphs_kernels_are_seen_replay_by_replay() -> None:
    x = torch.ones(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(5):
            y = y + 1
    launches = launches_of_replays(graph.replay, 4)
    assert [len(launch.kernels) for launch in launches] == [5] * 4
    assert all(kernel.end > kernel.start for launch in launches for kernel in launch.kernels)
    session = Session()
    session.start()
    _ = x + 1  # no graph
    assert session.stop() == []
