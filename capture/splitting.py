"""A graph with regions, split at ops that are not captured: the parts of a step in launch order.

Enters: a GraphModule with the region ops of `insert_regions`, and the names of ops to split at. Leaves: a `Split`:
runs of nodes to capture, split ops to run eagerly, points between launches, each with the stream it is launched on and
the parts it waits for. Pure: the graph is not touched. Invariants: parts keep the graph's launch order; what a part
takes was given by parts before it; a part of a lane follows its region's fork, and whatever follows a region's join
waits for its last part.

Note "regions across parts". A region with no split op between its fork and its join lies inside one part, as it stands.
Any other is taken apart: its body becomes parts of their own, on a lane, and its fork and join become waits between
launches. A region that such a fork or join would cut goes the same way, unless these can be moved out of it: a fork
down past the other's join, a join up to the other's fork. Both only lose a little of what runs side by side.

Note "random numbers on a lane". torch writes a generator's seed and offset to memory of the device right before it
launches a graph that draws from it, and graphs share that memory: two such graphs may not run side by side.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..kernels.accesses import draws_random_numbers
from ..runtime.errors import RegionError
from ..runtime.handoff_ops import REGION_OPS, region_enter, region_fork, region_join, region_leave
from .split_ops import splits_at


@dataclass(frozen=True, slots=True)
class Part:
    """One launch: a `graph` of nodes, or one `eager` op with the elements of its result. A part of no nodes is a point
    on the caller's stream.

    Attributes:
        lane: None for the caller's stream.
        region: of which this is the body, or a stretch of it.
        after: earlier parts whose end it waits for, besides the one before it on its own stream.
        takes: values of other parts, and inputs, that its nodes use.
        gives: values that other parts, or the output, use.
        places: eager parts whose results get their memory while this one is captured.
    """

    kind: Literal["graph", "eager"]
    nodes: tuple[Node, ...]
    lane: int | None = None
    region: str | None = None
    after: tuple[int, ...] = ()
    takes: tuple[Node, ...] = ()
    gives: tuple[Node, ...] = ()
    places: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = "caller" if self.lane is None else f"lane {self.lane}, {self.region}"
        waits = f", after {', '.join(map(str, self.after))}" if self.after else ""
        names = [node.name for node in self.nodes]
        shown = f"{names[0]} ... {names[-1]} ({len(names)} nodes)" if len(names) > 2 else ", ".join(names) or "nothing"
        return f"{self.kind} on {where}{waits}: {shown}"


@dataclass(frozen=True, slots=True)
class Split:
    """A step in parts.

    Attributes:
        parts: in launch order. The last one is a graph on the caller's stream.
        outputs: values that leave the graph.
        same: results of joins that became waits, and what they are.
        lanes: how many lanes parts are launched on.
    """

    parts: tuple[Part, ...]
    outputs: tuple[Node, ...]
    same: Mapping[Node, Node]
    lanes: int

    def value(self, node: Node) -> Node:
        """The node itself, or what a result of a join that is gone stands for."""
        while node in self.same:
            node = self.same[node]
        return node

    def ancestors(self) -> tuple[int, ...]:
        """Per part, what ends before it begins, and itself, as bits."""
        above: list[int] = []
        last: dict[int | None, int] = {}
        for number, part in enumerate(self.parts):
            bits = 1 << number
            for earlier in (*part.after, *((last[part.lane],) if part.lane in last else ())):
                bits |= above[earlier]
            above.append(bits)
            last[part.lane] = number
        return tuple(above)

    def users(self) -> dict[Node, int]:
        """Per value that passes between parts, the parts that give or take it, as bits; one more for who called."""
        users = {node: 1 << len(self.parts) for node in self.outputs}
        for number, part in enumerate(self.parts):
            for node in (*part.takes, *part.gives):
                users[node] = users.get(node, 0) | 1 << number
        return users

    def drawing(self) -> tuple[str, ...]:
        """Regions with a graph on a lane that draws random numbers. See the note "random numbers on a lane"."""
        return tuple(dict.fromkeys(part.region for part in self.parts if part.region and _draws(part)))

    def on_one_stream(self) -> Split:
        """The same parts, one after the other."""
        return replace(self, parts=_with_places([replace(p, lane=None, after=()) for p in self.parts]), lanes=0)

    def __str__(self) -> str:
        return "\n".join(f"{number:3d} {part}" for number, part in enumerate(self.parts))


def _draws(part: Part) -> bool:
    return part.kind == "graph" and any(
        isinstance(node.target, OpOverload) and draws_random_numbers(node, node.target) for node in part.nodes
    )


def split_graph(gm: GraphModule, names: Sequence[str] = ()) -> Split:
    """The parts of a graph, split at attention and at the ops of `names` (`"lib.op"` or `"lib.op.overload"`).

    Raises RegionError for regions within regions that would have to be taken apart.
    """
    nodes = _with_elements([node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")])
    splits = {node for node in nodes if splits_at(node, names)}
    regions = {node: _Region(node) for node in nodes if node.target is region_fork}
    for node in nodes:
        if node.target in REGION_OPS:
            regions[_fork_of(node)].ops[node.target] = node
    order, apart = _taken_apart(nodes, splits, list(regions.values()))
    return _Builder(gm, splits, apart).split(order)


@dataclass(slots=True)
class _Region:
    """The four nodes of a region."""

    fork: Node
    ops: dict[Any, Node] = field(default_factory=dict[Any, Node])
    lane: int = 0

    @property
    def name(self) -> str:
        return str(self.fork.args[0])


def _fork_of(node: Node) -> Node:
    fork = node if node.target is region_fork else node.args[0]
    assert isinstance(fork, Node)
    return fork


def _with_elements(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, each element of a tuple right behind the tuple: so that only what is used of it passes on."""
    elements: dict[Node, list[Node]] = {}
    for node in nodes:
        if _is_element(node):
            elements.setdefault(_source(node), []).append(node)
    order: list[Node] = []
    pending = [node for node in reversed(nodes) if not _is_element(node)]
    while pending:
        node = pending.pop()
        order.append(node)
        pending += reversed(elements.get(node, []))
    return order


