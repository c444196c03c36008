"""`auxstream.graph`: capture a block of work once, prove it free of races, replay it.

Enters: a `with` block. Leaves: a `CapturedGraph`. On a GPU the block is captured into a CUDA graph; on the simulated
machine it is recorded as a program. Invariant: however the block ends, the thread's current stream, its machine and
the RNG are as before, and nothing stays half-captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from ..runtime import ranges
from ..runtime.errors import AuxstreamError, CaptureError, RaceError
from ..runtime.machine import current_machine, thread_state, using_machine
from ..runtime.settings import SETTINGS, VERIFY_VALUES, Verify
from .allocator import AllocatorModel
from .evidence import Evidence, from_program
from .hazards import Hazard
from .program import Program
from .proof import Report, not_checked
from .proof import verify as prove
from .record import Recorder
from .refusals import NoHostReads, capturing_device
from .simulate import Simulation
from .source import warn_user
from .streams import CALLER, InlineStreams, RecordingMachine, SimulatedStreams
from .unfinished import entered_once, unfinished

if TYPE_CHECKING:
    from .replay_order import ReplayOrder

OBSERVERS: Final[list[Callable[[CapturedGraph], None]]] = []
"""Told of each captured graph, proved or not, before a failed proof raises."""

LAUNCH_OBSERVERS: Final[list[Callable[[CapturedGraph, int], None]]] = []
"""Told of each replay of a CUDA graph and its stream's handle, right before the launch; may refuse it by raising."""

_VERIFY_REMEDY: Final = "leave it out: the default, 'error', raises where the proof fails"
_one_processor: Final = threading.RLock()


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """Bytes a graph keeps for itself: `reserved` from the device (or the simulated arena)."""

    reserved: int


class CapturedGraph:
    """A captured block. Filled in when the `with auxstream.graph(...)` block ends.

    Attributes:
        name: as given.
        regions: names of the regions, in fork order.
        block_ended: whether the block of the capture is over, however it ended.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.regions: tuple[str, ...] = ()
        self.block_ended = False
        self._program: Program | None = None
        self._report: Report | None = None
        self._evidence: Evidence | None = None
        self._memory = GraphMemory(0)
        self._outside: Mapping[int, Tensor] = {}

    @property
    def program(self) -> Program:
        """What was recorded: ops, streams, events and bytes."""
        if self._program is None:
            raise self._unfinished("read its program")
        return self._program

    @property
    def programs(self) -> tuple[Program, ...]:
        """What was recorded, capture by capture."""
        return (self.program,)

    @property
    def evidence(self) -> Evidence:
        """What its proof is about: the CUDA graph's own nodes where there is one, else the program."""
        return self._recorded() if self._evidence is None else self._evidence

    def _recorded(self) -> Evidence:
        return from_program(self.program)

    @property
    def report(self) -> Report:
        """What was proved."""
        if self._report is None:
            raise self._unfinished("read its report")
        return self._report

    @property
    def memory(self) -> GraphMemory:
        """What it keeps, in bytes."""
        return self._memory

    def attach(self, program: Program, regions: tuple[str, ...], outside: Mapping[int, Tensor]) -> None:
        """Take what the capture recorded; `outside` keeps every external input alive for as long as the graph."""
        self._program = program
        self.regions = regions
        self._outside = outside

    def attach_evidence(self, evidence: Evidence) -> None:
        """Take what was read back from the CUDA graph."""
        self._evidence = evidence

    def let_go(self) -> None:
        """Keep outside memory alive no longer: its owner knows until when it is needed."""
        self._outside = {}

    @ranges.around(lambda graph: f"prove {graph.name}")
    def prove(self, *, checked: bool) -> Report:
        """Fill in the report."""
        self._report = prove(self.evidence) if checked else not_checked(self.program)
        return self._report

    def _unfinished(self, use: str) -> CaptureError:
        return unfinished(self.name, self.block_ended, use)

    def replay(self) -> None:
        """Run the captured work again on the current stream: outputs and mutated buffers are updated in place.

        From any stream and thread: replays run one after the other, and each waits, on the GPU, for what was given to
        the stream of the last one and to those that called `wait` since. Other streams that read outputs or write
        inputs call `wait` first.

        Raises:
            CaptureError: inside a capture, or the graph's own capture failed.
        """
        raise self._unfinished("replay it")

    def wait(self) -> None:
        """The current stream waits, on the GPU, for the last replay: now it may read outputs and write inputs. The next
        replay waits for that work; of an `ExternalStream`, which may be gone by then, it must be told by an event."""
        raise self._unfinished("wait for its replay")

    @property
    def order(self) -> AbstractContextManager[object]:
        """What a replay enters: one at a time, and behind what uses the graph's memory. It nests."""
        raise self._unfinished("replay it")

    def __reduce__(self) -> Any:
        raise CaptureError(f"graph {self.name!r} cannot be pickled or copied", remedy="capture it again")


