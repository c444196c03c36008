"""A replay runs on no more streams than the lanes declared and the caller's, counted by the profiler."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from auxstream.bench.replay_streams import streams_in, streams_used
from auxstream.capture.graphs import graph
from auxstream.runtime.regions import fork

LAYERS = 12
WIDTH = 8

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(180),
]


def one_region(x: Tensor) -> Tensor:
    region = fork("one", x)
    a = x * 0.5
    with region:
        b = region.returns(x + 1)
    region.join()
    return a + b


def three_at_once(x: Tensor) -> Tensor:
    regions = [fork(f"r{index}", x) for index in range(3)]
    total = x * 0.5
    results: list[Tensor] = []
    for region in regions:
        with region:
            results.append(region.returns(x + 1))
    for region in regions:
        region.join()
    for result in results:
        total = total + result
    return total


def three_joined_one_by_one(x: Tensor) -> Tensor:
    """The same, but for work between the joins: each join then opens new streams at replay."""
    regions = [fork(f"r{index}", x) for index in range(3)]
    total = x * 0.5
    results: list[Tensor] = []
    for region in regions:
        with region:
            results.append(region.returns(x + 1))
    for region, result in zip(regions, results, strict=True):
        region.join()
        total = total + result
    return total


def nested(x: Tensor) -> Tensor:
    outer = fork("outer", x)
    a = x * 0.5
    with outer:
        b = x + 1
        inner = fork("inner", b)
        c = b * 0.5
        with inner:
            d = inner.returns(b - 5)
        inner.join()
        e = outer.returns(c + d)
    outer.join()
    return a + e


def layers(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    for _ in range(LAYERS):
        x = layer(x)
    return x


@pytest.fixture
def x() -> Tensor:
    """A tensor, once the profiler is known to count: CUPTI attaches here, before anything is captured."""
    x = torch.randn(256, 256, device="cuda")
    assert len(streams_used(lambda: x * 2)) == 1
    return x


@pytest.mark.parametrize(("layer", "lanes"), [(one_region, 1), (three_at_once, 3), (nested, 2)])
@pytest.mark.usefixtures("x")
class TestOnAGpu:
    pytestmark = needs_gpu

    def test_a_replay_uses_the_lanes_declared(self, x: Tensor, layer: Callable[[Tensor], Tensor], lanes: int) -> None:
        layers(layer, x)  # warm: kernels loaded, lanes made
        with graph() as g:
            out = layers(layer, x)
        assert len(g.program.stream_names) == 1 + lanes, "the caller's, and the lanes'"
        used = streams_used(g.replay)
        assert len(used) <= 1 + lanes, sorted(used)
        expected = layers(layer, x)
        assert torch.equal(out, expected)


class TestTheCount:
    pytestmark = needs_gpu

    def test_joins_with_work_between_them_have_more(self, x: Tensor) -> None:
        layers(three_joined_one_by_one, x)
        with graph() as g:
            layers(three_joined_one_by_one, x)
        assert len(streams_used(g.replay)) > 4

    def test_a_graph_of_many_streams_has_more(self, x: Tensor) -> None:
        """The twin: captured by hand, the auxiliary branches first and each on a stream of its own."""
        sides = [torch.cuda.Stream() for _ in range(WIDTH)]
        kept: list[Tensor] = []

        def wide(h: Tensor) -> Tensor:
            caller = torch.cuda.current_stream()
            results: list[Tensor] = []
            for side in sides:
                side.wait_stream(caller)
                with torch.cuda.stream(side):
                    results.append(h + 1)
            total = h * 0.5
            for side in sides:
                caller.wait_stream(side)
            for result in results:
                total = total + result
            kept.extend((h, total, *results))
            return total

        layers(wide, x)
        torch.cuda.synchronize()
        by_hand = torch.cuda.CUDAGraph()
        with torch.cuda.graph(by_hand):
            layers(wide, x)
        assert len(streams_used(by_hand.replay)) > 2


def test_the_trace_is_read_as_the_profiler_writes_it(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.ones(4) + 1
    path = tmp_path / "trace.json"
    profiled.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    assert streams_in(trace["traceEvents"]) == frozenset()
    trace["traceEvents"] += [
        {"ph": "X", "cat": "kernel", "name": "mul", "args": {"stream": 7, "device": 0}},
        {"ph": "X", "cat": "kernel", "name": "add", "args": {"stream": 13, "device": 0}},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset", "args": {"stream": 13}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "args": {"stream": 99}},
        {"ph": "X", "cat": "kernel", "name": "no stream"},
    ]
    assert streams_in(trace["traceEvents"]) == {7, 13}
