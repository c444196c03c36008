"""`watch`: refuses work on a graph's memory in no fixed order with a replay, by op, line, stream and missing wait.

Enters: a `with` block; the replays in it, this thread's ops, and what the host says of streams and events. Leaves: the
same work, or a `ReplayRaceError` before the first op, or replay, that could meet a replay on the same bytes in no fixed
order. Replays order themselves against each other (capture/replay_order.py); what other streams do to inputs and
outputs only their author can order, and this says where that was forgotten.

Note "what a watch sees". Order comes from torch's streams and events, whoever uses them (torch reports each record,
wait and host wait from C++), from `wait()` of graphs and models, and from regions. A `query()` that answers True is no
wait. Accesses come from the dispatcher: ops of the thread that opened the block, and replays of every thread. Kernels
launched past the dispatcher, and streams' work from before the block, are not seen. Nor is the simulated machine, whose
replays are over when they return. Default streams of several devices count as one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ..kernels.accesses import hidden_writes
from ..runtime.errors import AuxstreamError, CaptureError, RaceError
from .graphs import LAUNCH_OBSERVERS, OBSERVERS, CapturedGraph
from .program import TensorRef
from .signatures import arguments, in_parts, is_view, tensors_in
from .source import source_line
from .timeline import Conflict, Footprint, Launches, Span, Timeline, Use

if TYPE_CHECKING:
    from .compiler import CompiledModel

_one_watch: Final = threading.Lock()


class ReplayRaceError(RaceError):
    """Work on a graph's memory and a replay of the graph, in no fixed order; `report` is the `Conflict`."""

    def __init__(self, conflict: Conflict) -> None:
        first, second = conflict.first, conflict.second
        start, stop = conflict.span
        graph = first.graph or second.graph
        if second.graph is None:
            remedy = f"wait() of {graph!r} on {_stream(second)} before `{second.what}`, or an event that says the same"
        elif first.graph is None:
            remedy = f"wait() of {graph!r} on {_stream(first)} before `{first.what}`, and replays wait for it in turn; "
            remedy += f"or have {_stream(second)} wait for {_stream(first)} before the replay"
        else:
            remedy = f"have {_stream(second)} wait for {_stream(first)} before the replay"
        AuxstreamError.__init__(
            self,
            f"{_named(second)} and {_named(first)} touch the same {stop - start:,} bytes, and one of them writes",
            expected="each ordered behind the other's stream, on the GPU",
            came=f"no wait of {_stream(second)} for {_stream(first)}\n"
            f"            first: {first.line}\n            then:  {second.line}",
            remedy=remedy,
        )
        self.report = conflict


def _named(use: Use) -> str:
    return f"`{use.what}` on {_stream(use)}" if use.graph is None else f"a replay of {use.graph!r} on {_stream(use)}"


def _stream(use: Use) -> str:
    return f"the stream with handle {use.stream:#x}" if use.stream else "the default stream"


