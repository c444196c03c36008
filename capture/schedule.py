"""From marked nodes to regions: fork, enter, leave and join in the graph, in launch order.

Enters: a graph and the node sets that shall run on auxiliary streams. Leaves: the same graph, with the region ops of
`handoff_ops` around each set in the order of `launch_order`, and a `RegionPlan` per region. Invariants: what a branch
reads is made before its fork; every use of what it returns, and every access ordered after its writes, comes behind its
join; and memory that crosses outlives its last reader.

Note: lifetime by construction. The caching allocator hands a freed block to the next request of the stream it was
allocated on. A block of the caller's that a lane reads is an argument of the join: the graph's own reference keeps it
until the caller has waited, and no event, no deferral and no memory growth is needed. A block of the lane's that the
caller reads goes back to the lane, whose next work waits for a fork event on the caller's stream: dropped before that
fork it is safe, and one that lives on is recorded for the caller, who waits for every region that reads it. Which lane
a fork is given is the runtime's business, so the next fork of any region counts.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..kernels.dataflow import Dataflow
from ..kernels.regions import LAY_AGAIN
from ..runtime.errors import CaptureError, RegionError
from ..runtime.handoff_ops import REGION_OPS, RegionValue, region_enter, region_fork, region_join, region_leave
from .launch_order import Block, ForkAt, LaunchOrder, Step, launch_order, make_block
from .mark import MarkedRegion

Handoff = Literal["auto", "record"]


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """One region as it stands in the graph."""

    name: str
    nodes: tuple[Node, ...]
    """What runs on the lane, in launch order."""
    live_ins: tuple[Node, ...]
    """Tensors made elsewhere that the branch reads or writes; parameters and buffers, which outlive it, not listed."""
    live_outs: tuple[Node, ...]
    """Tensors of the branch that others use."""
    recorded: tuple[Node, ...]
    """Live-ins and live-outs that get `record_stream`."""
    held: tuple[Node, ...]
    """Live-ins that the join keeps alive."""
    lane: int
    priority: int
    fork: Node
    enter: Node
    leave: Node
    join: Node

    def __str__(self) -> str:
        reads, returns, recorded = (
            ", ".join(node.name for node in nodes) or "nothing"
            for nodes in (self.live_ins, self.live_outs, self.recorded)
        )
        return (
            f"{self.name}: {len(self.nodes)} nodes on lane {self.lane}, "
            f"reads {reads}, returns {returns}, records {recorded}"
        )

    def __reduce__(self) -> Any:
        raise CaptureError(f"region {self.name!r} cannot be pickled or copied", remedy="insert it into the other graph")


def insert_regions(
    gm: GraphModule,
    regions: Sequence[MarkedRegion | str] | None = None,
    *,
    handoff: Handoff = "auto",
    order: LaunchOrder = "caller_first",
    fork_at: ForkAt = "live_in",
    priority: int = 0,
    unsafe_no_lifetime: bool = False,
) -> tuple[RegionPlan, ...]:
    """Put each region of `gm` between a fork and a join; the graph is changed in place and recompiled.

    Args:
        gm: an ATen graph whose nodes have `meta["val"]`.
        regions: what to insert, a name standing for the nodes whose `meta["auxstream"]` it is; by default all such.
        handoff: "record" declares every tensor that crosses for `record_stream`; "auto" only those whose lifetime the
            graph does not prove.
        order: what is enqueued first between fork and join.
        fork_at: "live_in" forks as soon as what the branch reads is there. "first_product" leaves the branch's work
            ahead of its first weight (a norm) to the caller, and forks behind it.
        priority: of the lanes, as a CUDA stream priority.
        unsafe_no_lifetime: UNSAFE, for negative controls alone: nothing is recorded and nothing held, so a block may be
            reused while a lane still reads it.

    Returns:
        a plan for each region, in launch order.

    Raises:
        RegionError: the graph has regions already, or a region cannot run in one piece beside the rest.
    """
    if any(node.target in REGION_OPS for node in gm.graph.nodes):
        raise RegionError(
            "this graph has regions already",
            expected="a graph without region ops",
            came="one that insert_regions has been through",
            remedy="mark everything first, then insert once",
        )
    requested = _requested(gm, regions)
    _name_elements(gm, requested)
    flow = Dataflow.of(gm)
    blocks = [make_block(flow, name, nodes, fork_at) for name, nodes in requested.items()]
    blocks = [block for block in blocks if block.mask]
    if not blocks:
        return ()
    steps = launch_order(flow, blocks, order)
    _mark(gm, requested)
    again = functools.partial(
        insert_regions,
        regions=tuple(requested),
        handoff=handoff,
        order=order,
        fork_at=fork_at,
        priority=priority,
        unsafe_no_lifetime=unsafe_no_lifetime,
    )
    writer = _Writer(gm, flow, blocks, steps, priority)
    crossings = [writer.crossing(number, handoff, unsafe_no_lifetime) for number in range(len(blocks))]
    plans = writer.write(crossings)
    for plan in plans:
        plan.fork.meta[LAY_AGAIN] = again
    return plans


def _requested(gm: GraphModule, regions: Sequence[MarkedRegion | str] | None) -> dict[str, list[Node]]:
    marked: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.meta.get("auxstream"):
            marked.setdefault(str(node.meta["auxstream"]), []).append(node)
    if regions is None:
        return marked
    requested: dict[str, list[Node]] = {}
    for region in regions:
        name, nodes = (region, marked.get(region, ())) if isinstance(region, str) else (region.name, region.nodes)
        requested.setdefault(name, []).extend(nodes)
    return requested


def _mark(gm: GraphModule, requested: Mapping[str, Sequence[Node]]) -> None:
    """Mark what was asked for by its nodes, too: it must be found again once the graph has changed."""
    home = {node: name for name, nodes in requested.items() for node in nodes}
    for node in gm.graph.nodes:
        if node in home:
            node.meta["auxstream"] = home[node]
        elif node.meta.get("auxstream") in requested:
            del node.meta["auxstream"]


def _name_elements(gm: GraphModule, requested: Mapping[str, Sequence[Node]]) -> None:
    """Give each element of a tuple that crosses a border whole a node of its own: only tensors are held or recorded."""
    home = {node: name for name, nodes in requested.items() for node in nodes}
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        users = [user for user in node.users if user.target is not operator.getitem]
        if not isinstance(value, tuple | list) or all(home.get(user) == home.get(node) for user in users):
            continue
        with gm.graph.inserting_after(node):
            elements: list[Node] = []
            for position, part in enumerate(value):
                element = gm.graph.call_function(operator.getitem, (node, position))
                element.meta = {**node.meta, "val": part}
                elements.append(element)
        for user in users:
            user.args = _replaced(user.args, node, elements)
            user.kwargs = _replaced(user.kwargs, node, elements)


def _replaced(arguments: Any, node: Node, elements: list[Node]) -> Any:
    return map_arg(arguments, lambda other: elements if other is node else other)


@dataclass(frozen=True, slots=True)
class _Crossing:
    """What passes a region's border, and how its lifetime is secured."""

    live_ins: tuple[Node, ...]
    live_outs: tuple[Node, ...]
    recorded_ins: tuple[Node, ...]
    recorded_outs: tuple[Node, ...]
    held: tuple[Node, ...]
    writes: tuple[Node, ...]


