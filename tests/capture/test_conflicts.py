"""Strided bytes, and races between them, against enumeration of every byte. No hypothesis: seeds."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch

from auxstream.bench.verify import SHAPES
from auxstream.capture import conflicts
from auxstream.capture.conflicts import Findings, find_conflicts, hazards_of
from auxstream.capture.extents import Extent, quotient, strided
from auxstream.capture.hazards import Access, Graph, find_hazards
from auxstream.capture.program import Buffer, Op, Program, TensorRef

Nodes = list[list[tuple[Extent, bool]]]
Edges = list[tuple[int, int]]


def bytes_of(extent: Extent) -> set[int]:
    found = set(range(extent.start, extent.start + extent.length))
    for stride, count in extent.repeats:
        found = {byte + stride * index for byte in found for index in range(count)}
    return found


def random_extent(draw: random.Random, memory: int) -> Extent:
    """Any strides: runs that touch, overlap, interleave, stand still."""
    rank = draw.randint(0, 3)
    size = [draw.choice([0, 1, 2, 3, 4, 4, 4, 4]) if draw.random() < 0.2 else draw.randint(1, 4) for _ in range(rank)]
    stride = [draw.choice([0, 1, 2, 3, 4, 5, 8, 16]) for _ in range(rank)]
    return strided(draw.randrange(memory), draw.choice([1, 2, 4]), size, stride)


def test_an_extent_is_its_bytes() -> None:
    draw = random.Random(1)
    for _ in range(3000):
        extent = random_extent(draw, 64)
        truth = bytes_of(extent)
        spans = extent.spans()
        assert {byte for span in spans for byte in range(*span)} == truth
        assert all(left[1] < right[0] for left, right in pairwise(spans)), spans
        assert {byte for byte in range(600) if extent.covers(byte)} == truth
        if truth:
            assert (extent.start, extent.stop) == (min(truth), max(truth) + 1)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((3, 5), (5, 1), Extent(0, 60)),
        ((3, 5), (1, 3), Extent(0, 60)),
        ((2048, 4), (8, 1), Extent(0, 16, ((32, 2048),))),
        ((4, 512, 4), (4096, 8, 1), Extent(0, 16, ((32, 2048),))),  # rows of rows at one pitch are rows
        ((2, 4, 3), (40, 8, 2), Extent(0, 4, ((8, 3), (32, 4), (160, 2)))),
        ((5, 7), (0, 1), Extent(0, 28)),
        ((4, 0), (1, 1), Extent(0, 0)),
        ((), (), Extent(0, 4)),
    ],
)
def test_dims_that_continue_one_another_are_one(
    size: tuple[int, ...], stride: tuple[int, ...], expected: Extent
) -> None:
    assert strided(0, 4, size, stride) == expected


def test_a_quotient_sorts_bytes_by_who_covers_them() -> None:
    draw = random.Random(2)
    for _ in range(1500):
        extents = [random_extent(draw, 64) for _ in range(draw.randint(0, 4))]
        start = draw.randrange(80)
        stop = start + draw.randint(1, 60)
        sorted_out = quotient(extents, start, stop)
        truth: dict[tuple[bool, ...], list[int]] = defaultdict(list)
        touched = [bytes_of(extent) for extent in extents]
        for byte in range(start, stop):
            truth[tuple(byte in one for one in touched)].append(byte)
        assert len(truth) == len(sorted_out.sizes)
        for number, size in enumerate(sorted_out.sizes):
            members = truth[tuple(number in covered for covered in sorted_out.covered)]
            assert (size, sorted_out.first[number], sorted_out.last[number]) == (
                len(members),
                members[0],
                members[-1],
            )


def random_work(draw: random.Random) -> tuple[Nodes, Edges]:
    size = draw.randint(2, 14)
    names = draw.sample(range(size), size)
    nodes: Nodes = [[] for _ in range(size)]
    edges: Edges = []
    for place in range(size):
        for _ in range(draw.choice([0, 1, 1, 2])):
            if place:
                edges.append((names[draw.randrange(max(0, place - 4), place)], names[place]))
        nodes[place] = [(random_extent(draw, 48), draw.random() < 0.4) for _ in range(draw.randint(0, 3))]
    return nodes, edges


def by_bytes(nodes: Nodes, edges: Edges) -> Counter[tuple[int, int, str]]:
    """Racing bytes per pair and kind, from the checker of ranges (see test_hazards.py) with every byte on its own."""
    accesses = tuple(tuple(Access(b, b + 1, w) for extent, w in node for b in bytes_of(extent)) for node in nodes)
    found: Counter[tuple[int, int, str]] = Counter()
    for hazard in find_hazards(Graph(accesses, tuple(edges))):
        found[hazard.first, hazard.second, hazard.kind] += hazard.nbytes
    return found


def check(nodes: Nodes, edges: Edges) -> Findings:
    findings = find_conflicts(nodes, edges)
    found: Counter[tuple[int, int, str]] = Counter()
    for conflict in findings.conflicts:
        hazard = conflict.hazard
        first, writes = nodes[hazard.first][conflict.first_touch]
        second, second_writes = nodes[hazard.second][conflict.second_touch]
        assert (writes, second_writes) == (hazard.first_writes, hazard.second_writes)
        assert hazard.start in bytes_of(first) & bytes_of(second), "the touches named do not meet there"
        found[hazard.first, hazard.second, hazard.kind] += hazard.nbytes
    assert found == by_bytes(nodes, edges)
    keys = [(c.hazard.first, c.hazard.second, c.first_touch, c.second_touch) for c in findings.conflicts]
    assert len(set(keys)) == len(keys), "one conflict for what two touches share"
    return findings


def test_conflicts_are_exact() -> None:
    racy = sum(bool(check(*random_work(random.Random(seed))).conflicts) for seed in range(1500))
    assert 300 < racy < 1300, f"{racy} of 1500 race: the generator must yield clean work and racy work"


def test_hulls_alone_would_be_wrong() -> None:
    """The twin: on the same work, hulls report races that are none, and name pairs that hide behind others."""
    wrong = 0
    for seed in range(300):
        nodes, edges = random_work(random.Random(seed))
        hulls = [[(Extent(e.start, e.stop - e.start), writes) for e, writes in node] for node in nodes]
        pairs = {(c.hazard.first, c.hazard.second) for c in find_conflicts(hulls, edges).conflicts}
        wrong += pairs != {(a, b) for a, b, _ in by_bytes(nodes, edges)}
    assert wrong > 50


# --- halves of one tensor, by columns ---------------------------------------------------------------------------------


def halves(rows: int, overlap: int = 0) -> tuple[Nodes, Edges]:
    """A caller writes [rows, 2, 256] bytes; the branch updates the left columns, the caller the right ones; joined."""
    whole = strided(4096, 1, (rows, 512), (512, 1))
    left = strided(4096, 1, (rows, 256 + overlap), (512, 1))
    right = strided(4096 + 256, 1, (rows, 256), (512, 1))
    nodes: Nodes = [[(whole, True)], [(left, True), (left, False)], [(right, True), (right, False)], [(whole, False)]]
    return nodes, [(0, 1), (0, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("rows", [2, 256, 257, 2048, 100_000])
def test_columns_side_by_side_do_not_race(rows: int) -> None:
    assert find_conflicts(*halves(rows)) == Findings((), ())


@pytest.mark.parametrize("rows", [2, 257, 2048])
def test_columns_that_overlap_race_once_per_pair(rows: int) -> None:
    found = find_conflicts(*halves(rows, overlap=3))
    kinds = [(c.hazard.first, c.hazard.second, c.hazard.kind, c.hazard.nbytes) for c in found.conflicts]
    assert sorted(kinds) == [(1, 2, "write/read", 3 * rows), (1, 2, "write/write", 3 * rows)]
    assert {c.hazard.start for c in found.conflicts} == {4096 + 256}


def test_a_write_by_columns_hides_nothing_between_them() -> None:
    """A hull resets the history of the bytes between its runs. Left is written on one stream, then right on another
    after it; then someone else touches left, ordered after right alone: a race that dropped pairs would not show."""
    left, right = strided(0, 1, (2048, 4), (8, 1)), strided(4, 1, (2048, 4), (8, 1))
    nodes: Nodes = [[(left, True)], [(right, True)], [(left, False)]]
    assert [(c.hazard.first, c.hazard.second) for c in find_conflicts(nodes, [(1, 2)]).conflicts] == [(0, 2)]
    assert find_conflicts(nodes, [(0, 1), (1, 2)]).conflicts == ()


def test_past_the_limit_hulls_decide_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conflicts, "MOST_RUNS", 4000)
    assert find_conflicts(*halves(1000)) == Findings((), ())
    found = find_conflicts(*halves(2048))
    assert found.hulls == ((4096 + 256, 4096 + 2048 * 512 - 256),)
    assert {(c.hazard.first, c.hazard.second) for c in found.conflicts} == {(1, 2)}


def test_exactness_costs_little() -> None:
    """Thirty layers of [8192, N] halves, blocks reused: were rows listed one by one, this would take minutes."""
    nodes: Nodes = []
    edges: Edges = []
    for layer in range(30):
        shape, base = halves(8192)[0], len(nodes)
        nodes += shape
        edges += [(base + a, base + b) for a, b in halves(8192)[1]] + [(base - 1, base)] * (layer > 0)
    started = time.perf_counter()
    assert find_conflicts(nodes, edges).conflicts == ()
    assert time.perf_counter() - started < 1.0, "typical is a hundredth of a second"
    assert find_conflicts(nodes, [edge for edge in edges if edge != (56, 57)]).conflicts


def test_hazards_of_a_program_names_steps_and_touches() -> None:
    def ref(offset: int, columns: int) -> TensorRef:
        return TensorRef(0, offset, (2048, columns), (8, 1), torch.float32)

    def op(stream: int, reads: tuple[TensorRef, ...], writes: tuple[TensorRef, ...]) -> Op:
        return Op(stream, "op", (), {}, (), reads, writes, "model.py:1", None)

    def program(columns: int) -> Program:
        steps = (op(0, (), (ref(0, 4),)), op(1, (ref(6, 1), ref(4, columns)), (ref(7, 1),)))
        return Program(steps, (Buffer(4096, 2048 * 32, None, "x"),), {0: "caller", 1: "lane0"}, 0)

    assert hazards_of(program(2)).conflicts == ()
    steps = program(5).steps[1]
    assert isinstance(steps, Op)
    (conflict,) = hazards_of(program(5)).conflicts
    assert (conflict.hazard.first, conflict.hazard.second, conflict.hazard.kind) == (0, 1, "write/read")
    assert (conflict.first_touch, conflict.second_touch) == (0, 2), "one write, then the second read"
    assert conflict.hazard.nbytes == 2047 * 4, "a row's fifth column from its half is the next row's first"


# --- scale: a proof of 10,000 nodes takes under a second, of 100,000 under six; slow machines get twice as long -------


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_thousand_nodes(shape: str) -> None:
    work = SHAPES[shape](10_000)
    started = time.perf_counter()
    assert find_conflicts(work.nodes, work.edges).conflicts == ()
    assert time.perf_counter() - started < 2.0, "typical is a fifth of a second"
    stream_order = [(a, b) for a, b in work.edges if b == a + 1]
    assert find_conflicts(work.nodes[:500], [edge for edge in stream_order if edge[1] < 500][::2]).conflicts


@pytest.mark.parametrize("shape", ["decoder", "cache rows", "columns"])
def test_a_hundred_thousand_nodes(shape: str) -> None:
    work = SHAPES[shape](100_000)
    started = time.perf_counter()
    assert find_conflicts(work.nodes, work.edges).conflicts == ()
    assert time.perf_counter() - started < 12.0, "typical is two seconds"
