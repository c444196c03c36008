"""Replays from many streams and threads: in one order on the GPU; and a watch over whoever forgets to wait.

No GPU here: streams and events are those of a CUDA that only keeps order (fake_cuda.py). Each rule has a twin in which
the order is taken out. The same on a device: test_launches_on_gpu.py.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, cast

import pytest
import torch
from cuda.bindings import driver as real
from fake_cuda import CudaTensor, FakeCuda, Stream, fake_cuda
from torch import Tensor, nn
from torch.cuda import _gpu_trace as trace

import auxstream
import auxstream.capture
from auxstream.capture import graphs
from auxstream.capture import launches as launches_module
from auxstream.capture.compiler import CompiledModel
from auxstream.capture.evidence import Evidence, Node, span
from auxstream.capture.graphs import CapturedGraph, CudaGraph, GraphMemory
from auxstream.capture.launches import ReplayRaceError, Watch, watch
from auxstream.capture.policy import Choice, Plan
from auxstream.capture.program import Buffer
from auxstream.capture.simulate import Simulation
from auxstream.capture.timeline import Timeline
from auxstream.runtime import driver
from auxstream.runtime.errors import CaptureError, RaceError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a CUDA of its own here")

Work = tuple[Any, int]

A, B, C = 0x101, 0x201, 0x301  # torch's own streams have odd ids
EXTERNAL = 0x1000  # a pointer
POOL, OTHER_POOL = (0, 1), (0, 2)


class FakeEvent:
    """A torch.cuda.Event of the fake CUDA: it tells the trace, as torch's own does once that is active."""

    fake: FakeCuda
    made = 0x7000

    def __init__(self) -> None:
        self.handle = 0

    def record(self, stream: Stream) -> None:
        assert stream.cuda_stream not in self.fake.destroyed, "the stream is gone"  # type: ignore[attr-defined]
        if not self.handle:
            FakeEvent.made += 1
            self.handle = FakeEvent.made
            self.fake.devices[self.handle] = stream.device_index
        self.fake.event_record(self.handle, stream.cuda_stream)
        trace.EventRecordCallbacks.fire_callbacks(self.handle, stream.cuda_stream)

    def wait(self, stream: Stream) -> None:
        if self.handle:
            self.fake.wait_event(stream.cuda_stream, self.handle, 0)
            trace.EventWaitCallbacks.fire_callbacks(self.handle, stream.cuda_stream)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_cuda(monkeypatch) as fake, monkeypatch.context() as patch:
        fake.thread.context = 0x9000
        fake.capturing, fake.destroyed = set(), set()  # type: ignore[attr-defined]

        def is_capturing(handle: Any) -> tuple[Any, Any]:
            states = real.CUstreamCaptureStatus
            active = int(handle) in fake.capturing  # type: ignore[attr-defined]
            none = states.CU_STREAM_CAPTURE_STATUS_NONE
            return real.CUresult.CUDA_SUCCESS, states.CU_STREAM_CAPTURE_STATUS_ACTIVE if active else none

        driver.cuda.cuStreamIsCapturing = is_capturing
        driver.cuda.CUstreamCaptureStatus = real.CUstreamCaptureStatus
        patch.setattr(FakeEvent, "fake", fake, raising=False)
        patch.setattr(torch.cuda, "Event", FakeEvent)
        patch.setattr(torch.cuda, "current_stream", lambda device: Stream(*fake.get_stream(device)))
        patch.setattr(
            torch._C,
            "_cuda_isCurrentStreamCapturing",
            lambda: fake.get_stream(-1)[0] in fake.capturing,  # type: ignore[attr-defined]
        )
        patch.setattr(torch._C, "_activate_gpu_trace", lambda: None)
        try:
            yield fake
        finally:
            sys.modules.pop("auxstream.capture.replay_order", None)
            vars(auxstream.capture).pop("replay_order", None)


