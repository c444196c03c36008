"""The proof: captured work is free of cross-stream races, or here is each one.

Enters: a `CapturedGraph`, a `Program`, or `Evidence` of any origin. Leaves: a `Report` that reads well and says what it
took for granted. The judgement itself is capture/hazards.py; this file turns node numbers back into ops, tensors,
lines, and the edge whose absence matters.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

from .evidence import Evidence, from_program
from .hazards import Access, Graph, Hazard, find_hazards
from .program import Program
from .report import Party, Race, Report

Lives: TypeAlias = dict[int, tuple[str, str]]
"""Per buffer, the lines where it was made and last used."""


class HasEvidence(Protocol):
    """A captured graph."""

    @property
    def evidence(self) -> Evidence: ...


def verify(graph: Program | Evidence | HasEvidence) -> Report:
    """Check every pair of ops that share bytes, at least one writing, for an ordering path between them.

    Args:
        graph: a captured graph, a program, or evidence.
    """
    match graph:
        case Evidence():
            evidence = graph
        case Program():
            evidence = from_program(graph)
        case _:
            evidence = graph.evidence
    hazards = find_hazards(_graph(evidence))
    lives = _lives(evidence) if hazards else {}
    races = tuple(_race(evidence, lives, hazard) for hazard in hazards)
    return Report(races, evidence.unattributed, evidence.assumptions, evidence.nodes, evidence.edges)


def not_checked(program: Program) -> Report:
    """The report of a graph nobody checked: it says so, and is not `ok`."""
    evidence = from_program(program)
    why = ("the whole graph: captured with verify='off'",)
    return Report((), why, (), evidence.nodes, evidence.edges)


def _graph(evidence: Evidence) -> Graph:
    """The plain form the hazards checker takes."""
    accesses: list[tuple[Access, ...]] = []
    for node in evidence.nodes:
        found: dict[tuple[int, int, bool], None] = {}
        for ref, writes in node.touches:
            for start, stop in ref.ranges(evidence.buffers[ref.buffer].address):
                found[(start, stop, writes)] = None
        accesses.append(tuple(Access(*key) for key in found))
    return Graph(tuple(accesses), evidence.edges)


def _lives(evidence: Evidence) -> Lives:
    """Of the buffers that nodes touch; memory from outside was made nowhere."""
    lives: Lives = {}
    for node in evidence.nodes:
        for ref, _ in node.touches:
            made = "" if evidence.buffers[ref.buffer].stream is None else node.line
            lives[ref.buffer] = (lives.get(ref.buffer, (made, ""))[0], node.line)
    return lives


def _race(evidence: Evidence, lives: Lives, hazard: Hazard) -> Race:
    # Nodes are numbered as they were enqueued, which is the order the author meant.
    early, late = sorted((hazard.first, hazard.second))
    first, first_buffer = _party(evidence, lives, early, hazard.start)
    second, second_buffer = _party(evidence, lives, late, hazard.start)
    reuse = first_buffer != second_buffer
    missing = f"a wait on {second.stream} for {first.stream}, after {first.named} and before {second.named}"
    if reuse:
        missing += "; or record_stream / a held reference that keeps the old tensor's block from being reused"
    return Race(first, second, hazard.stop - hazard.start, reuse, missing, hazard)


def _party(evidence: Evidence, lives: Lives, index: int, byte: int) -> tuple[Party, int]:
    node = evidence.nodes[index]
    for ref, writes in node.touches:  # writes come first
        buffer = evidence.buffers[ref.buffer]
        if any(start <= byte < stop for start, stop in ref.ranges(buffer.address)):
            op = (node.name, node.stream, node.region, node.line, writes)
            return Party(*op, buffer.label, index, node.kernel, *lives[ref.buffer]), ref.buffer
    raise AssertionError(f"node {index} does not touch byte {byte:#x}")
