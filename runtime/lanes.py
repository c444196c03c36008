"""Lanes: the auxiliary streams, and the pool that hands them out.

Enters: a device, a priority, the caller's stream. Leaves: a `Lane` no open region uses. Invariants: native handles are
distinct (they are our own driver streams, so torch's round-robin over 32 cannot alias two); the lowest free lane comes
first, so a warm-up and the capture after it run on the same lanes and cuBLAS keeps one workspace each.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

import torch

from . import driver


class StreamHandle:
    """A CUDA stream in the three forms its callers need: driver, torch, and torch's id triple."""

    __slots__ = ("cu", "device", "handle", "ids", "torch_stream")

    def __init__(self, ids: tuple[int, int, int]) -> None:
        stream = torch.cuda.Stream(stream_id=ids[0], device_index=ids[1], device_type=ids[2])
        self.ids = ids
        self.device = ids[1]
        self.torch_stream = stream
        self.handle: int = stream.cuda_stream
        self.cu: Any = driver.cuda.CUstream(self.handle)


class Caller(StreamHandle):
    """A stream that forks and joins regions, with the pool its regions of default priority take their lanes from."""

    __slots__ = ("joined", "pool")

    def __init__(self, ids: tuple[int, int, int], pool: LanePool) -> None:
        super().__init__(ids)
        self.pool = pool
        self.joined = (self.handle,)  # a region's `joined_by`, once this stream was the first to join it


class Lane(StreamHandle):
    """One auxiliary stream, named `lane0`, `lane1`, ... within its pool, with the two events of its regions.

    Note "a lane's events". A lane serves one open region at a time. `forked` is recorded at its fork and waited for
    at its enter, both before the next region can take the lane. `done` is recorded at leave, on the lane itself: a
    stream that joins late, when the next region has recorded `done` again, waits for a later point of the same
    stream, which is past the earlier one. So no waiter can miss its record, and no event is ever made on the hot path.
    """

    __slots__ = ("displaced", "done", "forked", "index", "name", "pool")

    def __init__(self, pool: LanePool, index: int) -> None:
        with torch.cuda.device(pool.device):  # the driver makes streams and events on the current device
            driver.attach(pool.device)
            stream = driver.make_stream(pool.priority)
            self.forked: Any = driver.make_event()
            self.done: Any = driver.make_event()
        external = torch.cuda.ExternalStream(int(stream), device=pool.device)
        super().__init__((external.stream_id, external.device_index, external.device_type))
        self.displaced: tuple[int, int, int] | None = None  # see CudaMachine.enter
        self.pool = pool
        self.index = index
        self.name = f"lane{index}" if pool.priority == 0 else f"lane{index}p{pool.priority}"


class LanePool:
    """The lanes of one thread, device and priority; the lowest free one comes first.

    Note "a lane's thread". A lane that took part in a capture cannot serve eager work until that capture has ended,
    and nobody tells us when the user's own `torch.cuda.graph` ends. A capture ends on the thread that began it, before
    that thread goes on; so lanes that stay with one thread are never met in another's capture, and the hot path needs
    neither a lock nor the question "is this stream capturing?" (0.4 us). A thread may give another's lane back, by
    joining its region: pushing an integer on a heap is atomic in CPython.
    """

    def __init__(self, device: int, priority: int) -> None:
        self.device = device
        self.priority = priority
        self.lanes: list[Lane] = []
        self.free: list[int] = []

    def take(self, caller: int) -> Lane:
        """A free lane whose native handle differs from `caller`'s, made if there is none."""
        if self.free:
            lane = self.lanes[heappop(self.free)]
        else:
            lane = Lane(self, len(self.lanes))
            self.lanes.append(lane)
        if lane.handle == caller:  # the caller kept the stream of a region long joined
            lane, taken = self.take(0), lane
            self.give_back(taken)
        return lane

    def give_back(self, lane: Lane) -> None:
        """The lane's region was joined or dropped."""
        heappush(self.free, lane.index)
