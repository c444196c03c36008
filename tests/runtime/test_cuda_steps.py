"""The CUDA machine's steps without a GPU, on a CUDA that only keeps order (fake_cuda.py)."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

import pytest
import torch
from cuda.bindings.driver import CUresult
from fake_cuda import FakeCuda, fake_cuda

import auxstream
from auxstream.runtime import regions
from auxstream.runtime.errors import AuxstreamWarning, CaptureError, RegionError, UndeclaredAccessError
from auxstream.runtime.lanes import LanePool
from auxstream.runtime.machine import INLINE, current_machine, thread_state
from auxstream.runtime.regions import Region, State, fork, open_region

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a CUDA of its own here: test_cuda.py")

INVALIDATED = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_cuda(monkeypatch) as fake:
        yield fake


@pytest.fixture(params=["quick", "general"])
def form(cuda: FakeCuda, request: pytest.FixtureRequest) -> str:
    """Both forms of a region's steps, with a caller and a lane already known."""
    warm(cuda, request.param)
    return request.param


def warm(cuda: FakeCuda, form: str) -> None:
    finish(fork("warm", cuda.tensor()))
    if form == "general":
        thread_state.quick_fork = None
    cuda.log.clear()


def finish(region: Region) -> None:
    with region:
        pass
    region.join()


def is_quick(region: Region) -> bool:
    return type(region).__name__ == "QuickRegion"


class Oops(Exception):
    """The user's own."""


# --- the quick form and the general one -------------------------------------------------------------------------------


