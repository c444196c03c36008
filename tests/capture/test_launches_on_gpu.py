"""Replays from several streams and threads on a GPU: right with the order of replays, wrong in the twin without it.

Spins inside the graphs, or behind them, hold one stream while the other goes on. Each scene runs once without any spin
first: a kernel that is loaded while another runs may wait for it, and that would be an order of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture.compiler import CompiledModel
from auxstream.capture.delays import delay
from auxstream.capture.graphs import CapturedGraph
from auxstream.capture.launches import ReplayRaceError, watch
from auxstream.runtime import driver
from auxstream.runtime.errors import CaptureError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(120),
]

SPIN = 30_000_000  # ns: the host enqueues all of a scene meanwhile
ordered_or_not = pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "twin"])
Scene = Callable[[], tuple[Tensor, Tensor]]


def disorder(patch: pytest.MonkeyPatch) -> None:
    """The twin: replays follow nobody, and nobody waits for them."""
    from auxstream.capture.replay_order import ReplayOrder

    def follow(self: Any, ids: Any) -> None:
        self._device.stream = torch.cuda.current_stream(self._device.index)

    patch.setattr(ReplayOrder, "_follow", follow)
    patch.setattr(ReplayOrder, "wait", lambda self: None)


class Lab:
    """Two streams, an input of ones, and a spin of a length that lies in device memory."""

    def __init__(self) -> None:
        self.one, self.two = torch.cuda.Stream(), torch.cuda.Stream()
        self.x = torch.ones(1024, device="cuda")
        self.ns = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.pool = torch.cuda.graph_pool_handle()
        delay(self.ns, 0)

    def capture(self, name: str, work: Callable[[], Tensor]) -> tuple[CapturedGraph, Tensor]:
        with auxstream.graph(name, verify="off", pool=self.pool) as g:
            out = work()
        return g, out

    def play(self, scene: Scene) -> tuple[list[float], list[float]]:
        """The distinct values of what a scene returns, with the spin; the input is ones again at its start."""
        for nanoseconds in (0, SPIN):
            self.x.fill_(1)
            self.ns.fill_(nanoseconds)
            torch.cuda.synchronize()
            first, second = scene()
            torch.cuda.synchronize()
        return first.unique().tolist(), second.unique().tolist()


@pytest.fixture
def lab() -> Lab:
    return Lab()


# --- right, or wrong without the order --------------------------------------------------------------------------------


@ordered_or_not
def test_an_input_rewritten_during_a_replay(lab: Lab, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    def work() -> Tensor:
        delay(lab.ns, 0)
        return lab.x * 2

    g, out = lab.capture("late reader", work)
    if not ordered:
        disorder(monkeypatch)

    def scene() -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(lab.one):
            g.replay()
            first = out.clone()
        with torch.cuda.stream(lab.two):
            g.wait()
            lab.x.fill_(5)
            g.replay()
            return first, out.clone()

    first, second = lab.play(scene)
    assert second == [10.0]
    assert (first == [2.0]) == ordered


@ordered_or_not
def test_an_output_read_during_the_next_replay(lab: Lab, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    g, out = lab.capture("count", lambda: lab.x.add_(1) * 1)
    if not ordered:
        disorder(monkeypatch)

    def scene() -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(lab.one):
            g.replay()
            delay(lab.ns, 0)
            first = out.clone()
        with torch.cuda.stream(lab.two):
            g.replay()
            return first, out.clone()

    first, second = lab.play(scene)
    assert second == [3.0]
    assert (first == [2.0]) == ordered


@ordered_or_not
def test_two_graphs_in_one_pool(lab: Lab, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    def slow() -> Tensor:
        doubled = lab.x * 2
        delay(lab.ns, 0)
        return doubled + 1

    def quick() -> Tensor:
        negative = -lab.x
        return negative + 1

    a, out_a = lab.capture("slow", slow)
    b, out_b = lab.capture("quick", quick)
    blocks = [{buffer.label: buffer.address for buffer in g.program.buffers} for g in (a, b)]
    assert blocks[0]["mul.Tensor"] == blocks[1]["neg.default"], "they share no block, so this would show nothing"
    if not ordered:
        disorder(monkeypatch)

    def scene() -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(lab.one):
            a.replay()
            first = out_a.clone()
        with torch.cuda.stream(lab.two):
            b.replay()
            return first, out_b.clone()

    first, second = lab.play(scene)
    assert second == [0.0]
    assert (first == [3.0]) == ordered


class Slow(nn.Module):
    """Spins, and then reads its input and writes it."""

    def __init__(self, ns: Tensor) -> None:
        super().__init__()
        self.register_buffer("ns", ns)

    def forward(self, x: Tensor) -> Tensor:
        delay(self.ns, 0)
        x.mul_(2)
        return x + 1


def compiled(lab: Lab) -> CompiledModel:
    options = auxstream.Options(mlir_elementwise_fusion=False, verify="off")
    model = auxstream.compile(Slow(lab.ns), (torch.ones(1024, device="cuda"),), options)
    names = [step.name for step in model.graph.program.steps if hasattr(step, "func")]
    assert "delay" in names[0], "the spin must come before the read"
    return model


@ordered_or_not
def test_a_model_called_from_two_streams(lab: Lab, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    model = compiled(lab)
    if not ordered:
        disorder(monkeypatch)

    def scene() -> tuple[Tensor, Tensor]:
        inputs = [torch.full((1024,), float(value), device="cuda") for value in (1, 2, 3, 4)]
        outputs: list[Tensor] = []
        torch.cuda.synchronize()
        for turn, x in enumerate(inputs):
            with torch.cuda.stream((lab.one, lab.two)[turn % 2]):
                outputs.append(model(x).clone())
        torch.cuda.synchronize()
        return torch.stack(outputs)[:, 0], torch.stack(inputs)[:, 0]

    right = ([3.0, 5.0, 7.0, 9.0], [2.0, 4.0, 6.0, 8.0])
    assert (lab.play(scene) == right) == ordered


@ordered_or_not
def test_a_model_called_from_two_threads(lab: Lab, monkeypatch: pytest.MonkeyPatch, ordered: bool) -> None:
    """Each thread looks only at its own input, which a call copies back to: outputs need a lock of the callers' own."""
    model = compiled(lab)
    lab.ns.fill_(2_000_000)
    turns = 10
    inputs = [[torch.full((1024,), float(100 * t + turn), device="cuda") for turn in range(turns)] for t in (1, 2)]
    expected = [[[2.0 * x[0].item()] for x in mine] for mine in inputs]
    errors: list[BaseException] = []
    start = threading.Barrier(2)
    if not ordered:
        disorder(monkeypatch)
    torch.cuda.synchronize()

    def run(mine: list[Tensor], stream: torch.cuda.Stream) -> None:
        try:
            with torch.cuda.stream(stream):
                start.wait(timeout=30)
                for x in mine:
                    model(x)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, (lab.one, lab.two), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    torch.cuda.synchronize()
    assert not errors
    assert ([[x.unique().tolist() for x in mine] for mine in inputs] == expected) == ordered


