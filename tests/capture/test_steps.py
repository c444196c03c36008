"""Steps of several pieces: what launches order, which memory pieces share, and that a racy step really goes wrong.

The planted steps of planted.py are here too, executed: the broken ones corrupt numbers in the orders the proof names,
the whole ones are right in every order.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planted import CASES, Case
from torch import Tensor

import auxstream
from auxstream.capture import CapturedGraph, verify
from auxstream.capture.allocator import BASE, AllocatorModel
from auxstream.capture.clocks import Order
from auxstream.capture.conflicts import hazards_of
from auxstream.capture.program import Buffer, Op, Program, Record, Step, TensorRef, Wait
from auxstream.capture.simulate import ShadowMemory
from auxstream.capture.steps import Piece, compose, one_program, simulate_step, verify_step
from auxstream.runtime.errors import AuxstreamWarning, CaptureError

SIZE = 64


def op(stream: int, *, reads: tuple[int, ...] = (), writes: tuple[int, ...] = (), line: str = "m.py:1: op") -> Op:
    def ref(buffer: int) -> TensorRef:
        return TensorRef(buffer, 0, (SIZE,), (1,), torch.float32)

    return Op(stream, "op", (), {}, (), tuple(map(ref, reads)), tuple(map(ref, writes)), line, None)


def program(*steps: Step, address: int = 4096, streams: int = 3) -> Program:
    """Buffers 0, 1, 2 lie outside, side by side from `address` on."""
    buffers = tuple(Buffer(address + 4 * SIZE * n, 4 * SIZE, None, f"x{n}") for n in range(3))
    names = {0: "caller"} | {n: f"lane{n - 1}" for n in range(1, streams)}
    return Program(steps, buffers, names, 0)


WRITER, READER = program(op(0, writes=(0,))), program(op(0, reads=(0,)))


def pairs(pieces: list[Piece], rounds: int = 1) -> set[tuple[str, str]]:
    """Which streams race, as reports name them."""
    return {(race.first.stream, race.second.stream) for race in verify_step(pieces, rounds).races}


# --- what launches order ----------------------------------------------------------------------------------------------


def random_piece(draw: random.Random) -> Program:
    """Up to four ops on up to three streams; a lane waits for nothing, for the caller, or is waited for."""
    steps: list[Step] = []
    for _ in range(draw.randint(0, 4)):
        stream = draw.randrange(3)
        records = [n for n, step in enumerate(steps) if isinstance(step, Record) and step.stream != stream]
        if records and draw.random() < 0.4:
            steps.append(Wait(stream, draw.choice(records), "event"))
        elif draw.random() < 0.3:
            steps.append(Record(stream, "event"))
        else:
            steps.append(op(stream, reads=(draw.randrange(3),), writes=(draw.randrange(3),)))
    return program(*steps)


def test_a_launch_waits_for_its_stream_and_its_waits_and_for_nothing_else() -> None:
    """Against a definition by pieces: nodes of two pieces are ordered exactly if their launches are."""
    unordered = 0
    for seed in range(300):
        draw = random.Random(seed)
        graphs = [random_piece(draw) for _ in range(3)]
        pieces: list[Piece] = []
        for position in range(draw.randint(1, 5)):
            after = tuple(other for other in range(position) if draw.random() < 0.2)
            pieces.append(Piece(draw.choice(graphs), draw.randrange(3), after))
        behind: list[set[int]] = []  # per piece, those that end before it is launched
        for position, piece in enumerate(pieces):
            direct = {n for n in range(position) if pieces[n].stream == piece.stream} | set(piece.after)
            behind.append(direct.union(*(behind[n] for n in direct)))
        evidence = compose(pieces)
        order = Order(len(evidence.nodes), evidence.edges)
        owner = [n for n, piece in enumerate(pieces) for _ in range(len(piece.program.steps) + 2)]
        first = [owner.index(n) for n in range(len(pieces))]
        inner = [Order(len(piece.program.steps), piece.program.edges()) for piece in pieces]
        for a in range(len(owner)):
            for b in range(len(owner)):
                if owner[a] != owner[b]:
                    assert order.before(a, b) == (owner[a] in behind[owner[b]])
                    unordered += not order.before(a, b)
                    continue
                size = len(pieces[owner[a]].program.steps)
                at, to = a - first[owner[a]] - 1, b - first[owner[a]] - 1
                if 0 <= at < size and 0 <= to < size:
                    assert order.before(a, b) == inner[owner[a]].before(at, to)
                else:  # the launch precedes all of the piece, and all of it the end
                    assert order.before(a, b) == (at < to and (at == -1 or to == size))
    assert unordered > 1000


@pytest.mark.parametrize(
    ("pieces", "races"),
    [
        ([Piece(WRITER, 0, name="w"), Piece(READER, 0, name="r")], set()),
        ([Piece(WRITER, 0, name="w"), Piece(READER, 1, name="r")], {("caller of w", "caller of r")}),
        ([Piece(WRITER, 0, name="w"), Piece(READER, 1, (0,), name="r")], set()),
        ([Piece(WRITER, "a", name="w"), Piece(program(), "b", (0,)), Piece(READER, "b", name="r")], set()),
        ([Piece(READER, 0, name="r"), Piece(READER, 1, name="s")], set()),
        ([Piece(WRITER, 0, name="w"), Piece(WRITER, 1, name="w")], {("caller of w (0)", "caller of w (1)")}),
    ],
    ids=["same stream", "no wait", "a wait", "a wait through a piece", "readers", "one graph on two streams"],
)
def test_races_between_pieces(pieces: list[Piece], races: set[tuple[str, str]]) -> None:
    assert pairs(pieces) == races
    assert verify_step(pieces).ok == (not races)


def test_the_next_round_races_with_what_this_one_left_running() -> None:
    pieces = [Piece(WRITER, 0, name="w"), Piece(READER, 1, (0,), name="r")]
    assert verify_step(pieces).ok
    assert pairs(pieces, rounds=2) == {("caller of r, round 0", "caller of w, round 1")}
    assert verify_step([*pieces, Piece(program(), 0, (1,))], rounds=3).ok


def test_pieces_wait_for_earlier_ones_only() -> None:
    for after in ((1,), (0, 2), (-1,)):
        with pytest.raises(CaptureError, match="waits for what has not been launched"):
            verify_step([Piece(WRITER), Piece(READER, 1, after)])


def test_what_one_piece_does_not_explain_the_step_does_not() -> None:
    stranger = program(op(7, writes=(0,)))
    report = verify_step([Piece(WRITER, name="w"), Piece(stranger, name="s")])
    assert not report.ok
    assert report.unattributed == ("in s: `op` ran on a stream no region opened, at m.py:1: op",)


# --- eager pieces -----------------------------------------------------------------------------------------------------

LANE_WITHOUT_WAIT = program(op(1, reads=(0,)), Record(1, "end"), Wait(0, 1, "end"))
LANE_WITHOUT_JOIN = program(Record(0, "fork"), Wait(1, 0, "fork"), op(1, writes=(0,)))


@pytest.mark.parametrize("eager", [False, True])
def test_lanes_of_eager_work_know_only_what_they_waited_for(eager: bool) -> None:
    """A launch orders all of a graph; eager work has to do it itself."""
    unforked = [Piece(WRITER, 0, name="w"), Piece(LANE_WITHOUT_WAIT, 0, eager=eager, name="e")]
    assert pairs(unforked) == ({("caller of w", "lane0 of e")} if eager else set())
    unjoined = [Piece(LANE_WITHOUT_JOIN, 0, eager=eager, name="e"), Piece(READER, 0, name="r")]
    assert pairs(unjoined) == ({("lane0 of e", "caller of r")} if eager else set())


def test_lanes_go_on_from_one_eager_piece_to_the_next() -> None:
    forked = program(Record(0, "fork"), Wait(1, 0, "fork"), op(1, writes=(0,)))
    goes_on = program(op(1, reads=(0,)))
    other = program(op(2, reads=(0,)))
    assert pairs([Piece(forked, eager=True, name="a"), Piece(goes_on, eager=True, name="b")]) == set()
    assert pairs([Piece(forked, eager=True, name="a"), Piece(other, eager=True, name="b")]) == {
        ("lane0 of a", "lane1 of b")
    }


# --- which memory is the same -----------------------------------------------------------------------------------------


def captured(pool: AllocatorModel | None, x: Tensor, factor: float, out: Tensor) -> CapturedGraph:
    with auxstream.graph(f"times {factor}", device="cpu", pool=pool) as g:
        h = x * factor
        out.copy_(h)
        del h
    return g


@pytest.mark.parametrize("shared", [False, True])
def test_graphs_share_memory_exactly_if_they_share_a_pool(shared: bool) -> None:
    pool = AllocatorModel()
    x, a, b = torch.ones(SIZE), torch.ones(SIZE), torch.ones(SIZE)
    first = captured(pool, x, 2, a)
    second = captured(pool if shared else None, x, 3, b)
    evidence = compose([Piece(first, 0), Piece(second, 1)])
    inside = [buffer.address for buffer in evidence.buffers if buffer.stream is not None]
    assert len(inside) == 2
    assert (inside[0] == inside[1]) == shared
    assert verify_step([Piece(first, 0), Piece(second, 1)]).ok == (not shared)
    assert one_program([Piece(first, 0), Piece(second, 1)]).arena_bytes == (512 if shared else 1024)


def test_outside_memory_and_outputs_are_one_buffer_for_all() -> None:
    x = torch.ones(SIZE)
    with auxstream.graph(device="cpu") as first:
        out = x * 2
    with auxstream.graph(device="cpu") as second:
        x.add_(out)
    buffers = compose([Piece(first), Piece(second)]).buffers
    assert len(buffers) == 2, "x, and out, which the second graph saw as outside memory"
    assert sorted(buffer.address >= BASE for buffer in buffers) == [False, True]


# --- executed ---------------------------------------------------------------------------------------------------------


def a_step(waits: bool) -> tuple[list[Piece], Tensor, Tensor]:
    """Two graphs of one pool around one on another stream, which takes the first one's output."""
    pool = AllocatorModel()
    x, result = torch.zeros(SIZE), torch.zeros(SIZE)
    with auxstream.graph("first", device="cpu", pool=pool) as first:
        h = x * 2
        out = h + 1
        del h
    with auxstream.graph("aside", device="cpu", pool=AllocatorModel()) as aside:
        result.copy_(out * out)
    with auxstream.graph("last", device="cpu", pool=pool) as last:
        x.add_(out)
    pieces = [Piece(first, 0), Piece(aside, 1, (0,) if waits else ()), Piece(last, 0, (1,) if waits else ())]
    return pieces, x, result