def usual(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    with region:
        region.returns(cuda.tensor())
    region.join()
    region.join()


def no_read(cuda: FakeCuda) -> None:
    finish(fork("r"))


def several_reads_and_results(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor(), cuda.tensor(), cuda.tensor())
    with region:
        region.returns([cuda.tensor(), 3, {"k": cuda.tensor()}])
        region.returns(cuda.tensor())
    region.join()


def nested_reads(cuda: FakeCuda) -> None:
    finish(fork("r", cuda.tensor(), [cuda.tensor(), None, {"k": cuda.tensor()}]))


def writes_and_priority(cuda: FakeCuda) -> None:
    x = cuda.tensor()
    region = fork("r", cuda.tensor(), writes=x, priority=-1)
    with region:
        x.add_(1)
    region.join()


def nested_regions(cuda: FakeCuda) -> None:
    outer = fork("outer", cuda.tensor())
    with outer:
        inner = fork("inner", cuda.tensor())
        with inner:
            inner.returns(cuda.tensor())
        inner.join()
        outer.returns(cuda.tensor())
    outer.join()


def several_at_once(cuda: FakeCuda) -> None:
    opened = [fork(f"r{index}", cuda.tensor()) for index in range(3)]
    for region in opened:
        with region:
            region.returns(cuda.tensor())
    for region in reversed(opened):
        region.join()
    finish(fork("after", cuda.tensor()))


def a_result_on_the_cpu(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    with region:
        region.returns((cuda.tensor(), torch.ones(1), cuda.tensor()))
    region.join()


def joined_on_another_stream_first(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    with region:
        region.returns(cuda.tensor())
    with cuda.stream(0x77):
        region.join()
        region.join()
    region.join()


def entered_on_another_stream(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    with cuda.stream(0x77), region:
        pass
    region.join()


def entered_and_joined_under_another_device(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    with cuda.device(1):
        with region:
            region.returns(cuda.tensor())
        region.join()


def an_error_in_the_branch(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    with region:
        region.returns(cuda.tensor())
        raise Oops


def undeclared_write(cuda: FakeCuda) -> None:
    x = cuda.tensor()
    region = fork("r", x)
    with region:
        x.add_(1)
    region.join()


def undeclared_write_of_several(cuda: FakeCuda) -> None:
    x = cuda.tensor()
    region = fork("r", cuda.tensor(), x, cuda.tensor())
    with region:
        x.add_(1)
    region.join()


def inference_tensors(cuda: FakeCuda) -> None:
    with torch.inference_mode():
        x = cuda.tensor()
        for reads in ((x,), (x, x)):
            region = fork("r", *reads)
            with region:
                x.add_(1)
            region.join()


def an_inference_tensor_outside_of_its_mode(cuda: FakeCuda) -> None:
    with torch.inference_mode():
        x = cuda.tensor()
    finish(fork("r", x))


def an_inference_tensor_among_others(cuda: FakeCuda) -> None:
    with torch.inference_mode():
        x = cuda.tensor()
    y = cuda.tensor()
    region = fork("r", x, y)
    with region:
        y.add_(1)
    region.join()


def a_tensor_of_another_device(cuda: FakeCuda) -> None:
    fork("r", cuda.tensor(), cuda.tensor(1))


def a_tensor_of_the_cpu_beside_one_of_the_gpu(cuda: FakeCuda) -> None:
    fork("r", cuda.tensor(), torch.ones(1))


def no_tensor(cuda: FakeCuda) -> None:
    fork("r", cuda.tensor(), 3)


def not_nested(cuda: FakeCuda) -> None:
    outer, inner = fork("outer", cuda.tensor()), fork("inner", cuda.tensor())
    outer.__enter__()
    inner.__enter__()
    try:
        outer.__exit__(None, None, None)
    finally:
        with pytest.raises(RegionError, match="'inner' was left"):
            inner.__exit__(None, None, None)
        outer.join()
        inner.join()


def from_a_lane_that_was_kept(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    lane = region.lane
    finish(region)
    with cuda.stream(lane.handle):  # a free lane, and the caller
        for _ in range(2):
            region = fork("again", cuda.tensor())
            assert region.lane is not lane
            finish(region)


SCENARIOS: tuple[tuple[Callable[[FakeCuda], None], type[BaseException] | None], ...] = (
    (usual, None),
    (no_read, None),
    (several_reads_and_results, None),
    (nested_reads, None),
    (writes_and_priority, None),
    (nested_regions, None),
    (several_at_once, None),
    (a_result_on_the_cpu, None),
    (joined_on_another_stream_first, None),
    (entered_on_another_stream, None),
    (entered_and_joined_under_another_device, None),
    (an_error_in_the_branch, Oops),
    (undeclared_write, UndeclaredAccessError),
    (undeclared_write_of_several, UndeclaredAccessError),
    (inference_tensors, None),
    (an_inference_tensor_outside_of_its_mode, None),
    (an_inference_tensor_among_others, UndeclaredAccessError),
    (a_tensor_of_another_device, RegionError),
    (a_tensor_of_the_cpu_beside_one_of_the_gpu, RegionError),
    (no_tensor, RegionError),
    (not_nested, RegionError),
    (from_a_lane_that_was_kept, None),
)


FOUND_OUT_LATE = (
    nested_reads,
    a_result_on_the_cpu,
    a_tensor_of_another_device,
    a_tensor_of_the_cpu_beside_one_of_the_gpu,
    no_tensor,
)
"""The quick form has recorded some tensors, or waited, when it finds that the case is not usual, and the general form
starts again."""


@pytest.mark.parametrize(("scenario", "error"), SCENARIOS, ids=lambda value: getattr(value, "__name__", None))
def test_both_forms_make_the_same_calls(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[[FakeCuda], None], error: type[BaseException] | None
) -> None:
    seen: list[Any] = []
    for form in ("general", "quick"):
        with warnings.catch_warnings(), fake_cuda(monkeypatch) as cuda:
            warnings.simplefilter("error")
            warm(cuda, form)
            before = cuda.current()
            caught: BaseException | None = None
            try:
                scenario(cuda)
            except (AssertionError, KeyError):
                raise
            except Exception as refusal:
                caught = refusal
            assert type(caught) is (error or type(None)), caught
            if scenario is not not_nested:  # which leaves what cannot be put right
                assert cuda.current() == before
            free = {key: sorted(pool.free) for key, pool in current_machine()._pools.items()}  # type: ignore[attr-defined]
            for key, pool in current_machine()._pools.items():  # type: ignore[attr-defined]
                assert free[key] == list(range(len(pool.lanes))), "every lane was given back, once"
            seen.append((cuda.log, str(caught), free))
            del caught
    general, quick = seen
    assert quick[1:] == general[1:]
    if scenario in FOUND_OUT_LATE:
        extra = iter(quick[0])
        more = [call for wanted in general[0] for call in takewhile(lambda call, wanted=wanted: call != wanted, extra)]
        assert all(call.startswith(("record_stream", "wait")) for call in [*more, *extra])
    else:
        assert quick[0] == general[0]


@pytest.mark.usefixtures("form")
def test_the_usual_region_is_quick(form: str, cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    assert is_quick(region) == (form == "quick")
    finish(region)
    assert cuda.log == [
        f"record_stream {region.lane.handle:#x}",
        f"record {int(region.lane.forked):#x} on ('default', 0)",
        f"wait of {region.lane.handle} for {int(region.lane.forked):#x}",
        f"set_stream {region.lane.handle:#x} of cuda:0",
        f"record {int(region.lane.done):#x} on {region.lane.handle}",
        "set_stream 0x0 of cuda:0",
        f"wait of ('default', 0) for {int(region.lane.done):#x}",
    ]


STEPS = {
    "enter": lambda region: region.__enter__(),
    "return values": lambda region: region.returns(None),
    "leave": lambda region: region.__exit__(None, None, None),
    "join": lambda region: region.join(),
}
PATH = {
    State.FORKED: (),
    State.RUNNING: ("enter",),
    State.LEFT: ("enter", "leave"),
    State.JOINED: ("enter", "leave", "join"),
}
LEGAL = {
    (State.FORKED, "enter"): State.RUNNING,
    (State.RUNNING, "return values"): State.RUNNING,
    (State.RUNNING, "leave"): State.LEFT,
    (State.LEFT, "join"): State.JOINED,
    (State.JOINED, "join"): State.JOINED,
}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", State)
def test_every_transition(cuda: FakeCuda, state: State, step: str) -> None:
    region = fork("the one", cuda.tensor())
    for each in PATH[state]:
        STEPS[each](region)
    assert region.state is state
    after = LEGAL.get((state, step))
    log = list(cuda.log)
    if after is None:
        with pytest.raises(RegionError) as caught:
            STEPS[step](region)
        assert caught.value.came == state.value
        assert region.state is state
        assert cuda.log == log, "an illegal step does nothing"
    else:
        STEPS[step](region)
        assert region.state is after
    region.abandon()
    assert cuda.current() == (0, 0)


# --- the order of work ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("form")
def test_the_branch_waits_for_the_fork_and_the_caller_for_the_branch(cuda: FakeCuda) -> None:
    x = cuda.tensor()
    before = cuda.work()
    region = fork("r", x)
    beside = cuda.work()
    with region:
        assert cuda.waits_for(before)
        assert not cuda.waits_for(beside)
        inside = cuda.work()
    assert cuda.waits_for(beside)
    assert not cuda.waits_for(inside)
    with cuda.stream(0x77):
        region.join()
        assert cuda.waits_for(inside)
    assert not cuda.waits_for(inside)
    region.join()
    assert cuda.waits_for(inside)


@pytest.mark.usefixtures("form")
def test_a_late_join_waits_though_the_lane_serves_another_region(cuda: FakeCuda) -> None:
    first = fork("first", cuda.tensor())
    with first:
        inside = cuda.work()
    first.join()
    second = fork("second", cuda.tensor())
    assert second.lane is first.lane
    with cuda.stream(0x77):
        first.join()
        assert cuda.waits_for(inside)
    finish(second)


def test_an_edge_that_is_missing_shows(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    warm(cuda, "general")
    monkeypatch.setattr("auxstream.runtime.cuda.wait_event", lambda stream, event, flags: (0,))
    with pytest.raises(AssertionError):
        test_the_branch_waits_for_the_fork_and_the_caller_for_the_branch(cuda)
    gc.collect()


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("form")
def test_entered_under_another_device(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    with cuda.stream(0x77, device=1), cuda.stream(0x66, device=0):
        cuda.thread.device = 1
        with region:
            assert cuda.current() == (0, region.lane.handle), "as under torch.cuda.stream"
        assert cuda.current() == (1, 0x77), "the caller's device and its stream"
        assert cuda.get_stream(0)[0] == 0x66, "and the other device's"
        cuda.thread.device = 0
    region.join()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("stream", [0, 0x66])
def test_joined_under_another_device(cuda: FakeCuda, stream: int) -> None:
    """An op on the results runs on the current stream of their device, so that is what must wait."""
    region = fork("r", cuda.tensor())
    with region:
        inside = cuda.work()
    with cuda.stream(stream, device=0), cuda.device(1):
        region.join()
        assert cuda.waits_for(inside, device=0)
        assert cuda.current() == (1, 0)


@pytest.mark.usefixtures("form")
def test_forked_under_another_device(cuda: FakeCuda) -> None:
    with cuda.device(1):
        before = cuda.work()
        region = fork("r", cuda.tensor(1))
        with region:
            assert cuda.current() == (1, region.lane.handle)
            assert cuda.waits_for(before)
            inside = cuda.work()
        region.join()
        assert cuda.waits_for(inside)
        with pytest.raises(RegionError, match=r"(?s)cuda:1.*came: +cuda:0"):
            fork("r", cuda.tensor(0))


@pytest.mark.usefixtures("form")
def test_a_lane_is_made_on_its_pool_s_device(cuda: FakeCuda) -> None:
    lane = LanePool(1, 0).take(0)
    assert cuda.devices[lane.handle] == cuda.devices[int(lane.done)] == cuda.devices[int(lane.forked)] == 1


@pytest.mark.usefixtures("form")
def test_priorities_have_lanes_of_their_own(cuda: FakeCuda) -> None:
    opened = [fork("r", cuda.tensor(), priority=priority) for priority in (0, -1, 0, -1)]
    assert [region.lane.name for region in opened] == ["lane0", "lane0p-1", "lane1", "lane1p-1"]
    for region in opened:
        finish(region)


# --- what the driver refuses ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("step", ["fork", "enter", "leave", "join"])
def test_a_step_that_the_driver_refuses(cuda: FakeCuda, step: str) -> None:
    call = {"fork": "record", "enter": "wait", "leave": "record", "join": "wait"}[step]
    region: Region | None = None
    with pytest.raises(CaptureError, match=rf"(?s)CUDA refused while {step[:4]}.*'r'.*CAPTURE_INVALIDATED"):  # noqa: PT012
        for each in ("fork", *PATH[State.JOINED]):
            if each == step:
                cuda.failing[call] = INVALIDATED
            if each == "fork":
                region = fork("r", cuda.tensor())
            else:
                assert region is not None
                STEPS[each](region)
    cuda.failing.clear()
    assert cuda.current() == (0, 0)
    if region is not None:
        expected = {"enter": State.FORKED, "leave": State.LEFT, "join": State.LEFT}[step]
        assert region.state is expected
        region.abandon()
    assert free_lanes() == [0], "the lane was given back"


@pytest.mark.usefixtures("form")
def test_a_branch_s_error_goes_on_and_the_lane_comes_back(cuda: FakeCuda) -> None:
    with pytest.raises(Oops) as caught, fork("r", cuda.tensor()):  # noqa: PT012
        cuda.failing["record"] = cuda.failing["wait"] = INVALIDATED
        raise Oops
    assert "CAPTURE_INVALIDATED" in "".join(caught.value.__notes__)
    cuda.failing.clear()
    assert cuda.current() == (0, 0)
    assert free_lanes() == [0]


# --- lanes ------------------------------------------------------------------------------------------------------------


def free_lanes() -> list[int]:
    (pool,) = current_machine()._pools.values()  # type: ignore[attr-defined]
    return sorted(pool.free)


@pytest.mark.usefixtures("form")
def test_a_region_given_up_and_joined_gives_its_lane_back_once(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    region.abandon()
    region.join()
    assert free_lanes() == [0]


@pytest.mark.usefixtures("form")
def test_two_threads_that_join_at_once_give_the_lane_back_once(cuda: FakeCuda) -> None:
    region = fork("r", cuda.tensor())
    with region:
        pass
    meet = threading.Barrier(2)

    def both_inside(stream: Any, event: Any, flags: int) -> tuple[Any]:
        meet.wait(20)
        return cuda.wait_event(stream, event, flags)

    errors: list[BaseException] = []

    def join(handle: int) -> None:
        try:
            with cuda.stream(handle):
                region.join()
        except BaseException as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("cuda", "quick"):
            patch.setattr(f"auxstream.runtime.{module}.wait_event", both_inside)
        threads = [threading.Thread(target=join, args=(handle,)) for handle in (0x77, 0x88)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not errors, errors
    assert set(region.joined_by) == {0x77, 0x88}
    assert free_lanes() == [0]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("state", [State.FORKED, State.RUNNING, State.LEFT])
def test_a_dropped_region_warns_and_gives_its_lane_back(cuda: FakeCuda, state: State) -> None:
    region = fork("the one", cuda.tensor())
    for step in PATH[state]:
        STEPS[step](region)
    with pytest.warns(AuxstreamWarning, match=f"'the one' was dropped while {state.value}"):  # noqa: PT031
        del region
        gc.collect()
    assert free_lanes() == [0]


# --- threads ----------------------------------------------------------------------------------------------------------


def in_a_new_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("form")
def test_a_thread_s_first_use_of_cuda_is_a_region(cuda: FakeCuda) -> None:
    x = cuda.tensor()

    def first() -> None:
        for _ in range(2):
            region = fork("r", x)
            with region:
                inside = cuda.work()
            region.join()
            assert cuda.waits_for(inside)

    in_a_new_thread(first)
    in_a_new_thread(first)  # its ident may be the dead one's, and so may its lanes


@pytest.mark.usefixtures("form")
def test_entered_and_joined_on_threads_new_to_cuda(cuda: FakeCuda) -> None:
    before = cuda.work()
    region = fork("r", cuda.tensor())
    inside: list[Any] = []

    def enter() -> None:
        with region:
            assert cuda.waits_for(before)
            inside.append(cuda.work())
        assert cuda.current() == (0, 0)

    def join() -> None:
        region.join()
        assert cuda.waits_for(inside[0])

    in_a_new_thread(enter)
    in_a_new_thread(join)
    region.join()
    assert free_lanes() == [0]


# --- what does not go to the GPU --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("form")
def test_tensors_of_the_cpu_alone_run_inline(cuda: FakeCuda) -> None:
    x, y = torch.ones(2), torch.zeros(2)
    for region in (fork("r", x), fork("r", writes=y), fork("r", [x], writes=y), open_region("r", held=[x])):
        assert region.machine is INLINE
        finish(region)
    assert cuda.log == []


@pytest.mark.usefixtures("form")
def test_parallel_closes_what_it_forked_when_a_fork_is_refused(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = regions.fork, 0

    def second_refused(*args: Any, **kwargs: Any) -> Region:
        nonlocal made
        made += 1
        if made == 2:
            raise Oops
        return real(*args, **kwargs)

    monkeypatch.setattr(regions, "fork", second_refused)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(Oops):
            auxstream.parallel(lambda: 1, lambda: 2, lambda: 3, reads=cuda.tensor())
        gc.collect()
    assert not caught
    assert free_lanes() == [0]


def test_quick_regions_give_way_to_another_machine(cuda: FakeCuda) -> None:
    from auxstream.runtime.machine import using_machine

    warm(cuda, "quick")
    with using_machine(INLINE):
        region = fork("r", cuda.tensor())
        assert region.machine is INLINE
        finish(region)
    region = fork("r", cuda.tensor())
    assert is_quick(region)
    finish(region)
