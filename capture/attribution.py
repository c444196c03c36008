"""What must be asked while a CUDA graph is being captured: whose op each node is, what the allocator does, which Triton
kernels are launched.

Enters: a recorder, before and after each op. Leaves: the `Evidence` of the captured graph. Invariant: a node that
appeared while an op ran is that op's, whatever stream it went to; one that appeared between two ops is nobody's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch

from ..kernels.triton_accesses import TritonLaunches
from ..runtime import driver
from ..runtime.errors import CaptureError
from .device_evidence import from_capture
from .evidence import Evidence, from_program
from .history import AllocatorHistory
from .inspect import inspect
from .program import Program
from .record import Recorder

cuda: Final = driver.cuda
_CAPTURING: Final = cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE


class Claims:
    """Nodes of the graph under capture, by the step that made them; None: no op did."""

    def __init__(self, stream: int) -> None:
        status, _, graph, *_ = driver.call(cuda.cuStreamGetCaptureInfo(cuda.CUstream(stream)), "reading a capture")
        assert status == _CAPTURING, status
        self._graph: Any = graph
        self.owners: dict[int, int | None] = {}

    def claim(self, step: int | None, stream: int) -> None:
        """Nodes that are new since the last claim belong to `step`; `stream` is where they probably are."""
        count = cuda.cuGraphGetNodes(self._graph, 0)[2]
        if count == len(self.owners):
            return
        for node in reversed(self._behind(stream)):
            self.owners[node] = step
        if count > len(self.owners):  # an op that launched on a stream of its own, and did not wait for it
            nodes = driver.call(cuda.cuGraphGetNodes(self._graph, count), "listing the nodes of a capture")[0]
            for node in map(int, nodes):
                self.owners.setdefault(node, step)

    def _behind(self, stream: int) -> list[int]:
        """New nodes that the stream's next work would wait for, latest first."""
        answer = driver.call(cuda.cuStreamGetCaptureInfo(cuda.CUstream(stream)), "reading a capture")
        if answer[0] != _CAPTURING:
            return []
        found: dict[int, None] = {}
        waiting: list[Any] = list(answer[3])
        while waiting:
            node = waiting.pop()
            if int(node) in self.owners or int(node) in found:
                continue
            found[int(node)] = None
            waiting += _dependencies(node)
        return list(found)


def _dependencies(node: Any) -> list[Any]:
    count = driver.call(cuda.cuGraphNodeGetDependencies(node, 0), "counting what a node waits for")[-1]
    if not count:
        return []
    return list(driver.call(cuda.cuGraphNodeGetDependencies(node, count), "listing what a node waits for")[0])


class CaptureWatch:
    """A `with` block around a capture: what happens in it is noted, and then explained."""

    def __init__(self, recorder: Recorder, device: int) -> None:
        self._recorder = recorder
        self._launches = TritonLaunches()
        self._history = AllocatorHistory(device)
        self._claims: Claims | None = None

    def __enter__(self) -> CaptureWatch:
        self._launches.__enter__()
        self._history.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        del self._recorder  # which holds on to what the capture read, and to this watch
        self._history.__exit__()
        self._launches.__exit__(None, None, None)

    def begin(self, stream: int) -> None:
        """The capture has begun on `stream`."""
        self._claims = Claims(stream)
        self._recorder.before_op = self._before
        self._recorder.after_op = self._claims.claim

    def _before(self, step: int, stream: int) -> None:
        assert self._claims is not None
        self._claims.claim(None, stream)
        self._history.stamp(step)

    def end(self, stream: int) -> None:
        """The capture is about to end."""
        assert self._claims is not None
        self._claims.claim(None, stream)

    def evidence(self, graph: torch.cuda.CUDAGraph, program: Program) -> Evidence:
        """Read the captured graph back and explain its nodes."""
        assert self._claims is not None
        try:
            device_graph = inspect(graph)
        except CaptureError as error:  # an old driver: the recording is all there is
            recorded = from_program(program)
            why = f"the CUDA graph itself, which cannot be read back ({error.came or error})"
            return replace(recorded, unattributed=(*recorded.unattributed, why))
        return from_capture(program, device_graph, self._claims.owners, self._history.read(), self._launches)
