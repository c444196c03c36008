"""What a compiled model keeps, in bytes, per bucket, pool and stream.

Enters: its graphs by bucket, and the memory of its inputs. Leaves: a `Ledger`. Invariant: a byte of the pool that
several buckets use counts once in the pool, and once in each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .graphs import CapturedGraph
from .program import Program

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One bucket (None: a model of one shape; text: a phase, and its bucket): what its capture `added` to the pool, and
    what it uses of the pool by the stream that allocated it."""

    bucket: int | str | None
    added: int
    streams: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Ledger:
    """All in bytes.

    Attributes:
        buckets: in the order of their captures.
        pool: reserved by the pool that they share.
        streams: of the pool, what some bucket uses, by stream.
        inputs: of the memory that calls copy into, which is not the pool's.
    """

    buckets: tuple[Entry, ...]
    pool: int
    streams: Mapping[str, int]
    inputs: int

    @property
    def total(self) -> int:
        return self.pool + self.inputs

    def __str__(self) -> str:
        names = list(self.streams)
        rows = [
            ("", *names, "added to the pool"),
            *((_name(e.bucket), *(f"{e.streams.get(n, 0):,}" for n in names), f"{e.added:,}") for e in self.buckets),
            ("pool", *(f"{self.streams[name]:,}" for name in names), f"{self.pool:,} reserved"),
            ("inputs", *("" for _ in names), f"{self.inputs:,}"),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(["bytes, by the stream that allocated them", *lines])


def ledger(graphs: Mapping[Any, CapturedGraph], inputs: Iterable[Tensor]) -> Ledger:
    """`graphs` in the order of their captures, all of one pool."""
    entries: list[Entry] = []
    used: dict[str, list[Span]] = {}
    pool = 0
    for bucket, graph in graphs.items():
        programs = graph.programs
        if not programs:
            continue
        spans = _spans(programs)
        # What the simulated machine says is the size of the pool; a device says what the capture added.
        added = graph.memory.reserved if programs[0].pool is None else graph.memory.reserved - pool
        pool += added
        entries.append(Entry(bucket, added, {stream: _bytes(found) for stream, found in spans.items()}))
        for stream, found in spans.items():
            used.setdefault(stream, []).extend(found)
    streams = {stream: _bytes(found) for stream, found in used.items()}
    return Ledger(tuple(entries), pool, streams, sum(tensor.nbytes for tensor in inputs))


def _name(bucket: int | str | None) -> str:
    return bucket if isinstance(bucket, str) else "graph" if bucket is None else f"bucket {bucket}"


def _spans(programs: Iterable[Program]) -> dict[str, list[Span]]:
    """Addresses of the pool that programs use, by stream."""
    found: dict[str, list[Span]] = {}
    for program in programs:
        for buffer in program.buffers:
            if buffer.stream is not None:
                name = program.stream_names.get(buffer.stream, str(buffer.stream))
                found.setdefault(name, []).append((buffer.address, buffer.address + buffer.nbytes))
    return found


def _bytes(spans: Sequence[Span]) -> int:
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
