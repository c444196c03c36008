"""The recorded program: what a model did, on which stream, to which bytes, in plain data.

Enters: nothing; capture/record.py fills it. Leaves: `Program`, which capture/simulate.py executes, capture/proof.py
checks (through capture/evidence.py), and people read (`str`). Invariant: steps stand in program order, the order in
which the host enqueued them; a `Wait` names the `Record` it waits for, as CUDA binds it at the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .extents import Extent, strided


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of the program: a strided window on a buffer. `offset`, `size`, `stride` are in elements; `conj` and
    `neg` are torch's lazy conjugation and negation."""

    buffer: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    conj: bool = False
    neg: bool = False

    def extent(self, base: int) -> Extent:
        """The bytes it covers, with the buffer at address `base`."""
        item = self.dtype.itemsize
        return strided(base + self.offset * item, item, self.size, self.stride)

    def ranges(self, base: int) -> tuple[tuple[int, int], ...]:
        """The same as [start, stop): exact up to MOST_RUNS runs, else the hull."""
        extent = self.extent(base)
        return extent.spans() if extent.runs <= MOST_RUNS else ((extent.start, extent.stop),)


MOST_RUNS = 256
"""`TensorRef.ranges` lists no more separate runs than this: more conservative, never less."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One storage. `address` is where it lies (the allocator model's, or the GPU's own); `stream` allocated it,
    None for memory from outside the program; `label` names the op that made it, or the outside tensor."""

    address: int
    nbytes: int
    stream: int | None
    label: str


@dataclass(frozen=True, slots=True)
class Op:
    """An atomic operation. `args` and `kwargs` hold `TensorRef`s in place of tensors; `fresh` are the outputs it
    allocates (None where an output aliases an argument); `reads` and `writes` are all refs it touches."""

    stream: int
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fresh: tuple[TensorRef | None, ...]
    reads: tuple[TensorRef, ...]
    writes: tuple[TensorRef, ...]
    line: str
    region: str | None

    @property
    def name(self) -> str:
        return str(self.func).removeprefix("aten.")


@dataclass(frozen=True, slots=True)
class Record:
    """A point on a stream that others may wait for; `what` says which (fork or done, and of which region)."""

    stream: int
    what: str


@dataclass(frozen=True, slots=True)
class Wait:
    """`stream` waits for the `Record` at step `source`."""

    stream: int
    source: int
    what: str


Step = Op | Record | Wait


@dataclass(frozen=True, slots=True)
class Program:
    """A whole recording. `pool` is the allocator model that placed its buffers, None where a device did: programs of
    one pool share memory."""

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    stream_names: Mapping[int, str]
    arena_bytes: int
    pool: object | None = None

    def edges(self) -> tuple[tuple[int, int], ...]:
        """Every ordering edge: stream order, and record -> wait."""
        edges: list[tuple[int, int]] = []
        last: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            if step.stream in last:
                edges.append((last[step.stream], index))
            last[step.stream] = index
            if isinstance(step, Wait):
                edges.append((step.source, index))
        return tuple(edges)

    def extents(self, step: Step) -> tuple[tuple[Extent, bool], ...]:
        """The bytes a step touches, and whether it writes them."""
        if not isinstance(step, Op):
            return ()
        return tuple(
            (ref.extent(self.buffers[ref.buffer].address), writes)
            for refs, writes in ((step.writes, True), (step.reads, False))
            for ref in refs
        )

    def without(self, index: int) -> Program:
        """The program with the wait at `index` taken out: the twin that every safety test must see fail."""
        step = self.steps[index]
        assert isinstance(step, Wait), step
        gone = Record(step.stream, f"{step.what} (wait removed)")
        return replace(self, steps=(*self.steps[:index], gone, *self.steps[index + 1 :]))

    def __str__(self) -> str:
        lines: list[str] = []
        for index, step in enumerate(self.steps):
            head = f"{index:5d} {self.stream_names.get(step.stream, step.stream)!s:8}"
            match step:
                case Op():
                    made = ", ".join(f"b{ref.buffer}" for ref in step.writes)
                    read = ", ".join(f"b{ref.buffer}" for ref in step.reads)
                    lines.append(f"{head} {step.name}({read}) -> {made}   {step.line}")
                case Record():
                    lines.append(f"{head} record {step.what}")
                case Wait():
                    lines.append(f"{head} wait for {step.source} {step.what}")
        return "\n".join(lines)
