"""What a proof found: as text for people, as JSON for tools, as a picture of who waits for whom.

Enters: what capture/proof.py found. Leaves: `Report`. Invariant: only a report with no race and nothing unexplained
says "no race"; no form of it says more than that.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from .evidence import Node
from .hazards import Hazard

SCHEMA: Final = 1
"""Version of the JSON form; it changes when a key changes its meaning or goes away."""

MOST_SHOWN: Final = 20
"""Races that the text spells out; the JSON has all of them."""


@dataclass(frozen=True, slots=True)
class Party:
    """One side of a race: an op, its stream and region, and how it touches the bytes.

    Attributes:
        op, stream, region, line: of the op.
        kernel: the device's name for it, where the graph was read back.
        node: its position in `Report.nodes`.
        writes: whether it writes the bytes.
        buffer: what the memory was to this op: the op that made the tensor, or where it comes from.
        made: line of the op that made the tensor; empty for memory from outside.
        last_use: line of the op enqueued last of those that touch the tensor.
    """

    op: str
    stream: str
    region: str | None
    line: str
    writes: bool
    buffer: str
    node: int
    kernel: str = ""
    made: str = ""
    last_use: str = ""

    @property
    def does(self) -> str:
        """`reads` or `writes`."""
        return "writes" if self.writes else "reads"

    @property
    def named(self) -> str:
        """The op and where it stands."""
        return f"`{short(self.op)}`" + (f" at {place(self.line)}" if self.line else "")

    def __str__(self) -> str:
        where = f"{self.stream}, region {self.region}" if self.region else self.stream
        kernel = f" ({self.kernel})" if self.kernel else ""
        return f"{self.does:6} `{self.op}`{kernel} on {where}: {self.line or 'no line known'}"


@dataclass(frozen=True, slots=True)
class Race:
    """Two ops touch the same `nbytes` bytes in no fixed order, `first` enqueued first; `reuse` when the block changed
    hands between them; `missing` names the edge whose absence matters."""

    first: Party
    second: Party
    nbytes: int
    reuse: bool
    missing: str
    hazard: Hazard

    @property
    def headline(self) -> str:
        """What can go wrong, in one sentence."""
        first, second = self.first, self.second
        if not self.reuse:
            return (
                f"{first.named} on {first.stream} {first.does} and {second.named} on {second.stream} {second.does} "
                f"{_memory(first)}, in no fixed order"
            )
        freed = f" freed after {place(first.last_use)}," if first.last_use else ""
        reused = "reused by" if second.writes else "reused, and read by"
        return (
            f"block of {_memory(first)},{freed} {reused} {second.named} while `{short(first.op)}` on {first.stream} "
            f"may still {first.does.removesuffix('s')} it"
        )

    def __str__(self) -> str:
        what = "reused block" if self.reuse else "shared tensor"
        return (
            f"race on a {what} ({self.nbytes:,} bytes): {self.headline}\n"
            f"  {self.first}\n  {self.second}\n  missing: {self.missing}"
        )


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

    @property
    def verdict(self) -> str:
        """What was found, in a few words."""
        return "no race" if self.ok else f"{len(self.races)} race(s), {len(self.unattributed)} unattributed"

    @property
    def size(self) -> str:
        """How much was checked."""
        work = [node for node in self.nodes if is_work(node)]
        what = "nodes of the CUDA graph" if any(node.kernel for node in work) else "ops"
        return f"{len(work):,} {what}, {len(self.edges):,} ordering edges"

    def __str__(self) -> str:
        lines = [f"{self.size}: {self.verdict}", *map(str, self.races[:MOST_SHOWN])]
        if len(self.races) > MOST_SHOWN:
            lines.append(f"and {len(self.races) - MOST_SHOWN:,} more races: to_json() has all of them")
        lines += [f"unattributed: {item}" for item in self.unattributed]
        lines += [f"assumed: {item}" for item in self.assumptions]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the nodes' bytes, in plain values.

        Returns:
            `schema` (the version of this form), `ok`, `races`, `unattributed`, `assumptions`, `nodes` and `edges`. Node
            numbers are positions in `nodes`; `bytes` of a race are addresses, the end not included.
        """
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "races": [
                {
                    "headline": race.headline,
                    "first": asdict(race.first),
                    "second": asdict(race.second),
                    "nbytes": race.nbytes,
                    "bytes": [race.hazard.start, race.hazard.stop],
                    "reuse": race.reuse,
                    "missing": race.missing,
                }
                for race in self.races
            ],
            "unattributed": list(self.unattributed),
            "assumptions": list(self.assumptions),
            "nodes": [
                {"op": n.name, "kernel": n.kernel, "stream": n.stream, "region": n.region, "line": n.line}
                for n in self.nodes
            ],
            "edges": [list(edge) for edge in self.edges],
        }

    def to_json(self) -> str:
        """`as_dict` as text, for other tools."""
        return json.dumps(self.as_dict(), indent=1)

    def picture(self, name: str = "graph") -> str:
        """The graph as SVG: streams as rows, waits as arrows, races in red.

        Args:
            name: its title.

        Returns:
            the text of an SVG file.
        """
        from .picture import draw

        return draw(self, name)


def is_work(node: Node) -> bool:
    """Whether a node does anything but order others."""
    return bool(node.line or node.kernel)


def short(op: str) -> str:
    """An op's name without its overload."""
    return re.sub(r"(?<=\w)\.\w+$", "", op)


def place(line: str) -> str:
    """Where a line stands: `file:number` of `file:number: text`; of a line of an FX graph, its node."""
    found = re.match(r"[^:]+:\d+(?=: )", line)
    return found[0] if found else line.replace("graph: ", "node ", 1)


def _memory(party: Party) -> str:
    label = party.buffer if " " in party.buffer else f"`{short(party.buffer)}`"
    return f"{label} (made at {place(party.made)})" if party.made else label