def test_a_whole_step_is_right_in_every_order() -> None:
    pieces, x, result = a_step(waits=True)
    assert verify_step(pieces).ok
    simulation = simulate_step(pieces)
    for seed, order in enumerate(simulation.orders.exhaustive()):
        x.copy_(torch.arange(float(SIZE)) + seed)
        before = x.clone()
        simulation.run(order)
        assert torch.equal(result, (before * 2 + 1) ** 2)
        assert torch.equal(x, before * 3 + 1)


def test_a_racy_step_goes_wrong_in_the_orders_that_the_proof_names() -> None:
    pieces, x, result = a_step(waits=False)
    simulation, hazards = simulate_step(pieces), hazards_of(compose(pieces)).hazards
    assert hazards
    for k in range(len(hazards)):
        x.copy_(torch.arange(float(SIZE)))
        simulation.run(simulation.orders.adversarial(k, hazards))
        assert not torch.equal(result, (torch.arange(float(SIZE)) * 2 + 1) ** 2)
    x.copy_(torch.arange(float(SIZE)))
    simulation.run(simulation.orders.program_order())
    assert torch.equal(result, (torch.arange(float(SIZE)) * 2 + 1) ** 2), "and right only by luck"


def planted_steps(broken: bool) -> Iterator[tuple[Case, list[Piece]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AuxstreamWarning)
        for case in CASES:
            if case.where != "gpu" and isinstance(work := case.build("cpu", broken), list):
                yield case, work


def test_evidence_and_program_count_alike() -> None:
    for case, pieces in planted_steps(broken=False):
        for rounds in (1, 2):
            evidence, whole = compose(pieces, rounds), one_program(pieces, rounds)
            assert len(evidence.nodes) == len(whole.steps), case.name
            for node, step in zip(evidence.nodes, whole.steps, strict=True):
                named = step.name if isinstance(step, Op) else step.what
                assert node.name.endswith(named), case.name
                refs = (*step.writes, *step.reads) if isinstance(step, Op) else ()
                assert tuple(ref for ref, _ in node.touches) == refs, case.name
            assert evidence.buffers == whole.buffers


def test_planted_steps_corrupt_memory_and_their_twins_do_not() -> None:
    seen = 0
    for case, pieces in planted_steps(broken=True):
        hazards = hazards_of(compose(pieces)).hazards
        orders, shadow = simulate_step(pieces).orders, ShadowMemory(one_program(pieces))
        for k in range(len(hazards)):
            assert shadow.first_violation(orders.adversarial(k, hazards)) is not None, case.name
        seen += 1
    assert seen >= 4
    for case, pieces in planted_steps(broken=False):
        shadow = ShadowMemory(one_program(pieces))
        for order in simulate_step(pieces).orders.exhaustive():
            assert shadow.first_violation(order) is None, case.name


@pytest.mark.parametrize("pieces", [[], [3], "not a list of pieces"])
def test_no_step_is_not_a_safe_step(pieces: Any) -> None:
    with pytest.raises(CaptureError, match="no step"):
        verify_step(pieces)


@pytest.mark.parametrize("arguments", [(3,), (torch.ones(2),)])
def test_pieces_are_graphs(arguments: Any) -> None:
    with pytest.raises(CaptureError, match="cannot be made"):
        Piece(*arguments)


def test_only_what_was_captured_is_verified() -> None:
    with pytest.raises(CaptureError, match="a Tensor"):
        verify(torch.ones(2))  # type: ignore[arg-type]
