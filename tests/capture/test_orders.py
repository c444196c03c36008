"""Legal orders; and the checker held to the simulator: every race it reports shows in some legal order, and every
program that it passes is right in all of them. On small random programs, and on the planted ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CASES, Case

from auxstream.capture.conflicts import hazards_of
from auxstream.capture.orders import Orders
from auxstream.capture.program import Buffer, Op, Program, Record, Step, TensorRef, Wait
from auxstream.capture.proof import verify
from auxstream.capture.simulate import ShadowMemory
from auxstream.runtime.errors import AuxstreamWarning

# Bytes of each buffer: `a` and `b` share a block (one was freed and reused), `c` overlaps the end of `b`'s.
BUFFERS = (Buffer(100, 4, 0, "a"), Buffer(100, 4, 0, "b"), Buffer(102, 4, 1, "c"), Buffer(200, 4, 1, "d"))


def op(stream: int, reads: list[int], writes: list[int]) -> Op:
    """`reads` and `writes`: buffers; plus 10 for their even bytes, plus 20 for the odd ones."""

    def ref(number: int) -> TensorRef:
        part, buffer = divmod(number, 10)
        size, stride = ((4,), (1,)) if part == 0 else ((2,), (2,))
        return TensorRef(buffer, part == 2, size, stride, torch.uint8)

    return Op(stream, "op", (), {}, (), tuple(map(ref, reads)), tuple(map(ref, writes)), "model.py:1", None)


def program_of(steps: list[Step]) -> Program:
    return Program(tuple(steps), BUFFERS, {0: "caller", 1: "lane0", 2: "lane1"}, 0)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """At most 9 steps on 2 or 3 streams over 4 buffers: ops, records, and waits for earlier records."""
    streams = draw(st.integers(2, 3))
    steps: list[Step] = []
    buffers = st.lists(st.sampled_from([0, 1, 2, 3, 0, 1, 2, 3, 10, 11, 12, 20, 21, 22]), max_size=2, unique=True)
    for _ in range(draw(st.integers(2, 9))):
        stream = draw(st.integers(0, streams - 1))
        records = [index for index, step in enumerate(steps) if isinstance(step, Record) and step.stream != stream]
        kind = draw(st.sampled_from(["op", "op", "op", "record", "wait"]))
        if kind == "wait" and records:
            steps.append(Wait(stream, draw(st.sampled_from(records)), "r"))
        elif kind == "record":
            steps.append(Record(stream, "r"))
        else:
            steps.append(op(stream, draw(buffers), draw(buffers)))
    return program_of(steps)


def legal(program: Program) -> Iterator[list[int]]:
    yield from Orders([step.stream for step in program.steps], program.edges()).exhaustive()


def is_legal(order: list[int], program: Program) -> bool:
    place = {step: position for position, step in enumerate(order)}
    return sorted(order) == list(range(len(program.steps))) and all(place[a] < place[b] for a, b in program.edges())


@settings(max_examples=1500, deadline=None)
@given(programs())
def test_the_proof_holds_exactly_if_no_order_hurts(program: Program) -> None:
    shadow = ShadowMemory(program)
    report = verify(program)
    hurt = any(shadow.first_violation(order) is not None for order in legal(program))
    assert report.ok == (not hurt), f"{report}\n{program}"
    orders = Orders([step.stream for step in program.steps], program.edges())
    hazards = [race.hazard for race in report.races]
    for k in range(len(hazards)):
        order = orders.adversarial(k, hazards)
        assert is_legal(order, program)
        assert shadow.first_violation(order) is not None, f"race {k} was not exhibited\n{report.races[k]}\n{program}"
        early, late = sorted((hazards[k].first, hazards[k].second))
        assert order.index(late) < order.index(early)


def planted_programs(broken: bool) -> Iterator[tuple[Case, Program]]:
    """Of the planted cases that are one graph or one program; test_steps.py has the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AuxstreamWarning)
        for case in CASES:
            if case.where != "gpu" and not isinstance(work := case.build("cpu", broken), list):
                yield case, work if isinstance(work, Program) else work.program


