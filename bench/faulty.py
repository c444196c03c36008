"""A CUDA machine with one kind of wait taken out: the demo's negative controls on a GPU.

Enters: regions. Leaves: corrupt numbers. A capture must still end with every stream joined, so the wait is moved to
where it cannot help instead of dropped: the fork's to the start of the step, the join's to its end.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..runtime import driver
from ..runtime.cuda import CudaMachine
from ..runtime.lanes import Lane
from ..runtime.regions import Region
from .controls import Fault


class FaultyMachine(CudaMachine):
    """A CUDA machine whose regions do not wait where they should.

    Call `begin` before the step's first op and `finish` after its last, on the stream the step runs on.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault
        self._start = driver.make_event()
        self._unwaited: dict[int, Lane] = {}

    def begin(self) -> None:
        """Mark the step's start: the point lanes wait for when the fork wait is out."""
        driver.call(driver.event_record(self._start, self.current().cu), "marking the start of a step")

    def finish(self) -> None:
        """Wait for every lane that was not waited for: a capture must not end without."""
        stream = self.current()
        for lane in self._unwaited.values():
            driver.call(driver.stream_wait_event(stream.cu, lane.done, 0), "ending a step")
        self._unwaited.clear()

    def enter(self, region: Region) -> None:
        if self._fault != "fork wait":
            super().enter(region)
            return
        kept, region.lane.forked = region.lane.forked, self._start
        try:
            super().enter(region)
        finally:
            region.lane.forked = kept

    def join(self, region: Region, returned: Sequence[Tensor]) -> None:
        if self._fault != "join wait":
            super().join(region, returned)
            return
        region.joined_by = (self.current_handle(),)
        self._unwaited[region.lane.index] = region.lane
        region.lane.pool.give_back(region.lane)
