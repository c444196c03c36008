"""Graphs that already hold hand-written stream switches: taken over as regions, or the reason why not.

Enters: a traced graph with switches of a form that `switch_forms` reads. Leaves: the graph without those switches whose
work could become regions, that work marked as the marker marks a branch, and an `Adoption` for each piece of work on
another stream, taken over or not. Invariants: the graph computes what it computed; what is not taken over is untouched;
and work becomes a region only if the switches ordered all of its accesses that need an order: nobody's race is passed
off as his intention.

Order is checked, lifetime is not: how long memory must live is decided anew by `insert_regions`. An `Adoption` names
the values for which the graph had not seen to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ..kernels.routing import mark_experts
from ..runtime.errors import RegionError
from ..runtime.handoff_ops import REGION_OPS
from .module_paths import common_path
from .switch_checks import (
    Bare,
    exposed_values,
    refuse_flawed,
    refuse_unlayable,
    refuse_unordered,
    refuse_untraced,
    refuse_what_hangs_on_refused,
)
from .switch_forms import CALLER, PASSTHROUGHS, Form, Role, read_switches, take_out
from .switch_history import History, Piece


@dataclass(frozen=True, slots=True)
class Adoption:
    """Work that hand-written switches put on another stream, and what became of it."""

    name: str
    """The region's name; for switches around no work, the first one's."""
    form: Form
    nodes: tuple[Node, ...]
    """The work, in graph order."""
    switches: tuple[str, ...]
    """The nodes that switched streams for it."""
    reason: str = ""
    """Why it was left as it is; empty: it is a region now."""
    exposed: tuple[str, ...] = ()
    """Values whose memory nothing in the graph kept until the other stream had read them; their region does."""

    @property
    def adopted(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        work = f"{len(self.nodes)} nodes, {self.nodes[0]} to {self.nodes[-1]}" if self.nodes else "no work"
        if self.reason:
            return f"{self.name}: left as it is ({work}), because {self.reason}"
        late = f"; until now nothing kept {', '.join(self.exposed)} alive for its readers" if self.exposed else ""
        return f"{self.name}: adopted ({work}) in place of {', '.join(self.switches)}{late}"


def adopt_switches(
    gm: GraphModule, *, passthroughs: Mapping[str, Role] = PASSTHROUGHS, experts: Sequence[str] = ()
) -> tuple[Adoption, ...]:
    """Turn hand-written stream switches of `gm` into marks.

    Marks are `meta["auxstream"]` and `meta["skip_mlir_fusion"]`: `insert_regions(gm)` and the passes before it go on
    from there. The graph is changed in place and recompiled.

    Args:
        gm: a graph whose nodes, switches excepted, have `meta["val"]`.
        passthroughs: functions and ops that return their first argument and switch streams, by name.
        experts: globs of `namespace::name` for ops that are a whole mixture of experts, besides the known ones: the
            marker takes a branch with such an op for the routed side.

    Returns:
        what became of each switch, first of those around work: adopted, or the reason why it was left.

    Raises:
        RegionError: the graph has regions already, or nodes without traced values.
    """
    for node in gm.graph.nodes:
        if node.target in REGION_OPS:
            raise RegionError(
                "this graph has regions already",
                expected="a graph without region ops",
                came=node.name,
                remedy="call adopt_switches(gm) before insert_regions(gm)",
            )
    mark_experts(gm, experts)
    reading = read_switches(gm, passthroughs)
    if not reading.switches and set(reading.streams.values()) <= {CALLER}:
        return ()
    history = History.of(gm, reading)
    bare = Bare.of(gm, reading.switches)
    refuse_untraced(bare)
    names = _names(gm, history.pieces)
    refuse_flawed(history)
    refuse_unordered(history, bare)
    refuse_what_hangs_on_refused(history, bare)
    stay = any(piece.reason for piece in history.pieces)
    refuse_unlayable(history, names, Bare.of(gm, _leaving(history)) if stay else bare)
    refuse_what_hangs_on_refused(history, bare)
    leaving = _leaving(history)
    found = [*_adoptions(history, names, leaving, bare), *_strays(history)]
    for adoption in found:
        if adoption.adopted:
            _mark(adoption)
    for node in leaving:
        take_out(node)
    gm.graph.lint()
    gm.recompile()
    return tuple(found)


def _leaving(history: History) -> list[Node]:
    """The switches all of whose pieces become regions."""
    staying = {node for piece in history.pieces if piece.reason for node in piece.switches}
    used = {node for piece in history.pieces for node in piece.switches}
    torchs = [piece.reason for piece in history.pieces if piece.form == "streams"]
    return [
        node
        for node, switch in history.reading.switches.items()
        if (bool(torchs) and not any(torchs) if switch.form == "streams" else node in used and node not in staying)
    ]


def _adoptions(history: History, names: Mapping[Piece, str], leaving: Sequence[Node], bare: Bare) -> list[Adoption]:
    exposed = exposed_values(history, bare)
    found: list[Adoption] = []
    for piece in history.pieces:
        switches = [node for node in piece.switches if piece.reason or node in leaving]
        idle = not bare.work(piece)
        nodes = [n for n in piece.nodes if not bare.flow.symbolic >> bare.flow.index[bare.copies[n]] & 1 and not idle]
        found.append(
            Adoption(
                names[piece],
                piece.form,
                tuple(piece.nodes if piece.reason else nodes),
                tuple(node.name for node in switches),
                piece.reason,
                () if piece.reason else tuple(dict.fromkeys(exposed.get(piece, ()))),
            )
        )
    return found


def _strays(history: History) -> list[Adoption]:
    """Switches around no work, and those that only make sense together with something outside of the graph."""
    used = {node for piece in history.pieces for node in piece.switches}
    torchs = any(piece.form == "streams" for piece in history.pieces)
    found: list[Adoption] = []
    for node, switch in history.reading.switches.items():
        if node not in used and not (torchs and switch.form == "streams"):
            reason = switch.flaw or f"{node} orders no work that runs on another stream"
            found.append(Adoption(node.name, switch.form, (), (node.name,), reason))
    return found


def _mark(adoption: Adoption) -> None:
    for node in adoption.nodes:
        node.meta["auxstream"] = adoption.name
        node.meta["skip_mlir_fusion"] = True
        if "stream" in node.meta.get("custom", ()):
            node.meta["custom"] = {key: value for key, value in node.meta["custom"].items() if key != "stream"}


def _names(gm: GraphModule, pieces: Sequence[Piece]) -> dict[Piece, str]:
    """`layers.<i>.aux` from the module path the nodes have in common, else `aux.<k>`; always unique."""
    used = {str(node.meta["auxstream"]) for node in gm.graph.nodes if node.meta.get("auxstream")}
    names: dict[Piece, str] = {}
    for count, piece in enumerate(pieces):
        layer = re.search(r"(?:^|\.)[A-Za-z_]\w*\.(\d+)(?:\.|$)", common_path(piece.nodes))
        base = f"layers.{layer.group(1)}.aux" if layer else f"aux.{count}"
        name, again = base, 1
        while name in used:
            name, again = f"{base}.{again}", again + 1
        used.add(name)
        names[piece] = name
    return names
