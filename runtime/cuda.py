"""`CudaMachine`: a region's four steps as driver calls on raw handles.

Enters: regions from runtime/regions.py. Leaves: event records, event waits, `record_stream` calls and the thread's
current stream. Nothing here waits on the host, and nothing asks "am I capturing?": a capture gets the same calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from . import driver
from .errors import RegionError
from .lanes import LanePool, StreamHandle
from .regions import Region

# Private, and stable since torch 1.x: the public forms build a Stream object per call (1-2 us against 0.1).
_get_stream = torch._C._cuda_getCurrentStream
_set_stream = torch._C._cuda_setStream
_event_record = driver.event_record
_wait_event = driver.stream_wait_event
_CURRENT_DEVICE: Final = -1


class CudaMachine:
    """Regions of one thread on auxiliary CUDA streams of its current device."""

    compares_versions = True

    def __init__(self) -> None:
        torch.cuda.init()
        self._streams: dict[tuple[int, int, int], StreamHandle] = {}
        self._pools: dict[tuple[int, int], LanePool] = {}

    def current(self) -> StreamHandle:
        """This thread's current stream."""
        ids = _get_stream(_CURRENT_DEVICE)
        stream = self._streams.get(ids)
        return stream if stream is not None else self._streams.setdefault(ids, StreamHandle(ids))

    def current_handle(self) -> int:
        """This thread's current stream, as its native handle."""
        return self.current().handle

    def fork(self, region: Region) -> None:
        ids = _get_stream(_CURRENT_DEVICE)
        caller = self._streams.get(ids) or self.current()
        device = ids[1]
        recorded = region.recorded
        for tensor in recorded:
            if tensor.get_device() != device:
                raise _wrong_device(region, tensor, device)
        pool = self._pools.get((device, region.priority)) or self._make_pool(device, region.priority)
        lane = region.lane = pool.take(caller.handle)
        code = _event_record(lane.forked, caller.cu)[0]
        if code:
            raise driver.failed(code, f"forking region {region.name!r}")
        for tensor in recorded:
            tensor.record_stream(lane.torch_stream)

    def _make_pool(self, device: int, priority: int) -> LanePool:
        return self._pools.setdefault((device, priority), LanePool(device, priority))

    def enter(self, region: Region) -> None:
        lane = region.lane
        ids = lane.ids
        region.outer = _get_stream(ids[1])
        code = _wait_event(lane.cu, lane.forked, 0)[0]
        if code:
            raise driver.failed(code, f"entering region {region.name!r}")
        _set_stream(*ids)

    def leave(self, region: Region) -> None:
        lane = region.lane
        ids = lane.ids
        current = _get_stream(ids[1])
        _set_stream(*region.outer)
        code = _event_record(lane.done, lane.cu)[0]
        if code:
            raise driver.failed(code, f"leaving region {region.name!r}")
        if current != ids:
            raise RegionError(
                f"region {region.name!r} was left while another stream was current",
                expected=f"its own {lane.name}",
                came=f"stream id {current[0]}",
                remedy="regions and stream contexts nest: leave the inner one first",
            )

    def join(self, region: Region, returned: Sequence[Tensor]) -> None:
        stream = self._streams.get(_get_stream(_CURRENT_DEVICE)) or self.current()
        joined = region.joined_by
        if joined and stream.handle in joined:
            return
        lane = region.lane
        code = _wait_event(stream.cu, lane.done, 0)[0]
        if code:
            raise driver.failed(code, f"joining region {region.name!r}")
        for tensor in returned:
            if tensor.is_cuda:
                tensor.record_stream(stream.torch_stream)
        if joined:
            region.joined_by = (*joined, stream.handle)
        else:
            region.joined_by = (stream.handle,)
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
