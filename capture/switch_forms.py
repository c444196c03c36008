"""Stream switches that others wrote into a graph, read as records of events and waits for them.

Enters: an FX graph with AutoDeploy's passthroughs or torch's `streams` ops. Leaves: a `Switch` for each such node, and
the stream each other node runs on. Only `take_out` changes a graph. Invariant: a switch that is not understood has a
`flaw`, and an order that is not known is not assumed.

Form "passthrough": functions that return their argument. `begin` makes an auxiliary stream current, behind what the
caller has enqueued; `end` makes the caller's stream current again; `wait` lets the current stream wait for the last
`end`. The order of the nodes is what counts, and there is one auxiliary stream per device.

Form "streams": ops over numbers that stand for streams and events outside the graph. A node runs on the stream in
`meta["custom"]["stream"]`, where Dynamo notes `with torch.cuda.stream(...)`, else on the one that `fork` and `join`
made current. AOTAutograd wraps these ops in `control_deps`, which hands values through to keep the order.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, cast

from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

Form = Literal["passthrough", "streams"]
Role = Literal["begin", "end", "wait", "record"]
Stream = str
CALLER: Final[Stream] = "the caller's stream"

PASSTHROUGHS: Final[Mapping[str, Role]] = {
    "begin_aux_stream_passthrough": "begin",
    "end_aux_stream_passthrough": "end",
    "wait_aux_stream_passthrough": "wait",
    "record_event_passthrough": "record",
}
"""TensorRT-LLM AutoDeploy's functions by name. An op may be named `namespace::name`, too."""
_HOST_WAITS = ("synchronize_event", "synchronize_stream", "synchronize_device")


@dataclass(frozen=True, slots=True)
class Record:
    """`event` is recorded on `stream`."""

    event: str
    stream: Stream


@dataclass(frozen=True, slots=True)
class Wait:
    """`stream` waits for the last record of `event`."""

    event: str
    stream: Stream


@dataclass(frozen=True, slots=True)
class Switch:
    """One node that switches streams: what it does, in order."""

    node: Node
    form: Form
    acts: tuple[Record | Wait, ...] = ()
    recorded: Stream | None = None
    """The stream for which the tensors among its arguments get `record_stream`."""
    flaw: str = ""
    """Why it cannot be taken out, whatever it surrounds."""


@dataclass(frozen=True, slots=True)
class Reading:
    """All switches of a graph, in order, and where its other nodes run."""

    switches: dict[Node, Switch] = field(default_factory=dict[Node, Switch])
    streams: dict[Node, Stream] = field(default_factory=dict[Node, Stream])
    scopes: dict[Node, Node] = field(default_factory=dict[Node, Node])
    """Per node, the outermost `begin` whose `end` has not come yet; a `begin` and its `end` are in their own scope."""
    flaws: dict[Node, str] = field(default_factory=dict[Node, str])
    """Per `begin`, why its scope is no region."""


def read_switches(gm: GraphModule, passthroughs: Mapping[str, Role]) -> Reading:
    """Read `gm` once, in order."""
    reader = _Reader(gm, passthroughs)
    for node in gm.graph.nodes:
        reader.visit(node)
    return reader.finish()


def take_out(node: Node) -> None:
    """Remove a switch from its graph: its users get what it passed through."""
    inputs = node.all_input_nodes
    _put(node, _passed(node))
    node.graph.erase_node(node)
    for source in inputs:
        if source.op == "get_attr" and not source.users:  # the graph that `control_deps` ran
            source.graph.erase_node(source)


def _passed(node: Node) -> Any:
    namespace, name = name_of(node.target)
    if name == "control_deps":
        return (None, *node.args[2:])
    if namespace == "streams":
        return None
    return node.args[0] if node.args else next(iter(node.kwargs.values()))


def _put(node: Node, value: Any) -> None:
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(value, tuple | list):
            _put(user, operator.getitem(value, cast(int, user.args[1])))
            user.graph.erase_node(user)
        else:
            user.args = map_arg(user.args, lambda other: value if other is node else other)
            user.kwargs = map_arg(user.kwargs, lambda other: value if other is node else other)


