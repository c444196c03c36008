"""Lanes: the auxiliary streams, and the pool that hands them out.

Enters: a device, a priority, the capture (if any) that forks. Leaves: a `Lane` no open region uses. Invariants:
native handles are distinct (they are our own driver streams, so torch's round-robin over 32 cannot alias two); the
lowest free lane comes first, so a warm-up and the capture after it run on the same lanes and cuBLAS keeps one
workspace each; a lane that entered a capture serves that capture only, until it has ended.
"""

from __future__ import annotations

import heapq
import threading
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
    """One auxiliary stream, named `lane0`, `lane1`, ... within its pool. Ordered by index."""

    __slots__ = ("capture", "index", "name", "owned", "pool")

    def __init__(self, pool: LanePool, index: int) -> None:
        self.owned = driver.make_stream(pool.priority)
        external = torch.cuda.ExternalStream(int(self.owned), device=pool.device)
        super().__init__((external.stream_id, external.device_index, external.device_type))
        self.pool = pool
        self.index = index
        self.name = f"lane{index}" if pool.priority == 0 else f"lane{index}p{pool.priority}"
        self.capture = 0

    def __lt__(self, other: Lane) -> bool:
        return self.index < other.index


class LanePool:
    """The lanes of one device and priority. One lock; each call holds it for a heap operation."""

    def __init__(self, device: int, priority: int) -> None:
        self.device = device
        self.priority = priority
        self._lock = threading.Lock()
        self._free: list[Lane] = []
        self._captured: dict[int, list[Lane]] = {}  # capture id -> its idle lanes
        self._made = 0

    def take(self, caller: int, capture: int) -> Lane:
        """A free lane whose handle differs from `caller`'s; `capture` is the id of the forking capture, or 0."""
        with self._lock:
            free = self._captured.setdefault(capture, []) if capture else self._free
            lane = self._pop(free, caller)
            if lane is None and capture:
                lane = self._pop(self._free, caller)
            if lane is None:
                self._reclaim()
                lane = self._pop(self._free, caller)
            if lane is None:
                lane = Lane(self, self._made)
                self._made += 1
            lane.capture = capture
            return lane

    def give_back(self, lane: Lane) -> None:
        """The lane's region was joined or dropped."""
        with self._lock:
            heapq.heappush(self._captured.setdefault(lane.capture, []) if lane.capture else self._free, lane)

    @staticmethod
    def _pop(free: list[Lane], caller: int) -> Lane | None:
        if not free:
            return None
        lane = heapq.heappop(free)
        if lane.handle != caller:
            return lane
        other = heapq.heappop(free) if free else None
        heapq.heappush(free, lane)
        return other

    def _reclaim(self) -> None:
        """Captures end without telling us (the user's own `torch.cuda.graph`): ask their lanes."""
        for capture, lanes in list(self._captured.items()):
            ended = [lane for lane in lanes if not driver.is_capturing(lane.cu)]
            for lane in ended:
                lanes.remove(lane)
                lane.capture = 0
                heapq.heappush(self._free, lane)
            if not lanes:
                del self._captured[capture]
            else:
                heapq.heapify(lanes)
