"""Safety, each with its twin: the safe program is proved and replays right in every order; the twin, which lacks one
wait or one handoff, is reported at the right ops and gives wrong numbers.

No test waits for luck: replays of a racy program turn the reported races around, one after the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import auxstream
from auxstream.capture import CapturedGraph, verify
from auxstream.capture.conflicts import hazards_of
from auxstream.capture.graphs import CudaGraph, SimulatedGraph
from auxstream.capture.program import Buffer, Op, Program, Wait
from auxstream.capture.proof import Race
from auxstream.capture.simulate import ShadowMemory, Simulation
from auxstream.runtime.errors import AuxstreamWarning, RaceError
from auxstream.runtime.regions import fork, open_region

SIZE = 256  # floats: two granules, so that blocks of other sizes do not interfere
REPLAYS = 50
Work = Callable[[Tensor], Any]


def capture(work: Work, x: Tensor, **options: Any) -> tuple[SimulatedGraph, Any]:
    with auxstream.graph(work.__name__, device="cpu", **options) as g:
        out = work(x)
    assert isinstance(g, SimulatedGraph)
    return g, out


def wrong_replays(run: Callable[[int], None], x: Tensor, out: Tensor, reference: Work) -> int:
    """How many of the replays differ from `reference`, which runs the work on one stream."""
    wrong = 0
    for k in range(REPLAYS):
        x.copy_(torch.arange(float(SIZE)) * (k + 1) + 1)
        run(k)
        wrong += not torch.equal(out, reference(x))
    return wrong


def twin_of(g: SimulatedGraph, out: Tensor, program: Program) -> Callable[[int], None]:
    """Replays of a changed program over the same memory, in orders that turn its races around."""
    view = torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())
    (buffer,) = [number for number, visible in g.simulation.visible.items() if visible.data_ptr() == view.data_ptr()]
    simulation = Simulation(program, g.simulation.outside, {buffer: view})
    hazards = hazards_of(program).hazards
    return lambda k: simulation.run(simulation.orders.adversarial(k, hazards))


def wait_at(program: Program, stream: int, what: str) -> int:
    (index,) = [i for i, s in enumerate(program.steps) if isinstance(s, Wait) and s.stream == stream and s.what == what]
    return index


def buffer_made_by(program: Program, line: str) -> Buffer:
    """The buffer that the op on a source line allocated."""
    (op,) = [step for step in program.steps if isinstance(step, Op) and line in step.line and step.writes]
    return program.buffers[op.writes[0].buffer]


def overlap(a: Buffer, b: Buffer) -> bool:
    return a is not b and a.address < b.address + b.nbytes and b.address < a.address + a.nbytes


def parties(race: Race) -> tuple[tuple[str, str, bool], tuple[str, str, bool]]:
    return tuple((p.line.partition(": ")[2], p.stream, p.writes) for p in (race.first, race.second))  # type: ignore[return-value]


# --- 1 and 2: the two waits -------------------------------------------------------------------------------------------


def handed_over(x: Tensor) -> Tensor:
    h = x * 2
    region = fork("aux", h)
    a = h + 1
    with region:
        s = region.returns(h * 3)
    region.join()
    return a + s


def handed_over_serially(x: Tensor) -> Tensor:
    return x * 2 + 1 + x * 2 * 3


def test_a_wait_at_each_end_is_safe() -> None:
    x = torch.ones(SIZE)
    g, out = capture(handed_over, x)
    assert g.report.ok
    assert verify(g).ok
    assert wrong_replays(lambda _: g.replay(), x, out, handed_over_serially) == 0


@pytest.mark.parametrize(
    ("stream", "what", "expected"),
    [
        (1, "fork of aux", (("h = x * 2", "caller", True), ("s = region.returns(h * 3)", "lane0", False))),
        (0, "end of aux", (("s = region.returns(h * 3)", "lane0", True), ("return a + s", "caller", False))),
    ],
    ids=["fork wait", "join wait"],
)
def test_without_one_wait(stream: int, what: str, expected: Any) -> None:
    x = torch.ones(SIZE)
    g, out = capture(handed_over, x)
    twin = g.program.without(wait_at(g.program, stream, what))
    report = verify(twin)
    assert not report.ok
    assert [parties(race) for race in report.races] == [expected]
    (race,) = report.races
    assert not race.reuse
    assert race.nbytes == SIZE * 4
    assert race.first.region == ("aux" if expected[0][1] == "lane0" else None)
    text = str(report)
    assert f"a wait on {race.second.stream} for {race.first.stream}" in text
    assert "test_proof.py:" in text
    assert "shared tensor (1,024 bytes)" in text
    assert wrong_replays(twin_of(g, out, twin), x, out, handed_over_serially) == REPLAYS
    assert wrong_replays(lambda _: g.replay(), x, out, handed_over_serially) == 0, "the graph itself is still right"


def test_a_wait_between_two_lanes() -> None:
    def relay(x: Tensor) -> Tensor:
        first = fork("first", x)
        with first:
            a = first.returns(x * 2)
        second = fork("second", x)
        with second:
            first.join()
            b = second.returns(a + 1)
        first.join()
        second.join()
        return a + b

    x = torch.ones(SIZE)
    g, out = capture(relay, x)
    assert wrong_replays(lambda _: g.replay(), x, out, lambda x: x * 4 + 1) == 0
    lane = next(step.stream for step in g.program.steps if isinstance(step, Op) and step.region == "second")
    twin = g.program.without(wait_at(g.program, lane, "end of first"))
    assert [parties(race)[1][0] for race in verify(twin).races] == ["b = second.returns(a + 1)"]
    assert wrong_replays(twin_of(g, out, twin), x, out, lambda x: x * 4 + 1) == REPLAYS


# --- 3: a temporary of the caller's, freed while the branch may still read it -----------------------------------------


def caller_temporary(x: Tensor, region_of: Callable[[Tensor], Any]) -> Tensor:
    h = x * 2
    region = region_of(h)
    with region:
        s = region.returns(h * 3)
    del h
    z = x + 5
    region.join()
    return z + s


def caller_temporary_serially(x: Tensor) -> Tensor:
    return x + 5 + x * 2 * 3


SAFE_FORKS: dict[str, Callable[[Tensor], Any]] = {
    "fork": lambda h: fork("aux", h),
    "recorded": lambda h: open_region("aux", recorded=[h]),
    "held": lambda h: open_region("aux", held=[h]),
}


@pytest.mark.parametrize("handoff", SAFE_FORKS)
def test_a_temporary_handed_to_the_branch_is_not_reused(handoff: str) -> None:
    def work(x: Tensor) -> Tensor:
        return caller_temporary(x, SAFE_FORKS[handoff])

    x = torch.ones(SIZE)
    g, out = capture(work, x)
    old, new = buffer_made_by(g.program, "h = x * 2"), buffer_made_by(g.program, "z = x + 5")
    assert not overlap(old, new)
    assert g.report.ok
    assert wrong_replays(lambda _: g.replay(), x, out, caller_temporary_serially) == 0


def test_a_temporary_not_handed_over_is_reused_and_corrupts() -> None:
    def work(x: Tensor) -> Tensor:
        return caller_temporary(x, lambda h: open_region("aux"))

    x = torch.ones(SIZE)
    g, out = capture(work, x, verify="off")
    old, new = buffer_made_by(g.program, "h = x * 2"), buffer_made_by(g.program, "z = x + 5")
    assert overlap(old, new), "the twin shows nothing unless the block is really reused"
    report = verify(g)
    assert [parties(race) for race in report.races] == [
        (("s = region.returns(h * 3)", "lane0", False), ("z = x + 5", "caller", True))
    ]
    (race,) = report.races
    assert race.reuse
    assert (race.first.buffer, race.second.buffer) == ("mul.Tensor", "add.Tensor")
    assert "record_stream" in race.missing
    assert "reused block" in str(race)
    hazards = hazards_of(g.program).hazards
    orders = g.simulation.orders
    assert (
        wrong_replays(lambda k: g.simulation.run(orders.adversarial(k, hazards)), x, out, caller_temporary_serially)
        == REPLAYS
    )
    assert wrong_replays(lambda _: g.replay(), x, out, caller_temporary_serially) > 0, "unproved: orders are drawn"


def test_the_default_order_is_safe_by_construction() -> None:
    """Caller first, and the live-in held by its own variable: nothing is freed before the branch is joined."""

    def work(x: Tensor) -> Tensor:
        h = x * 2
        region = open_region("aux")
        z = h + 5
        with region:
            s = region.returns(h * 3)
        region.join()
        del h
        return z + s

    x = torch.ones(SIZE)
    g, out = capture(work, x, verify="off")
    assert verify(g).ok
    assert wrong_replays(lambda _: g.replay(), x, out, lambda x: x * 2 + 5 + x * 2 * 3) == 0


# --- 4: a temporary of the branch's, freed while the caller may still read it -----------------------------------------


def aux_temporary(x: Tensor, *, record: bool) -> Tensor:
    first = open_region("first")
    with first:
        s = x * 3
        if record:
            first.returns(s)
    first.join()
    second = open_region("second")  # the lane's next region forks before the caller reads s
    y = s + 1
    del s
    with second:
        t = second.returns(x * 5)
    second.join()
    return y + t


def aux_temporary_serially(x: Tensor) -> Tensor:
    return x * 3 + 1 + x * 5


@pytest.mark.parametrize("record", [True, False])
def test_a_result_of_the_branch(record: bool) -> None:
    def work(x: Tensor) -> Tensor:
        return aux_temporary(x, record=record)

    x = torch.ones(SIZE)
    g, out = capture(work, x, verify="off")
    old, new = buffer_made_by(g.program, "s = x * 3"), buffer_made_by(g.program, "t = second.returns(x * 5)")
    assert old.stream == new.stream == 1, "one lane serves both regions"
    report = verify(g)
    if record:
        assert not overlap(old, new)
        assert report.ok
        assert wrong_replays(lambda _: g.replay(), x, out, aux_temporary_serially) == 0
        return
    assert overlap(old, new)
    assert [parties(race) for race in report.races] == [
        (("y = s + 1", "caller", False), ("t = second.returns(x * 5)", "lane0", True))
    ]
    assert report.races[0].reuse
    hazards = hazards_of(g.program).hazards
    orders = g.simulation.orders
    assert (
        wrong_replays(lambda k: g.simulation.run(orders.adversarial(k, hazards)), x, out, aux_temporary_serially)
        == REPLAYS
    )


def test_a_result_read_before_the_lane_s_next_fork_needs_no_record() -> None:
    def work(x: Tensor) -> Tensor:
        first = open_region("first")
        with first:
            s = x * 3
        first.join()
        y = s + 1
        del s
        second = open_region("second")  # forks after the caller's read: ordered
        with second:
            t = second.returns(x * 5)
        second.join()
        return y + t

    x = torch.ones(SIZE)
    g, out = capture(work, x, verify="off")
    old, new = buffer_made_by(g.program, "s = x * 3"), buffer_made_by(g.program, "t = second.returns(x * 5)")
    assert overlap(old, new), "reused, and rightly"
    assert verify(g).ok
    assert wrong_replays(lambda _: g.replay(), x, out, aux_temporary_serially) == 0


# --- the context's own part -------------------------------------------------------------------------------------------


def test_an_undeclared_read_is_made_safe_where_it_is_ordered() -> None:
    def work(x: Tensor) -> Tensor:
        return caller_temporary(x, lambda h: open_region("aux"))

    x = torch.ones(SIZE)
    with pytest.warns(AuxstreamWarning, match="reads an undeclared tensor made by `mul.Tensor`"):
        g, out = capture(work, x, verify="error")
    old, new = buffer_made_by(g.program, "h = x * 2"), buffer_made_by(g.program, "z = x + 5")
    assert not overlap(old, new)
    assert g.report.ok
    assert wrong_replays(lambda _: g.replay(), x, out, caller_temporary_serially) == 0


def test_racy_work_is_refused_by_default_and_shown_when_asked() -> None:
    def work(x: Tensor) -> Tensor:
        buffer = x * 0
        region = fork("aux", x, writes=buffer)
        y = x + buffer
        with region:
            buffer.add_(7)
        region.join()
        return y

    x = torch.ones(SIZE)
    with pytest.raises(RaceError) as caught:
        capture(work, x)
    assert not caught.value.report.ok
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AuxstreamWarning)
        g, out = capture(work, x, verify="warn")
    assert wrong_replays(lambda _: g.replay(), x, out, lambda x: x) > 0
    assert all(race.first.line.endswith("y = x + buffer") for race in g.report.races)
    assert all(race.second.line.endswith("buffer.add_(7)") for race in g.report.races)


def test_a_race_that_leaves_equal_numbers_is_found_by_shadow_ids() -> None:
    def work(x: Tensor) -> Tensor:
        buffer = x * 0
        region = fork("aux", x, writes=buffer)
        buffer.fill_(3.0)
        with region:
            buffer.fill_(3.0)
        region.join()
        return buffer + 0

    x = torch.ones(SIZE)
    g, out = capture(work, x, verify="off")
    report = verify(g)
    assert {(race.first.writes, race.second.writes) for race in report.races} == {(True, True)}
    shadow = ShadowMemory(g.program)
    for k, race in enumerate(report.races):
        order = g.simulation.orders.adversarial(k, [race.hazard])
        g.simulation.run(order)
        assert out.tolist() == [3.0] * SIZE, "the numbers show nothing"
        assert shadow.first_violation(order) is not None


def test_disjoint_halves_do_not_race_and_overlapping_ones_do() -> None:
    def work(x: Tensor, cut: int) -> Tensor:
        buffer = x * 0
        region = fork("aux", x, writes=buffer)
        buffer[:cut].fill_(1.0)
        with region:
            buffer[SIZE // 2 :].fill_(2.0)
        region.join()
        return buffer

    x = torch.ones(SIZE)
    with auxstream.graph(device="cpu") as g:
        out = work(x, SIZE // 2)
    for _ in range(10):
        g.replay()
        assert out.tolist() == [1.0] * (SIZE // 2) + [2.0] * (SIZE // 2)
    with pytest.raises(RaceError) as caught, auxstream.graph(device="cpu"):
        work(x, SIZE // 2 + 1)
    assert {race.nbytes for race in caught.value.report.races} == {4}


def test_a_report_reads_well() -> None:
    g, _ = capture(handed_over, torch.ones(SIZE))
    text = str(g.report)
    assert text.startswith("4 ops, ")
    assert "no race" in text
    assert text.count("assumed: ") == len(g.report.assumptions) == 2
    twin = g.program.without(wait_at(g.program, 1, "fork of aux"))
    assert "1 race(s), 0 unattributed" in str(verify(twin))


def test_verify_takes_a_program_or_what_has_one() -> None:
    g, _ = capture(handed_over, torch.ones(SIZE))
    assert isinstance(g, CapturedGraph)
    assert verify(g) == verify(g.program) == g.report


def test_ops_on_a_stream_nobody_opened_are_unattributed() -> None:
    g, _ = capture(handed_over, torch.ones(SIZE))
    stranger = Program(g.program.steps, g.program.buffers, {0: "caller"}, g.program.arena_bytes)
    report = verify(stranger)
    assert not report.ok
    assert report.races == ()
    assert len(report.unattributed) == 1
    assert "mul.Tensor" in report.unattributed[0]


def test_a_cuda_graph_that_was_not_read_back_is_never_called_safe() -> None:
    g, _ = capture(handed_over, torch.ones(SIZE))
    unread = CudaGraph.__new__(CudaGraph)  # whose own constructor needs a torch with CUDA
    CapturedGraph.__init__(unread, "unread")
    unread.attach(g.program, g.regions, {})
    report = verify(unread)
    assert not report.races
    assert not report.ok
