"""The proof: captured work is free of cross-stream races, or here is each one.

Enters: a `CapturedGraph`, a `Program`, or `Evidence` of any origin. Leaves: a `Report` that reads well and says what it
took for granted. The judgement itself is capture/conflicts.py; this file turns node numbers back into ops, tensors,
lines, and the edge whose absence matters.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

from ..runtime.errors import CaptureError
from .conflicts import Conflict, hazards_of
from .evidence import Evidence, from_program
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
        graph: a captured graph, a compiled model, a program, or evidence.

    Returns:
        the report; `ok` if no pair lacks a path and every node is explained.

    Raises:
        CaptureError: anything else.
    """
    match graph:
        case Evidence():
            evidence = graph
        case Program():
            evidence = from_program(graph)
        case _:
            evidence = _evidence_of(graph)
    findings = hazards_of(evidence)
    lives = _lives(evidence) if findings.conflicts else {}
    races = tuple(_race(evidence, lives, conflict) for conflict in findings.conflicts)
    hulls = (
        f"{stop - start:,} bytes have too many strided runs: tensors on them count whole"
        for start, stop in findings.hulls
    )
    return Report(races, evidence.unattributed, (*evidence.assumptions, *hulls), evidence.nodes, evidence.edges)


def _evidence_of(graph: object) -> Evidence:
    graph = getattr(graph, "graph", graph)  # a compiled model's
    evidence = getattr(graph, "evidence", None)
    if not isinstance(evidence, Evidence):
        raise CaptureError(
            "verify() was given something that was not captured",
            expected="a CapturedGraph, a CompiledModel, a Program or Evidence",
            came=f"a {type(graph).__name__}",
            remedy="capture the work: with auxstream.graph() as g: ..., then verify(g)",
        )
    return evidence


def not_checked(program: Program) -> Report:
    """The report of a graph nobody checked: it says so, and is not `ok`."""
    evidence = from_program(program)
    why = ("the whole graph: captured with verify='off'",)
    return Report((), why, (), evidence.nodes, evidence.edges)


def _lives(evidence: Evidence) -> Lives:
    """Of the buffers that nodes touch; memory from outside was made nowhere."""
    lives: Lives = {}
    for node in evidence.nodes:
        for ref, _ in node.touches:
            made = "" if evidence.buffers[ref.buffer].stream is None else node.line
            lives[ref.buffer] = (lives.get(ref.buffer, (made, ""))[0], node.line)
    return lives


def _race(evidence: Evidence, lives: Lives, conflict: Conflict) -> Race:
    hazard = conflict.hazard
    sides = [(hazard.first, conflict.first_touch), (hazard.second, conflict.second_touch)]
    # Nodes are numbered as they were enqueued, which is the order the author meant.
    (first, first_buffer), (second, second_buffer) = (_party(evidence, lives, *side) for side in sorted(sides))
    reuse = first_buffer != second_buffer
    missing = f"a wait on {second.stream} for {first.stream}, after {first.named} and before {second.named}"
    if reuse:
        missing += "; or record_stream / a held reference that keeps the old tensor's block from being reused"
    return Race(first, second, hazard.nbytes, reuse, missing, hazard)


def _party(evidence: Evidence, lives: Lives, index: int, touch: int) -> tuple[Party, int]:
    node = evidence.nodes[index]
    ref, writes = node.touches[touch]
    op = (node.name, node.stream, node.region, node.line, writes)
    label = evidence.buffers[ref.buffer].label
    return Party(*op, label, index, node.kernel, *lives[ref.buffer]), ref.buffer