class Watch(TorchDispatchMode):
    """A watch under way. Streams and events are numbers; what they are is told by the arguments.

    Args:
        timeline: who waits for whom.
        device_type: of the tensors that matter.
        current: the current stream of a device.
        capturing: whether a stream is being captured, so that its ops run at no time yet.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        timeline: Timeline,
        device_type: str,
        current: Callable[[int], int],
        capturing: Callable[[int], bool],
    ) -> None:
        super().__init__()
        self._timeline = timeline
        self._device_type = device_type
        self._current = current
        self._capturing = capturing
        self._launches = Launches(timeline)
        self._graphs: dict[int, tuple[ref[CapturedGraph], Footprint]] = {}
        self._numbers: WeakKeyDictionary[CapturedGraph, int] = WeakKeyDictionary()
        self._count = itertools.count()
        self._lock = threading.RLock()

    def add(self, graph: CapturedGraph) -> None:
        """Watch the graph's memory, from before its first replay on."""
        with self._lock:
            self._number(graph)

    def launch(self, graph: CapturedGraph, stream: int) -> None:
        """A replay is about to be launched."""
        with self._lock:
            self._forget_dead()
            number = self._number(graph)
            _, footprint = self._graphs[number]
            conflict = self._launches.replay(number, Use("replay", source_line(), stream, graph.name, footprint))
        if conflict is not None:
            raise ReplayRaceError(conflict)

    def _number(self, graph: CapturedGraph) -> int:
        number = self._numbers.get(graph)
        if number is None:
            number = self._numbers[graph] = next(self._count)
            footprint = footprint_of(graph)
            self._graphs[number] = ref(graph), footprint
            self._launches.know(number, footprint)
        return number

    def _forget_dead(self) -> None:
        """The memory of a graph that is gone belongs to somebody else."""
        for number, (graph, _) in list(self._graphs.items()):
            if graph() is None:
                del self._graphs[number]
                self._launches.forget(number)

    def record(self, event: int, stream: int) -> None:
        """An event is recorded."""
        if not self._capturing(stream):
            with self._lock:
                self._timeline.record(event, stream)

    def wait(self, event: int, stream: int) -> None:
        """A stream waits for an event."""
        if not self._capturing(stream):
            with self._lock:
                self._timeline.wait(stream, event)

    def host_waits(self, **what: int) -> None:
        """The host waits, for an `event`, a `stream`, or all."""
        with self._lock:
            self._timeline.host_waits_for(**what)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator) or func.namespace == "prim":
            return func(*args, **kwargs)
        if any(map(is_traceable_wrapper_subclass, (*tensors_in(args), *tensors_in(kwargs)))):
            return NotImplemented  # it unwraps itself, and its inner ops come here
        parts = in_parts(self, func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        if not _looks_at_metadata(func):
            self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        touched: dict[int, tuple[list[Span], list[Span]]] = {}  # by device
        for tensor, writes in _touches(func, args, kwargs):
            if tensor.device.type == self._device_type and not isinstance(tensor, FakeTensor):
                touched.setdefault(tensor.get_device(), ([], []))[writes].extend(_spans(tensor))
        for device, spans in touched.items():
            stream = self._current(device)
            if self._capturing(stream):
                continue
            name = str(func).removeprefix("aten.")
            with self._lock:
                self._forget_dead()
                conflict = self._launches.other(Use(name, source_line(), stream, None, Footprint.of(*spans)))
            if conflict is not None:
                raise ReplayRaceError(conflict)


def footprint_of(graph: CapturedGraph) -> Footprint:
    """All bytes of the device that a replay reads, and writes."""
    evidence = graph.evidence
    spans: tuple[list[Span], list[Span]] = ([], [])
    for node in evidence.nodes:
        for touched, writes in node.touches:
            spans[writes].extend(touched.ranges(evidence.buffers[touched.buffer].address))
    return Footprint.of(*spans)


def _looks_at_metadata(func: Any) -> bool:
    """Whether an op touches no byte of its arguments: views, tensors like another, notes to the allocator."""
    name = func._schema.name
    like = name.endswith("_like") or name.startswith("aten::new_") or name == "aten::record_stream"
    return is_view(func) or (like and func.namespace == "aten")


def _touches(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """Each tensor an op is given, and whether the op writes it (or reads and writes)."""
    hidden = hidden_writes(func, args)
    for argument in arguments(func):
        for leaf in tensors_in(argument.of(args, kwargs)):
            if leaf.layout is torch.strided:
                yield leaf, argument.writes or argument.position in hidden


def _spans(tensor: Tensor) -> tuple[Span, ...]:
    window = TensorRef(0, int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride(), tensor.dtype)
    return window.ranges(tensor.untyped_storage().data_ptr())


@contextmanager
def watch(*graphs: CapturedGraph | CompiledModel) -> Generator[Watch]:
    """Refuse work that races with a replay: `with watch(g): ...`. For tests, and to look into a doubt: it slows every
    op, and torch goes on reporting events to Python, at a few microseconds each, until the process ends.

    Args:
        graphs: those captured before the block, so that what is done to their inputs before their first replay in it is
            seen. Graphs captured in the block, or replayed in it, are watched from then on.

    Yields:
        the watch.

    Raises:
        CaptureError: another watch is under way.
        ReplayRaceError: inside the block, from the op or the replay that no wait orders.
    """
    if not _one_watch.acquire(blocking=False):
        raise CaptureError(
            "a watch begins while another is under way",
            expected="one at a time in a process: it follows every stream",
            came="a nested one, or one on another thread",
            remedy="pass all graphs to the outer one",
        )
    with ExitStack() as stack:
        stack.callback(_one_watch.release)
        made = stack.enter_context(_on_cuda() if torch.cuda.is_available() else _on_nothing())
        for given in graphs:
            for captured in (given,) if isinstance(given, CapturedGraph) else given.graphs:
                made.add(captured)
        stack.enter_context(made)
        yield made


@contextmanager
def _on_nothing() -> Generator[Watch]:
    """With no CUDA there is one stream, the host's own."""
    yield Watch(Timeline(), "cuda", lambda device: 0, lambda stream: False)


@contextmanager
def _on_cuda() -> Generator[Watch]:
    """Told by torch of its own streams and events, and by the driver calls of regions."""
    from torch.cuda import _gpu_trace as trace

    from ..runtime import cuda, driver, quick

    get_raw_stream = torch._C._cuda_getCurrentRawStream

    def capturing(stream: int) -> bool:
        if not stream:
            return False  # the default stream cannot be captured
        handle = driver.cuda.CUstream(stream)
        status = driver.call(driver.cuda.cuStreamIsCapturing(handle), "asking whether a stream is capturing")
        return status != driver.cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE

    made = Watch(Timeline(), "cuda", get_raw_stream, capturing)

    def record_event(event: Any, stream: Any) -> tuple[Any]:
        result = driver.event_record(event, stream)
        if not result[0]:
            made.record(int(event), int(stream))
        return result

    def wait_event(stream: Any, event: Any, flags: int) -> tuple[Any]:
        result = driver.stream_wait_event(stream, event, flags)
        if not result[0]:
            made.wait(int(event), int(stream))
        return result

    torch._C._activate_gpu_trace()
    with ExitStack() as stack:

        def tell(callbacks: list[Any], callback: Callable[..., None]) -> None:
            callbacks.append(callback)
            stack.callback(callbacks.remove, callback)

        tell(trace.EventRecordCallbacks.callback_list, made.record)
        tell(trace.EventWaitCallbacks.callback_list, made.wait)
        tell(trace.EventSynchronizationCallbacks.callback_list, lambda event: made.host_waits(event=event))
        tell(trace.StreamSynchronizationCallbacks.callback_list, lambda stream: made.host_waits(stream=stream))
        tell(trace.DeviceSynchronizationCallbacks.callback_list, made.host_waits)
        tell(OBSERVERS, made.add)
        tell(LAUNCH_OBSERVERS, made.launch)
        for module in (cuda, quick):
            for name, call in (("record_event", record_event), ("wait_event", wait_event)):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, call)
        yield made
