"""What a replay in pieces does, call by call, on a CUDA that only keeps order (fake_cuda.py)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import NO_CONTEXT, FakeCuda, fake_cuda

from auxstream.capture import pieces
from auxstream.capture.graphs import GraphMemory
from auxstream.capture.pieces import Launch
from auxstream.capture.pieces_eager import EagerCall, address_of
from auxstream.runtime.errors import AuxstreamError

CALLER = 0x700


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    pieces._lane_pool.cache_clear()
    with fake_cuda(monkeypatch) as fake:
        fake._set_context(0x9000)
        yield fake
    pieces._lane_pool.cache_clear()


def random_launches(draw: random.Random) -> list[Launch]:
    """As splitting makes them: every lane waits for the caller first, and the caller for every lane at last."""
    launches = [Launch(None, None, ())]
    for _ in range(draw.randint(1, 7)):
        lane = draw.choice([None, None, 0, 1])
        after = {n for n in range(len(launches)) if draw.random() < 0.25}
        if lane is not None and not any(other.lane == lane for other in launches):
            after.add(max(n for n, other in enumerate(launches) if other.lane is None))
        launches.append(Launch(None, lane, tuple(sorted(after))))
    return [*launches, Launch(None, None, tuple(range(len(launches))))]


def ancestors(launches: Sequence[Launch]) -> list[set[int]]:
    above: list[set[int]] = []
    for number, launch in enumerate(launches):
        direct = {n for n in range(number) if launches[n].lane == launch.lane} | set(launch.after)
        above.append(direct.union(*(above[n] for n in direct)))
    return above


def replayed(cuda: FakeCuda, launches: Sequence[Launch], rounds: int = 2) -> list[list[set[int]]]:
    """Per round and launch, which launches of the round it is behind. Each round has a caller of its own."""
    seen: list[list[set[int]]] = []
    work: list[Any] = []

    def run(number: int) -> None:
        seen[-1][number] = {n for n in range(number) if cuda.waits_for(work[n])}
        work[number] = cuda.work()

    turn = pieces._Turn(0, 1 + max((launch.lane for launch in launches if launch.lane is not None), default=-1))
    with cuda.stream(CALLER):
        steps = turn.steps([replace(one, run=lambda n=n: run(n)) for n, one in enumerate(launches)])
    for number in range(rounds):
        seen.append([set() for _ in launches])
        work[:] = [None for _ in launches]
        with cuda.stream(CALLER + number):
            before = cuda.current()
            turn.begin(CALLER + number)
            for step in steps:
                step()
            turn.end()
            assert cuda.current() == before
    return seen


def test_a_launch_is_behind_what_it_waits_for_and_behind_nothing_else(cuda: FakeCuda) -> None:
    free = 0
    for seed in range(60):
        launches = random_launches(random.Random(seed))
        expected = ancestors(launches)
        first, second = replayed(cuda, launches)
        assert first == expected
        # Lanes go on from round to round, so a later launch may be behind more; never behind less.
        assert all(found >= wanted for found, wanted in zip(second, expected, strict=True))
        free += sum(n - len(found) for n, found in enumerate(first))
    assert free > 50, "some run side by side"


def test_a_wait_that_is_left_out_would_show(cuda: FakeCuda) -> None:
    launches = [Launch(None, None, ()), Launch(None, 0, (0,)), Launch(None, None, (1,))]
    assert replayed(cuda, launches, 1) == [ancestors(launches)]
    without = [*launches[:2], replace(launches[2], after=())]
    assert replayed(cuda, without, 1)[0] != ancestors(launches)


def test_one_stream_needs_no_event_and_no_switch(cuda: FakeCuda) -> None:
    ran: list[int] = []
    turn = pieces._Turn(0, 0)
    steps = turn.steps([Launch(lambda n=n: ran.append(n), None, ()) for n in range(3)] + [Launch(None, None, ())])
    log = list(cuda.log)
    for step in steps:
        step()
    assert ran == [0, 1, 2]
    assert len(steps) == 3
    assert cuda.log == log


def test_a_replay_that_fails_leaves_no_lane_behind(cuda: FakeCuda) -> None:
    turn = pieces._Turn(0, 1)
    steps = turn.steps([Launch(lambda: None, None, ()), Launch(lambda: None, 0, (0,))])
    with cuda.stream(CALLER):
        before = cuda.current()
        turn.begin(CALLER)
        steps[0]()
        for step in steps[1:]:
            step()
        work = cuda.work()
        assert cuda.current() != before
        turn.give_up()
        turn.end()
        assert cuda.current() == before
        assert cuda.waits_for(work)


@pytest.mark.parametrize("call", ["record", "wait"])
def test_what_the_driver_refuses_is_an_error(cuda: FakeCuda, call: str) -> None:
    turn = pieces._Turn(0, 1)
    steps = turn.steps([Launch(lambda: None, None, ()), Launch(lambda: None, 0, (0,))])
    turn.begin(CALLER)
    cuda.failing[call] = NO_CONTEXT

    def replay() -> None:
        for step in steps:
            step()

    with pytest.raises(AuxstreamError, match="a piece of a step"):
        replay()


class Order:
    """Of replays: counts them."""

    stream = CALLER

    def __init__(self) -> None:
        self.entered = 0

    def __enter__(self) -> Order:
        self.entered += 1
        return self

    def __exit__(self, *_: object) -> None: ...


def test_a_replay_is_one_turn_and_runs_as_captured_whatever_mode_it_comes_in(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    told: list[tuple[Any, int]] = []
    monkeypatch.setattr(pieces, "LAUNCH_OBSERVERS", [lambda *what: told.append(what)])
    launch = Launch(lambda: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"))), None, ())
    order: Any = Order()
    graph = pieces.CudaPieces("step", (), ("region",), GraphMemory(7), [launch, launch], order, 0)
    graph.replay()
    torch.set_autocast_enabled("cuda", True)
    try:
        graph.replay()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [(False, False)] * 4
    assert told == [(graph, CALLER)] * 2
    assert order.entered == 2
    assert (graph.regions, graph.memory.reserved) == (("region",), 7)


# --- eager calls ------------------------------------------------------------------------------------------------------


def test_an_address_owns_nothing_and_is_the_same_memory() -> None:
    whole = torch.arange(12.0).view(3, 4)
    named = address_of(whole.t()[1:3])
    assert torch.equal(named, whole.t()[1:3])
    assert named.stride() == whole.t()[1:3].stride()
    named.add_(1)
    assert whole[0].tolist() == [0.0, 2.0, 3.0, 3.0]
    weak = whole.untyped_storage()._weak_ref()
    del whole
    assert torch.UntypedStorage._expired(weak), "whoever names memory does not keep it"
    torch.UntypedStorage._free_weak_ref(weak)


def test_conjugate_and_negated_tensors_stay_so() -> None:
    z = torch.randn(4, dtype=torch.complex64)
    for tensor in (z.conj(), z.conj().imag):
        assert torch.equal(address_of(tensor), tensor)


def test_a_call_copies_each_result_to_its_place() -> None:
    place, count = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    x = torch.tensor([[3.0, 1.0], [2.0, 5.0]])
    call = EagerCall(torch.ops.aten.max.dim, (x, 1), {}, ((0, place), (1, count)))
    call.launcher()()
    assert (place.tolist(), count.tolist()) == ([3.0, 5.0], [0, 1])
    one = EagerCall(torch.ops.aten.add.Tensor, (x[0], x[1]), {"alpha": 2}, ((None, place),))
    one.launcher()()
    assert place.tolist() == [7.0, 11.0]
