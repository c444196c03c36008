"""Byte ranges of strided tensors against enumeration; the plain form of a program."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auxstream.capture.extents import Extent
from auxstream.capture.program import MOST_RUNS, Buffer, Op, Program, Record, TensorRef, Wait

BASE = 4096
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.complex64)


def touched(ref: TensorRef, base: int = BASE) -> set[int]:
    """Every byte of every element, by enumerating indices."""
    item = ref.dtype.itemsize
    found: set[int] = set()
    for index in product(*map(range, ref.size)):
        element = ref.offset + sum(i * s for i, s in zip(index, ref.stride, strict=True))
        found.update(range(base + element * item, base + (element + 1) * item))
    return found


def covered(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {byte for start, stop in ranges for byte in range(start, stop)}


@st.composite
def refs(draw: st.DrawFn) -> TensorRef:
    rank = draw(st.integers(0, 4))
    size = tuple(draw(st.integers(0, 4)) for _ in range(rank))
    stride = tuple(draw(st.integers(0, 9)) for _ in range(rank))
    return TensorRef(0, draw(st.integers(0, 5)), size, stride, draw(st.sampled_from(DTYPES)))


@settings(max_examples=1500, deadline=None)
@given(refs())
def test_ranges_are_the_bytes_touched(ref: TensorRef) -> None:
    ranges = ref.ranges(BASE)
    assert covered(ranges) == touched(ref)  # up to 4 ** 4 = MOST_RUNS runs: always exact
    assert all(start < stop for start, stop in ranges)


@pytest.mark.parametrize(
    ("make", "runs"),
    [
        (lambda: torch.empty(3, 5), 1),
        (lambda: torch.empty(3, 5).t(), 1),
        (lambda: torch.empty(4, 6)[:, 2:4], 4),
        (lambda: torch.empty(4, 6)[1:3], 1),
        (lambda: torch.empty(5).expand(7, 5), 1),
        (lambda: torch.empty(1, 5).expand(7, 5)[:, ::2], 3),
        (lambda: torch.empty(2, 3, 4).permute(2, 0, 1), 1),
        (lambda: torch.empty(10).unfold(0, 3, 1), 1),
        (lambda: torch.empty(0, 3), 0),
        (lambda: torch.empty(3, 0), 0),
        (lambda: torch.empty(()), 1),
        (lambda: torch.empty(8, dtype=torch.complex64).real, 8),
    ],
)
def test_ranges_of_real_views(make: object, runs: int) -> None:
    tensor: torch.Tensor = make()  # type: ignore[operator]
    ref = TensorRef(0, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    assert covered(ref.ranges(0)) == touched(ref, 0)
    assert len(ref.ranges(0)) == runs


@pytest.mark.parametrize("rows", [MOST_RUNS, MOST_RUNS + 1])
def test_many_runs_become_the_hull(rows: int) -> None:
    ref = TensorRef(0, 1, (rows, 2), (5, 1), torch.float32)
    ranges, bytes_ = ref.ranges(BASE), touched(ref)
    if rows <= MOST_RUNS:
        assert covered(ranges) == bytes_
    else:
        assert ranges == ((min(bytes_), max(bytes_) + 1),)


def small_program() -> Program:
    ref = TensorRef(0, 0, (4,), (1,), torch.float32)
    half = TensorRef(0, 0, (2,), (1,), torch.float32)
    steps = (
        Op(0, "write", (), {}, (), (), (ref,), "model.py:1", None),
        Record(0, "fork of a"),
        Wait(1, 1, "fork of a"),
        Op(1, "read", (), {}, (), (half, half), (), "model.py:2", "a"),
        Record(1, "end of a"),
        Op(0, "both", (), {}, (), (half,), (half,), "model.py:3", None),
        Wait(0, 4, "end of a"),
    )
    return Program(steps, (Buffer(64, 16, 0, "b"),), {0: "caller", 1: "lane0"}, 512)


def test_edges_are_stream_order_and_waits() -> None:
    assert set(small_program().edges()) == {(0, 1), (1, 5), (5, 6), (2, 3), (3, 4), (1, 2), (4, 6)}


def test_extents_are_writes_then_reads() -> None:
    program = small_program()
    assert [program.extents(step) for step in program.steps] == [
        ((Extent(64, 16), True),),
        (),
        (),
        ((Extent(64, 8), False), (Extent(64, 8), False)),
        (),
        ((Extent(64, 8), True), (Extent(64, 8), False)),
        (),
    ]


def test_without_takes_out_one_edge_only() -> None:
    program = small_program()
    for index, gone in ((2, (1, 2)), (6, (4, 6))):
        twin = program.without(index)
        assert set(twin.edges()) == set(program.edges()) - {gone}
        assert [*map(twin.extents, twin.steps)] == [*map(program.extents, program.steps)]
    with pytest.raises(AssertionError):
        program.without(0)


def test_the_text_shows_every_step() -> None:
    lines = str(small_program()).splitlines()
    assert len(lines) == 7
    assert "write() -> b0   model.py:1" in lines[0]
    assert "record fork of a" in lines[1]
    assert "lane0" in lines[2]
    assert "wait for 1 fork of a" in lines[2]