class SimulatedGraph(CapturedGraph):
    """A graph of the simulated machine. Replays run in adversarial orders; see capture/orders.py."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._simulation: Simulation | None = None
        self.replays = 0

    def ready(self, simulation: Simulation, memory: GraphMemory) -> None:
        """The capture ended well."""
        self._simulation = simulation
        self._memory = memory

    @property
    def simulation(self) -> Simulation:
        """The executable form, for replays in an order of one's own."""
        return self._executable("use its simulation")

    def _executable(self, use: str) -> Simulation:
        if self._simulation is None:
            raise self._unfinished(use)
        return self._simulation

    @property
    def hazards(self) -> tuple[Hazard, ...]:
        """What replays turn around first."""
        return tuple(race.hazard for race in self.report.races)

    @ranges.around(lambda graph: f"replay {graph.name}")
    def replay(self) -> None:
        simulation = self._executable("replay it")
        if isinstance(thread_state.machine, RecordingMachine):
            raise CaptureError(
                f"graph {self.name!r} is replayed inside a capture",
                expected="replays between captures: CUDA captures no launch of another graph either",
                came="one while this thread records",
                remedy="run the work itself in the outer block, or replay one graph after the other",
            )
        with self.order:
            order = simulation.orders.adversarial(self.replays, self.hazards)
            self.replays += 1
            simulation.run(order)

    def wait(self) -> None:
        self._executable("wait for its replay")  # if there is one, its replays are over when they return

    @property
    def order(self) -> AbstractContextManager[object]:
        return _one_processor


class OwnGraph(torch.cuda.CUDAGraph):
    """A graph that auxstream captures, and so need not adopt."""


