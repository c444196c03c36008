"""`CudaMachine`: a region's four steps as driver calls on raw handles.

Enters: regions from runtime/regions.py. Leaves: event records, event waits, `record_stream` calls and the thread's
current stream. Nothing here waits on the host, and nothing asks "am I capturing?": a capture gets the same calls.
This is the general form; runtime/quick.py has the usual case in fewer steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from . import driver
from .errors import RegionError
from .lanes import Caller, LanePool
from .regions import Region

# Private, and stable since torch 1.x: the public forms build a Stream object per call (1-2 us against 0.1).
get_stream = torch._C._cuda_getCurrentStream
get_raw_stream = torch._C._cuda_getCurrentRawStream
set_stream = torch._C._cuda_setStream  # and with it the current device
record_event = driver.event_record
wait_event = driver.stream_wait_event
CURRENT_DEVICE: Final = -1


class CudaMachine:
    """Regions of one thread on auxiliary CUDA streams of its current device."""

    compares_versions = True

    def __init__(self) -> None:
        torch.cuda.init()
        self.callers: dict[tuple[int, int, int], Caller] = {}
        self._pools: dict[tuple[int, int], LanePool] = {}

    def current(self) -> Caller:
        """This thread's current stream."""
        ids = get_stream(CURRENT_DEVICE)
        return self.callers.get(ids) or self.callers.setdefault(ids, Caller(ids, self._pool(ids[1], 0)))

    def current_handle(self) -> int:
        """This thread's current stream, as its native handle."""
        return self.current().handle

    def _pool(self, device: int, priority: int) -> LanePool:
        return self._pools.get((device, priority)) or self._pools.setdefault(
            (device, priority), LanePool(device, priority)
        )

    def fork(self, region: Region) -> None:
        caller = self.current()
        device = caller.device
        for tensor in region.recorded:
            if tensor.get_device() != device:
                raise _wrong_device(region, tensor, device)
        pool = self._pool(device, region.priority) if region.priority else caller.pool
        lane = region.lane = pool.take(caller.handle)
        for tensor in region.recorded:
            tensor.record_stream(lane.torch_stream)
        code = record_event(lane.forked, caller.cu)[0]
        if code:
            driver.insist(code, device, f"forking region {region.name!r}", record_event, lane.forked, caller.cu)

    def enter(self, region: Region) -> None:
        lane = region.lane
        outer = region.outer = get_stream(CURRENT_DEVICE)
        code = wait_event(lane.cu, lane.forked, 0)[0]
        if code:
            doing = f"entering region {region.name!r}"
            driver.insist(code, lane.device, doing, wait_event, lane.cu, lane.forked, 0)
        if outer[1] != lane.device:  # each device has a current stream, and the lane takes its own device's place
            lane.displaced = get_stream(lane.device)
        set_stream(*lane.ids)

    def leave(self, region: Region) -> None:
        lane = region.lane
        current = get_raw_stream(lane.device)
        try:
            code = record_event(lane.done, lane.cu)[0]
            if code:
                doing = f"leaving region {region.name!r}"
                driver.insist(code, lane.device, doing, record_event, lane.done, lane.cu)
        finally:
            if region.outer[1] != lane.device:
                set_stream(*lane.displaced)
            set_stream(*region.outer)
        if current != lane.handle:
            raise RegionError(
                f"region {region.name!r} was left while another stream was current",
                expected=f"its own {lane.name}",
                came=f"the stream with handle {current:#x}",
                remedy="regions and stream contexts nest: leave the inner one first",
            )

    def join(self, region: Region, returned: Sequence[Tensor]) -> None:
        lane = region.lane
        if lane is None:  # given up, so there is nothing to wait for
            return
        stream = self.current()
        if stream.device != lane.device:  # ops on the results will run on the current stream of *their* device
            with torch.cuda.device(lane.device):
                return self.join(region, returned)
        if stream.handle in region.joined_by:
            return
        code = wait_event(stream.cu, lane.done, 0)[0]
        if code:
            driver.insist(code, lane.device, f"joining region {region.name!r}", wait_event, stream.cu, lane.done, 0)
        for tensor in returned:
            if tensor.is_cuda:
                tensor.record_stream(stream.torch_stream)
        # Between the question and the answer there is no call, where CPython may switch threads: of two threads that
        # join at once, one gives the lane back.
        if region.joined_by:
            region.joined_by = (*region.joined_by, stream.handle)
        else:
            region.joined_by = stream.joined
            lane.pool.give_back(lane)

    def drop(self, region: Region) -> None:
        if region.lane is not None and not region.joined_by:
            region.lane.pool.give_back(region.lane)


@functools.cache
def thread_machine(thread: int) -> CudaMachine:
    """The CUDA machine of the thread with this ident. Idents are used again when threads die, and so are lanes."""
    return CudaMachine()


def _wrong_device(region: Region, tensor: Tensor, device: int) -> RegionError:
    return RegionError(
        f"region {region.name!r} cannot take a tensor of shape {tuple(tensor.shape)}",
        expected=f"a tensor on the current device, cuda:{device}",
        came=str(tensor.device),
        remedy="move it there, or fork under `with torch.cuda.device(...)` of the tensor's device",
    )
