"""Who may read what: which streams a block was handed to, and what each stream is ordered behind, while recording.

Enters: the recorder's steps, one by one. Leaves: a verdict on each read. Invariant: clocks follow exactly the records
and waits of the program.

A stream reads a block safely, as far as its lifetime goes, if it allocated the block, was handed it (declared at fork,
returned at join), or if the block comes from outside and the graph keeps it alive. Any other read gets the lifetime
handoff and a warning when it is at least ordered behind the block's last write; when it is not, it is an error.
"""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """What a read of a block is."""

    FINE = 0
    UNDECLARED = 1
    """Ordered behind the last write, but nothing keeps the block from being reused."""
    UNORDERED = 2


class Handing:
    """Vector clocks over streams, and the streams each buffer was handed to."""

    def __init__(self) -> None:
        self._clocks: dict[int, dict[int, int]] = {}
        self._marks: dict[int, dict[int, int]] = {}  # record step -> clock
        self._handed: dict[int, set[int]] = {}
        self._written: dict[int, tuple[int, int]] = {}  # buffer -> (stream, position) of its last write

    def step(self, stream: int) -> None:
        """Something was enqueued on `stream`."""
        clock = self._clocks.setdefault(stream, {})
        clock[stream] = clock.get(stream, 0) + 1

    def used(self, stream: int) -> bool:
        """Whether anything was."""
        return stream in self._clocks

    def mark(self, record: int, stream: int) -> None:
        """Step `record` is an event record on `stream`."""
        self._marks[record] = dict(self._clocks[stream])

    def wait(self, stream: int, record: int) -> None:
        """`stream` waits for it."""
        clock = self._clocks[stream]
        for other, position in self._marks[record].items():
            clock[other] = max(clock.get(other, 0), position)

    def hand(self, buffer: int, stream: int) -> None:
        """`stream` may read `buffer` from now on."""
        self._handed.setdefault(buffer, set()).add(stream)

    def wrote(self, buffer: int, stream: int) -> None:
        """The last step of `stream` wrote `buffer`."""
        self._written[buffer] = (stream, self._clocks[stream][stream])

    def last_writer(self, buffer: int) -> int:
        """The stream that wrote it last; something did."""
        return self._written[buffer][0]

    def judge(self, buffer: int, allocated_on: int | None, stream: int) -> Verdict:
        """A step about to be enqueued on `stream` reads `buffer`, which `allocated_on` allocated (None: outside)."""
        if allocated_on is None or allocated_on == stream or stream in self._handed.get(buffer, ()):
            return Verdict.FINE
        writer, position = self._written.get(buffer, (stream, 0))
        ordered = self._clocks.get(stream, {}).get(writer, 0) >= position
        return Verdict.UNDECLARED if ordered else Verdict.UNORDERED