class CudaGraph(CapturedGraph):
    """A captured CUDA graph."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.cuda_graph = OwnGraph(keep_graph=True)
        self._order: ReplayOrder | None = None

    def _recorded(self) -> Evidence:
        recorded = super()._recorded()
        return replace(recorded, unattributed=(*recorded.unattributed, "the CUDA graph: captured with verify='off'"))

    def ready(self, memory: GraphMemory, order: ReplayOrder) -> None:
        """The capture ended well."""
        self._memory = memory
        self._order = order

    @property
    def order(self) -> ReplayOrder:
        if self._order is None:
            raise self._unfinished("replay it")
        return self._order

    def __del__(self) -> None:
        # `with auxstream.graph() as g` in a loop drops the old graph inside the new capture, where CUDA forbids
        # destroying one (it invalidates the capture): that waits until the capture has ended.
        machine = thread_state.machine
        if isinstance(machine, RecordingMachine):
            machine.kept.append(self.cuda_graph)

    @ranges.around(lambda graph: f"replay {graph.name}")
    def replay(self) -> None:
        with self.order as order:
            for observe in LAUNCH_OBSERVERS:
                observe(self, order.stream)
            self.cuda_graph.replay()

    def wait(self) -> None:
        self.order.wait()


@entered_once
def graph(
    name: str = "graph",
    *,
    verify: Verify = "error",
    device: torch.device | str | None = None,
    pool: Any = None,
    stream: torch.cuda.Stream | int | None = None,
) -> Generator[CapturedGraph]:
    """Capture a block of work: `with auxstream.graph() as g: out = model(x)`, then `g.replay()`.

    Args:
        name: for messages and profiles.
        verify: what a failed proof does: `error` raises RaceError, `warn` warns, `off` proves nothing and watches
            nothing. `AUXSTREAM_VERIFY` overrides it.
        device: None for the current CUDA device, or the simulated machine where there is none; `"cpu"` forces that.
        pool: a graph memory pool to share, as in `torch.cuda.graph`; on the simulated machine, an `AllocatorModel`.
        stream: the stream to capture on; default: a stream of this module's own. Likewise, a number.

    Yields:
        the graph, filled in when the block has ended. It keeps alive what the block read of tensors made before it.

    Raises:
        CaptureError: work that cannot be captured, or a region left open when the block ends.
        RaceError: the proof failed and `verify` is `error`.
    """
    mode = SETTINGS.verify or verify
    if mode not in VERIFY_VALUES:
        known = ", ".join(VERIFY_VALUES)
        raise CaptureError(f"graph {name!r}: unknown verify", expected=known, came=repr(mode), remedy=_VERIFY_REMEDY)
    chosen = capturing_device(name, device)
    if isinstance(thread_state.machine, RecordingMachine):
        raise CaptureError(
            f"graph {name!r} begins inside another capture",
            expected="one auxstream.graph at a time on a thread",
            came="a nested one",
            remedy="end the outer block first, or use regions (auxstream.fork) alone inside it",
        )
    context = _record(name, mode, pool, stream) if chosen.type == "cpu" else _capture(name, mode, chosen, pool, stream)
    with ranges.span(f"capture {name}"), context as captured:
        yield captured


@contextmanager
def _recording(machine: RecordingMachine, *modes: Any) -> Generator[None]:
    """Put the recorder and its machine in force, and leave no region open behind, error or not."""
    machine.begin()
    try:
        with ExitStack() as stack:
            stack.enter_context(using_machine(machine))
            for entered in modes:
                stack.enter_context(entered)
            yield
    except BaseException as error:
        _abandon(machine, error)
        raise
    if left_open := machine.open_regions():
        error = CaptureError(
            "the capture ended with regions open: " + ", ".join(f"{region.name!r}" for region in left_open),
            expected="every region joined inside the block that captures it",
            came=", ".join(f"{region.name!r} {region.state.value}" for region in left_open),
            remedy="call region.join() before the block ends",
        )
        _abandon(machine, error)
        raise error


def _abandon(machine: RecordingMachine, error: BaseException) -> None:
    """Close the regions that are open when `error` ends the capture; what goes wrong then is noted on it."""
    for region in reversed(machine.open_regions()):
        try:
            region.abandon()
        except AuxstreamError as refusal:
            error.add_note(f"while giving up region {region.name!r}: {refusal}")


@contextmanager
def _record(name: str, mode: Verify, pool: AllocatorModel | None, stream: Any) -> Generator[CapturedGraph]:
    own = stream if isinstance(stream, int) else CALLER
    captured = SimulatedGraph(name)
    recorder = Recorder(allocator=(allocator := pool or AllocatorModel()), watch=mode)
    machine = RecordingMachine(InlineStreams(lambda: own) if SETTINGS.disable else SimulatedStreams(own), recorder)
    rng = torch.get_rng_state()
    try:
        with allocator.undone_by_errors(), _recording(machine, NoHostReads("cpu"), recorder):
            yield captured
    finally:
        recorder.restore_outside()
        torch.set_rng_state(rng)
    program = recorder.finish()
    with torch.inference_mode(False):
        visible = {
            buffer: torch.empty(0, dtype=torch.uint8).set_(cast("Any", storage))
            for buffer, storage in recorder.live_storages()
        }
    _close(captured, recorder, machine, program, mode)
    captured.ready(Simulation(program, recorder.outside, visible), GraphMemory(program.arena_bytes))


@contextmanager
def _capture(name: str, mode: Verify, device: torch.device, pool: Any, stream: Any) -> Generator[CapturedGraph]:
    from ..runtime.cuda import CudaMachine
    from .attribution import CaptureWatch
    from .cuda_capture import CudaCapture
    from .replay_order import replay_order

    captured = CudaGraph(name)
    recorder = Recorder(allocator=None, watch=mode)
    streams = current_machine()
    if not isinstance(streams, CudaMachine):  # the kill switch is on
        streams = InlineStreams(CudaMachine().current_handle)
    machine = RecordingMachine(streams, recorder)
    recorder.record_use = lambda tensor, _: tensor.record_stream(torch.cuda.current_stream())
    with ExitStack() as stack:
        capture = CudaCapture(captured.cuda_graph, device, pool, stream)
        watch = stack.enter_context(CaptureWatch(recorder, capture.device)) if _checked(mode) else None
        with capture, _recording(machine, NoHostReads("cuda"), recorder):
            if watch is not None:
                watch.begin(streams.current_handle())
            yield captured
            if watch is not None:
                watch.end(streams.current_handle())
        program = recorder.finish()
        if watch is not None:
            captured.attach_evidence(watch.evidence(captured.cuda_graph, program))
    _close(captured, recorder, machine, program, mode)
    captured.cuda_graph.instantiate()
    captured.ready(GraphMemory(capture.reserved), replay_order(capture.device, captured.cuda_graph.pool()))


def _checked(mode: Verify) -> bool:
    """Whether to prove at all: while somebody observes, what the code switched off too, but not what the user did."""
    return mode != "off" or (bool(OBSERVERS) and SETTINGS.verify != "off")


def _close(
    captured: CapturedGraph, recorder: Recorder, machine: RecordingMachine, program: Program, mode: Verify
) -> None:
    """Attach what was recorded, prove it, and act on a failed proof."""
    captured.attach(program, tuple(machine.names), recorder.outside)
    report = captured.prove(checked=_checked(mode))
    for observe in OBSERVERS:
        observe(captured)
    if report.ok or mode == "off":
        return
    if mode == "error":
        raise RaceError(f"graph {captured.name!r} is not proved free of races\n{report}", report)
    warn_user(f"graph {captured.name!r} is not proved free of races\n{report}")
