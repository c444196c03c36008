"""Regions without a GPU: on the inline machine (eager), and on the simulated machine (under `auxstream.graph`)."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import auxstream
from auxstream.runtime.errors import (
    AuxstreamError,
    AuxstreamWarning,
    CaptureError,
    RaceError,
    RegionError,
    UndeclaredAccessError,
)
from auxstream.runtime.machine import INLINE, InlineMachine, thread_state, using_machine
from auxstream.runtime.regions import Region, State, open_region

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors in eager: test_cuda.py has the GPU's")


@pytest.fixture(params=["inline", "simulated"])
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The body of the test runs eagerly, or inside a capture on the simulated machine."""
    with nullcontext() if request.param == "inline" else auxstream.graph(request.param, device="cpu"):
        yield request.param


# --- the state machine ------------------------------------------------------------------------------------------------

STEPS = {
    "enter": lambda region: region.__enter__(),
    "return values": lambda region: region.returns(torch.ones(1)),
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


def region_in(state: State) -> Region:
    region = auxstream.fork("the one", torch.ones(2))
    for step in PATH[state]:
        STEPS[step](region)
    assert region.state is state
    return region


def finish(region: Region) -> None:
    for state, step in ((State.FORKED, "enter"), (State.RUNNING, "leave"), (State.LEFT, "join")):
        if region.state is state:
            STEPS[step](region)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", State)
def test_every_transition(state: State, step: str) -> None:
    region = region_in(state)
    after = LEGAL.get((state, step))
    if after is not None:
        STEPS[step](region)
        assert region.state is after
    else:
        with pytest.raises(RegionError) as caught:
            STEPS[step](region)
        error = caught.value
        assert error.came == state.value
        assert error.expected
        assert error.remedy
        text = str(error)
        assert all(part in text for part in ("'the one'", "expected:", "came:", "remedy:", error.remedy))
        assert region.state is state, "an illegal step changes nothing"
    finish(region)


def test_a_table_entry_for_every_state_and_step() -> None:
    assert {state for state, _ in LEGAL} == set(State), "each state must have a way on, or be the end"


@pytest.mark.usefixtures("machine")
def test_joining_again_is_no_op() -> None:
    region = region_in(State.JOINED)
    for _ in range(3):
        region.join()
    assert region.state is State.JOINED


def test_joining_again_adds_no_wait() -> None:
    def waits(joins: int) -> int:
        with auxstream.graph(device="cpu") as g:
            region = region_in(State.LEFT)
            for _ in range(joins):
                region.join()
        return sum(type(step).__name__ == "Wait" for step in g.program.steps)

    assert waits(1) == waits(3) == 2  # the lane for the fork, the caller for the end


def test_each_joining_stream_waits_once() -> None:
    x = torch.ones(4)
    with auxstream.graph(device="cpu") as g:
        first = auxstream.fork("first", x)
        with first:
            y = first.returns(x + 1)
        with auxstream.aux_region("second", x) as second:
            first.join()
            z = second.returns(y * 2)
        first.join()
        second.join()
        out = y + z
    assert sum(type(step).__name__ == "Wait" for step in g.program.steps) == 5
    g.replay()
    assert torch.equal(out, torch.full((4,), 6.0))


@pytest.mark.usefixtures("machine")
def test_returns_gives_the_same_objects_back() -> None:
    x = torch.ones(2)
    tree = {"a": [x * 2, 3, None], "b": (x,)}
    with auxstream.aux_region("tree", x) as region:
        assert region.returns(tree) is tree
        assert region.returns(x) is x
        assert region.returns(7) == 7
    region.join()


# --- shapes of use ----------------------------------------------------------------------------------------------------


def two_levels(x: Tensor) -> Tensor:
    outer = auxstream.fork("outer", x)
    a = x * 2
    with outer:
        b = x + 1
        inner = auxstream.fork("inner", b)
        c = b * 3
        with inner:
            d = inner.returns(b - 5)
        inner.join()
        e = outer.returns(c * d)
    outer.join()
    return a + e


def several(x: Tensor) -> Tensor:
    regions = [auxstream.fork(f"r{i}", x) for i in range(4)]
    total = x * 10
    results = []
    for i, region in enumerate(regions):
        with region:
            results.append(region.returns((x + i) * (x - i)))
    for region in reversed(regions):
        region.join()
    for result in results:
        total = total + result
    return total


USES = {
    two_levels: lambda x: x * 2 + (x + 1) * 3 * (x + 1 - 5),
    several: lambda x: x * 10 + sum((x + i) * (x - i) for i in range(4)),
}


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_nested_and_several_at_once(use: Any) -> None:
    x = torch.arange(6.0)
    expected = USES[use](x)
    assert torch.equal(use(x), expected)
    with auxstream.graph(device="cpu") as g:
        out = use(x)
    for k in range(20):
        x.copy_(torch.arange(6.0) + k)
        g.replay()
        assert torch.equal(out, USES[use](x))
    lanes = {step.stream for step in g.program.steps}
    assert len(lanes) == {two_levels: 3, several: 5}[use], "one lane per open region, and the caller"


def test_lanes_are_reused_lowest_first() -> None:
    x = torch.ones(2)
    with auxstream.graph(device="cpu") as g:
        for _ in range(5):
            with auxstream.aux_region("again", x) as region:
                region.returns(x + 1)
            region.join()
    assert set(g.program.stream_names.values()) == {"caller", "lane0"}
    assert g.regions == ("again",) * 5


@pytest.mark.usefixtures("machine")
def test_regions_must_nest() -> None:
    x = torch.ones(2)
    outer, inner = auxstream.fork("outer", x), auxstream.fork("inner", x)
    outer.__enter__()
    inner.__enter__()
    if isinstance(outer.machine, InlineMachine):
        outer.__exit__(None, None, None)  # nothing switches streams: harmless
        inner.__exit__(None, None, None)
    else:
        with pytest.raises(RegionError, match=r"'outer' was left while another region was current"):
            outer.__exit__(None, None, None)
        with pytest.raises(RegionError, match=r"'inner' was left"):
            inner.__exit__(None, None, None)
    for region in (outer, inner):
        assert region.state is State.LEFT
        region.join()


def test_a_dropped_region_warns_and_a_joined_one_does_not() -> None:
    for state in State:
        region = region_in(state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del region
            gc.collect()
        if state is State.JOINED:
            assert not caught
        else:
            (warning,) = caught
            assert warning.category is AuxstreamWarning
            assert "'the one'" in str(warning.message)
            assert state.value in str(warning.message)


@pytest.mark.parametrize(
    ("reads", "where"),
    [((3,), "int 3"), ((torch.ones(1), "x"), "str 'x'"), (([torch.ones(1), {"k": 2.5}],), "[0][1]['k']")],
)
@pytest.mark.usefixtures("machine")
def test_reads_that_are_no_tensors(reads: tuple[Any, ...], where: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RegionError) as caught:
            auxstream.fork("odd", *reads)
    assert where in str(caught.value)
    assert "'odd'" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.usefixtures("machine")
def test_writes_that_are_no_tensors() -> None:
    with pytest.raises(RegionError, match=r"a write at .* is no tensor"):
        auxstream.fork("odd", torch.ones(1), writes=[3])


@pytest.mark.usefixtures("machine")
def test_none_and_nested_reads_are_taken() -> None:
    x = torch.ones(2)
    region = auxstream.fork("nested", {"a": [x, None]}, None, (x,))
    finish(region)


def test_a_tensor_of_another_device() -> None:
    with (
        auxstream.graph(device="cpu"),
        pytest.raises(RegionError, match=r"(?s)'far'.*came: +meta.*remedy"),
    ):
        auxstream.fork("far", torch.empty(2, device="meta"))


# --- exceptions -------------------------------------------------------------------------------------------------------


class Oops(Exception):
    """The user's own."""


def current_stream() -> int:
    return 0 if thread_state.machine is None else thread_state.machine.below.current_handle()


@pytest.mark.usefixtures("machine")
def test_an_exception_in_a_branch_is_the_users_own() -> None:
    x, oops = torch.ones(2), Oops("mine")
    outer = auxstream.fork("outer", x)
    inner = auxstream.fork("inner", x)
    with pytest.raises(Oops) as caught, outer, inner:  # noqa: PT012
        inner.returns(x + 1)
        raise oops
    assert caught.value is oops
    assert not hasattr(oops, "__notes__")
    assert oops.__context__ is None
    assert outer.state is inner.state is State.JOINED
    assert current_stream() == 0
    inner.join()  # a no-op
    after = auxstream.fork("after", x)
    finish(after)


class Refusing(InlineMachine):
    """A machine whose streams a failed call has broken, as in a capture that the user's error invalidated."""

    compares_versions = False  # or CPU tensors would go to the inline machine

    def leave(self, region: Region) -> None:
        raise CaptureError("the capture is invalid")


def test_a_failure_to_leave_does_not_hide_the_users_error() -> None:
    oops = Oops("first")
    with using_machine(Refusing()):
        with pytest.raises(Oops) as caught, auxstream.aux_region("a", torch.ones(1)) as region:
            raise oops
        assert caught.value is oops
        assert "the capture is invalid" in "".join(oops.__notes__)
        assert region.state is State.JOINED
        with pytest.raises(CaptureError, match="invalid"), auxstream.aux_region("b", torch.ones(1)) as region:
            pass
        finish(region)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("position", range(3))
def test_parallel_joins_all_when_one_raises(position: int, recwarn: pytest.WarningsRecorder) -> None:
    x, oops = torch.ones(2), Oops("mine")
    ran: list[int] = []

    def part(index: int) -> Any:
        def run() -> Tensor:
            ran.append(index)
            if index == position:
                raise oops
            return x * index

        return run

    with pytest.raises(Oops) as caught:
        auxstream.parallel(part(0), part(1), part(2), reads=x)
    assert caught.value is oops
    assert ran == list(range(position + 1))
    assert current_stream() == 0
    if thread_state.machine is not None:
        assert thread_state.machine.open_regions() == []
    del caught
    gc.collect()
    assert not [w for w in recwarn if issubclass(w.category, AuxstreamWarning)]


def test_parallel_returns_in_argument_order_and_names_its_regions() -> None:
    x = torch.arange(3.0)
    with auxstream.graph(device="cpu") as g:
        one = auxstream.parallel(lambda: x + 1, lambda: x + 2, reads=x, name="pair")
        three = auxstream.parallel(lambda: x, lambda: {"k": x * 2}, lambda: 7, reads=[x], name="trio")
    assert g.regions == ("pair", "trio.0", "trio.1")
    g.replay()
    assert torch.equal(one[0], x + 1)
    assert torch.equal(one[1], x + 2)
    assert three[0] is x
    assert torch.equal(three[1]["k"], x * 2)
    assert three[2] == 7


def test_parallel_eager_declares_writes_for_every_branch() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    results = auxstream.parallel(lambda: x * 2, lambda: y.add_(x), reads=x, writes=y)
    assert torch.equal(results[1], torch.ones(2))
    with pytest.raises(UndeclaredAccessError, match="'parallel'"):
        auxstream.parallel(lambda: x * 2, lambda: y.add_(x), reads=(x, y))


# --- declared and undeclared writes -----------------------------------------------------------------------------------


def branch_writes(target: Tensor, *reads: Tensor, writes: Any = ()) -> Region:
    region = auxstream.fork("writer", *reads, writes=writes)
    with region:
        target.add_(1)
    return region


def test_undeclared_write_by_the_branch_raises_at_the_join() -> None:
    x, other = torch.ones(4), torch.ones(4)
    region = branch_writes(x, other, x)
    with pytest.raises(UndeclaredAccessError) as caught:
        region.join()
    assert "'writer'" in str(caught.value)
    assert "#1" in str(caught.value)
    assert "writes=" in caught.value.remedy
    assert region.state is State.JOINED, "the stream has waited; only the rule was broken"
    region.join()


def test_undeclared_write_by_the_caller_raises_at_the_join() -> None:
    x = torch.ones(4)
    region = auxstream.fork("reader", x)
    x.mul_(2)
    with region:
        region.returns(x + 1)
    with pytest.raises(UndeclaredAccessError, match="#0"):
        region.join()


@pytest.mark.parametrize("declared", ["the tensor", "its base", "a view of it", "read too"])
def test_declared_writes_are_fine(declared: str) -> None:
    base = torch.ones(4, 4)
    x = base[1]
    writes = {"the tensor": x, "its base": base, "a view of it": x[:1], "read too": [{"t": x}]}[declared]
    branch_writes(x, *((x, base) if declared == "read too" else ()), writes=writes).join()
    assert torch.equal(base.sum(), torch.tensor(20.0))


def test_views_share_their_base_s_version() -> None:
    base = torch.ones(4, 4)
    region = branch_writes(base[2], base[1])
    with pytest.raises(UndeclaredAccessError):
        region.join()
    branch_writes(base[2], base[1], writes=base[2]).join()
    copy = base[1].clone()
    branch_writes(base[1], copy).join()


def test_inference_tensors_have_no_version_and_are_taken() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
    y = torch.ones(3)
    with auxstream.aux_region("inference", x, y) as region:
        z = region.returns(x + y)
    region.join()
    assert torch.equal(z, torch.full((3,), 2.0))
    region = branch_writes(y, x, y)  # one inference tensor does not switch the check off for the others
    with pytest.raises(UndeclaredAccessError, match="#1"):
        region.join()


def test_no_version_check_hides_an_exception() -> None:
    x = torch.ones(3)
    with pytest.raises(Oops), auxstream.aux_region("both", x):  # noqa: PT012
        x.add_(1)
        raise Oops


def test_under_a_capture_the_proof_judges_writes() -> None:
    def work(x: Tensor, buffer: Tensor, *, caller_too: bool) -> Tensor:
        region = auxstream.fork("writer", x, writes=buffer)
        y = x + buffer if caller_too else x + 1
        with region:
            buffer.mul_(2)
        region.join()
        return y

    x, buffer = torch.ones(2), torch.ones(2)
    with auxstream.graph(device="cpu") as g:
        work(x, buffer, caller_too=False)
    assert g.report.ok
    assert torch.equal(buffer, torch.ones(2)), "recording changes nothing"
    g.replay()
    assert torch.equal(buffer, torch.full((2,), 2.0))
    with pytest.raises(RaceError) as caught, auxstream.graph(device="cpu"):
        work(x, buffer, caller_too=True)
    report = caught.value.report
    assert {race.first.op for race in report.races} == {"add.Tensor"}
    assert {race.second.op for race in report.races} == {"mul_.Tensor"}


# --- threads ----------------------------------------------------------------------------------------------------------


def in_threads(count: int, work: Any) -> list[Any]:
    """Run work(index) in `count` threads that meet at a barrier first; results, or the first exception."""
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            barrier.wait(20)
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return results


def test_eager_regions_in_several_threads() -> None:
    def work(index: int) -> bool:
        x = torch.arange(64.0) + index
        return all(torch.equal(two_levels(x), USES[two_levels](x)) for _ in range(50))

    assert all(in_threads(4, work))


def test_captures_in_several_threads() -> None:
    meet = threading.Barrier(3)

    def work(index: int) -> tuple[bool, int]:
        x = torch.arange(8.0) + index
        with auxstream.graph(f"thread{index}", device="cpu") as g:
            meet.wait(20)
            out = (two_levels if index else several)(x)
            meet.wait(20)
        good = True
        for k in range(10):
            x.fill_(float(k + index))
            g.replay()
            good &= torch.equal(out, USES[two_levels if index else several](x))
        return good, len({step.stream for step in g.program.steps})

    assert in_threads(3, work) == [(True, 5), (True, 3), (True, 3)]


def test_a_capture_does_not_leak_into_other_threads() -> None:
    x = torch.ones(4)

    def elsewhere(_: int) -> tuple[Any, Any, list[float]]:
        with auxstream.aux_region("elsewhere", x) as region:
            y = region.returns(x + 1)
        region.join()
        return thread_state.machine, region.machine, y.tolist()

    with auxstream.graph(device="cpu") as g:
        before = len(thread_state.machine.recorder.steps)
        assert in_threads(2, elsewhere) == [(None, INLINE, [2.0] * 4)] * 2
        assert len(thread_state.machine.recorder.steps) == before
        x + 1
    assert g.regions == ()
    assert len(g.program.steps) == 1
    assert thread_state.machine is None


def test_using_machine_restores() -> None:
    with pytest.raises(Oops), using_machine(INLINE):  # noqa: PT012
        assert thread_state.machine is INLINE
        raise Oops
    assert thread_state.machine is None


# --- a capture that ends badly ----------------------------------------------------------------------------------------


def leaves_all_as_it_was(ends_badly: Any, *, error: type[BaseException], match: str) -> BaseException:
    """A capture that fails: the thread's machine, the RNG and outside tensors are as before, and a new one works."""
    x = torch.arange(4.0)
    torch.manual_seed(11)
    rng, before = torch.get_rng_state(), x.clone()
    with pytest.raises(error, match=match) as caught, auxstream.graph("bad", device="cpu") as g:  # noqa: PT012
        x.add_(torch.rand(4))
        ends_badly(x)
    assert thread_state.machine is None
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, before)
    with pytest.raises(CaptureError, match=r"graph 'bad': its capture has failed"):
        g.replay()
    with auxstream.graph("good", device="cpu") as g:
        out = several(x)
    g.replay()
    assert torch.equal(out, USES[several](x))
    return caught.value


@pytest.mark.parametrize("state", [State.FORKED, State.RUNNING, State.LEFT])
def test_a_region_open_at_the_end(state: State) -> None:
    kept: list[Region] = []

    def work(x: Tensor) -> None:
        kept.append(auxstream.fork("fine", x))
        finish(kept[-1])
        kept.append(region_in(state))

    error = leaves_all_as_it_was(work, error=CaptureError, match="'the one'")
    assert "'fine'" not in str(error)
    assert state.value in str(error)
    assert "join" in str(error)
    assert all(region.state is State.JOINED for region in kept)


def test_a_dropped_open_region_is_still_named() -> None:
    def work(x: Tensor) -> None:
        region_in(State.LEFT)

    leaves_all_as_it_was(work, error=CaptureError, match="'the one'")


@pytest.mark.parametrize("state", State)
def test_an_error_with_a_region_open(state: State) -> None:
    oops = Oops("mine")
    kept: list[Region] = []

    def work(x: Tensor) -> None:
        kept.append(region_in(state))
        raise oops

    assert leaves_all_as_it_was(work, error=Oops, match="mine") is oops
    assert kept[0].state is State.JOINED


def test_an_error_with_regions_wrongly_nested() -> None:
    def work(x: Tensor) -> None:
        outer, inner = auxstream.fork("outer", x), auxstream.fork("inner", x)
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AuxstreamWarning)
        leaves_all_as_it_was(work, error=RegionError, match="'outer' was left")


