"""What hand-written switches order, and what work they put on other streams.

Enters: a graph and its `Reading`. Leaves: a `History`: per node the prefix of each stream it comes behind, and the
`Piece`s of work. Invariant: a piece is enqueued on one stream with no switch acting on that stream in between, so it
has one entry and one exit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from .switch_forms import CALLER, Form, Reading, Record, Stream, Switch

Prefix = Mapping[Stream, int]
"""Per stream, the position in the graph up to which its work is done."""
_NOTHING: Prefix = {}


@dataclass(slots=True, eq=False)
class Piece:
    """Work on a stream other than the caller's, in graph order."""

    form: Form
    stream: Stream
    nodes: list[Node] = field(default_factory=list[Node])
    switches: dict[Node, None] = field(default_factory=dict[Node, None])
    """What leads to it, ends it, and waits for it."""
    reason: str = ""
    """Why it is no region."""


@dataclass(slots=True)
class History:
    """A graph as its switches let it run."""

    reading: Reading
    position: dict[Node, int] = field(default_factory=dict[Node, int])
    behind: dict[Node, Prefix] = field(default_factory=dict[Node, Prefix])
    """Per node that is no switch, what other streams have done before it."""
    pieces: list[Piece] = field(default_factory=list[Piece])
    _names: set[Node] = field(default_factory=set[Node])
    """Parts of what a switch passed through, which go with it."""
    _known: dict[Stream, Prefix] = field(default_factory=dict[Stream, Prefix])
    _events: dict[str, Prefix] = field(default_factory=dict[str, Prefix])
    _recorders: dict[str, Piece] = field(default_factory=dict[str, Piece])
    _scoped: dict[Node, Piece] = field(default_factory=dict[Node, Piece])
    _open: dict[Stream, Piece] = field(default_factory=dict[Stream, Piece])
    _acted: dict[Stream, Node] = field(default_factory=dict[Stream, Node])

    @staticmethod
    def of(gm: GraphModule, reading: Reading) -> History:
        """Follow `gm` once, in order."""
        history = History(reading)
        for position, node in enumerate(gm.graph.nodes):
            history.position[node] = position
            switch = reading.switches.get(node)
            if switch is None:
                history._work(node)
            else:
                history._switch(node, switch)
        return history

    def ordered(self, one: Node, other: Node) -> bool:
        """Whether `other`, which stands behind `one` in the graph, runs behind it."""
        stream = self.reading.streams[one]
        if stream == self.reading.streams[other]:
            return True
        return self.position[one] <= self.behind[other].get(stream, -1)

    def passed(self, node: Node) -> Iterator[Node]:
        """The switches that mention a node's value, under whatever name."""
        for user in node.users:
            if user in self.reading.switches:
                yield user
            if user in self.reading.switches or user in self._names:
                yield from self.passed(user)

    def _work(self, node: Node) -> None:
        stream, scope = self.reading.streams[node], self.reading.scopes.get(node)
        self.behind[node] = self._known.get(stream, _NOTHING)
        if node.target is operator.getitem and (node.args[0] in self.reading.switches or node.args[0] in self._names):
            self._names.add(node)
        if stream == CALLER or not node.op.startswith("call_") or node in self._names:
            return
        piece = self._open.get(stream) if scope is None else self._scoped[scope]
        if piece is None:
            piece = self._open[stream] = self._piece("streams", stream)
            if stream in self._acted:
                piece.switches[self._acted[stream]] = None
        piece.nodes.append(node)

    def _piece(self, form: Form, stream: Stream) -> Piece:
        self.pieces.append(Piece(form, stream))
        return self.pieces[-1]

    def _switch(self, node: Node, switch: Switch) -> None:
        scope = self.reading.scopes.get(node)
        if scope is node:
            self._scoped[node] = self._piece("passthrough", switch.acts[-1].stream)
        if scope is not None:
            piece = self._scoped[scope]
            piece.switches[node] = None
            piece.reason = piece.reason or self.reading.flaws.get(scope, "")
        for act in switch.acts:
            closed = self._open.pop(act.stream, None)
            if closed is not None:
                closed.switches[node] = None
            self._acted[act.stream] = node
            known = self._known.get(act.stream, _NOTHING)
            if isinstance(act, Record):
                self._events[act.event] = {**known, act.stream: self.position[node]}
                if scope is not None and scope is not node:
                    self._recorders[act.event] = self._scoped[scope]
                continue
            given = self._events.get(act.event, _NOTHING)
            self._known[act.stream] = {
                stream: max(given.get(stream, -1), known.get(stream, -1)) for stream in {**known, **given}
            }
            if act.stream == CALLER:
                for piece in self.pieces:
                    last = self.position[piece.nodes[-1]] if piece.nodes else -1
                    if known.get(piece.stream, -1) < last <= given.get(piece.stream, -1):
                        piece.switches[node] = None
                if act.event in self._recorders:
                    self._recorders[act.event].switches[node] = None