def test_planted_races_show_in_the_orders_that_turn_them_around() -> None:
    races = 0
    for case, program in planted_programs(broken=True):
        shadow, hazards = ShadowMemory(program), hazards_of(program).hazards
        orders = Orders([step.stream for step in program.steps], program.edges())
        for k in range(len(hazards)):
            order = orders.adversarial(k, hazards)
            assert is_legal(order, program)
            assert shadow.first_violation(order) is not None, f"{case.name}: {hazards[k]}"
        races += len(hazards)
    assert races > 30


def test_planted_clean_twins_are_right_in_every_order() -> None:
    count = 0
    for case, program in planted_programs(broken=False):
        shadow = ShadowMemory(program)
        for order in legal(program):
            assert shadow.first_violation(order) is None, case.name
            count += 1
    assert count > 100


def test_the_generator_yields_safe_and_racy_programs() -> None:
    seen: list[bool] = []

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(programs())
    def collect(program: Program) -> None:
        seen.append(verify(program).ok)

    collect()
    assert 15 < sum(seen) < len(seen) - 15


@settings(max_examples=200, deadline=None)
@given(programs(), st.integers(0, 40))
def test_every_order_is_legal_and_repeatable(program: Program, seed: int) -> None:
    orders = Orders([step.stream for step in program.steps], program.edges())
    assert is_legal(orders.program_order(), program)
    order = orders.adversarial(seed)
    assert is_legal(order, program)
    assert order == orders.adversarial(seed)


@settings(max_examples=100, deadline=None)
@given(programs().filter(lambda program: len(program.steps) <= 6))
def test_exhaustive_is_all_legal_permutations_once(program: Program) -> None:
    found = [tuple(order) for order in legal(program)]
    assert len(set(found)) == len(found)
    assert set(found) == {p for p in permutations(range(len(program.steps))) if is_legal(list(p), program)}


def test_exhaustive_refuses_to_be_partial() -> None:
    orders = Orders([0, 1, 2, 3], ())
    assert len(list(orders.exhaustive(limit=24))) == 24
    with pytest.raises(ValueError, match="more than 23 legal orders"):
        list(orders.exhaustive(limit=23))


def test_adversarial_without_hazards_starves_and_rushes_each_stream() -> None:
    orders = Orders([0, 1, 0, 1], [(0, 2), (1, 3)])
    assert [orders.adversarial(seed) for seed in range(4)] == [[1, 3, 0, 2], [0, 2, 1, 3], [0, 2, 1, 3], [1, 3, 0, 2]]
    later = {tuple(orders.adversarial(seed)) for seed in range(4, 60)}
    assert len(later) >= 3, "later seeds interleave"


def test_an_empty_program() -> None:
    orders = Orders([], ())
    assert orders.adversarial(0) == orders.adversarial(7) == orders.program_order() == []
    assert list(orders.exhaustive()) == [[]]


@pytest.mark.parametrize(
    ("steps", "violation"),
    [
        # write, read; read, write; write, write: each on two streams, swapped
        ([op(0, [], [3]), op(1, [3], [])], (1, 0, -1)),
        ([op(0, [3], []), op(1, [], [3])], (0, -1, 1)),
        ([op(0, [], [3]), op(1, [], [3])], (1, 0, -1)),
    ],
)
def test_shadow_memory_names_the_step_and_the_writers(steps: list[Step], violation: Any) -> None:
    program = program_of(steps)
    shadow = ShadowMemory(program)
    assert shadow.first_violation([0, 1]) is None
    found = shadow.first_violation([1, 0])
    assert found is not None
    assert (found.step, found.expected, found.found) == violation


def test_shadow_memory_sees_partial_overlap() -> None:
    program = program_of([op(0, [], [1]), op(1, [], [2]), op(1, [1], [])])
    assert ShadowMemory(program).first_violation([1, 2, 0]) is not None
    apart = program_of([op(0, [], [1]), op(1, [], [3]), op(1, [3], [])])
    assert ShadowMemory(apart).first_violation([1, 2, 0]) is None
    assert verify(apart).ok
    assert not verify(program).ok
