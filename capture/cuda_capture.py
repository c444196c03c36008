"""One CUDA stream capture, begun and ended so that a failure leaves nothing behind.

Enters: a `torch.cuda.CUDAGraph`, a device, a pool, a stream. Leaves: the graph captured, or the capture ended and the
graph forgotten. Invariant: the thread's current stream, the allocator's routing into the pool and the default
generator are as before, however the block ends. `torch.cuda.graph` restores none of these when `capture_end` raises.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ..runtime import driver
from ..runtime.errors import CaptureError
from ..runtime.lanes import LanePool
from .refusals import refused_by_cuda


@functools.cache
def _capture_streams(device: int, thread: int) -> LanePool:
    """Streams this thread's captures begin on; reused, so that cuBLAS keeps one workspace for them."""
    return LanePool(device, 0)


def _index(device: torch.device) -> int:
    # `torch.device("cuda")` has no index, though the stubs say int.
    return torch.cuda.current_device() if device == torch.device(device.type) else device.index


class CaptureStream:
    """The stream a model is warmed up and captured on, taken for a block. Warm-up and capture must share streams (and
    the lanes, which come lowest first in both), or cuBLAS would allocate its workspaces inside the capture."""

    def __init__(self, device: torch.device) -> None:
        index = _index(device)
        self._lane = _capture_streams(index, threading.get_ident()).take(0)
        self.torch_stream = self._lane.torch_stream

    def __enter__(self) -> CaptureStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._lane.pool.give_back(self._lane)

    def warm_up(self, run: Callable[[], object], times: int) -> None:
        """Run eagerly on this stream; the caller's stream waits for it, on the device."""
        caller = torch.cuda.current_stream(self.torch_stream.device)
        self.torch_stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.torch_stream):
                for _ in range(times):
                    run()
        finally:  # a graph module that fails inside a region leaves its lane current
            torch.cuda.set_stream(caller)
        caller.wait_stream(self.torch_stream)


class CudaCapture:
    """The `with` block between `capture_begin` and `capture_end`. `device`: index; `reserved`: bytes taken from it."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any, stream: torch.cuda.Stream | None
    ) -> None:
        self.reserved = 0
        self._graph = graph
        self.device = _index(device)
        self._shared_pool = pool
        self._given_stream = stream

    def __enter__(self) -> CudaCapture:
        if torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                "a capture is already under way on the current stream",
                expected="auxstream.graph outside of any capture",
                came="a nested one",
                remedy="use regions (auxstream.fork) alone inside your own torch.cuda.graph",
            )
        if self._given_stream is not None:
            self._refuse(self._given_stream)
        pool = self._shared_pool if self._shared_pool is not None else torch.cuda.graph_pool_handle()
        self._outer_device = torch.cuda.current_device()
        torch.cuda.set_device(self.device)
        self._caller = torch.cuda.current_stream()
        self._lane = (
            None if self._given_stream is not None else _capture_streams(self.device, threading.get_ident()).take(0)
        )
        stream = self._given_stream if self._lane is None else self._lane.torch_stream
        assert stream is not None
        stream.wait_stream(self._caller)
        self._reserved_before = torch.cuda.memory_reserved(self.device)
        self._stream = stream
        generator = torch.cuda.default_generators[self.device]
        rng = generator.clone_state()
        self._collecting = gc.isenabled()
        gc.disable()  # a collection in mid-capture would free blocks at moments that differ from run to run
        torch.cuda.set_stream(stream)
        try:
            self._graph.capture_begin(pool, capture_error_mode="thread_local")
        except BaseException:
            generator.graphsafe_set_state(rng)  # a state that no graph has marked as capturing
            self._restore()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        torch.cuda.set_stream(self._stream)  # the block may have leaked a switch, and a capture ends where it began
        try:
            self._graph.capture_end()
        except BaseException as end_error:
            self._end_anyway()
            if error is None:
                raise CaptureError(
                    "CUDA could not end the capture",
                    expected="a block whose ops can be captured, with every stream joined back that was forked in it",
                    came=str(end_error).partition("\n")[0],
                    remedy="join each region, or let the capture's stream wait for each stream you used",
                ) from end_error
        else:
            if error is not None:
                self._graph.reset()
        finally:
            self._restore()
        if (refused := refused_by_cuda(error)) is not None:
            raise refused from error
        self.reserved = torch.cuda.memory_reserved(self.device) - self._reserved_before

    def _refuse(self, stream: torch.cuda.Stream) -> None:
        default = torch.cuda.default_stream(self.device)
        if stream.device.index != self.device or stream == default:
            raise CaptureError(
                f"this stream cannot capture on cuda:{self.device}",
                expected="a stream of that device, and not its default one",
                came="the default stream" if stream == default else f"a stream of {stream.device}",
                remedy="pass stream=torch.cuda.Stream(...), or leave it out",
            )

    def _end_anyway(self) -> None:
        """`capture_end` raised, and torch's allocators and generator still believe in the capture, for good: the pool
        could not be captured into again. An empty capture on the same stream lets `capture_end` go its whole way."""
        stream = driver.cuda.CUstream(self._stream.cuda_stream)
        mode = driver.cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        driver.call(driver.cuda.cuStreamBeginCapture(stream, mode), "ending a capture that failed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the graph is empty
            self._graph.capture_end()
        self._graph.reset()

    def _restore(self) -> None:
        torch.cuda.set_stream(self._caller)
        torch.cuda.set_device(self._outer_device)
        if self._lane is not None:
            self._lane.pool.give_back(self._lane)
        if self._collecting:
            gc.enable()
