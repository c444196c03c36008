"""Regions while a graph is recorded: the real steps, and a note of each in the program.

Enters: the four steps of a region. Leaves: the same steps on the machine below (CUDA's, or simulated streams that
are only numbers), and `Record` / `Wait` steps in the recorder. Invariant: the program's edges are exactly the waits
that were enqueued; taking one out of the machine below takes it out of the program too.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Final, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..runtime.errors import RegionError
from ..runtime.machine import Machine
from ..runtime.regions import Region
from .record import Recorder

CALLER: Final = 0
"""The stream number of the simulated machine's caller."""


class StreamSystem(Machine, Protocol):
    """A machine that can say which stream is current."""

    def current_handle(self) -> int:
        """The current stream's number (simulated) or native handle (CUDA)."""
        ...


class SimulatedLane:
    """A lane of the simulated machine: a number and a name."""

    __slots__ = ("handle", "name")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.name = f"lane{handle - 1}"

    def __lt__(self, other: SimulatedLane) -> bool:
        return self.handle < other.handle


class SimulatedStreams:
    """Streams as numbers: the caller's, lanes count from 1, the lowest free one first, as on a GPU."""

    compares_versions = False

    def __init__(self, caller: int = CALLER) -> None:
        self._current = caller
        self._free: list[SimulatedLane] = []
        self._made = 0

    def current_handle(self) -> int:
        return self._current

    def fork(self, region: Region) -> None:
        for tensor in (*region.recorded, *region.held):
            if tensor.device.type != "cpu":
                raise RegionError(
                    f"region {region.name!r} cannot take a tensor of shape {tuple(tensor.shape)}",
                    expected="a CPU tensor: this graph records on the simulated machine",
                    came=str(tensor.device),
                    remedy="move it to the CPU, or capture with device='cuda'",
                )
        if self._free:
            region.lane = heapq.heappop(self._free)
        else:
            self._made += 1
            region.lane = SimulatedLane(self._made)

    def enter(self, region: Region) -> None:
        region.outer = self._current
        self._current = region.lane.handle

    def leave(self, region: Region) -> None:
        current, self._current = self._current, region.outer
        if current != region.lane.handle:
            raise RegionError(
                f"region {region.name!r} was left while another region was current",
                expected=f"its own {region.lane.name}",
                came=f"stream {current}",
                remedy="regions nest: leave the inner one first",
            )

    def join(self, region: Region, returned: Sequence[Tensor]) -> None:
        joined = region.joined_by
        if not joined:
            heapq.heappush(self._free, region.lane)
        if self._current not in joined:
            region.joined_by = (*joined, self._current)

    def drop(self, region: Region) -> None:
        if region.lane is not None and not region.joined_by:
            heapq.heappush(self._free, region.lane)


class InlineStreams:
    """The kill switch under a capture: regions run on the caller's stream and leave no mark."""

    compares_versions = False

    def __init__(self, current_handle: Callable[[], int]) -> None:
        self._current_handle = current_handle

    def current_handle(self) -> int:
        return self._current_handle()

    def fork(self, region: Region) -> None: ...

    def enter(self, region: Region) -> None: ...

    def leave(self, region: Region) -> None: ...

    def join(self, region: Region, returned: Sequence[Tensor]) -> None: ...

    def drop(self, region: Region) -> None: ...


class RecordingMachine:
    """In force on a thread while `auxstream.graph` captures."""

    compares_versions = False

    def __init__(self, below: StreamSystem, recorder: Recorder) -> None:
        self.below = below
        self.recorder = recorder
        self.kept: list[object] = []  # what must not be destroyed before the capture ends
        self.names: list[str] = []  # of all regions, in fork order
        # A joined region is let go, and with it the results it returned: the recording keeps no tensor alive.
        self._open: dict[Region, None] = {}
        self._marks: WeakKeyDictionary[Region, int] = WeakKeyDictionary()  # the fork point, then the done point
        self._outer_names: list[str | None] = []
        recorder.current = below.current_handle

    def begin(self) -> None:
        """The capture has begun: the current stream is its caller."""
        self.recorder.stream_names[self.below.current_handle()] = "caller"

    def open_regions(self) -> list[Region]:
        """Regions that nobody has joined yet, in fork order."""
        return list(self._open)

    def fork(self, region: Region) -> None:
        self.below.fork(region)
        self._open[region] = None
        self.names.append(region.name)
        if region.lane is None:
            return
        lane = region.lane.handle
        self.recorder.stream_names.setdefault(lane, region.lane.name)
        with _disable_current_modes():
            self._marks[region] = self.recorder.mark(self.below.current_handle(), f"fork of {region.name}")
            self.recorder.hand(region.recorded, lane, recorded=True)
            self.recorder.hand(region.held, lane, recorded=False)

    def enter(self, region: Region) -> None:
        self.below.enter(region)
        self._outer_names.append(self.recorder.region)
        self.recorder.region = region.name
        if region.lane is not None:
            self.recorder.wait(region.lane.handle, self._marks[region], f"fork of {region.name}")

    def leave(self, region: Region) -> None:
        self.recorder.region = self._outer_names.pop()
        self.below.leave(region)
        if region.lane is not None:
            self._marks[region] = self.recorder.mark(region.lane.handle, f"end of {region.name}")

    def join(self, region: Region, returned: Sequence[Tensor]) -> None:
        self._open.pop(region, None)
        stream = self.below.current_handle()
        if region.lane is None or stream in region.joined_by:
            return
        self.below.join(region, returned)
        self.recorder.wait(stream, self._marks[region], f"end of {region.name}")
        with _disable_current_modes():
            self.recorder.hand(returned, stream, recorded=True)
            self.recorder.hand(region.held_returns, stream, recorded=False)

    def drop(self, region: Region) -> None:
        self._open.pop(region, None)
        self.below.drop(region)