def _is_element(node: Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and source.op == "call_function"


def _source(element: Node) -> Node:
    source = element.args[0]
    assert isinstance(source, Node)
    return source


def _taken_apart(nodes: list[Node], splits: set[Node], regions: list[_Region]) -> tuple[list[Node], list[_Region]]:
    """See the note "regions across parts": the order of nodes, and the regions to take apart."""
    order, apart = list(nodes), list[_Region]()
    while True:
        at = {node: position for position, node in enumerate(order)}
        cuts = sorted(at[node] for node in (*splits, *(node for region in apart for node in region.ops.values())))
        cut = next(
            (
                (region, order[position])
                for region in regions
                if region not in apart
                for position in cuts
                if at[region.fork] < position < at[region.ops[region_join]]
            ),
            None,
        )
        if cut is None:
            return order, apart
        region, node = cut
        other = next((one for one in apart if node in one.ops.values()), None)
        if other is not None and node is other.fork and at[other.ops[region_enter]] > at[region.ops[region_join]]:
            order.insert(at[region.ops[region_join]], order.pop(at[node]))
        elif other is not None and node.target is region_join and at[other.ops[region_leave]] < at[region.fork]:
            order.insert(at[region.fork], order.pop(at[node]))
        else:
            apart.append(region)


class _Builder:
    """Walks a graph in launch order and closes a part wherever a launch must end."""

    def __init__(self, gm: GraphModule, splits: set[Node], apart: Sequence[_Region]) -> None:
        self.gm = gm
        self.splits = splits
        self.apart = {op: region for region in apart for op in region.ops.values()}
        self.same: dict[Node, Node] = {}
        self.parts: list[Part] = []
        self.run: list[Node] = []
        self.region: _Region | None = None  # whose body we are in
        self.last: dict[int | None, int] = {}  # per lane, its last part
        self.waits: dict[int | None, dict[int, None]] = {}  # per lane, what its next part waits for
        self.forked: dict[Node, int] = {}
        self.ended: dict[Node, int] = {}

    def split(self, order: Sequence[Node]) -> Split:
        self.give_lanes(order)
        for node in order:
            region = self.apart.get(node)
            if region is not None:
                self.hand_off(node, region)
            elif _is_element(node) and _source(node) in self.apart:
                outputs: Any = _source(node).args[1]
                self.same[node] = outputs[node.args[1]]
            elif node in self.splits:
                self.close()
                self.add("eager", (node, *(user for user in order if _is_element(user) and _source(user) is node)))
            elif not (_is_element(node) and _source(node) in self.splits):
                self.run.append(node)
        self.close(always=True)
        lanes = 1 + max((region.lane for region in self.apart.values()), default=-1)
        output = next(node for node in self.gm.graph.nodes if node.op == "output")
        split = Split(tuple(self.parts), (), self.same, lanes)
        split = replace(split, outputs=tuple(map(split.value, output.all_input_nodes)))
        return replace(split, parts=_with_places(self.with_values(split)))

    def give_lanes(self, order: Sequence[Node]) -> None:
        """The lowest lane that is free from a region's fork to its join."""
        free: list[int] = []
        made = 0
        for node in order:
            region = self.apart.get(node)
            if region is not None and node is region.fork:
                free.sort()
                region.lane = free.pop(0) if free else made
                made = max(made, region.lane + 1)
            elif region is not None and node.target is region_join:
                free.append(region.lane)

    def hand_off(self, node: Node, region: _Region) -> None:
        """A region's step becomes waits between launches."""
        if self.region is not None and node.target is not region_leave:
            raise RegionError(
                f"region {region.name!r} cannot be handed off within region {self.region.name!r}",
                expected="regions beside each other, where ops between them are not captured",
                came="one within another",
                remedy="mark them as one region, or capture whole graphs (mode 'full')",
            )
        if node.target is region_fork:
            self.close(always=None not in self.last or bool(self.waits.get(None)))
            self.forked[region.fork] = self.last[None]
        elif node.target is region_enter:
            self.close()
            self.region = region
            self.waits.setdefault(region.lane, {})[self.forked[region.fork]] = None
        elif node.target is region_leave:
            self.close(always=bool(self.waits.get(region.lane)))
            self.ended[region.fork] = self.last[region.lane]
            self.region = None
        else:
            self.close()
            self.waits.setdefault(None, {})[self.ended[region.fork]] = None

    def close(self, *, always: bool = False) -> None:
        """End the run; an empty one is a part only where something waits for it or it for something."""
        if self.run or always:
            self.add("graph", tuple(self.run))
            self.run = []

    def add(self, kind: Literal["graph", "eager"], nodes: tuple[Node, ...]) -> None:
        region = self.region
        lane = None if region is None else region.lane
        after = tuple(self.waits.pop(lane, {}))
        self.last[lane] = len(self.parts)
        self.parts.append(Part(kind, nodes, lane, None if region is None else region.name, after))

    def with_values(self, split: Split) -> list[Part]:
        """What each part takes and gives."""
        home = {node: number for number, part in enumerate(split.parts) for node in part.nodes}
        takes: list[dict[Node, None]] = [{} for _ in split.parts]
        gives: list[dict[Node, None]] = [{} for _ in split.parts]
        for user in self.gm.graph.nodes:
            if user.op != "output" and user not in home:
                continue
            for node in map(split.value, user.all_input_nodes):
                if node.op == "get_attr" or home.get(node, -1) == home.get(user, -2):
                    continue
                if user in home:
                    takes[home[user]][node] = None
                if node in home:
                    gives[home[node]][node] = None
        return [
            replace(part, takes=tuple(taken), gives=tuple(given))
            for part, taken, given in zip(split.parts, takes, gives, strict=True)
        ]


def _with_places(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Give each eager part memory for its results from the graph before it on its stream, if there is one."""
    places: dict[int, list[int]] = {}
    last: dict[int | None, int] = {}
    for number, part in enumerate(parts):
        if part.kind == "graph":
            last[part.lane] = number
        elif part.lane in last:
            places.setdefault(last[part.lane], []).append(number)
    return tuple(replace(part, places=tuple(places.get(number, ()))) for number, part in enumerate(parts))


def module_of(gm: GraphModule, split: Split, part: Part) -> GraphModule:
    """A part as a module of its own, from the values it takes to the ones it gives; it shares the graph's tensors."""
    graph = Graph()
    made: dict[Node, Node] = {}
    for node in part.takes:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)

    def there(node: Node) -> Node:
        node = split.value(node)
        if node not in made:
            assert node.op == "get_attr", f"{node} is not there yet"
            made[node] = graph.node_copy(node)
        return made[node]

    for node in part.nodes:
        map_arg((node.args, node.kwargs), there)  # attributes come before their first user
        made[node] = graph.node_copy(node, there)
    graph.output(tuple(made[node] for node in part.gives))
    return GraphModule(gm, graph)
