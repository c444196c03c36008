"""Graphs that other code captures with torch alone, checked as our own are.

Enters: a `with` block. Leaves: an `Adopted` for each `torch.cuda.CUDAGraph` captured in it, `torch.cuda.graph` and what
is built on it included. Invariant: what the code does is what it would have done, and what cannot be recorded fails the
proof, not the code; torch's class is as before after it.

Graphs made in the block are made with `keep_graph=True`, or nothing could be read back, and instantiated when their
captures end; of one made before it the report says that it cannot be read.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch

from ..runtime.machine import current_machine, using_machine
from .graphs import OwnGraph
from .proof import Report, verify
from .record import Recorder
from .streams import InlineStreams, RecordingMachine


@dataclass(frozen=True, slots=True)
class Adopted:
    """One graph of somebody else's. `name` counts them."""

    name: str
    report: Report


@contextmanager
def adopting(found: list[Adopted]) -> Generator[None]:
    """Check every CUDA graph captured in the block, by any code on this thread; reports are appended to `found`."""
    kind: Any = torch.cuda.CUDAGraph
    originals = {name: getattr(kind, name) for name in ("__init__", "capture_begin", "capture_end")}
    defined = {name: kind.__dict__[name] for name in originals if name in kind.__dict__}
    running: dict[int, _Capture] = {}
    kept: WeakSet[Any] = WeakSet()

    def init(graph: Any, keep_graph: bool = False) -> None:
        originals["__init__"](graph, keep_graph=True)
        kept.add(graph)

    def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(graph, OwnGraph):
            return originals["capture_begin"](graph, *args, **kwargs)
        capture = _Capture()
        try:
            originals["capture_begin"](graph, *args, **kwargs)
            capture.begin()
        except BaseException:
            capture.close()
            raise
        running[id(graph)] = capture

    def capture_end(graph: Any) -> None:
        capture = running.pop(id(graph), None)
        if capture is None:
            return originals["capture_end"](graph)
        try:
            capture.end()
            originals["capture_end"](graph)
            found.append(Adopted(f"graph {len(found)}", capture.report(graph)))
            if graph in kept:
                graph.instantiate()
        finally:
            capture.close()

    patched = {"__init__": init, "capture_begin": capture_begin, "capture_end": capture_end}
    for name, replacement in patched.items():
        setattr(kind, name, replacement)
    try:
        yield
    finally:
        for capture in running.values():  # the code began them by hand, and did not come to their end
            capture.close()
        for name in patched:
            if name in defined:
                setattr(kind, name, defined[name])
            else:
                delattr(kind, name)


class _Capture:
    """One capture, from before it begins until its report. Reads that nobody declared are left to the proof."""

    def __init__(self) -> None:
        from ..runtime.cuda import CudaMachine
        from .attribution import CaptureWatch

        below: Any = current_machine()
        if not isinstance(below, CudaMachine):
            below = InlineStreams(CudaMachine().current_handle)
        self._unrecorded: dict[str, None] = {}
        self._recorder = Recorder(allocator=None, watch="off", noted=self._unrecorded)
        self._machine = RecordingMachine(below, self._recorder)
        self._below = below
        self._thread = threading.get_ident()
        self._around = ExitStack()
        self._inside = ExitStack()
        self._watch = self._around.enter_context(CaptureWatch(self._recorder, torch.cuda.current_device()))

    def begin(self) -> None:
        self._machine.begin()
        self._inside.enter_context(using_machine(self._machine))
        self._inside.enter_context(self._recorder)
        self._watch.begin(self._below.current_handle())

    def end(self) -> None:
        self._watch.end(self._below.current_handle())
        self._inside.close()

    def report(self, graph: torch.cuda.CUDAGraph) -> Report:
        program = self._recorder.finish()
        evidence = self._watch.evidence(graph, program)
        return verify(replace(evidence, unattributed=(*evidence.unattributed, *self._unrecorded)))

    def close(self) -> None:
        if threading.get_ident() == self._thread:  # modes are a thread's own
            self._inside.close()
            self._around.close()
