"""May work that hand-written switches put on another stream become a region?

Enters: a graph's `History`, and a copy of the graph without its switches. Leaves: a reason on each `Piece` that may
not, and the values whose memory was free too early. Invariant: two accesses that the dataflow orders are ordered by
streams and waits, or the piece that holds one of them has a reason.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from ..kernels.dataflow import RNG, Dataflow
from ..runtime.errors import RegionError
from .launch_order import launch_order, make_block
from .switch_forms import Stream, take_out
from .switch_history import History, Piece


@dataclass(frozen=True, slots=True)
class Bare:
    """The dataflow of a graph without some switches, on a copy."""

    flow: Dataflow
    copies: Mapping[Node, Node]
    origin: Mapping[Node, Node]
    """The node of the graph that a node of `flow` is a copy of."""
    free: int
    """Nodes that put no work on a stream: what is there from the start, views, scalars of shapes."""

    @staticmethod
    def of(gm: GraphModule, switches: Iterable[Node]) -> Bare:
        graph, copies = Graph(), dict[Node, Node]()
        end = graph.output(graph.graph_copy(gm.graph, copies))
        bare = GraphModule(gm, graph)
        for node in switches:
            take_out(copies[node])
        origin = {copy: node for node, copy in copies.items()} | {end: next(iter(reversed(gm.graph.nodes)))}
        flow = Dataflow.of(bare)
        free = flow.symbolic | flow.mask(
            node for node in flow.nodes if node.op in ("placeholder", "get_attr") or flow.is_view(node)
        )
        return Bare(flow, copies, origin, free & ~flow.barriers)

    def work(self, piece: Piece) -> list[Node]:
        """The nodes of a piece that keep its stream busy."""
        return [node for node in piece.nodes if not self.free >> self.flow.index[self.copies[node]] & 1]


def refuse_untraced(bare: Bare) -> None:
    """Raise RegionError for a node without a traced value, unless its op returns nothing."""
    for node in bare.flow.nodes:
        op = node.target
        returns = not isinstance(op, OpOverload) or op._schema.returns
        if "val" not in node.meta and node.op not in ("get_attr", "output") and returns:
            raise RegionError(
                f"node {node.name} ({node.op} {node.target}) has no traced value",
                expected='meta["val"] on every node that switches no streams: it says what shares memory',
                came="a graph that was traced symbolically, or a switch that is not known as one",
                remedy="trace the model with auxstream.capture.trace; name other switches in `passthroughs`",
            )


def refuse_flawed(history: History) -> None:
    """A stream op of torch that cannot go keeps all work where it is."""
    torchs = [switch for switch in history.reading.switches.values() if switch.form == "streams"]
    flaw = next((switch.flaw for switch in torchs if switch.flaw), "")
    if torchs and not flaw and all(piece.form != "streams" for piece in history.pieces):
        flaw = f"{torchs[0].node} orders no work on another stream, and stays in the graph"
    for piece in history.pieces:
        piece.reason = piece.reason or flaw


def refuse_unordered(history: History, bare: Bare) -> None:
    """Two accesses that the dataflow orders must be ordered by streams and waits, too, or their pieces are to blame."""
    home = {node: piece for piece in history.pieces for node in piece.nodes}
    flow, streams = bare.flow, history.reading.streams
    end = history.behind[bare.origin[flow.nodes[-1]]]
    for piece in history.pieces:
        work = bare.work(piece)
        if work and end.get(piece.stream, -1) < history.position[work[-1]]:
            piece.reason = piece.reason or f"the caller's stream never waits for {work[-1]}"
    for at, node in enumerate(flow.nodes):
        for before in flow.predecessors[at]:
            if bare.free >> at & 1 or bare.free >> before & 1:
                continue
            one, other = bare.origin[flow.nodes[before]], bare.origin[node]
            if history.ordered(one, other) or not (clash := _clash(flow, before, at, one, other, streams)):
                continue
            for piece in (home.get(one), home.get(other)):
                if piece is not None:
                    piece.reason = piece.reason or clash


def _clash(flow: Dataflow, before: int, at: int, one: Node, other: Node, streams: Mapping[Node, Stream]) -> str:
    first, second = flow.nodes[before], flow.nodes[at]
    if flow.barriers >> at & 1 or flow.barriers >> before & 1:
        opaque = other if flow.barriers >> at & 1 else one
        return f"{opaque} may touch anything, having no schema, and nothing orders {one} and {other}"
    written, read = flow.writes[first] - {RNG}, flow.reads[first] - {RNG}
    if written & flow.reads[second]:
        what = f"reads what {one} writes"
    elif written & flow.writes[second]:
        what = f"overwrites what {one} writes"
    elif read & flow.writes[second]:
        what = f"overwrites what {one} reads"
    else:
        return ""  # two draws of random numbers, whose order the host keeps
    return f"{other}, on {streams[other]}, {what} on {streams[one]}, and no wait lies between"


def refuse_what_hangs_on_refused(history: History, bare: Bare) -> None:
    """Work that gives to, or takes from, work that stays on a hand-made stream stays there, too.

    Nothing ties torch's stream ops to their place: they go together, and where one stays nothing may move.
    """
    pieces = history.pieces
    refused = next((piece.reason for piece in pieces if piece.form == "streams" and piece.reason), "")
    for piece in pieces if refused else ():
        piece.reason = piece.reason or f"other stream ops stay in the graph: {refused}"
    home = {bare.flow.index[bare.copies[node]]: piece for piece in pieces for node in piece.nodes}
    ties = [
        (home[before], home[at])
        for at, above in enumerate(bare.flow.predecessors)
        for before in above
        if at in home and before in home and home[before] is not home[at]
    ]
    pending = [piece for piece in pieces if piece.reason]
    while pending:
        piece = pending.pop()
        for pair in ties:
            other = pair[1] if pair[0] is piece else pair[0]
            if piece in pair and not other.reason:
                other.reason = f"it exchanges values with {piece.nodes[0]}, which stays on its stream: {piece.reason}"
                pending.append(other)


def refuse_unlayable(history: History, names: Mapping[Piece, str], bare: Bare) -> None:
    """What `insert_regions` could not enqueue in one piece, beside the rest."""
    blocks = []
    for piece in history.pieces:
        if piece.reason or not bare.work(piece):
            continue
        try:
            blocks.append(make_block(bare.flow, names[piece], [bare.copies[n] for n in piece.nodes], "live_in"))
        except RegionError as error:
            piece.reason = f"it cannot run in one piece beside {error.came}"
    try:
        if blocks:
            launch_order(bare.flow, blocks, "caller_first")
    except RegionError as error:
        for piece in history.pieces:
            piece.reason = piece.reason or f"{error.what}: {error.came}"


def exposed_values(history: History, bare: Bare) -> dict[Piece, list[str]]:
    """Per piece, the values that cross its border and whose memory may be another's before they are read.

    A block is free once its last mention has been passed, and goes to the next request on the stream it was made on.
    That request must come behind all readers, or the block must be recorded for their streams.
    """
    flow, streams, position = bare.flow, history.reading.streams, history.position
    requests: dict[Stream, list[tuple[int, Node]]] = {}
    for owner in dict.fromkeys(flow.owner.values()):
        if owner.op == "call_function":
            node = bare.origin[owner]
            requests.setdefault(streams[node], []).append((position[node], node))
    readers: dict[int, list[Node]] = {}
    for node in flow.nodes:
        for storage in flow.reads[node] | flow.writes[node]:
            readers.setdefault(storage, []).append(bare.origin[node])
    recorded = {
        (node, switch.recorded)
        for switch in history.reading.switches.values()
        if switch.recorded is not None
        for node in switch.node.all_input_nodes
    }
    home = {node: piece for piece in history.pieces for node in piece.nodes}
    found: dict[Piece, list[str]] = {}
    for storage, owner in flow.owner.items():
        maker, names = bare.origin[owner], [bare.origin[holder] for holder in flow.holders[storage]]
        mentions = [bare.origin[user] for holder in flow.holders[storage] for user in holder.users]
        mentions += [user for name in names for user in history.passed(name)]
        if owner.op != "call_function" or any(user.op == "output" for user in mentions):
            continue
        last = max(position[node] for node in (maker, *mentions))
        later = requests.get(streams[maker], [])
        after = bisect.bisect_right(later, last, key=lambda request: request[0])
        for reader in readers.get(storage, ()) if after < len(later) else ():
            safe = streams[reader] == streams[maker] or any((name, streams[reader]) in recorded for name in names)
            if not safe and history.behind[later[after][1]].get(streams[reader], -1) < position[reader]:
                for piece in (home.get(reader), home.get(maker)):
                    if piece is not None:
                        found.setdefault(piece, []).append(maker.name)
    return found
