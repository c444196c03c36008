"""The usual region, quickly: one Python frame per step.

A region's step is `Region`'s part, which keeps the order of steps, and its machine's part, which calls the driver.
Here the two are written as one for what nearly every eager region is: declared reads on the current device, no writes,
default priority, forked, entered and joined on one stream of the thread's own CUDA machine.

Enters: the names and tensors of `fork`. Leaves: the calls that the general form makes, in the same order (tests compare
the two). Invariant: what is not usual, an error above all, is left to the general step, and nothing was changed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from types import TracebackType
from typing import Any

from torch import Tensor

from .cuda import CURRENT_DEVICE, CudaMachine, get_raw_stream, get_stream, record_event, set_stream, wait_event
from .lanes import Caller
from .machine import QuickFork
from .regions import NOTHING, Region, State, versions_of

_FORKED, _RUNNING, _LEFT, _JOINED = State.FORKED, State.RUNNING, State.LEFT, State.JOINED
_new = object.__new__


class QuickRegion(Region):
    """A region of the thread's own CUDA machine. Each step does `Region`'s and `CudaMachine`'s part, or neither."""

    __slots__ = ("caller",)

    caller: Caller

    def __enter__(self) -> Region:
        lane = self.lane
        outer = get_stream(CURRENT_DEVICE)
        if self.state is not _FORKED or outer[1] != lane.device or wait_event(lane.cu, lane.forked, 0)[0]:
            return super().__enter__()
        set_stream(*lane.ids)
        self.outer = outer
        self.state = _RUNNING
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lane = self.lane
        if (
            error is not None
            or self.state is not _RUNNING
            or self.outer[1] != lane.device
            or get_raw_stream(lane.device) != lane.handle
            or record_event(lane.done, lane.cu)[0]
        ):
            return super().__exit__(kind, error, trace)
        set_stream(*self.outer)
        self.state = _LEFT

    def join(self) -> None:
        lane, caller = self.lane, self.caller
        if (
            get_stream(CURRENT_DEVICE) != caller.ids
            or self.state is not _LEFT
            or wait_event(caller.cu, lane.done, 0)[0]
        ):
            return super().join()
        try:
            for tensor in self._returned:
                tensor.record_stream(caller.torch_stream)
        except NotImplementedError:  # one of them is on no GPU: the general step asks each
            return super().join()
        if self.joined_by:  # by another thread, meanwhile
            return super().join()
        self.joined_by = caller.joined  # with no call in between: see CudaMachine.join
        heappush(lane.pool.free, lane.index)
        reads, versions = self.recorded, self._versions
        if versions is not None and versions != (reads[0]._version if len(reads) == 1 else versions_of(reads)):
            return super().join()
        self.state = _JOINED
        self.recorded = NOTHING


def quick_fork(machine: CudaMachine) -> QuickFork:
    """The fork of usual regions on `machine`."""
    callers = machine.callers

    def fork(name: str, reads: Sequence[Any]) -> Region | None:
        caller = callers.get(get_stream(CURRENT_DEVICE))
        if caller is None:
            return None
        pool = caller.pool
        if not pool.free:
            return None
        lane = pool.lanes[heappop(pool.free)]
        if lane.handle == caller.handle:
            pool.give_back(lane)
            return None
        region = _new(QuickRegion)  # and its fields written out: to call the class costs as much as all of these
        region.name = name
        region.machine = machine
        region.recorded = reads
        region.priority = 0
        region.state = _FORKED
        region.lane = lane
        region.caller = caller
        region.joined_by = region.held = region.held_returns = region._returned = NOTHING
        for tensor in reads:
            if not isinstance(tensor, Tensor) or tensor.get_device() != lane.device:
                break
            tensor.record_stream(lane.torch_stream)
        else:
            if len(reads) == 1:
                region._versions = None if reads[0].is_inference() else reads[0]._version
            else:
                region._versions = versions_of(reads)
            if not record_event(lane.forked, caller.cu)[0]:
                return region
        region.abandon()
        return None

    return fork
