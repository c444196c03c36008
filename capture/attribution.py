"""What must be asked while a CUDA graph is being captured: whose op each node is, what the allocator does, which Triton
kernels are launched.

Enters: a recorder, before and after each op. Leaves: the `Evidence` of the captured graph. Invariant: a node that
appeared while an op ran is that op's, whatever stream it went to; one that appeared between two ops is nobody's. Of
both it is known when they appeared (capture/history.py, note "moments").
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

import torch

from ..kernels.triton_accesses import TritonLaunches
from ..runtime import driver
from ..runtime.errors import CaptureError
from .device_evidence import from_capture
from .device_nodes import UNTOLD
from .evidence import Evidence, from_program
from .history import AllocatorHistory, after, during
from .inspect import inspect
from .program import Program
from .record import Recorder

cuda: Final = driver.cuda
_CAPTURING: Final = cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE


class Claims:
    """Nodes of the graph under capture, by the moment at which they appeared."""

    def __init__(self, stream: int) -> None:
        status, _, graph, *_ = driver.call(cuda.cuStreamGetCaptureInfo(cuda.CUstream(stream)), "reading a capture")
        assert status == _CAPTURING, status
        self._graph: Any = graph
        self.moments: dict[int, int] = {}

    def claim(self, moment: int, stream: int) -> None:
        """Nodes that are new since the last claim appeared at `moment`; `stream` is where they probably are."""
        count = cuda.cuGraphGetNodes(self._graph, 0)[2]
        if count == len(self.moments):
            return
        try:
            behind = self._behind(stream)
        except UNTOLD:  # cuda-bindings 12.9 do not tell what a node waits for that is launched early
            behind = []
        for node in reversed(behind):
            self.moments[node] = moment
        if count > len(self.moments):  # or an op launched on a stream of its own, and did not wait for it
            nodes = driver.call(cuda.cuGraphGetNodes(self._graph, count), "listing the nodes of a capture")[0]
            for node in map(int, nodes):
                self.moments.setdefault(node, moment)

    def _behind(self, stream: int) -> list[int]:
        """New nodes that the stream's next work would wait for, latest first."""
        answer = driver.call(cuda.cuStreamGetCaptureInfo(cuda.CUstream(stream)), "reading a capture")
        if answer[0] != _CAPTURING:
            return []
        found: dict[int, None] = {}
        waiting: list[Any] = list(answer[3])
        while waiting:
            node = waiting.pop()
            if int(node) in self.moments or int(node) in found:
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
        self._between = after(-1)
        self._around = ExitStack()

    def __enter__(self) -> CaptureWatch:
        with ExitStack() as stack:
            stack.enter_context(self._launches)
            stack.enter_context(self._history)
            self._around = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        del self._recorder  # which holds on to what the capture read, and to this watch
        self._around.close()

    def begin(self, stream: int) -> None:
        """The capture has begun on `stream`."""
        self._claims = Claims(stream)
        self._recorder.before_op = self._before_op
        self._recorder.after_op = self._after_op

    def _before_op(self, step: int, stream: int) -> None:
        self._claim(self._between, stream)
        self._history.stamp(during(step))

    def _after_op(self, step: int | None, stream: int) -> None:
        if step is None:
            self._claim(self._between, stream)
        else:
            self._claim(during(step), stream)
            self._between = after(step)
        self._history.stamp(self._between)

    def end(self, stream: int) -> None:
        """The capture is about to end."""
        self._claim(self._between, stream)

    def _claim(self, moment: int, stream: int) -> None:
        assert self._claims is not None
        self._claims.claim(moment, stream)

    def evidence(self, graph: torch.cuda.CUDAGraph, program: Program) -> Evidence:
        """Read the captured graph back and explain its nodes."""
        assert self._claims is not None
        try:
            device_graph = inspect(graph)
        except CaptureError as error:  # an old driver: the recording is all there is
            recorded = from_program(program)
            why = f"the CUDA graph itself, which cannot be read back ({error.came or error})"
            return replace(recorded, unattributed=(*recorded.unattributed, why))
        return from_capture(program, device_graph, self._claims.moments, self._history.read(), self._launches)
