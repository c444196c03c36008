"""Regions on a GPU: eager, under auxstream.graph, under the user's own torch.cuda.graph. Delays force the orders."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import auxstream
from auxstream.capture.delays import delay
from auxstream.capture.graphs import graph
from auxstream.runtime.errors import CaptureError, HostReadError, RaceError, RegionError
from auxstream.runtime.regions import fork, open_region

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(120),
]

LONG = 300_000  # ns, far longer than the kernels here


class Work:
    """Two branches over one temporary, with a delay in each; `serial` is the reference."""

    def __init__(self) -> None:
        self.x = torch.randn(512, 512, device="cuda")
        self.w = torch.randn(512, 512, device="cuda") / 32
        self.ns = torch.zeros(2, dtype=torch.int64, device="cuda")
        delay(self.ns, 0)
        self.parallel()  # warm: kernels loaded, lanes made

    def serial(self) -> Tensor:
        h = self.x * 2
        return h @ self.w + (h + 1) @ self.w

    def parallel(self) -> Tensor:
        h = self.x * 2
        region = fork("branch", h)
        delay(self.ns, 0)
        y = h @ self.w
        with region:
            delay(self.ns, 1)
            z = region.returns((h + 1) @ self.w)
        region.join()
        return y + z

    def draw(self, turn: int) -> None:
        self.x.normal_()
        self.ns.copy_(torch.tensor([LONG * (turn % 2), LONG * ((turn + 1) % 2)]))


@pytest.fixture
def work() -> Work:
    return Work()


def check(work: Work, run: Callable[[], Tensor], turns: int = 20) -> None:
    for turn in range(turns):
        work.draw(turn)
        assert torch.equal(run(), work.serial()), turn


def test_eager(work: Work) -> None:
    check(work, work.parallel)


def test_captured_and_proved(work: Work) -> None:
    with graph() as g:
        out = work.parallel()
    assert g.report.ok
    assert g.regions == ("branch",)

    def replay() -> Tensor:
        g.replay()
        return out

    check(work, replay)


def test_under_the_users_own_capture_and_eager_after_it(work: Work) -> None:
    own = torch.cuda.CUDAGraph()
    with torch.cuda.graph(own):
        out = work.parallel()

    def replay() -> Tensor:
        own.replay()
        return out

    check(work, replay)
    check(work, work.parallel)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "twin"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_a_temporary_reused_while_a_lane_reads_it(work: Work, recorded: bool, captured: bool) -> None:
    reused: list[bool] = []

    def step() -> Tensor:
        h = work.x * 2
        address = h.data_ptr()
        region = open_region("late", recorded=(h,) if recorded else ())
        with region:
            delay(work.ns, 1)
            z = region.returns(h + 1)
        region.recorded = ()  # the region's own reference would hold the block
        del h
        filler = torch.full_like(work.x, 7.0)
        reused.append(filler.data_ptr() == address)
        region.join()
        return z

    work.ns.copy_(torch.tensor([0, LONG]))
    run = step
    if captured:
        with graph(verify="error" if recorded else "off") as g:
            out = step()

        def run() -> Tensor:
            g.replay()
            return out

    wrong = 0
    for _ in range(5):
        work.x.normal_()
        wrong += not torch.equal(run(), work.x * 2 + 1)
    assert all(reused) is not recorded
    assert wrong == (0 if recorded else 5)


def test_the_checker_names_the_reused_block(work: Work) -> None:
    with pytest.raises(RaceError) as caught, graph():  # noqa: PT012
        h = work.x * 2
        region = open_region("late", held=(h,))
        with region:
            z = region.returns(h + 1)
        region.held = ()
        del h
        torch.full_like(work.x, 7.0)
        region.join()
    assert any(race.reuse for race in caught.value.report.races)  # type: ignore[attr-defined]
    assert z is not None


def test_lanes_are_distinct_streams(work: Work) -> None:
    regions = [fork(f"r{index}", work.x) for index in range(40)]
    handles = {region.lane.handle for region in regions}
    assert len(handles) == 40
    assert torch.cuda.current_stream().cuda_stream not in handles
    for region in regions:
        with region:
            pass
        region.join()


@pytest.mark.parametrize("fault", ["open", "item", "host tensor", "own error"])
def test_a_failed_capture_leaves_nothing_behind(work: Work, fault: str) -> None:
    stream, rng = torch.cuda.current_stream(), torch.cuda.get_rng_state()
    expected = {"open": CaptureError, "item": HostReadError, "host tensor": CaptureError, "own error": KeyError}[fault]
    with pytest.raises(expected), graph():  # noqa: PT012
        h = work.x * 2 + torch.randn(512, device="cuda")
        region = fork("branch", h)
        with region:
            z = region.returns(h + 1)
            if fault == "item":
                z.sum().item()
            if fault == "host tensor":
                z + torch.ones(512)
            if fault == "own error":
                raise KeyError("mine")
        if fault != "open":
            region.join()
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(), rng)
    test_captured_and_proved(work)
    check(work, work.parallel, 4)


def test_an_exception_in_a_branch_restores_the_stream(work: Work) -> None:
    stream = torch.cuda.current_stream()
    with pytest.raises(KeyError), auxstream.aux_region("branch", work.x):
        raise KeyError("mine")
    assert torch.cuda.current_stream() == stream


def test_a_cpu_tensor_beside_a_gpu_one_is_refused(work: Work) -> None:
    with pytest.raises(RegionError, match="current device"):
        fork("mixed", work.x, torch.ones(3))


def test_regions_never_synchronise(work: Work) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        work.parallel()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_usual_region_takes_the_quick_form(work: Work) -> None:
    region = fork("usual", work.x)
    with region:
        z = region.returns(work.x + 1)
    region.join()
    assert type(region).__name__ == "QuickRegion"
    assert torch.equal(z, work.x + 1)


def test_inference_tensors(work: Work) -> None:
    with torch.inference_mode():
        check(work, work.parallel, 4)


def test_each_joining_stream_waits(work: Work) -> None:
    other = torch.cuda.Stream()
    work.ns.copy_(torch.tensor([0, LONG]))
    region = fork("slow", work.x)
    with region:
        delay(work.ns, 1)
        z = region.returns(work.x + 1)
    with torch.cuda.stream(other):
        region.join()
        there = z * 2
    region.join()
    here = z * 2
    torch.cuda.current_stream().wait_stream(other)
    assert torch.equal(there, (work.x + 1) * 2)
    assert torch.equal(here, there)


@pytest.mark.parametrize("steps", ["all", "enter", "join"])
def test_a_thread_s_first_use_of_cuda_is_a_region(work: Work, steps: str) -> None:
    x, results, errors = work.x, [], []
    region = fork("r", x) if steps != "all" else None
    if region is not None and steps == "join":
        with region:
            results.append(region.returns(x + 1))

    def first() -> None:
        nonlocal region
        try:
            if region is None:
                region = fork("r", x)
            if steps != "join":
                with region:
                    results.append(region.returns(x + 1))
            if steps != "enter":
                region.join()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    thread.join(60)
    assert not errors, errors
    assert region is not None
    region.join()
    assert torch.equal(results[0], x + 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("entered_there", [False, True])
def test_entered_and_joined_under_another_device(work: Work, entered_there: bool) -> None:
    far = torch.cuda.Stream(1)
    with torch.cuda.stream(far):
        torch.ones(1, device="cuda")
    work.ns.copy_(torch.tensor([0, LONG]))
    region = fork("slow", work.x)

    def branch() -> Tensor:
        with region:
            assert torch.cuda.current_device() == 0
            delay(work.ns, 1)
            return region.returns(work.x + 1)

    before = torch.cuda.current_stream(0)
    with torch.cuda.device(1):
        z = branch() if entered_there else None
        assert torch.cuda.current_device() == 1
        assert torch.cuda.current_stream(0) == before
    z = branch() if z is None else z
    with torch.cuda.device(1):
        region.join()
        moved = z.to("cuda:1")
    assert torch.equal(moved.cpu(), (work.x + 1).cpu())
    assert torch.equal(z, work.x + 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_forked_under_another_device(work: Work) -> None:
    with torch.cuda.device(1):
        x = torch.randn(512, device="cuda")
        region = fork("far", x)
        with region:
            z = region.returns(x + 1)
        region.join()
        assert torch.equal(z, x + 1)
        with pytest.raises(RegionError, match="current device"):
            fork("mixed", work.x)


def test_threads_beside_captures(work: Work) -> None:
    errors: list[BaseException] = []
    warm = threading.Barrier(4)  # a library handle made in mid-capture would invalidate it, whatever we do
    start = torch.randn(128, 128, device="cuda")

    def loop() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(50):
                    a = start + turn
                    region = fork("t", a)
                    y = a @ a
                    with region:
                        z = region.returns(a + 1)
                    region.join()
                    assert torch.equal(y + z, a @ a + (a + 1))
                    if turn == 0:
                        warm.wait(30)
        except BaseException as error:
            errors.append(error)

    torch.cuda.current_stream().synchronize()
    threads = [threading.Thread(target=loop) for _ in range(3)]
    for thread in threads:
        thread.start()
    warm.wait(30)
    for _ in range(3):
        with graph() as g:
            work.parallel()
        assert g.report.ok
    for thread in threads:
        thread.join()
    assert not errors, errors
