"""The proof: captured work is free of cross-stream races, or here is each one.

Enters: a `CapturedGraph`, a `Program`, or `Evidence` of any origin. Leaves: a `Report` that reads well and says what it
took for granted. The judgement itself is capture/hazards.py; this file turns node numbers back into ops, tensors,
lines, and the edge whose absence matters.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .evidence import Evidence, Node, from_program
from .hazards import Access, Graph, Hazard, find_hazards
from .program import Program


class HasEvidence(Protocol):
    """A captured graph."""

    @property
    def evidence(self) -> Evidence: ...


@dataclass(frozen=True, slots=True)
class Party:
    """One side of a race: an op, its stream and region, and how it touches the bytes.

    `node` is its position in `Report.nodes`; `kernel` the device's name for it, where the graph was read back.
    """

    op: str
    stream: str
    region: str | None
    line: str
    writes: bool
    buffer: str
    node: int
    kernel: str = ""

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
        nodes: what was checked: ops of a program, or nodes of a CUDA graph, in the order they were enqueued.
        edges: what orders them, as positions in `nodes`.
    """

    races: tuple[Race, ...]
    unattributed: tuple[str, ...]
    assumptions: tuple[str, ...]
    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]

    @property
    def ok(self) -> bool:
        """No race, and nothing unexplained."""
        return not self.races and not self.unattributed

    def __str__(self) -> str:
        work = [node for node in self.nodes if node.line or node.kernel]
        what = "nodes of the CUDA graph" if any(node.kernel for node in work) else "ops"
        head = f"{len(work)} {what}, {len(self.edges)} ordering edges: "
        if self.ok:
            head += "no race"
        else:
            head += f"{len(self.races)} race(s), {len(self.unattributed)} unattributed"
        lines = [head, *map(str, self.races)]
        lines += [f"unattributed: {item}" for item in self.unattributed]
        lines += [f"assumed: {item}" for item in self.assumptions]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything but the nodes' bytes, for other tools."""
        nodes = [
            {"op": node.name, "kernel": node.kernel, "stream": node.stream, "region": node.region, "line": node.line}
            for node in self.nodes
        ]
        found: dict[str, Any] = {
            "ok": self.ok,
            "races": [asdict(race) for race in self.races],
            "unattributed": self.unattributed,
            "assumptions": self.assumptions,
            "nodes": nodes,
            "edges": self.edges,
        }
        return json.dumps(found, indent=1)


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
    races = tuple(_race(evidence, hazard) for hazard in find_hazards(_graph(evidence)))
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


def _race(evidence: Evidence, hazard: Hazard) -> Race:
    # Nodes are numbered as they were enqueued, which is the order the author meant.
    early, late = sorted((hazard.first, hazard.second))
    first, first_buffer = _party(evidence, early, hazard.start)
    second, second_buffer = _party(evidence, late, hazard.start)
    reuse = first_buffer != second_buffer
    missing = f"a wait on {second.stream} for {first.stream} after `{first.op}`, before `{second.op}`"
    if reuse:
        missing += "; or record_stream / a held reference that keeps the old tensor's block from being reused"
    return Race(first, second, hazard.stop - hazard.start, reuse, missing, hazard)


def _party(evidence: Evidence, index: int, byte: int) -> tuple[Party, int]:
    node = evidence.nodes[index]
    for ref, writes in node.touches:  # writes come first
        buffer = evidence.buffers[ref.buffer]
        if any(start <= byte < stop for start, stop in ref.ranges(buffer.address)):
            party = Party(node.name, node.stream, node.region, node.line, writes, buffer.label, index, node.kernel)
            return party, ref.buffer
    raise AssertionError(f"node {index} does not touch byte {byte:#x}")
