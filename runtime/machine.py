"""What a region asks of the machine it runs on, and which machine that is.

A machine turns a region's four steps into stream and event operations. Three exist: `CudaMachine` (runtime/cuda.py),
`InlineMachine` below (no GPU, CPU tensors, or the kill switch: the branch runs on the caller's stream), and the
recording machine of capture/record.py, which `auxstream.graph` puts in force on its own thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import ranges
from .settings import SETTINGS

if TYPE_CHECKING:
    from .regions import Region


class Machine(Protocol):
    """The four steps of a region. Each raises, and changes nothing, when the step cannot be taken."""

    compares_versions: bool
    """Regions compare tensor versions between fork and join (a recording proves more, and does without)."""

    def fork(self, region: Region) -> None:
        """Take a lane, mark the fork point on the current stream, and record the region's reads for the lane."""
        ...

    def enter(self, region: Region) -> None:
        """The lane waits for the fork point and becomes this thread's current stream."""
        ...

    def leave(self, region: Region) -> None:
        """Mark the lane's done point and restore the stream that was current at `enter`."""
        ...

    def join(self, region: Region, returned: Sequence[Tensor]) -> None:
        """The current stream waits for the done point (once per stream); `returned` are recorded for it."""
        ...

    def drop(self, region: Region) -> None:
        """Take back what the region holds: nobody refers to it any more, and nobody joined it."""
        ...


class InlineMachine:
    """Runs every branch on the caller's stream, in program order. Nothing to wait for, nothing to record."""

    compares_versions = True

    def fork(self, region: Region) -> None: ...

    def enter(self, region: Region) -> None: ...

    def leave(self, region: Region) -> None: ...

    def join(self, region: Region, returned: Sequence[Tensor]) -> None: ...

    def drop(self, region: Region) -> None: ...


INLINE = InlineMachine()


QuickFork = Callable[[str, Sequence[Any]], "Region | None"]
"""Forks a region with these reads if it is a usual one (runtime/quick.py); None: fork it on the machine in force."""


class _ThreadState(threading.local):
    """Thread-local, as CUDA's current stream is: a context variable would leak across awaits."""

    machine: Machine | None = None  # a recording's, or a control's; None: the thread's own
    own: Machine | None = None  # from the thread's first region on
    quick_fork: QuickFork | None = None  # the own machine's, if that is CUDA's, as long as no other is in force


thread_state = _ThreadState()


def adopt_machine() -> Machine:
    """Give this thread its machine: lanes are never shared between threads (runtime/lanes.py says why)."""
    machine: Machine = INLINE
    if not SETTINGS.disable and torch.cuda.is_available():
        from .cuda import thread_machine
        from .quick import quick_fork

        machine = own = thread_machine(threading.get_ident())
        if not ranges.ENABLED:
            thread_state.quick_fork = quick_fork(own)
    thread_state.own = machine
    return machine


def current_machine() -> Machine:
    """The machine regions of this thread run on."""
    return thread_state.machine or thread_state.own or adopt_machine()


@contextmanager
def using_machine(machine: Machine) -> Generator[None]:
    """Put `machine` in force on this thread for the block."""
    before = thread_state.machine, thread_state.quick_fork
    thread_state.machine, thread_state.quick_fork = machine, None
    try:
        yield
    finally:
        thread_state.machine, thread_state.quick_fork = before
