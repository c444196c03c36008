"""`CudaMachine`: a region's four steps as driver calls on raw handles.

Enters: regions from runtime/regions.py. Leaves: event records, event waits, `record_stream` calls and the thread's
current stream. Nothing here waits on the host, and nothing asks "am I capturing?" to leave a safety out: the one
question of that kind picks the lane.

Note "one event serves twice". A region owns one event: recorded at fork, waited for at enter, recorded again at
leave, waited for at join. `cuStreamWaitEvent` binds a wait to the record that precedes the call, so the second
record cannot reach the first waiter, which has been enqueued before it. The event returns to the pool only when the
region object dies, because any further stream may still join.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import driver
from .errors import RegionError
from .lanes import LanePool, StreamHandle
from .regions import Region

# Private, and stable since torch 1.x: the public forms build a Stream object per call (1-2 us against 0.1).
_get_device = torch._C._cuda_getDevice
_get_stream = torch._C._cuda_getCurrentStream
_set_stream = torch._C._cuda_setStream
_is_capturing = torch._C._cuda_isCurrentStreamCapturing
_event_record = driver.event_record
_wait_event = driver.stream_wait_event


def _switch(ids: tuple[int, int, int]) -> None:
    _set_stream(stream_id=ids[0], device_index=ids[1], device_type=ids[2])


class CudaMachine:
    """Regions on auxiliary CUDA streams of the current device."""

    compares_versions = True

    def __init__(self) -> None:
        torch.cuda.init()
        self._streams: dict[tuple[int, int, int], StreamHandle] = {}
        self._pools: dict[tuple[int, int], LanePool] = {}
        self._events: collections.defaultdict[int, collections.deque[Any]] = collections.defaultdict(collections.deque)

    def current(self) -> StreamHandle:
        """This thread's current stream."""
        ids = _get_stream(_get_device())
        stream = self._streams.get(ids)
        if stream is None:
            stream = self._streams[ids] = StreamHandle(ids)
        return stream

    def current_handle(self) -> int:
        """This thread's current stream, as its native handle."""
        return self.current().handle

    def fork(self, region: Region) -> None:
        caller = self.current()
        device = caller.ids[1]
        for tensor in region.recorded:
            if not tensor.is_cuda or tensor.get_device() != device:
                raise _wrong_device(region, tensor, device)
        key = (device, region.priority)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools.setdefault(key, LanePool(device, region.priority))
        lane = pool.take(caller.handle, driver.capture_id(caller.cu) if _is_capturing() else 0)
        events = self._events[device]
        try:
            event = events.pop()
        except IndexError:
            event = driver.make_event()
        region.lane = lane
        region.event = event
        code = _event_record(event, caller.cu)[0]
        if code:
            raise driver.failed(code, f"forking region {region.name!r}")
        stream = lane.torch_stream
        for tensor in region.recorded:
            tensor.record_stream(stream)

    def enter(self, region: Region) -> None:
        lane = region.lane
        region.outer = _get_stream(lane.ids[1])
        code = _wait_event(lane.cu, region.event, 0)[0]
        if code:
            raise driver.failed(code, f"entering region {region.name!r}")
        _switch(lane.ids)

    def leave(self, region: Region) -> None:
        lane = region.lane
        current = _get_stream(lane.ids[1])
        _switch(region.outer)
        code = _event_record(region.event, lane.cu)[0]
        if code:
            raise driver.failed(code, f"leaving region {region.name!r}")
        if current != lane.ids:
            raise RegionError(
                f"region {region.name!r} was left while another stream was current",
                expected=f"its own {lane.name}",
                came=f"stream id {current[0]}",
                remedy="regions and stream contexts nest: leave the inner one first",
            )

    def join(self, region: Region, returned: Sequence[Tensor]) -> None:
        stream = self.current()
        lane = region.lane
        joined = region.joined_by
        if joined is not None and stream.handle in joined:
            return
        code = _wait_event(stream.cu, region.event, 0)[0]
        if code:
            raise driver.failed(code, f"joining region {region.name!r}")
        torch_stream = stream.torch_stream
        for tensor in returned:
            if tensor.is_cuda:
                tensor.record_stream(torch_stream)
        if joined is None:
            region.joined_by = (stream.handle,)
            lane.pool.give_back(lane)
        else:
            region.joined_by = (*joined, stream.handle)

    def drop(self, region: Region) -> None:
        if region.event is not None:
            self._events[region.lane.ids[1]].append(region.event)
            if region.joined_by is None:
                region.lane.pool.give_back(region.lane)


@functools.cache
def cuda_machine() -> CudaMachine:
    """This process's CUDA machine."""
    return CudaMachine()


def _wrong_device(region: Region, tensor: Tensor, device: int) -> RegionError:
    return RegionError(
        f"region {region.name!r} cannot take a tensor of shape {tuple(tensor.shape)}",
        expected=f"a tensor on the current device, cuda:{device}",
        came=str(tensor.device),
        remedy="move it there, or fork under `with torch.cuda.device(...)` of the tensor's device",
    )