# --- refusals, and streams that go ------------------------------------------------------------------------------------


def test_no_replay_inside_a_capture(lab: Lab) -> None:
    g, out = lab.capture("inner", lambda: lab.x * 2)
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        for use in (g.replay, g.wait):
            with pytest.raises(CaptureError, match="inside a capture"):
                use()
        plus = lab.x + 1
    with auxstream.graph("outer") as own:
        with pytest.raises(CaptureError, match="inside a capture"):
            g.replay()
        minus = lab.x - 1
    lab.x.fill_(4)
    for replay in (g.replay, outer.replay, own.replay):
        replay()
    assert [t[0].item() for t in (out, plus, minus)] == [8.0, 5.0, 3.0]


def test_no_replay_while_a_stream_that_replayed_is_capturing(lab: Lab) -> None:
    g, out = lab.capture("inner", lambda: lab.x * 2)
    with torch.cuda.stream(lab.one):
        g.replay()
    torch.cuda.synchronize()
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer, stream=lab.one):
        plus = lab.x + 1
        with torch.cuda.stream(lab.two), pytest.raises(CaptureError, match="another stream that may use its memory"):
            g.replay()
    lab.x.fill_(4)
    torch.cuda.synchronize()
    with torch.cuda.stream(lab.two):
        g.replay()
        outer.replay()
    torch.cuda.synchronize()
    assert (out[0].item(), plus[0].item()) == (8.0, 5.0)


