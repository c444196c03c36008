"""Graphs captured with torch alone, checked without changing the code that captures them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

import auxstream
from auxstream.capture.adopt import Adopted, adopting
from auxstream.runtime.errors import AuxstreamWarning, CaptureError


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        pytest.mark.timeout(120),
    ):
        test = mark(test)
    return test


WIDTH = 1 << 20


def test_torch_s_class_is_as_before() -> None:
    kind = torch.cuda.CUDAGraph
    before = dict(vars(kind))
    with adopting([]):
        assert vars(kind)["capture_end"] is not before["capture_end"]
    with pytest.raises(ZeroDivisionError), adopting([]):
        _ = 1 / 0
    assert dict(vars(kind)) == before


def two_streams(x: Tensor, side: torch.cuda.Stream, *, early_free: bool) -> Tensor:
    """By hand, with events: `h` is read on the side stream; an early free hands its block to the caller's next op."""
    caller = torch.cuda.current_stream()
    h = x * 2
    side.wait_stream(caller)
    with torch.cuda.stream(side):
        torch.cuda._sleep(2_000_000)
        s = h + 1
    if early_free:
        del h
    refill = x * 5
    caller.wait_stream(side)
    return s + refill


def captured(early_free: bool) -> tuple[Tensor, torch.cuda.CUDAGraph, Tensor, list[Adopted]]:
    x, side = torch.ones(WIDTH, device="cuda"), torch.cuda.Stream()
    two_streams(x, side, early_free=early_free)
    torch.cuda.synchronize()
    found: list[Adopted] = []
    with adopting(found):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = two_streams(x, side, early_free=early_free)
    return x, graph, out, found


@needs_gpu
@pytest.mark.parametrize("early_free", [False, True])
def test_an_early_free_by_hand_is_found_and_corrupts(early_free: bool) -> None:
    x, graph, out, (adopted,) = captured(early_free)
    wrong = 0
    for k in range(5):
        x.fill_(k + 1)
        graph.replay()
        wrong += not torch.equal(out, x * 7 + 1)
    report = adopted.report
    if not early_free:
        assert wrong == 0
        assert not report.races, str(report)
        return
    assert wrong == 5
    assert any(race.reuse and {race.first.op, race.second.op} == {"add.Tensor", "mul.Tensor"} for race in report.races)
    assert "refill = x * 5" in str(report)


@needs_gpu
def test_a_graph_made_before_cannot_be_read_and_works() -> None:
    x = torch.ones(8, device="cuda")
    found: list[Adopted] = []
    graph = torch.cuda.CUDAGraph()
    with adopting(found), torch.cuda.graph(graph):
        y = x + 1
    assert not found[0].report.ok
    assert "keep_graph" in str(found[0].report)
    x.fill_(4)
    graph.replay()
    assert torch.equal(y, x + 1)


@needs_gpu
def test_our_own_graphs_are_left_alone() -> None:
    x = torch.ones(8, device="cuda")
    found: list[Adopted] = []
    with adopting(found), auxstream.graph() as g:
        y = x + 1
    assert not found
    assert g.report.ok
    x.fill_(3)
    g.replay()
    assert torch.equal(y, x + 1)


@needs_gpu
def test_a_capture_that_fails_leaves_nothing_behind() -> None:
    x = torch.ones(8, device="cuda")
    found: list[Adopted] = []
    with adopting(found):
        with pytest.raises(ZeroDivisionError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            _ = x + 1 / 0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x + 2
    assert found[-1].report.ok
    graph.replay()
    assert torch.equal(y, x + 2)


@needs_gpu
def test_a_capture_that_does_not_end_leaves_nothing_behind() -> None:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        try:
            with adopting([]):
                graph.capture_begin()
            assert _get_current_dispatch_mode() is None
            assert not torch._C._cuda_isHistoryEnabled()
        finally:
            graph.capture_end()


@needs_gpu
def test_what_cannot_be_recorded_fails_the_proof_and_not_the_code() -> None:
    x = torch.ones(8, device="cuda")
    found: list[Adopted] = []
    with adopting(found):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = torch.empty(4, device="cuda")
            torch.add(x, x, out=out)  # resizes `out`, with a warning
    graph.replay()
    assert torch.equal(out, x + x)
    assert any("resizes" in item for item in found[0].report.unattributed)


@needs_gpu
def test_a_graph_that_cannot_be_read_back_is_never_called_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    from auxstream.capture import attribution

    def unreadable(graph: object) -> None:
        raise CaptureError("cannot list edges", came="a driver older than CUDA 12.3")

    monkeypatch.setattr(attribution, "inspect", unreadable)
    x = torch.ones(8, device="cuda")
    with pytest.warns(AuxstreamWarning, match="not proved"), auxstream.graph("old", verify="warn") as g:
        _ = x + 1
    assert not g.report.ok
    assert "12.3" in str(g.report)
