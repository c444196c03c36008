"""`PiecewiseGraph`: a step of captured pieces and eager ops, in the place of one captured graph.

Enters: the pieces of a step (capture/pieces_capture.py), in launch order, each on a stream and behind the ones it waits
for. Leaves: an object with the replay, order, proof and memory of a `CapturedGraph`. Invariants: a step is proved as a
whole, twice in a row; a replay is one turn of the order that its pool's graphs share, launched from the caller's
stream, to which every lane has come back when it ends; the host waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime import ranges
from .evidence import Evidence
from .graphs import LAUNCH_OBSERVERS, CapturedGraph, GraphMemory, SimulatedGraph
from .hazards import Hazard
from .program import Program
from .proof import Report, not_checked
from .steps import Piece, compose, one_program, simulate_step, verify_step

if TYPE_CHECKING:
    from ..runtime.lanes import Lane
    from .replay_order import ReplayOrder


class PiecewiseGraph(CapturedGraph):
    """A captured step in pieces.

    Attributes:
        pieces: in launch order, as `verify_step` takes them. Eager ops and points between launches are among them.
    """

    def __init__(self, name: str, pieces: Sequence[Piece], regions: tuple[str, ...], memory: GraphMemory) -> None:
        super().__init__(name)
        self.pieces = tuple(pieces)
        self.regions = regions
        self._memory = memory

    @functools.cached_property
    def _whole(self) -> Program:
        return one_program(self.pieces)

    @property
    def program(self) -> Program:
        """The recordings of all pieces as one."""
        return self._whole

    @property
    def programs(self) -> tuple[Program, ...]:
        pieces = [piece for piece in self.pieces if piece.program.steps and not piece.eager]
        return tuple(_named(piece.program, str(piece.stream)) for piece in pieces)

    def keep(self, outside: Mapping[int, Tensor]) -> None:
        """Keep outside memory alive for as long as the step."""
        self._outside = outside

    def _recorded(self) -> Evidence:
        return compose(self.pieces)

    @ranges.around(lambda graph: f"prove {graph.name}")
    def prove(self, *, checked: bool) -> Report:
        """Fill in the report: of two steps, one right behind the other."""
        self._report = verify_step(self.pieces, rounds=2) if checked else not_checked(self.program)
        return self._report


def _named(program: Program, caller: str) -> Program:
    """The recording with its first stream under the name that the step has for it."""
    first = next(iter(program.stream_names))
    return replace(program, stream_names={**program.stream_names, first: caller})


class SimulatedPieces(PiecewiseGraph, SimulatedGraph):
    """Pieces of the simulated machine: a replay executes the whole step, in an adversarial order."""

    def __init__(self, name: str, pieces: Sequence[Piece], regions: tuple[str, ...], memory: GraphMemory) -> None:
        super().__init__(name, pieces, regions, memory)
        self.ready(simulate_step(self.pieces), memory)

    @property
    def hazards(self) -> tuple[Hazard, ...]:
        """Those within one step: replays here are over when they return."""
        steps = len(self.program.steps)
        return tuple(hazard for hazard in super().hazards if max(hazard.first, hazard.second) < steps)


@dataclass(frozen=True, slots=True)
class Launch:
    """What a replay does for one piece.

    Attributes:
        run: the launch itself; None for a point between launches.
        lane: None for the caller's stream.
        after: earlier launches whose end it waits for.
    """

    run: Callable[[], object] | None
    lane: int | None
    after: tuple[int, ...]


def _ranged(launches: Sequence[Launch], pieces: Sequence[Piece]) -> Iterator[Launch]:
    """The launches, each in a range of its piece's name."""
    for launch, piece in zip(launches, pieces, strict=True):
        what = f"{'eager' if piece.eager else 'piece'} {piece.name}"
        lane = "" if launch.lane is None else f" [launch lane{launch.lane}]"
        yield launch if launch.run is None else replace(launch, run=ranges.around(what + lane)(launch.run))