class FakeExecutable:
    """What torch.cuda.CUDAGraph is to a CudaGraph: launching it is work on the current stream of its device."""

    def __init__(self, fake: FakeCuda, device: int) -> None:
        self.fake = fake
        self.device = device
        self.launched: list[Work] = []
        self.before: Callable[[], None] = lambda: None

    def replay(self) -> None:
        self.before()
        self.launched.append(self.fake.work(self.device))


def cuda_graph(
    fake: FakeCuda, pool: tuple[int, int] = POOL, device: int = 0, name: str = "g", touches: Evidence | None = None
) -> CudaGraph:
    from auxstream.capture.replay_order import replay_order

    graph = CudaGraph.__new__(CudaGraph)
    CapturedGraph.__init__(graph, name)
    graph.cuda_graph = FakeExecutable(fake, device)  # type: ignore[assignment]
    graph.ready(GraphMemory(0), replay_order(device, pool))
    graph.attach_evidence(touches or Evidence((), (), (), (), ()))
    return graph


def last(graph: CudaGraph) -> Work:
    return cast("FakeExecutable", graph.cuda_graph).launched[-1]


def disorder(patch: pytest.MonkeyPatch) -> None:
    """The twin: replays follow nobody."""
    from auxstream.capture.replay_order import ReplayOrder

    patch.setattr(ReplayOrder, "_follow", lambda self, ids: setattr(self._device, "stream", Stream(*ids)))
    patch.setattr(ReplayOrder, "wait", lambda self: None)


def behind(fake: FakeCuda, work: Work, stream: int, device: int = 0) -> bool:
    """Whether a stream's next work is behind `work`."""
    with fake.stream(stream, device):
        return fake.waits_for(work)


# --- replays order themselves -----------------------------------------------------------------------------------------


@without_cuda
def test_on_one_stream_a_replay_waits_for_nothing(cuda: FakeCuda) -> None:
    graph = cuda_graph(cuda)
    with cuda.stream(A):
        graph.replay()
        cuda.log.clear()
        graph.replay()
        graph.wait()
        graph.replay()
    records = [line for line in cuda.log if line.startswith("record")]
    assert len(records) == 2
    assert not [line for line in cuda.log if line.startswith("wait")]


@without_cuda
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "twin"])
@pytest.mark.parametrize("second", ["the same graph", "of the same pool", "of another pool"])
def test_a_replay_on_another_stream_is_behind_the_last_one(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, second: str, ordered: bool
) -> None:
    graph = cuda_graph(cuda)
    other = graph if second == "the same graph" else cuda_graph(cuda, POOL if "same" in second else OTHER_POOL)
    if not ordered:
        disorder(monkeypatch)
    with cuda.stream(A):
        graph.replay()
        launched = last(graph)
        read = cuda.work()  # say, of the outputs
    with cuda.stream(B):
        other.replay()
        assert cuda.waits_for(launched) == ordered
        assert cuda.waits_for(read) == (ordered and second != "of another pool")


