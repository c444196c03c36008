"""What a matched router is, and whether an op may take its place.

Enters: a dataflow and a `Match`. Leaves: nothing, or `Unmatched` with the reason. Invariant: of a match that passes,
nobody else sees what it computes on the way, nothing writes to what it reads before it is done, and all that the op is
given is there when it runs, which is where the selection ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from .dataflow import RNG, Dataflow
from .reach import region_of
from .router import Rules
from .router_forms import CASTS, RESHAPING


class Unmatched(Exception):
    """Why a selection is not known as a router's."""


@dataclass(frozen=True, slots=True)
class Match:
    """A router: `tensors` are the op's, `index` and `weights` what leaves it."""

    selection: Node
    hidden: Node
    weight: Node
    scale: Node | None
    bias: Node | None
    expert_scale: Node | None
    rules: Rules
    index: Node
    weights: Node
    nodes: tuple[Node, ...]
    """In graph order: everything that is computed again by the op."""

    @property
    def tensors(self) -> tuple[Node | None, ...]:
        """In the order of the op's arguments."""
        return self.hidden, self.weight, self.scale, self.bias, self.expert_scale


def require_closed(flow: Dataflow, found: Match) -> None:
    """Nobody outside looks at what is inside, and nothing is written on the way."""
    inside, seen = set(found.nodes), (found.index, found.weights)
    own = [node for node in found.nodes if not is_shared(found, node)]
    for node in own:
        outside = next((user for user in node.users if user not in inside), None)
        if outside is not None and node not in seen:
            raise Unmatched(f"{outside} uses {node} too")
    late = [node for node in found.tensors if node is not None and node.op != "get_attr" and found.selection < node]
    if late:
        raise Unmatched(f"{late[0]} is computed behind the selection")
    values = [node.meta.get("val") for node in (*found.tensors, *found.nodes) if node is not None]
    modes = {id(leaf.fake_mode) if isinstance(leaf, FakeTensor) else None for leaf in pytree.tree_leaves(values)}
    if len(modes) != 1 or None in modes:
        raise Unmatched("it was not traced with values of one kind")
    if len({region_of(node) for node in own}) != 1:
        raise Unmatched("part of it is marked for a region")
    for node in _written_inside(flow, found):
        raise Unmatched(f"{node} writes to what is not the router's own")
    first = dict[int, int]()  # per storage, where the match first looks at it
    for node in reversed(found.nodes):
        first |= dict.fromkeys(flow.storages[node] | flow.reads[node], flow.index[node])
    for node in found.tensors:  # which the op looks at where the selection was, maybe earlier
        for storage in flow.storages[node] if node is not None else ():
            first[storage] = min(first[storage], flow.index[found.selection])
    last = flow.index[found.nodes[-1]]
    for storage, start in first.items():
        for node in flow.writers.get(storage, ()):
            if node not in inside and start < flow.index[node] < last:
                raise Unmatched(f"{node} writes to what it reads, in the middle of it")
    barrier = next((p for p in range(flow.index[own[0]], last) if flow.barriers >> p & 1), None)
    if barrier is not None:
        raise Unmatched(f"{flow.nodes[barrier]} is in the middle of it, and may do anything")


def _written_inside(flow: Dataflow, found: Match) -> Iterator[Node]:
    inside = set(found.nodes)
    for node in found.nodes:
        if RNG in flow.writes[node] or any(flow.owner[storage] not in inside for storage in flow.writes[node]):
            yield node


def is_shared(found: Match, node: Node) -> bool:
    """Whether a node is a cast or a view of the router's input or weights: others may use it, and then it stays."""
    source = node.args[0] if node.args else None
    while isinstance(source, Node) and source not in found.tensors and source in found.nodes and _is_look(source):
        source = source.args[0]
    return _is_look(node) and source in found.tensors


def _is_look(node: Node) -> bool:
    return node.target in (*RESHAPING, *CASTS)