class CudaPieces(PiecewiseGraph):
    """Pieces captured as CUDA graphs."""

    def __init__(
        self,
        name: str,
        pieces: Sequence[Piece],
        regions: tuple[str, ...],
        memory: GraphMemory,
        launches: Sequence[Launch],
        order: ReplayOrder,
        device: int,
    ) -> None:
        super().__init__(name, pieces, regions, memory)
        self._order = order
        self._turn = _Turn(device, 1 + max((launch.lane for launch in launches if launch.lane is not None), default=-1))
        self._steps = self._turn.steps([*_ranged(launches, self.pieces)] if ranges.ENABLED else launches)

    @property
    def order(self) -> ReplayOrder:
        return self._order

    @ranges.around(lambda graph: f"replay {graph.name}")
    def replay(self) -> None:
        with torch.no_grad(), self._order as order:
            for observe in LAUNCH_OBSERVERS:
                observe(self, order.stream)
            if torch.is_autocast_enabled("cuda"):  # as captured, whatever mode the replay comes in
                with torch.autocast("cuda", enabled=False):
                    self._launch(order)
            else:
                self._launch(order)

    def _launch(self, order: ReplayOrder) -> None:
        turn = self._turn
        if not turn.lanes:
            for step in self._steps:
                step()
            return
        turn.begin(order.stream)
        try:
            for step in self._steps:
                step()
        except BaseException:
            turn.give_up()
            raise
        finally:
            turn.end()

    def wait(self) -> None:
        self._order.wait()


class _Turn:
    """One replay under way: the caller's stream, the lanes, and an event for each launch that others wait for.

    Note "events of a step". An event is recorded anew by every replay. Whoever waits for it was told so while the last
    replay was launched: a wait binds to the record before it, and replays are launched one at a time.
    """

    def __init__(self, device: int, lanes: int) -> None:
        from ..runtime import cuda

        self._device = device
        self._cuda = cuda
        self._outer = self._ids = (0, 0, 0)
        self._caller: Any = None
        self.lanes = _lanes(device, lanes)

    def begin(self, stream: int) -> None:
        """The caller's stream of this replay."""
        cuda = self._cuda
        self._outer = cuda.get_stream(cuda.CURRENT_DEVICE)
        self._ids = cuda.get_stream(self._device)
        self._caller = cuda.driver.cuda.CUstream(stream)

    def end(self) -> None:
        self._cuda.set_stream(*self._ids)
        if self._outer[1] != self._device:
            self._cuda.set_stream(*self._outer)

    def give_up(self) -> None:
        """The caller's stream waits for whatever the lanes were given."""
        for lane in self.lanes:
            self._record(lane.done, lane.cu)
            self._wait(self._caller, lane.done)

    def steps(self, launches: Sequence[Launch]) -> tuple[Callable[[], object], ...]:
        """All that a replay does, call by call."""
        driver = self._cuda.driver
        awaited = {other for launch in launches for other in launch.after}
        with torch.cuda.device(self._device):
            events = {number: driver.make_event() for number in sorted(awaited)}
        steps: list[Callable[[], object]] = []
        current: int | None = None
        for number, launch in enumerate(launches):
            lane = launch.lane
            steps += [self._waiting(lane, events[other]) for other in launch.after]
            if launch.run is not None:
                if lane != current:
                    steps.append(self._entering(lane))
                    current = lane
                steps.append(launch.run)
            if number in events:
                steps.append(self._recording(lane, events[number]))
        return tuple(steps)

    def _entering(self, lane: int | None) -> Callable[[], object]:
        set_stream = self._cuda.set_stream
        if lane is None:
            return lambda: set_stream(*self._ids)
        ids = self.lanes[lane].ids
        return lambda: set_stream(*ids)

    def _waiting(self, lane: int | None, event: Any) -> Callable[[], object]:
        if lane is None:
            return lambda: self._wait(self._caller, event)
        stream = self.lanes[lane].cu
        return lambda: self._wait(stream, event)

    def _recording(self, lane: int | None, event: Any) -> Callable[[], object]:
        if lane is None:
            return lambda: self._record(event, self._caller)
        stream = self.lanes[lane].cu
        return lambda: self._record(event, stream)

    def _wait(self, stream: Any, event: Any) -> None:
        code = self._cuda.wait_event(stream, event, 0)[0]
        if code:
            raise self._cuda.driver.failed(code, "waiting for a piece of a step")

    def _record(self, event: Any, stream: Any) -> None:
        code = self._cuda.record_event(event, stream)[0]
        if code:
            raise self._cuda.driver.failed(code, "marking the end of a piece of a step")


def _lanes(device: int, count: int) -> list[Lane]:
    """The streams that pieces are launched on beside the caller's. They serve no region and no capture, and steps are
    launched one at a time on a device, so all share them, whatever thread they come from."""
    if not count:
        return []
    from ..runtime.lanes import Lane

    pool = _lane_pool(device)
    while len(pool.lanes) < count:
        pool.lanes.append(Lane(pool, len(pool.lanes)))
    return pool.lanes[:count]


@functools.cache
def _lane_pool(device: int) -> Any:
    from ..runtime.lanes import LanePool

    return LanePool(device, 0)