def test_a_failed_proof_leaves_all_as_it_was() -> None:
    def work(x: Tensor) -> None:
        with auxstream.aux_region("racy", x) as region:
            x.mul_(2)
        x.add_(1)
        region.join()

    leaves_all_as_it_was(work, error=RaceError, match="race on a shared tensor")


# --- the environment, in processes of their own -----------------------------------------------------------------------

SCRIPT = """
import torch, auxstream
from auxstream.runtime.machine import INLINE, current_machine
x = torch.arange(4.0)
def f():
    region = auxstream.fork("a", x)
    y = x * 2
    with region:
        z = region.returns(x + 1)
    region.join()
    return y + z
assert current_machine() is INLINE
assert torch.equal(f(), x * 3 + 1)
with auxstream.graph(device="cpu") as g:
    out = f()
x.mul_(5)
g.replay()
assert torch.equal(out, x * 3 + 1)
print(len({step.stream for step in g.program.steps}), len(g.program.steps), g.regions, g.report.ok)
"""


def run_script(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    import os

    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AUXSTREAM_")}
    return subprocess.run(
        [sys.executable, "-c", script], env={**inherited, **environ}, capture_output=True, text=True, timeout=120
    )


def test_kill_switch(capsys: pytest.CaptureFixture[str]) -> None:
    off = run_script(SCRIPT, AUXSTREAM_DISABLE="1")
    assert off.returncode == 0, off.stderr
    assert off.stdout == "1 3 ('a',) True\n", off.stderr  # one stream, no events
    exec(SCRIPT, {})
    assert capsys.readouterr().out == "2 7 ('a',) True\n", "the same script, here"


def test_a_misspelt_variable_stops_the_program() -> None:
    done = run_script("import auxstream; auxstream.fork", AUXSTREAM_DISABEL="1")
    assert done.returncode != 0
    assert "unknown environment variable AUXSTREAM_DISABEL" in done.stderr
    assert "AUXSTREAM_DISABLE (0 or 1)" in done.stderr


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_have_one_root_and_one_form() -> None:
    def below(kind: type[BaseException]) -> Sequence[type[BaseException]]:
        return [kind, *(deeper for each in kind.__subclasses__() for deeper in below(each))]

    assert {RegionError, CaptureError, RaceError, UndeclaredAccessError} <= set(below(AuxstreamError))
    error = RegionError("what", expected="this", came="that", remedy="do so")
    assert str(error) == "what\n  expected: this\n  came:     that\n  remedy:   do so"
    assert str(RegionError("what")) == "what"
    assert (error.what, error.expected, error.came, error.remedy) == ("what", "this", "that", "do so")


def test_open_region_records_only_what_it_is_told() -> None:
    x = torch.ones(2)
    region = open_region("plain", held=[x])
    with region:
        y = x + 1
    region.join()
    assert torch.equal(y, torch.full((2,), 2.0))
    assert region.held == region.recorded == ()


# --- arguments that were left out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forgetful",
    [
        lambda x: auxstream.fork(x),
        lambda x: auxstream.fork(x, x),
        lambda x: auxstream.aux_region(x, x),
        lambda x: auxstream.parallel(lambda: x, lambda: x, name=x),
        lambda x: auxstream.parallel(lambda: x, lambda: x, lambda: x, name=x),
    ],
)
def test_a_region_without_a_name_is_refused(machine: str, forgetful: Any) -> None:
    with pytest.raises(RegionError) as caught:
        forgetful(torch.ones(2, 3))
    assert "first argument of fork() and aux_region() is the region's name" in caught.value.expected
    assert caught.value.came == "a tensor of shape (2, 3)"
    assert "fork('shared_expert', x)" in caught.value.remedy


def test_the_quick_fork_gets_names_only() -> None:
    asked: list[Any] = []
    thread_state.quick_fork = lambda name, reads: asked.append(name)
    try:
        region = auxstream.fork("named")
        with region:
            pass
        region.join()
        with pytest.raises(RegionError, match="no name"):
            auxstream.fork(torch.ones(2))
    finally:
        thread_state.quick_fork = None
    assert asked == ["named"]


@pytest.mark.parametrize("position", [0, 1])
def test_parallel_takes_functions_not_their_results(machine: str, position: int) -> None:
    arguments: list[Any] = [lambda: torch.zeros(1), lambda: torch.zeros(1)]
    arguments[position] = torch.ones(2, 3)
    with pytest.raises(RegionError, match=rf"argument {position} of parallel\(\) is no function") as caught:
        auxstream.parallel(*arguments)
    assert "functions without arguments" in caught.value.expected
    assert caught.value.came == "a tensor of shape (2, 3)"
    assert "lambda" in caught.value.remedy
