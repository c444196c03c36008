"""Lanes: the auxiliary streams, and the pool that hands them out.

Enters: a device, a priority, the capture (if any) that forks. Leaves: a `Lane` no open region uses. Invariants:
native handles are distinct (they are our own driver streams, so torch's round-robin over 32 cannot alias two); the
lowest free lane comes first, so a warm-up and the capture after it run on the same lanes and cuBLAS keeps one
workspace each; a lane that entered a capture serves that capture only, until it has ended.
"""

from __future__ import annotations

import threading
from heapq import heapify, heappop, heappush
from typing import Any

import torch

from . import driver


class StreamHandle:
    """A CUDA stream in the three forms its callers need: driver, torch, and torch's id triple."""

    __slots__ = ("cu", "handle", "ids", "torch_stream")

    def __init__(self, ids: tuple[int, int, int]) -> None:
        stream = torch.cuda.Stream(stream_id=ids[0], device_index=ids[1], device_type=ids[2])
        self.ids = ids
        self.torch_stream = stream
        self.handle: int = stream.cuda_stream
        self.cu: Any = driver.cuda.CUstream(self.handle)


class Lane(StreamHandle):
    """One auxiliary stream, named `lane0`, `lane1`, ... within its pool, with the two events of its regions.

    Note "a lane's events". A lane serves one open region at a time. `forked` is recorded at its fork and waited for
    at its enter, both before the next region can take the lane. `done` is recorded at leave, on the lane itself: a
    stream that joins late, when the next region has recorded `done` again, waits for a later point of the same
    stream, which is past the earlier one. So no waiter can miss its record, and no event is ever made on the hot path.
    """

    __slots__ = ("capture", "done", "forked", "index", "name", "pool")

    def __init__(self, pool: LanePool, index: int) -> None:
        external = torch.cuda.ExternalStream(int(driver.make_stream(pool.priority)), device=pool.device)
        super().__init__((external.stream_id, external.device_index, external.device_type))
        self.pool = pool
        self.index = index
        self.name = f"lane{index}" if pool.priority == 0 else f"lane{index}p{pool.priority}"
        self.forked: Any = driver.make_event()
        self.done: Any = driver.make_event()
        self.capture = 0


class LanePool:
    """The lanes of one device and priority.

    The eager free list is a heap of lane numbers: pushing and popping integers is atomic in CPython, so the hot path
    takes no lock. Making lanes, and everything about captures, does.
    """

    def __init__(self, device: int, priority: int) -> None:
        self.device = device
        self.priority = priority
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._free: list[int] = []
        self._captured: dict[int, list[int]] = {}  # capture id -> its idle lanes

    def take(self, caller: int) -> Lane:
        """The lowest free lane whose native handle differs from `caller`'s, for a region outside of any capture."""
        try:
            lane = self._lanes[heappop(self._free)]
        except IndexError:
            lane = self._reclaim_or_make()
        if lane.handle == caller:
            lane = self._another(lane)
        return lane

    def take_captured(self, caller: int, capture: int) -> Lane:
        """Likewise for a region of the capture with id `capture`; the lane stays with it until it has ended."""
        with self._lock:
            own = self._captured.setdefault(capture, [])
            lane = self._lanes[heappop(own)] if own else None
        if lane is None or lane.handle == caller:
            lane = self.take(caller)
        lane.capture = capture
        return lane

    def give_back(self, lane: Lane) -> None:
        """The lane's region was joined or dropped."""
        if lane.capture:
            with self._lock:
                heappush(self._captured.setdefault(lane.capture, []), lane.index)
        else:
            heappush(self._free, lane.index)

    def _another(self, taken: Lane) -> Lane:
        """The caller runs on a free lane of ours (it kept the stream of a region long joined)."""
        lane = self.take(0)
        self.give_back(taken)
        return lane

    def _reclaim_or_make(self) -> Lane:
        with self._lock:
            # Captures end without telling us (the user's own `torch.cuda.graph`): ask their lanes.
            for capture, idle in list(self._captured.items()):
                for index in list(idle):
                    if not driver.is_capturing(self._lanes[index].cu):
                        idle.remove(index)
                        self._lanes[index].capture = 0
                        heappush(self._free, index)
                if idle:
                    heapify(idle)
                else:
                    del self._captured[capture]
            try:
                return self._lanes[heappop(self._free)]
            except IndexError:
                self._lanes.append(Lane(self, len(self._lanes)))
                return self._lanes[-1]