def test_a_stream_that_is_destroyed(lab: Lab) -> None:
    def work() -> Tensor:
        delay(lab.ns, 0)
        return lab.x.add_(1) * 1

    g, out = lab.capture("count", work)
    lab.ns.fill_(SPIN // 10)
    torch.cuda.synchronize()
    for turn in range(5):
        raw = driver.make_stream(0)
        with torch.cuda.stream(torch.cuda.ExternalStream(int(raw))):
            g.replay()
        driver.call(driver.cuda.cuStreamDestroy(raw), "destroying a stream")
        with torch.cuda.stream((lab.one, lab.two)[turn % 2]):
            g.replay()
    torch.cuda.synchronize()
    assert out.unique().tolist() == [11.0]


def test_how_stream_ids_tell_torchs_own(lab: Lab) -> None:
    """What capture/replay_order.py reads off an id."""
    from auxstream.capture.replay_order import _lasts

    def ids(stream: torch.cuda.Stream) -> tuple[int, int, int]:
        return stream.stream_id, stream.device_index, stream.device_type

    raw = driver.make_stream(0)
    assert _lasts(ids(torch.cuda.default_stream()))
    assert _lasts(ids(torch.cuda.Stream()))
    assert _lasts(ids(torch.cuda.Stream(priority=-1)))
    assert not _lasts(ids(torch.cuda.ExternalStream(int(raw))))
    driver.call(driver.cuda.cuStreamDestroy(raw), "destroying a stream")


# --- the watch --------------------------------------------------------------------------------------------------------

HANDOFFS: dict[str, Callable[[Lab, CapturedGraph, Tensor], object]] = {
    "wait": lambda lab, g, out: on(lab.two, g.wait),
    "wait_stream": lambda lab, g, out: lab.two.wait_stream(lab.one),
    "an event": lambda lab, g, out: lab.two.wait_event(lab.one.record_event()),
    "a synchronized stream": lambda lab, g, out: lab.one.synchronize(),
    "a synchronized event": lambda lab, g, out: lab.one.record_event().synchronize(),
    "a synchronized device": lambda lab, g, out: torch.cuda.synchronize(),
    "a copy to the host": lambda lab, g, out: on(lab.one, out.cpu),
}


def on(stream: torch.cuda.Stream, run: Callable[[], object]) -> object:
    with torch.cuda.stream(stream):
        return run()


@pytest.mark.parametrize("handoff", HANDOFFS)
def test_a_watch_knows_who_waits(lab: Lab, handoff: str) -> None:
    g, out = lab.capture("step", lambda: lab.x * 2)
    torch.cuda.synchronize()
    with watch(g):
        on(lab.one, g.replay)
        with torch.cuda.stream(lab.two):
            for unordered in (lambda: out + 1, lambda: lab.x.fill_(3)):
                with pytest.raises(ReplayRaceError, match=r"(?s)a replay of 'step'.*test_launches_on_gpu\.py"):
                    unordered()
            _ = lab.x + 1  # reads beside reads
        HANDOFFS[handoff](lab, g, out)
        with torch.cuda.stream(lab.two):
            assert out.shape == (out + 1).shape
            lab.x.fill_(3)
            g.replay()
            last = out + 0
    torch.cuda.synchronize()
    assert last.unique().tolist() == [6.0]


def test_a_watch_over_a_writer_that_replays_do_not_know(lab: Lab) -> None:
    g, _ = lab.capture("step", lambda: lab.x * 2)
    torch.cuda.synchronize()
    with watch(g):
        on(lab.two, lambda: lab.x.fill_(3))
        with torch.cuda.stream(lab.one):
            with pytest.raises(ReplayRaceError, match="fill_"):
                g.replay()
            lab.one.wait_stream(lab.two)
            g.replay()


def test_clean_use_under_a_watch(lab: Lab) -> None:
    """Streams in turn, models, regions, captures: nothing that orders itself is refused."""
    model = compiled(lab)
    torch.cuda.synchronize()
    with watch(model):
        g, out = lab.capture("step", lambda: lab.x * 2)
        h, other = lab.capture("sharer", lambda: lab.x + 2)
        lab.one.wait_stream(torch.cuda.current_stream())
        for turn in range(6):
            with torch.cuda.stream((lab.one, lab.two)[turn % 2]):
                g.replay()
                with auxstream.aux_region("reader", out) as region:
                    read = region.returns(out + 1)
                region.join()
                h.replay()
                g.replay()
                assert read.shape == other.shape
                model(torch.ones(1024, device="cuda"))
                lab.x.add_(1)
    torch.cuda.synchronize()


def test_a_region_not_joined_under_a_watch(lab: Lab) -> None:
    g, out = lab.capture("step", lambda: lab.x * 2)
    with watch(g):
        g.replay()
        with auxstream.aux_region("reader", out) as region:
            region.returns(out + 1)
        with pytest.raises(ReplayRaceError, match="a replay of 'step'"):
            g.replay()
        region.join()
        g.replay()
    torch.cuda.synchronize()
