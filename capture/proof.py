"""The proof: a recorded program is free of cross-stream races, or here is each one.

Enters: a `Program`, or anything that has one (`CapturedGraph`). Leaves: a `Report` that reads well and says what it
took for granted. The judgement itself is capture/hazards.py; this file turns node numbers back into ops, tensors,
lines, and the edge whose absence matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from .hazards import Hazard, find_hazards
from .program import Op, Program

OP_LEVEL: Final = (
    "ops access what their schemas declare, and nothing else",
    "memory an op takes and frees inside itself (library workspaces) is not seen",
)


class HasProgram(Protocol):
    """A captured graph."""

    @property
    def program(self) -> Program: ...


@dataclass(frozen=True, slots=True)
class Party:
    """One side of a race: an op, its stream and region, and how it touches the bytes."""

    op: str
    stream: str
    region: str | None
    line: str
    writes: bool
    buffer: str

    def __str__(self) -> str:
        where = f"{self.stream}, region {self.region}" if self.region else self.stream
        verb = "writes" if self.writes else "reads"
        return f"`{self.op}` on {where} {verb} the block of `{self.buffer}`, at {self.line}"


@dataclass(frozen=True, slots=True)
class Race:
    """Two ops touch the same `nbytes` bytes in no fixed order; `reuse` when the block changed hands between them."""

    first: Party
    second: Party
    nbytes: int
    reuse: bool
    missing: str
    hazard: Hazard

    def __str__(self) -> str:
        what = "reused block" if self.reuse else "shared tensor"
        return f"race on a {what} ({self.nbytes:,} bytes)\n  {self.first}\n  {self.second}\n  missing: {self.missing}"


@dataclass(frozen=True, slots=True)
class Report:
    """What was proved.

    Attributes:
        races: pairs of ops in no fixed order on the same bytes; empty is what `ok` needs.
        unattributed: work the checker cannot explain; fails the proof as a race does.
        assumptions: what the proof takes for granted.
        ops, edges: size of what was checked.
    """

    races: tuple[Race, ...]
    unattributed: tuple[str, ...]
    assumptions: tuple[str, ...]
    ops: int
    edges: int

    @property
    def ok(self) -> bool:
        """No race, and nothing unexplained."""
        return not self.races and not self.unattributed

    def __str__(self) -> str:
        head = f"{self.ops} ops, {self.edges} ordering edges: "
        if self.ok:
            head += "no race"
        else:
            head += f"{len(self.races)} race(s), {len(self.unattributed)} unattributed"
        lines = [head, *map(str, self.races)]
        lines += [f"unattributed: {item}" for item in self.unattributed]
        lines += [f"assumed: {item}" for item in self.assumptions]
        return "\n".join(lines)


def verify(graph: Program | HasProgram) -> Report:
    """Check every pair of ops that share bytes, at least one writing, for an ordering path between them.

    Args:
        graph: a program, or a captured graph that holds one.
    """
    program = graph if isinstance(graph, Program) else graph.program
    plain = program.graph()
    races = tuple(_race(program, hazard) for hazard in find_hazards(plain))
    known = set(program.stream_names)
    strangers = [step for step in program.steps if step.stream not in known]
    unattributed = tuple(
        dict.fromkeys(
            f"`{step.name}` ran on a stream no region opened, at {step.line}"
            for step in strangers
            if isinstance(step, Op)
        )
    )
    ops = sum(isinstance(step, Op) for step in program.steps)
    return Report(races, unattributed, OP_LEVEL, ops, len(plain.edges))


def not_checked(program: Program) -> Report:
    """The report of a graph nobody checked: it says so, and is not `ok`."""
    ops = sum(isinstance(step, Op) for step in program.steps)
    return Report((), ("the whole graph: captured with verify='off'",), (), ops, len(program.edges()))


def _race(program: Program, hazard: Hazard) -> Race:
    # Steps are numbered in program order, which is the order the author meant.
    early, late = sorted((hazard.first, hazard.second))
    first, first_buffer = _party(program, early, hazard.start)
    second, second_buffer = _party(program, late, hazard.start)
    reuse = first_buffer != second_buffer
    missing = f"a wait on {second.stream} for {first.stream} after `{first.op}`, before `{second.op}`"
    if reuse:
        missing += "; or record_stream / a held reference that keeps the old tensor's block from being reused"
    return Race(first, second, hazard.stop - hazard.start, reuse, missing, hazard)


def _party(program: Program, index: int, byte: int) -> tuple[Party, int]:
    op = program.steps[index]
    assert isinstance(op, Op), op
    for refs, writes in ((op.writes, True), (op.reads, False)):
        for ref in refs:
            for start, stop in ref.ranges(program.buffers[ref.buffer].address):
                if start <= byte < stop:
                    stream = program.stream_names.get(op.stream, f"stream {op.stream:#x}")
                    label = program.buffers[ref.buffer].label
                    return Party(op.name, stream, op.region, op.line, writes, label), ref.buffer
    raise AssertionError(f"step {index} does not touch byte {byte:#x}")