@without_cuda
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "twin"])
def test_a_stream_that_waits_is_waited_for(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    graph = cuda_graph(cuda)
    if not ordered:
        disorder(monkeypatch)
    with cuda.stream(A):
        graph.replay()
        launched = last(graph)
    with cuda.stream(B):
        graph.wait()
        assert cuda.waits_for(launched) == ordered
        rewritten = cuda.work()
    with cuda.stream(A):
        graph.replay()
        assert cuda.waits_for(rewritten) == ordered
    with cuda.stream(B):
        later = cuda.work()
    with cuda.stream(A):
        graph.replay()
        assert not cuda.waits_for(later), "B has not waited for the second replay, and is no user any more"


@without_cuda
def test_inputs_made_before_the_first_replay(cuda: FakeCuda) -> None:
    graph = cuda_graph(cuda)
    with cuda.stream(B):
        graph.wait()
        written = cuda.work()
    with cuda.stream(A):
        graph.replay()
        assert cuda.waits_for(written)


@without_cuda
def test_the_default_stream_is_a_stream_as_any_other(cuda: FakeCuda) -> None:
    graph = cuda_graph(cuda)
    graph.replay()
    launched, read = last(graph), cuda.work()
    with cuda.stream(A):
        graph.replay()
        assert cuda.waits_for(launched)
        assert cuda.waits_for(read)
        launched = last(graph)
    graph.wait()
    assert cuda.waits_for(launched)


@without_cuda
def test_streams_that_may_be_gone(cuda: FakeCuda) -> None:
    graph = cuda_graph(cuda)
    with cuda.stream(EXTERNAL):
        graph.replay()
        launched = last(graph)
    cuda.destroyed.add(EXTERNAL)  # type: ignore[attr-defined]
    with cuda.stream(A):
        graph.replay()
        assert cuda.waits_for(launched)
        launched = last(graph)
    cuda.destroyed.clear()  # type: ignore[attr-defined]
    cuda.clocks[EXTERNAL].clear()  # a new stream at the old address
    with cuda.stream(EXTERNAL):
        graph.wait()
        assert cuda.waits_for(launched)
        graph.replay()
        launched = last(graph)
    cuda.clocks[EXTERNAL].clear()
    with cuda.stream(EXTERNAL):
        assert not cuda.waits_for(launched)
        graph.replay()
        assert cuda.waits_for(launched), "the same handle is no reason not to wait"


@without_cuda
def test_the_stream_that_counts_is_that_of_the_graphs_device(cuda: FakeCuda) -> None:
    graph = cuda_graph(cuda, device=1)
    cuda.devices |= {A: 1, B: 1}
    with cuda.stream(A, device=1), cuda.device(0):
        graph.replay()
    launched = last(graph)
    with cuda.stream(B, device=1), cuda.device(0):
        graph.replay()
        assert cuda.waits_for(launched, device=1)
    assert not cuda.waits_for(launched), "device 0 has not waited"
    elsewhere = cuda_graph(cuda, device=0)
    elsewhere.replay()
    assert not cuda.waits_for(launched), "nor does a graph of device 0"


@without_cuda
@pytest.mark.parametrize("all_of_the_pool", [False, True])
def test_a_graph_that_is_gone_still_counts(cuda: FakeCuda, all_of_the_pool: bool) -> None:
    graph = cuda_graph(cuda)
    other = None if all_of_the_pool else cuda_graph(cuda)
    with cuda.stream(A):
        graph.replay()
    launched = last(graph)
    del graph
    gc.collect()
    with cuda.stream(B):
        (other or cuda_graph(cuda)).replay()
        assert cuda.waits_for(launched)


@without_cuda
def test_an_order_nests_and_survives_errors(cuda: FakeCuda) -> None:
    graph = cuda_graph(cuda)
    with cuda.stream(A), graph.order:
        graph.replay()
        graph.replay()
    assert [line.partition(" ")[0] for line in cuda.log if line.startswith(("record", "wait"))] == ["record"]

    def fail() -> None:
        raise ZeroDivisionError

    cast("FakeExecutable", graph.cuda_graph).before = fail
    with cuda.stream(B), pytest.raises(ZeroDivisionError):
        graph.replay()
    cast("FakeExecutable", graph.cuda_graph).before = lambda: None
    launched = last(graph)
    on_another_thread(lambda: on_stream(cuda, C, graph.replay))
    assert behind(cuda, launched, C)


@without_cuda
def test_no_replay_inside_a_capture(cuda: FakeCuda) -> None:
    graph = cuda_graph(cuda)
    with cuda.stream(A):
        graph.replay()
        cuda.log.clear()
        cuda.capturing.add(A)  # type: ignore[attr-defined]
        for use in (graph.replay, graph.wait):
            with pytest.raises(CaptureError, match=r"(?s)inside a capture.*remedy:"):
                use()
        assert cuda.log == []
    assert len(cast("FakeExecutable", graph.cuda_graph).launched) == 1
    with cuda.stream(B), pytest.raises(CaptureError, match=f"capture on the stream with handle {A:#x}"):
        graph.replay()
    cuda.capturing.clear()  # type: ignore[attr-defined]
    on_another_thread(lambda: on_stream(cuda, B, graph.replay))
    assert behind(cuda, cast("FakeExecutable", graph.cuda_graph).launched[0], B)


@without_cuda
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "twin"])
def test_threads_replay_one_after_the_other(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    pool = [cuda_graph(cuda), cuda_graph(cuda), cuda_graph(cuda, OTHER_POOL)]
    if not ordered:
        disorder(monkeypatch)
    launched: list[Work] = []
    unordered: list[Work] = []

    def check(graph: CudaGraph) -> Callable[[], None]:
        def before() -> None:
            unordered.extend(work for work in launched if not cuda.waits_for(work))
            launched.append(cuda.work())

        return before

    for graph in pool:
        cast("FakeExecutable", graph.cuda_graph).before = check(graph)

    def run(stream: int) -> None:
        with cuda.stream(stream):
            for turn in range(20):
                pool[turn % 3].replay()

    together([lambda stream=stream: run(stream) for stream in (A, B, C, EXTERNAL)])
    assert len(launched) == 80
    assert bool(unordered) != ordered


# --- compiled models --------------------------------------------------------------------------------------------------


class FakeCalls:
    """`Calls` whose copies are work on the current stream."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake = fake
        self.entered: list[Work] = []
        self.left: list[Work] = []
        self.unordered: list[Work] = []

    def enter(self, args: Any, kwargs: Any) -> list[Any]:
        self.unordered.extend(work for work in self.left if not self.fake.waits_for(work))
        self.entered.append(self.fake.work())
        return []

    def leave(self, given: Any) -> None:
        self.left.append(self.fake.work())


@without_cuda
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "twin"])
def test_a_call_copies_in_behind_the_last_copy_out(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, ordered: bool
) -> None:
    calls = FakeCalls(cuda)
    model = CompiledModel(cuda_graph(cuda), (), None, cast("Any", calls), Choice(Plan(), "rules"))
    if not ordered:
        disorder(monkeypatch)
    for stream in (A, B, A, EXTERNAL, B, EXTERNAL, C):
        with cuda.stream(stream):
            model()
    together([lambda stream=stream: on_stream(cuda, stream, model) for stream in (A, B, C, EXTERNAL) * 5])
    assert len(calls.left) == 27
    assert bool(calls.unordered) != ordered
    with cuda.stream(A):
        model()
    with cuda.stream(C):
        model.wait()
        assert cuda.waits_for(last(cast("CudaGraph", model.graph))) == ordered


# --- the simulated machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "twin"])
def test_simulated_replays_exclude_each_other(monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    x = torch.zeros(4)
    replayed = []
    for _ in range(2):
        with auxstream.graph(device="cpu") as g:
            x.add_(1)
        replayed.append(g)
    if not ordered:
        monkeypatch.setattr(graphs, "_one_processor", nullcontext())
    inside: list[int] = []
    most: list[int] = []
    both_inside = threading.Event()
    run = Simulation.run

    def counted(self: Simulation, order: Any) -> None:
        inside.append(1)
        most.append(len(inside))
        if len(inside) == 2:
            both_inside.set()
        both_inside.wait(timeout=0.2 if ordered else 30)
        run(self, order)
        inside.pop()

    monkeypatch.setattr(Simulation, "run", counted)
    together([g.replay for g in replayed])
    assert max(most) == (1 if ordered else 2)
    if ordered:
        assert x.tolist() == [2.0] * 4


def test_a_model_called_from_two_threads() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x.mul_(3)

    model = Counting()
    fast = auxstream.compile(model, (torch.ones(16),))
    results: dict[int, list[Tensor]] = {1: [], 2: []}

    def run(thread: int) -> None:
        for turn in range(25):
            x = torch.full((16,), float(thread * 100 + turn))
            fast(x)
            results[thread].append(x)

    together([lambda: run(1), lambda: run(2)])
    for thread, written in results.items():
        assert [x.unique().tolist() for x in written] == [[3.0 * (thread * 100 + turn)] for turn in range(25)]
    assert model.calls.tolist() == [50.0]
    fast.wait()


def test_an_unfinished_graph_has_no_order() -> None:
    with auxstream.graph("half", device="cpu") as g, pytest.raises(CaptureError, match="'half'"):
        g.wait()
    g.wait()


# --- the watch, over tensors and streams that are numbers -------------------------------------------------------------


class Streams:
    """A watch over CPU tensors, whose current stream is what the test says."""

    def __init__(self) -> None:
        self.current = A
        self.capturing: set[int] = set()
        self.watch = Watch(Timeline(), "cpu", lambda device: self.current, lambda stream: stream in self.capturing)

    def handed(self, source: int, target: int) -> None:
        self.watch.record(1, source)
        self.watch.wait(1, target)


def graph_over(reads: tuple[Tensor, ...], writes: tuple[Tensor, ...], name: str = "step") -> CapturedGraph:
    """A graph that touches these tensors, whole."""
    tensors = (*reads, *writes)
    buffers = tuple(
        Buffer(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes(), None, "") for tensor in tensors
    )
    touches = tuple((span(i, 0, buffer.nbytes), i >= len(reads)) for i, buffer in enumerate(buffers))
    graph = CapturedGraph(name)
    graph.attach_evidence(Evidence((Node("kernel", "caller", touches=touches),), (), buffers, (), ()))
    return graph


@pytest.fixture
def x() -> Tensor:
    return torch.ones(2, 32)


@pytest.fixture
def out() -> Tensor:
    return torch.zeros(2, 32)


@cache
def copied_like() -> Any:
    return torch.library.custom_op(
        "test_launches::copied_like", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor"
    )


OPS: dict[str, tuple[Callable[[Tensor, Tensor], Any], bool]] = {
    "reads of the input": (lambda x, out: x + 1, False),
    "a view of the output": (lambda x, out: out.t()[1:].reshape(-1, 2).detach(), False),
    "metadata": (lambda x, out: (out.shape, out.data_ptr(), torch.empty_like(out)), False),
    "work elsewhere": (lambda x, out: torch.ones(3).mul_(2), False),
    "a read of the output": (lambda x, out: out + 1, True),
    "a read of one of its rows": (lambda x, out: out[1].sum(), True),
    "a read in a list": (lambda x, out: torch.cat([torch.ones(2, 32), out]), True),
    "a read by keyword": (lambda x, out: torch.add(torch.ones(2, 32), other=out), True),
    "a write to the input": (lambda x, out: x.copy_(torch.ones(2, 32)), True),
    "a write to a view of it": (lambda x, out: x[:, 3].zero_(), True),
    "a custom op that is named like another": (lambda x, out: copied_like()(out), True),
    "a write by out=": (lambda x, out: torch.add(torch.ones(2, 32), 1, out=x), True),
    "batch-norm statistics": (
        lambda x, out: nn.functional.batch_norm(torch.ones(2, 32), x[0], torch.ones(32), training=True),
        True,
    ),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("what", OPS)
def test_ops_beside_a_replay(x: Tensor, out: Tensor, what: str, inference: bool) -> None:
    op, races = OPS[what]
    streams, graph = Streams(), graph_over((x,), (out,))
    with torch.inference_mode(inference), streams.watch:
        streams.watch.launch(graph, A)
        op(x, out)
        streams.current = B
        if not races:
            op(x, out)
            return
        with pytest.raises(ReplayRaceError) as caught:
            op(x, out)
        streams.handed(A, B)
        op(x, out)
        with pytest.raises(ReplayRaceError):
            streams.watch.launch(graph, A)
        streams.handed(B, A)
        streams.watch.launch(graph, A)
    text = str(caught.value)
    assert isinstance(caught.value, RaceError)
    assert f"on the stream with handle {B:#x}" in text
    assert f"a replay of 'step' on the stream with handle {A:#x}" in text
    assert f"no wait of the stream with handle {B:#x} for the stream with handle {A:#x}" in text
    assert "wait() of 'step'" in text
    assert text.count("test_launches.py:") == 2, "a line for each side"
    assert caught.value.report.second.stream == B


def test_a_replay_after_an_unordered_write(x: Tensor, out: Tensor) -> None:
    streams, graph = Streams(), graph_over((x,), (out,))
    streams.watch.add(graph)
    with streams.watch:
        x.add_(1)
        with pytest.raises(ReplayRaceError, match=r"(?s)a replay of 'step' .* and `add_\.Tensor` .* first: .*x\.add_"):
            streams.watch.launch(graph, B)
        streams.watch.host_waits(stream=A)
        streams.watch.launch(graph, B)


def test_two_graphs_unordered(x: Tensor, out: Tensor) -> None:
    streams, one, two = Streams(), graph_over((x,), (out,), "one"), graph_over((), (out,), "two")
    streams.watch.launch(one, A)
    with pytest.raises(ReplayRaceError, match=r"(?s)a replay of 'two' .* and a replay of 'one' .*256 bytes"):
        streams.watch.launch(two, B)
    streams.watch.launch(two, A)


def test_what_is_captured_runs_at_no_time_yet(x: Tensor, out: Tensor) -> None:
    streams, graph = Streams(), graph_over((x,), (out,))
    with streams.watch:
        streams.watch.launch(graph, A)
        streams.current = B
        streams.capturing.add(B)
        x.add_(1)
        streams.handed(A, B)
        streams.capturing.clear()
        with pytest.raises(ReplayRaceError):
            x.add_(1)


def test_memory_of_a_graph_that_is_gone(x: Tensor, out: Tensor) -> None:
    streams, graph = Streams(), graph_over((x,), (out,))
    with streams.watch:
        streams.watch.launch(graph, A)
        del graph
        gc.collect()
        streams.current = B
        x.add_(1)


def test_one_watch_at_a_time() -> None:
    with watch(), pytest.raises(CaptureError, match="a watch begins while another is under way"), watch():
        pytest.fail("the block must not run")
    with watch():
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="the simulated machine's watch")
def test_the_simulated_machine_under_a_watch() -> None:
    x = torch.ones(8)
    with watch(), auxstream.graph(device="cpu") as g:
        with auxstream.aux_region("aux", x) as region:
            y = region.returns(x * 2)
        region.join()
    fast = auxstream.compile(nn.Linear(8, 8), (x,))
    with watch(g, fast):
        g.replay()
        x.add_(1)
        g.replay()
        assert y.tolist() == [4.0] * 8
        assert fast(x).shape == (8,)
        assert auxstream.compile(nn.Linear(8, 8), (x,))(x).shape == (8,)


# --- the watch, over torch's events, regions and replays of the fake CUDA ---------------------------------------------


@contextmanager
def watched(cuda: FakeCuda, patch: pytest.MonkeyPatch) -> Iterator[tuple[CudaGraph, CudaTensor, CudaTensor]]:
    """A watch, a graph on its guard, and the input and the output of the graph."""
    given, output = cuda.tensor(), cuda.tensor()
    places = {id(given): 0x10000, id(output): 0x20000}
    patch.setattr(launches_module, "_spans", lambda t: ((places[id(t)], places[id(t)] + 8),) if id(t) in places else ())
    buffers = (Buffer(0x10000, 8, None, ""), Buffer(0x20000, 8, 1, ""))
    node = Node("kernel", "caller", touches=((span(0, 0, 8), False), (span(1, 0, 8), True)))
    graph = cuda_graph(cuda, name="step", touches=Evidence((node,), (), buffers, (), ()))
    with watch(graph):
        yield graph, given, output


@without_cuda
def test_replays_that_order_themselves_are_clean(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(cuda, monkeypatch) as (graph, given, output):
        with cuda.stream(A):
            torch.add(given, 1, out=given)
            graph.replay()
            output + 1
        with cuda.stream(B):
            graph.replay()
            output + 1
            torch.add(given, 1, out=given)
        with cuda.stream(A):
            graph.wait()
            output + 1
            torch.add(given, 1, out=given)
        graph.replay()
        output + 1


@without_cuda
def test_the_watch_sees_what_the_order_does_not_cover(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(cuda, monkeypatch) as (graph, given, output):
        with cuda.stream(A):
            graph.replay()
        with cuda.stream(B):
            with pytest.raises(ReplayRaceError, match="no wait of"):
                output + 1
            with pytest.raises(ReplayRaceError, match="no wait of"):
                torch.add(given, 1, out=given)
            event = torch.cuda.Event()
            with cuda.stream(A):
                event.record(torch.cuda.current_stream(0))
            event.wait(torch.cuda.current_stream(0))
            torch.add(given, 1, out=given)
        launches = len(cast("FakeExecutable", graph.cuda_graph).launched)
        with cuda.stream(C), pytest.raises(ReplayRaceError, match="a replay of 'step'"):
            graph.replay()
        assert len(cast("FakeExecutable", graph.cuda_graph).launched) == launches, "refused before the launch"
        with cuda.stream(B):
            graph.replay()


@without_cuda
def test_without_the_order_the_watch_refuses(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    disorder(monkeypatch)
    with watched(cuda, monkeypatch) as (graph, _, output):
        with cuda.stream(A):
            graph.replay()
            output + 1
        with cuda.stream(B), pytest.raises(ReplayRaceError):
            graph.replay()


@without_cuda
@pytest.mark.parametrize("joined", [True, False])
def test_regions_order_too(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, joined: bool) -> None:
    with watched(cuda, monkeypatch) as (graph, _, output), cuda.stream(A):
        graph.replay()
        with auxstream.aux_region("reader", output) as region:
            output + 1
        if joined:
            region.join()
            graph.replay()
        else:
            with pytest.raises(ReplayRaceError):
                graph.replay()
            region.join()


@without_cuda
def test_a_watch_leaves_nothing_behind(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    from auxstream.runtime import cuda as machine
    from auxstream.runtime import quick

    lists = [registry.callback_list for registry in vars(trace).values() if hasattr(registry, "callback_list")]
    lists += [graphs.OBSERVERS, graphs.LAUNCH_OBSERVERS]
    before = [list(callbacks) for callbacks in lists]
    calls = [(module.record_event, module.wait_event) for module in (machine, quick)]
    with pytest.raises(ZeroDivisionError), watched(cuda, monkeypatch):  # noqa: PT012
        assert [list(callbacks) for callbacks in lists] != before
        raise ZeroDivisionError
    assert [list(callbacks) for callbacks in lists] == before
    assert [(module.record_event, module.wait_event) for module in (machine, quick)] == calls


# --- threads ----------------------------------------------------------------------------------------------------------


def on_stream(cuda: FakeCuda, stream: int, run: Callable[[], Any]) -> None:
    cuda.thread.context = 0x9000
    with cuda.stream(stream):
        run()


def on_another_thread(run: Callable[[], Any]) -> None:
    together([run])


def together(runs: list[Callable[[], Any]]) -> None:
    """Run each on a thread of its own, all at once; the first error is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(runs))

    def body(run: Callable[[], Any]) -> None:
        try:
            start.wait(timeout=30)
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