def name_of(target: Any) -> tuple[str, str]:
    """A callable's namespace, if it is an op, and its name."""
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    if isinstance(packet, OpOverloadPacket):
        namespace, _, name = packet._qualified_op_name.partition("::")
        return namespace, name
    return "", str(getattr(target, "__name__", target))


class _Reader:
    """The current stream, and what is open, from node to node."""

    def __init__(self, gm: GraphModule, passthroughs: Mapping[str, Role]) -> None:
        self.gm = gm
        self.passthroughs = passthroughs
        self.reading = Reading()
        self.current = CALLER
        self.begun: list[Node] = []
        self.forked: Node | None = None
        self.recorded: dict[str, Node] = {}
        self.awaited: set[str] = set()
        self.callers = _numbers_of_the_caller(gm)

    def visit(self, node: Node) -> None:
        reading = self.reading
        before = self.begun[0] if self.begun else None
        switch = self.switch(node) if node.op == "call_function" else None
        scope = before or (node if self.begun else None)
        if scope is not None:
            reading.scopes[node] = scope
        if switch is not None and scope is not None and self.begun and scope is not node:
            reading.flaws.setdefault(scope, f"{node} switches streams before {scope} has ended")
        if switch is None:
            reading.streams[node] = self.stream_of(node)
            return
        for act in switch.acts:
            if isinstance(act, Record):
                self.recorded[act.event] = node
            else:
                self.awaited.add(act.event)
                if act.event not in self.recorded:
                    switch = replace(switch, flaw=f"{node} waits for an event nothing in the graph recorded")
        reading.switches[node] = switch

    def finish(self) -> Reading:
        switches = self.reading.switches
        if self.begun:
            self.reading.flaws[self.begun[0]] = f"nothing ends {self.begun[0]}"
        if self.forked is not None:
            self.flaw(self.forked, f"{self.forked} switches to a stream that is still current when the graph ends")
        for event, node in self.recorded.items():
            if event not in self.awaited and switches[node].form == "streams":
                self.flaw(node, f"{node} records an event for somebody outside of the graph")
        return self.reading

    def flaw(self, node: Node, why: str) -> None:
        self.reading.switches[node] = replace(self.reading.switches[node], flaw=why)

    def stream_of(self, node: Node) -> Stream:
        number = annotation(node)
        return self.current if number is None or node.op in ("placeholder", "output") else self.stream(number)

    def stream(self, number: int) -> Stream:
        return CALLER if number in self.callers else f"stream {number}"

    def switch(self, node: Node) -> Switch | None:
        namespace, name = name_of(node.target)
        role = self.passthroughs.get(name) or self.passthroughs.get(f"{namespace}::{name}")
        if role is not None:
            return self.passthrough(node, role)
        op = _stream_op(self.gm, node)
        return None if op is None else self.torchs(node, op)

    def passthrough(self, node: Node, role: Role) -> Switch:
        device, event = (
            node.kwargs.get(key, node.args[at] if len(node.args) > at else -1)
            for at, key in enumerate(("device", "event_id"), start=1)
        )
        lane = "the auxiliary stream" if device in (-1, None) else f"the auxiliary stream of device {device}"
        forked, done = f"fork {device} {event}", f"done {device} {event}"
        if role == "record":
            hidden = f"{node} records an event for ops that switch streams inside themselves, out of the graph's sight"
            return Switch(node, "passthrough", (Record(forked, self.current),), flaw=hidden)
        if role == "wait":
            return Switch(node, "passthrough", (Wait(done, self.current),))
        if role == "begin":
            acts = (Record(forked, self.current), Wait(forked, lane))
            self.begun.append(node)
            self.current = lane
            return Switch(node, "passthrough", acts)
        if not self.begun:
            return Switch(node, "passthrough", flaw=f"{node} ends what nothing began")
        if self.current != lane:
            self.reading.flaws[self.begun[0]] = f"{node} ends {lane}, and {self.begun[-1]} began {self.current}"
        acts = (Record(done, self.current),)
        self.begun.pop()
        if not self.begun:
            self.current = CALLER
        return Switch(node, "passthrough", acts)

    def torchs(self, node: Node, op: Node) -> Switch:
        _, name = name_of(op.target)
        given = _by_name(op)
        if name in _HOST_WAITS:
            return Switch(node, "streams", flaw=f"{node} makes the host wait, which no capture allows")
        if not all(isinstance(value, int) for key, value in given.items() if key.endswith("_index")):
            return Switch(node, "streams", flaw=f"{node} names its streams or events by values of the graph")
        streams = {key: self.stream(value) for key, value in given.items() if "stream" in key or key == "to_index"}
        events = {key: f"event {value}" for key, value in given.items() if "event" in key}
        match name, [*events.values(), *streams.values()]:
            case "fork" | "join", [stream]:
                self.current = stream
                self.forked = None if stream == CALLER else node
                return Switch(node, "streams")
            case "record_event", [event, stream]:
                return Switch(node, "streams", (Record(event, stream),))
            case "wait_event" | "sync_dealloc", [event, stream]:
                return Switch(node, "streams", (Wait(event, stream),))
            case "wait_stream", _:
                waiting, waited_on = streams["waiting_stream_index"], streams["waited_on_stream_index"]
                event = f"end of {node}"
                return Switch(node, "streams", (Record(event, waited_on), Wait(event, waiting)))
            case "record_stream", [stream]:
                return Switch(node, "streams", recorded=stream)
            case _:
                return Switch(node, "streams", flaw=f"it is not known what {op.target} does")


