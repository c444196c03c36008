"""Streams, events and the host as numbers: what is behind what, and which use of a graph's memory is in no order."""

from __future__ import annotations

import random

import pytest

from auxstream.capture.timeline import Footprint, Launches, Point, Span, Timeline, Use

A, B, C = 1, 2, 3
G, H = 10, 11


# --- what is behind what ----------------------------------------------------------------------------------------------


class Paths:
    """The same questions answered by walking a graph of everything that was enqueued."""

    def __init__(self) -> None:
        self.before: list[set[int]] = []  # per node, all nodes with a path to it
        self.last: dict[int, int] = {}  # per stream
        self.events: dict[int, int] = {}
        self.host: set[int] = set()

    def add(self, stream: int, *also: int) -> int:
        node = len(self.before)
        sources = {*also, *self.host, *([self.last[stream]] if stream in self.last else [])}
        self.before.append(set().union(sources, *(self.before[source] for source in sources)))
        self.last[stream] = node
        return node

    def behind(self, stream: int, node: int) -> bool:
        last = self.last.get(stream)
        reached = set(self.host).union(*(self.before[one] for one in self.host))
        return node in reached or (last is not None and (node == last or node in self.before[last]))


@pytest.mark.parametrize("seed", range(300))
def test_clocks_equal_paths(seed: int) -> None:
    draw = random.Random(seed)
    timeline, paths = Timeline(), Paths()
    works: list[tuple[Point, int]] = []
    streams, events = range(draw.randint(2, 5)), range(draw.randint(1, 3))
    for _ in range(draw.randint(5, 60)):
        stream, event = draw.choice(streams), draw.choice(events)
        match draw.choice(["work", "work", "work", "record", "wait", "wait", "host event", "host stream", "host all"]):
            case "work":
                works.append((timeline.work(stream), paths.add(stream)))
            case "record":
                timeline.record(event, stream)
                paths.events[event] = paths.add(stream)
            case "wait":
                timeline.wait(stream, event)
                paths.add(stream, *([paths.events[event]] if event in paths.events else []))
            case _ if draw.random() < 0.7:
                continue  # seldom, or everything is ordered by the host
            case "host event":
                timeline.host_waits_for(event=event)
                paths.host |= {paths.events[event]} if event in paths.events else set()
            case "host stream":
                timeline.host_waits_for(stream=stream)
                paths.host |= {paths.last[stream]} if stream in paths.last else set()
            case _:
                timeline.host_waits_for()
                paths.host |= set(paths.last.values())
        for point, node in works:
            for other in streams:
                assert timeline.behind(other, point) == paths.behind(other, node)


def test_a_later_record_does_not_reach_an_earlier_wait() -> None:
    timeline = Timeline()
    early = timeline.work(A)
    timeline.record(0, A)
    timeline.wait(B, 0)
    late = timeline.work(A)
    timeline.record(0, A)
    assert timeline.behind(B, early)
    assert not timeline.behind(B, late)


def test_what_came_before_the_first_call_counts_as_done() -> None:
    timeline = Timeline()
    timeline.wait(A, 99)
    timeline.host_waits_for(event=99)
    timeline.host_waits_for(stream=B)
    point = timeline.work(A)
    assert not timeline.behind(B, point)
    assert not timeline.done(point)
    timeline.host_waits_for()
    assert timeline.behind(B, point)
    assert timeline.done(point)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_footprints_meet_as_sets_of_bytes_do(seed: int) -> None:
    draw = random.Random(seed)

    def spans() -> list[Span]:
        return [
            (start, start + draw.randint(0, 5)) for start in (draw.randint(0, 40) for _ in range(draw.randint(0, 5)))
        ]

    def bytes_of(given: list[Span]) -> set[int]:
        return {byte for start, stop in given for byte in range(start, stop)}

    mine, theirs = (spans(), spans()), (spans(), spans())
    one, other = Footprint.of(*mine), Footprint.of(*theirs)
    reads, writes = map(bytes_of, mine)
    their_reads, their_writes = map(bytes_of, theirs)
    racing = writes & (their_reads | their_writes) | reads & their_writes
    found = one.conflict(other)
    assert (found is None) == (not racing)
    if found is not None:
        assert set(range(*found)) <= racing


