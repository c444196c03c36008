"""The allocator model against brute force: sets of granules, and maximal runs found by counting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auxstream.capture.allocator import BASE, GRANULE, AllocatorModel

STREAMS = 3
Step = tuple[str, int, int]  # what, stream or who, bytes


class BruteForce:
    """Watches an allocator and raises AssertionError on the first answer that breaks a rule."""

    def __init__(self, model: AllocatorModel) -> None:
        self.model = model
        self.live: dict[int, tuple[int, int, set[int]]] = {}  # address -> (granules, stream, recorded streams)
        self.free: list[set[int]] = [set() for _ in range(STREAMS)]  # per stream, granule numbers
        self.top = 0
        self.reused = 0

    def runs(self, stream: int) -> list[tuple[int, int]]:
        """Maximal runs of free granules, as (length, first)."""
        free = self.free[stream]
        starts = [g for g in free if g - 1 not in free]
        return [(next(n for n in range(1, self.top + 2) if g + n not in free), g) for g in starts]

    def allocate(self, stream: int, nbytes: int) -> int:
        granules = max(1, (nbytes + GRANULE - 1) // GRANULE)
        fitting = [run for run in self.runs(stream) if run[0] >= granules]
        address = self.model.allocate(stream, nbytes)
        first, rest = divmod(address - BASE, GRANULE)
        assert rest == 0, "blocks start at granules"
        taken = set(range(first, first + granules))
        for other, (size, _, _) in self.live.items():
            start = (other - BASE) // GRANULE
            assert not taken & set(range(start, start + size)), "two live blocks overlap"
        if fitting:
            assert taken <= self.free[stream], "a free block of this stream that fits is reused at once"
            assert first == min(fitting)[1], "the smallest that fits, the lowest of these"
            self.reused += 1
        else:
            assert first == self.top, "fresh memory comes from the top: never another stream's block"
            self.top += granules
        self.free[stream] -= taken
        self.live[address] = (granules, stream, set())
        assert self.model.reserved == self.top * GRANULE
        return address

    def record(self, address: int, stream: int) -> None:
        self.model.record_use(address, stream)
        self.live[address][2].add(stream)

    def release(self, address: int) -> None:
        self.model.free(address)
        size, stream, users = self.live.pop(address)
        if not users - {stream}:  # recorded blocks are never seen again
            first = (address - BASE) // GRANULE
            self.free[stream] |= set(range(first, first + size))

    def play(self, steps: list[Step]) -> None:
        for what, which, nbytes in steps:
            if what == "allocate":
                self.allocate(which % STREAMS, nbytes)
            elif self.live:
                address = sorted(self.live)[which % len(self.live)]
                if what == "record":
                    self.record(address, nbytes % STREAMS)
                else:
                    self.release(address)


step = st.tuples(
    st.sampled_from(["allocate", "allocate", "free", "free", "record"]), st.integers(0, 30), st.integers(0, 5 * GRANULE)
)


@settings(max_examples=500, deadline=None)
@given(st.lists(step, max_size=40))
def test_agrees_with_brute_force(steps: list[Step]) -> None:
    BruteForce(AllocatorModel()).play(steps)


class NoRecording(AllocatorModel):
    """Forgets `record_stream`."""

    def record_use(self, address: int, stream: int) -> None: ...


class OneFreeList(AllocatorModel):
    """Lets any stream take any stream's block."""

    def allocate(self, stream: int, nbytes: int) -> int:
        return super().allocate(0, nbytes)


class NoReuse(AllocatorModel):
    """Never gives a block back: no hazard would ever show."""

    def free(self, address: int) -> None:
        self._live.pop(address)


class NoMerging(AllocatorModel):
    """Keeps freed neighbours apart."""

    def free(self, address: int) -> None:
        block = self._live.pop(address)
        if not block.users:
            self._free[block.stream].append((address, block.size))
            self._free[block.stream].sort()


@pytest.mark.parametrize(
    ("wrong", "steps"),
    [
        (NoRecording, [("allocate", 0, 8), ("record", 0, 1), ("free", 0, 0), ("allocate", 0, 8)]),
        (OneFreeList, [("allocate", 0, 8), ("free", 0, 0), ("allocate", 1, 8)]),
        (NoReuse, [("allocate", 0, 8), ("free", 0, 0), ("allocate", 0, 8)]),
        (NoMerging, [("allocate", 0, 8), ("allocate", 0, 8), ("free", 0, 0), ("free", 0, 0), ("allocate", 0, 1000)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_brute_force_catches_a_wrong_model(wrong: type[AllocatorModel], steps: list[Step]) -> None:
    BruteForce(AllocatorModel()).play(steps)
    with pytest.raises(AssertionError):
        BruteForce(wrong()).play(steps)


def test_the_generator_reuses_blocks() -> None:
    import random

    rng = random.Random(3)
    watched = BruteForce(AllocatorModel())
    kinds = ["allocate", "free", "free", "record"]
    steps = [("allocate" if i % 2 else rng.choice(kinds), rng.randrange(31), rng.randrange(3000)) for i in range(2000)]
    watched.play(steps)
    assert watched.reused > 300


def test_freed_blocks_merge_on_both_sides() -> None:
    model = AllocatorModel()
    a, b, c, d = (model.allocate(0, GRANULE) for _ in range(4))
    for address in (a, c, b):
        model.free(address)
    assert model.allocate(0, 3 * GRANULE) == a
    model.free(d)
    assert model.allocate(1, GRANULE) == BASE + 4 * GRANULE, "another stream's free blocks are not for lane 1"
    assert model.allocate(0, 1) == d


def test_recording_the_owner_changes_nothing() -> None:
    model = AllocatorModel()
    a = model.allocate(2, 100)
    model.record_use(a, 2)
    model.free(a)
    assert model.allocate(2, 100) == a


def test_the_end_of_a_recording_gives_back_what_was_deferred() -> None:
    model = AllocatorModel()
    first, second, kept = (model.allocate(0, GRANULE) for _ in range(3))
    for address in (first, second):
        model.record_use(address, 1)
        model.free(address)
    assert model.allocate(0, GRANULE) not in (first, second), "not while the recording goes on"
    model.end_recording()
    assert model.allocate(0, 2 * GRANULE) == first, "both, as one"
    model.end_recording()
    assert model.allocate(0, GRANULE) not in (first, second, kept), "once"