class _Writer:
    """Decides lifetimes on the graph as it was, then writes the regions into it."""

    def __init__(
        self, gm: GraphModule, flow: Dataflow, blocks: Sequence[Block], steps: Sequence[Step], priority: int
    ) -> None:
        self.gm = gm
        self.flow = flow
        self.blocks = blocks
        self.steps = steps
        self.priority = priority
        self.members = [flow.select(block.mask) for block in blocks]
        self.home = {node: number for number, nodes in enumerate(self.members) for node in nodes}
        self.at = {(step.kind, step.at): index for index, step in enumerate(steps)}
        self.forks = [self.at["fork", number] for number in range(len(blocks))]
        self.joins = [self.at["join", number] for number in range(len(blocks))]

    def crossing(self, number: int, handoff: Handoff, unsafe: bool) -> _Crossing:
        inside = self.members[number]
        taken = dict.fromkeys(a for node in inside for a in node.all_input_nodes if self.home.get(a) != number)
        ins = tuple(node for node in taken if node.op != "get_attr" and isinstance(node.meta.get("val"), Tensor))
        outs = tuple(
            node
            for node in inside
            if isinstance(node.meta.get("val"), Tensor) and any(self.home.get(u) != number for u in node.users)
        )
        written = frozenset[int]().union(*(self.flow.writes[node] for node in inside))
        writes = tuple(node for node in taken if self.flow.storages[node] & written)
        if unsafe:
            return _Crossing(ins, outs, (), (), (), writes)
        if handoff == "record":
            return _Crossing(ins, outs, ins, outs, (), writes)
        return _Crossing(
            ins,
            outs,
            recorded_ins=(),
            recorded_outs=tuple(node for node in outs if self._outlives_its_lane(node)),
            held=ins,
            writes=writes,
        )

    def _outlives_its_lane(self, value: Node) -> bool:
        """Whether memory that a region allocated is still in use when a later fork may hand the lane out again."""
        for storage in self.flow.storages[value]:
            number = self.home.get(self.flow.owner[storage])
            if number is None:
                continue
            last = self._last_use(storage)
            # What leaves the graph may meet the lane's next fork in the graph's next run.
            if last == float("inf") or any(self.joins[number] < fork < last for fork in self.forks):
                return True
        return False

    def _last_use(self, storage: int) -> float:
        last = 0.0
        for node in self.flow.nodes:
            if not any(storage in self.flow.storages[a] for a in node.all_input_nodes):
                continue
            if node.op == "output":
                return float("inf")
            number = self.home.get(node)
            # A branch's use counts where the caller has waited for it.
            last = max(last, self.at["node", self.flow.index[node]] if number is None else self.joins[number])
        return last

    def write(self, crossings: Sequence[_Crossing]) -> tuple[RegionPlan, ...]:
        graph = self.gm.graph
        output = next(node for node in graph.nodes if node.op == "output")
        lanes = _lanes(self.forks, self.joins)
        plans: list[RegionPlan] = []
        placed: dict[tuple[str, int], list[Node]] = {}
        with graph.inserting_before(output):
            for number, (block, crossing) in enumerate(zip(self.blocks, crossings, strict=True)):
                plan, results = self._region(number, block, crossing, lanes[number])
                plans.append(plan)
                placed["fork", number] = [plan.fork]
                placed["body", number] = [plan.enter, *plan.nodes, plan.leave]
                placed["join", number] = [plan.join, *results]
        self._rewire(plans, placed)
        last: Node | None = None
        for step in self.steps:
            for node in placed.get((step.kind, step.at)) or [self.flow.nodes[step.at]]:
                if last is not None:
                    last.append(node)
                last = node
        graph.lint()
        self.gm.recompile()
        return tuple(plans)

    def _region(self, number: int, block: Block, crossing: _Crossing, lane: int) -> tuple[RegionPlan, list[Node]]:
        graph, members = self.gm.graph, self.members[number]
        base = re.sub(r"\W", "_", block.name)
        trace = next((node.meta["stack_trace"] for node in members if node.meta.get("stack_trace")), None)

        def call(role: str, op: Callable[..., Any], args: tuple[Any, ...], value: Any) -> Node:
            node = graph.create_node("call_function", op, args, name=f"{base}_{role}")
            node.meta.update(val=value, auxstream_role=role, auxstream_region=block.name)
            if trace is not None:
                node.meta["stack_trace"] = trace
            return node

        fork = call(
            "fork",
            region_fork,
            (block.name, list(crossing.recorded_ins), list(crossing.held), self.priority, list(crossing.writes)),
            RegionValue(block.name),
        )
        enter = call("enter", region_enter, (fork,), None)
        leave = call("leave", region_leave, (fork, list(crossing.recorded_outs)), None)
        values = tuple(node.meta["val"] for node in crossing.live_outs)
        join = call("join", region_join, (fork, list(crossing.live_outs), list(crossing.held)), values)
        results = [call("result", operator.getitem, (join, i), value) for i, value in enumerate(values)]
        for result, node in zip(results, crossing.live_outs, strict=True):
            kept = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
            result.meta.update(kept)
        plan = RegionPlan(
            name=block.name,
            nodes=members,
            live_ins=crossing.live_ins,
            live_outs=crossing.live_outs,
            recorded=crossing.recorded_ins + crossing.recorded_outs,
            held=crossing.held,
            lane=lane,
            priority=self.priority,
            fork=fork,
            enter=enter,
            leave=leave,
            join=join,
        )
        return plan, results

    def _rewire(self, plans: Sequence[RegionPlan], placed: dict[tuple[str, int], list[Node]]) -> None:
        """Whoever uses a live-out from outside takes it from the join, region ops of other regions included."""
        for number, plan in enumerate(plans):
            own = {*plan.nodes, plan.leave, plan.join}
            for node, result in zip(plan.live_outs, placed["join", number][1:], strict=True):
                node.replace_all_uses_with(result, delete_user_cb=lambda user, own=own: user not in own)


def _lanes(forks: Sequence[int], joins: Sequence[int]) -> list[int]:
    """The lowest lane that is free between a region's fork and its join; regions one after the other share one."""
    lanes = [0] * len(forks)
    busy: list[int] = []
    for number in sorted(range(len(forks)), key=lambda k: forks[k]):
        lane = next((k for k, until in enumerate(busy) if until < forks[number]), len(busy))
        if lane == len(busy):
            busy.append(joins[number])
        busy[lane] = joins[number]
        lanes[number] = lane
    return lanes
