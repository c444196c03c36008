"""What is asked while a capture is under way: torch's memory history and the driver, played by small models of both."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real

from auxstream.capture import attribution
from auxstream.capture.attribution import Claims
from auxstream.capture.history import AllocatorHistory, after, during

# --- torch's memory history -------------------------------------------------------------------------------------------


class Allocator:
    """torch's allocator, as far as its history goes: a ring of events, which switching off empties."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: deque[dict[str, Any]] = deque()
        self.on = False
        self.stamp = "the user's own"
        self._next = 0
        for name, function in {
            "_cuda_isHistoryEnabled": lambda: self.on,
            "_cuda_getMemoryMetadata": lambda: self.stamp,
            "_cuda_setMemoryMetadata": lambda stamp: setattr(self, "stamp", stamp),
        }.items():
            monkeypatch.setattr(torch._C, name, function, raising=False)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.switch)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: self.snapshot())
        monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", self.alloc)
        monkeypatch.setattr(torch.cuda, "caching_allocator_delete", self.free)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def switch(self, enabled: str | None, context: object = None, max_entries: int | None = None) -> None:
        self.on = enabled is not None
        self.events = deque(self.events if self.on else (), max_entries)

    def alloc(self, nbytes: int) -> int:
        self._next += 512
        self._note("alloc", self._next, nbytes)
        return self._next

    def free(self, address: int) -> None:
        self._note("free_requested", address, 512)

    def _note(self, action: str, address: int, nbytes: int) -> None:
        if self.on:
            self.events.append({"action": action, "addr": address, "size": nbytes, "user_metadata": self.stamp})

    def snapshot(self) -> dict[str, Any]:
        return {"device_traces": [list(self.events)], "segments": []}


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def scratch(allocator: Allocator, history: AllocatorHistory, step: int) -> int:
    history.stamp(during(step))
    address = allocator.alloc(100)
    history.stamp(after(step))
    allocator.free(address)
    return address


def test_what_an_op_takes_is_remembered_and_nothing_is_left_behind(allocator: Allocator) -> None:
    with AllocatorHistory(0) as history:
        address = scratch(allocator, history, 3)
        memory = history.read()
    assert memory.whole
    (block,) = memory.born_at[during(3)]
    assert (block.address, block.nbytes, block.freed) == (address, 100, after(3))
    assert (allocator.on, allocator.stamp) == (False, "the user's own")


@pytest.mark.parametrize("entries", [1_000, 4])
def test_a_history_of_the_user_s_own_is_used_as_far_as_it_reaches(allocator: Allocator, entries: int) -> None:
    allocator.switch("all", max_entries=entries)
    for _ in range(3):
        allocator.free(allocator.alloc(64))
    with AllocatorHistory(0) as history:
        for step in range(3):
            scratch(allocator, history, step)
        memory = history.read()
    assert memory.whole is (entries == 1_000)
    assert len(memory.born_at.get(during(0), ())) == (entries == 1_000)
    assert allocator.on


def test_captures_on_two_threads_do_not_end_each_other_s_history(allocator: Allocator) -> None:
    first, second = ExitStack(), ExitStack()
    one = first.enter_context(AllocatorHistory(0))
    scratch(allocator, one, 0)
    two = second.enter_context(AllocatorHistory(0))
    mine = scratch(allocator, two, 0)
    assert [block.address for block in two.read().born_at[during(0)]] == [mine]
    first.close()
    assert allocator.on
    memory = two.read()
    assert memory.whole
    assert [block.address for block in memory.born_at[during(0)]] == [mine]
    second.close()
    assert not allocator.on


def test_a_history_that_somebody_ends_is_known_to_be_lost(allocator: Allocator) -> None:
    with AllocatorHistory(0) as history:
        scratch(allocator, history, 0)
        allocator.switch(None)
        assert not history.read().whole


# --- whose node -------------------------------------------------------------------------------------------------------


class Capturing:
    """A graph under capture: nodes as numbers, what each waits for, and the last node of every stream."""

    CUstreamCaptureStatus = real.CUstreamCaptureStatus

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, early: frozenset[int] = frozenset()) -> None:
        self.after: dict[int, tuple[int, ...]] = {}
        self.last: dict[int, int] = {}
        self._early = early
        monkeypatch.setattr(attribution, "cuda", self)

    def node(self, node: int, stream: int, *after: int) -> None:
        self.after[node] = after
        self.last[stream] = node

    def CUstream(self, handle: int) -> int:
        return handle

    def cuStreamGetCaptureInfo(self, stream: int) -> Any:
        active = real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
        return real.CUresult.CUDA_SUCCESS, active, 1, "graph", [self.last[stream]] if stream in self.last else [], 0

    def cuGraphGetNodes(self, graph: str, count: int) -> Any:
        return real.CUresult.CUDA_SUCCESS, list(self.after)[:count], len(self.after)

    def cuGraphNodeGetDependencies(self, node: int, count: int) -> Any:
        if node in self._early:  # the form without edge data, as cuda-bindings 12.9 ask
            return real.CUresult.CUDA_ERROR_LOSSY_QUERY, None, None
        return real.CUresult.CUDA_SUCCESS, list(self.after[node])[:count], len(self.after[node])


@pytest.mark.parametrize("early", [frozenset[int](), frozenset({12})])
def test_nodes_belong_to_the_moment_they_appear_at(monkeypatch: pytest.MonkeyPatch, early: frozenset[int]) -> None:
    """Whatever the bindings say of a node that is launched early."""
    capture = Capturing(monkeypatch, early=early)
    claims = Claims(7)
    capture.node(11, 7)
    claims.claim(during(0), 7)
    capture.node(12, 7, 11)
    capture.node(13, 8, 11)  # on a stream that the op does not come back from
    claims.claim(during(1), 7)
    capture.node(14, 7, 12)
    claims.claim(after(1), 7)
    assert claims.moments == {11: during(0), 12: during(1), 13: during(1), 14: after(1)}


def test_a_watch_tells_ops_from_what_comes_between_them(monkeypatch: pytest.MonkeyPatch, allocator: Allocator) -> None:
    capture = Capturing(monkeypatch)
    recorder: Any = SimpleNamespace()
    with attribution.CaptureWatch(recorder, 0) as watch:
        watch.begin(7)
        capture.node(10, 7)
        recorder.before_op(0, 7)
        capture.node(11, 7)
        recorder.after_op(0, 7)
        allocator.alloc(8)
        capture.node(12, 7)
        recorder.before_op(3, 7)  # two steps of a region, then a view
        recorder.after_op(None, 7)
        allocator.alloc(16)
        recorder.before_op(3, 7)
        allocator.alloc(32)
        capture.node(13, 7)
        recorder.after_op(3, 7)
        capture.node(14, 7)
        watch.end(7)
        assert watch._claims is not None
        assert watch._claims.moments == {10: after(-1), 11: during(0), 12: after(0), 13: during(3), 14: after(3)}
        born = {block.nbytes: block.born for block in watch._history.read().blocks}
    assert born == {1: after(-1), 8: after(0), 16: after(0), 32: during(3)}