def annotation(node: Node) -> int | None:
    """The number of the stream that Dynamo's annotation puts a node on."""
    custom = node.meta.get("custom")
    number = custom.get("stream") if isinstance(custom, dict) else None
    return number if isinstance(number, int) else None


def _stream_op(gm: GraphModule, node: Node) -> Node | None:
    """The node that calls an op of torch's: this one, or the one in the graph that this one runs."""
    namespace, name = name_of(node.target)
    if node.op != "call_function" or namespace == "streams" or name != "control_deps":
        return node if namespace == "streams" else None
    graph = node.args[1]
    inner = getattr(gm, str(graph.target), None) if isinstance(graph, Node) else None
    calls = [n for n in inner.graph.nodes if n.op == "call_function"] if isinstance(inner, GraphModule) else []
    return calls[0] if len(calls) == 1 and name_of(calls[0].target)[0] == "streams" else None


def _by_name(op: Node) -> dict[str, Any]:
    """The arguments by schema name: their order is not the same in all versions of torch."""
    target: Any = op.target
    overload = target if isinstance(target, OpOverload) else target.default
    names = [argument.name for argument in overload._schema.arguments]
    return {**dict(zip(names, op.args, strict=False)), **op.kwargs}


def _numbers_of_the_caller(gm: GraphModule) -> frozenset[int]:
    """Which number stands for the stream that is current when the graph starts.

    Newer torch reserves one. Elsewhere it is what the first fork comes from, or else the one number in the ops that no
    node is annotated with; where several are left over, none is known to be the caller's.
    """
    reserved = getattr(sys.modules.get("torch._dynamo.graph_bytecode_inputs"), "CURRENT_STREAM_INDEX", None)
    if reserved is not None:
        return frozenset((reserved,))
    taken = {annotation(node) for node in gm.graph.nodes}
    free: set[int] = set()
    for node in gm.graph.nodes:
        op = _stream_op(gm, node)
        if op is None:
            continue
        given = _by_name(op)
        if name_of(op.target)[1] == "fork":
            return frozenset((given["from_index"],))
        free |= {value for key, value in given.items() if "stream" in key and isinstance(value, int)} - taken
    return frozenset(free) if len(free) == 1 else frozenset()