# --- replays and the rest ---------------------------------------------------------------------------------------------

INPUT, OUTPUT, WEIGHT, SCRATCH = (0, 64), (100, 164), (200, 264), (300, 364)


class Machine:
    """Two graphs over one input and one scratch block, and a timeline."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self.launches = Launches(self.timeline)
        self.of = {
            G: Footprint.of([INPUT, WEIGHT], [OUTPUT, SCRATCH]),
            H: Footprint.of([INPUT, WEIGHT], [SCRATCH]),
        }
        for graph, footprint in self.of.items():
            self.launches.know(graph, footprint)

    def replay(self, graph: int, stream: int) -> bool:
        """Whether it is in order."""
        return self.launches.replay(graph, Use("replay", "", stream, f"g{graph}", self.of[graph])) is None

    def read(self, stream: int, *spans: Span) -> bool:
        return self.launches.other(Use("op", "", stream, None, Footprint.of(spans, ()))) is None

    def write(self, stream: int, *spans: Span) -> bool:
        return self.launches.other(Use("op", "", stream, None, Footprint.of((), spans))) is None

    def handed(self, source: int, target: int) -> None:
        self.timeline.record("event", source)
        self.timeline.wait(target, "event")


def test_an_output_read_on_an_unordered_stream() -> None:
    machine = Machine()
    assert machine.replay(G, A)
    assert machine.read(A, OUTPUT)
    assert not machine.read(B, OUTPUT)
    machine.handed(A, B)
    assert machine.read(B, OUTPUT)


def test_an_input_rewritten_during_a_replay() -> None:
    machine = Machine()
    assert machine.replay(G, A)
    assert not machine.write(B, INPUT)
    assert machine.read(B, INPUT)
    machine.handed(A, B)
    assert machine.write(B, INPUT)


def test_a_replay_during_a_write_of_its_input() -> None:
    machine = Machine()
    assert machine.write(B, INPUT)
    assert not machine.replay(G, A)
    machine.handed(B, A)
    assert machine.replay(G, A)


def test_a_replay_during_a_read_of_its_output() -> None:
    machine = Machine()
    assert machine.replay(G, A)
    machine.handed(A, B)
    assert machine.read(B, OUTPUT)
    assert not machine.replay(G, A)
    machine.handed(B, A)
    assert machine.replay(G, A)


def test_two_graphs_in_one_pool() -> None:
    machine = Machine()
    assert machine.replay(G, A)
    assert not machine.replay(H, B)
    machine.handed(A, B)
    assert machine.replay(H, B)


def test_look_alikes_are_clean() -> None:
    machine = Machine()
    assert machine.replay(G, A)
    assert machine.replay(H, A), "two sharers of a pool on one stream"
    assert machine.replay(G, A), "one graph launched twice"
    assert machine.replay(G, A)
    assert machine.read(B, WEIGHT), "weights are only read"
    assert machine.write(B, (64, 100)), "bytes beside the input"
    assert machine.read(B, (164, 200)), "bytes beside the output"


def test_cuda_orders_the_launches_of_one_executable() -> None:
    machine = Machine()
    assert machine.replay(G, A)
    assert machine.replay(G, B)
    assert machine.read(B, OUTPUT), "the second launch is behind the first, and B behind the second"
    assert not machine.read(A, OUTPUT)


def test_the_host_orders_too_and_then_old_uses_are_forgotten() -> None:
    machine = Machine()
    assert machine.write(B, INPUT)
    machine.timeline.host_waits_for(stream=B)
    assert machine.replay(G, A)
    assert not machine.launches._others
    assert not machine.write(B, INPUT)
    machine.timeline.host_waits_for()
    assert machine.write(B, INPUT)


def test_a_conflict_enqueues_nothing() -> None:
    machine = Machine()
    assert machine.replay(G, A)
    assert not machine.write(B, INPUT)
    assert machine.replay(G, A), "the write was refused, so there is none to be behind"


def test_a_graph_that_is_gone() -> None:
    machine = Machine()
    assert machine.replay(G, A)
    assert not machine.write(B, OUTPUT)
    machine.launches.forget(G)
    assert machine.write(B, OUTPUT)
    assert machine.write(C, OUTPUT), "work beside other work is not a replay's concern"
