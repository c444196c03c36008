"""Facts about an FX graph of ATen ops: storages, accesses, order.

Enters: a GraphModule whose nodes carry `meta["val"]`. Leaves: `Dataflow`: which storages each node's value lives in,
which ones it reads and writes, and the edges any reordering must keep: data, plus read-after-write, write-after-read
and write-after-write through shared storages. Nothing is changed. Invariant: where an access is not known it is
assumed: a callable without a schema is a barrier that reads and writes everything, and an op that may return its input
does. Assumed of the caller: two inputs of the graph do not share memory.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from . import accesses

Storage = int
"""A storage, numbered in order of appearance. 0 is the state of the random number generator."""
RNG: Storage = 0
_NONE: frozenset[Storage] = frozenset()
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Dataflow:
    """The accesses and the partial order of one graph. Sets of nodes are bit masks over positions in `nodes`."""

    nodes: tuple[Node, ...]
    index: Mapping[Node, int]
    storages: Mapping[Node, frozenset[Storage]]
    """Storages a node's value lives in: a view lives in its base's, a tuple in those of its elements."""
    owner: Mapping[Storage, Node]
    """The node that brought a storage into the graph: its allocation, its attribute or its input."""
    reads: Mapping[Node, frozenset[Storage]]
    writes: Mapping[Node, frozenset[Storage]]
    holders: Mapping[Storage, Sequence[Node]]
    """The nodes whose values live in a storage, in graph order."""
    writers: Mapping[Storage, Sequence[Node]]
    """The nodes that write a storage, in graph order; the one that allocates it is one of them."""
    rewritten: frozenset[Storage]
    """Storages that a node writes which did not allocate them."""
    barriers: int
    predecessors: tuple[tuple[int, ...], ...]
    """Positions each node must come after, directly."""
    ancestors: tuple[int, ...]
    """Everything each node must come after, and the node itself."""
    constants: int
    """Nodes that depend on parameters, buffers and literals alone, none of which the graph changes."""
    symbolic: int
    """Nodes that compute scalars of shapes: no tensor, no memory."""

    @staticmethod
    def of(gm: GraphModule) -> Dataflow:
        """Read `gm` once, in order."""
        reader = _Reader(gm)
        for node in gm.graph.nodes:
            reader.visit(node)
        return reader.flow()

    def mask(self, nodes: Iterable[Node]) -> int:
        bits = 0
        for node in nodes:
            bits |= 1 << self.index[node]
        return bits

    def select(self, mask: int) -> tuple[Node, ...]:
        """The nodes of a mask, in graph order."""
        return tuple(self.nodes[position] for position in positions(mask))

    def is_view(self, node: Node) -> bool:
        """Whether the node only names memory of others: nothing is read, written or allocated."""
        return node.op == "call_function" and not self.reads[node] and not self.writes[node]

    def descendants(self, mask: int) -> int:
        """Everything that must come after some node of `mask`, those nodes included."""
        below = 0
        for position, above in enumerate(self.ancestors):
            if above & mask:
                below |= 1 << position
        return below

    def mutated(self, op: str) -> tuple[str, ...]:
        """Targets of the `op` nodes ("get_attr", "placeholder") whose storage some node writes, in graph order."""
        written = _NONE.union(*(self.writes[node] for node in self.nodes if node.op not in ("get_attr", "placeholder")))
        names = [str(node.target) for node in self.nodes if node.op == op and self.storages[node] & written]
        return tuple(dict.fromkeys(names))


def positions(mask: int) -> Iterator[int]:
    """The set bits of a mask, ascending; taken a word at a time, for masks are long and their bits lie close."""
    base = 0
    while mask:
        empty = (mask & -mask).bit_length() - 1
        mask >>= empty
        base += empty
        word = mask & _WORD
        while word:
            low = word & -word
            yield base + low.bit_length() - 1
            word ^= low
        mask >>= 64
        base += 64


@dataclass(frozen=True, slots=True)
class _Effect:
    """What one node does to memory."""

    outputs: tuple[frozenset[Storage], ...]
    """Per leaf of the node's value, the storages it lives in."""
    reads: frozenset[Storage] = _NONE
    writes: frozenset[Storage] = _NONE
    barrier: bool = False


@dataclass(slots=True)
class _Reader:
    """One pass over a graph, in order; `effect` says what a node touches, `visit` turns that into edges."""

    gm: GraphModule
    index: dict[Node, int] = field(default_factory=dict[Node, int])
    effects: dict[Node, _Effect] = field(default_factory=dict[Node, _Effect])
    owner: dict[Storage, Node] = field(default_factory=dict[Storage, Node])
    attributes: dict[int, Storage] = field(default_factory=dict[int, Storage])
    predecessors: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    symbolic: int = 0
    barriers: int = 0
    last_write: dict[Storage, int] = field(default_factory=dict[Storage, int])
    last_reads: dict[Storage, list[int]] = field(default_factory=dict[Storage, list[int]])
    last_barrier: int | None = None
    since_barrier: list[int] = field(default_factory=list[int])

    def visit(self, node: Node) -> None:
        position = self.index[node] = len(self.index)
        effect = self.effects[node] = self.effect(node)
        before = {self.index[argument] for argument in node.all_input_nodes}
        for storage in effect.reads | effect.writes:
            if storage in self.last_write:
                before.add(self.last_write[storage])
        for storage in effect.writes:
            before.update(self.last_reads.pop(storage, ()))
            self.last_write[storage] = position
        for storage in effect.reads - effect.writes:
            self.last_reads.setdefault(storage, []).append(position)
        if node.op not in ("placeholder", "get_attr") and not self.symbolic >> position & 1:
            if self.last_barrier is not None:
                before.add(self.last_barrier)
            if effect.barrier:
                self.barriers |= 1 << position
                before.update(self.since_barrier)
                self.last_barrier, self.since_barrier = position, []
            else:
                self.since_barrier.append(position)
        self.predecessors.append(tuple(sorted(before)))

    def effect(self, node: Node) -> _Effect:
        leaves = accesses.tensors(node)
        inputs = self.union(node.all_input_nodes)
        if node.op == "placeholder":
            return _Effect(tuple(self.fresh(node) for _ in leaves))
        if node.op == "get_attr":
            return _Effect(self.attribute(node))
        if node.op == "output":
            return _Effect((), reads=inputs)
        if node.target is operator.getitem:
            return _Effect(self.element(node, inputs))
        if _is_scalar(node.meta.get("val")) and not inputs:
            self.symbolic |= 1 << self.index[node]
            return _Effect(())
        if isinstance(node.target, OpOverload):
            return self.schema_effect(node, node.target, inputs)
        # No schema: it may touch anything, and what it returns may be anything it was given.
        outputs = tuple(inputs | self.fresh(node) for _ in leaves) or (inputs,)
        return _Effect(outputs, reads=inputs, writes=inputs.union(*outputs), barrier=True)

    def schema_effect(self, node: Node, target: OpOverload, inputs: frozenset[Storage]) -> _Effect:
        given = accesses.arguments(node, target)
        writes = self.union(accesses.written(node, target, given))
        outputs: list[frozenset[Storage]] = []
        fresh = _NONE
        for info, leaf in accesses.returned(node, target):
            memory = self.union(accesses.aliased(node, target, info, leaf, given))
            if not memory or not accesses.surely_aliased(target, info, leaf, given):
                new = self.fresh(node)
                fresh, memory = fresh | new, memory | new
            outputs.append(memory)
        if not writes and not outputs and target.namespace not in ("aten", "prims"):
            # It is there for what it does besides, as switching streams.
            return _Effect((), reads=inputs, barrier=True)
        if not writes and not fresh and outputs:
            return _Effect(tuple(outputs))  # A view: another look at memory, which is neither read nor written.
        if accesses.draws_random_numbers(node, target):
            writes = writes | {RNG}
        return _Effect(tuple(outputs), reads=inputs, writes=writes | fresh)

    def of(self, node: Node) -> frozenset[Storage]:
        return _NONE.union(*self.effects[node].outputs)

    def union(self, nodes: Iterable[Node]) -> frozenset[Storage]:
        return _NONE.union(*(self.of(node) for node in nodes))

    def fresh(self, node: Node) -> frozenset[Storage]:
        storage = len(self.owner) + 1
        self.owner[storage] = node
        return frozenset((storage,))

    def attribute(self, node: Node) -> tuple[frozenset[Storage], ...]:
        """Tied weights are two attributes in one storage."""
        value: Any = self.gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            return ()
        key = value.untyped_storage()._cdata
        if key not in self.attributes:
            (self.attributes[key],) = self.fresh(node)
        return (frozenset((self.attributes[key],)),)

    def element(self, node: Node, inputs: frozenset[Storage]) -> tuple[frozenset[Storage], ...]:
        source, key = node.args[0], node.args[1]
        if isinstance(source, Node) and isinstance(key, int):
            whole, value = self.effects[source].outputs, source.meta.get("val")
            if isinstance(value, tuple | list) and len(value) == len(whole) and -len(whole) <= key < len(whole):
                return (whole[key],)
        return (inputs,)

    def flow(self) -> Dataflow:
        ancestors: list[int] = []
        for position, before in enumerate(self.predecessors):
            above = 1 << position
            for other in before:
                above |= ancestors[other]
            ancestors.append(above)
        nodes = tuple(self.index)
        storages = {node: self.of(node) for node in nodes}
        writes = {node: self.effects[node].writes for node in nodes}
        writers = _by_storage(writes)
        return Dataflow(
            nodes=nodes,
            index=self.index,
            storages=storages,
            owner=self.owner,
            reads={node: self.effects[node].reads for node in nodes},
            writes=writes,
            holders=_by_storage(storages),
            writers=writers,
            rewritten=frozenset(s for s, by in writers.items() if s == RNG or by != [self.owner[s]]),
            barriers=self.barriers,
            predecessors=tuple(self.predecessors),
            ancestors=tuple(ancestors),
            constants=self.constants(nodes),
            symbolic=self.symbolic,
        )

    def constants(self, nodes: tuple[Node, ...]) -> int:
        """Constant values, less those in a storage that a node which is not constant writes, and what hangs on them."""
        every = _NONE.union(*(effect.writes for effect in self.effects.values())) - {RNG}
        changed = frozenset(storage for storage in every if self.owner[storage].op == "get_attr")
        while True:
            constant: dict[Node, None] = {}
            for node in nodes:
                position, effect = self.index[node], self.effects[node]
                if node.op == "get_attr":
                    known = not self.of(node) & changed
                else:
                    known = (
                        node.op == "call_function"
                        and not (self.barriers | self.symbolic) >> position & 1
                        and all(a in constant or self.symbolic >> self.index[a] & 1 for a in node.all_input_nodes)
                        and not (self.of(node) | effect.writes) & changed
                        and RNG not in effect.writes
                    )
                if known:
                    constant[node] = None
            more = _NONE.union(*(self.effects[node].writes for node in nodes if node not in constant)) - {RNG}
            more = frozenset(storage for storage in more if self.owner[storage] in constant)
            if more <= changed:
                bits = 0
                for node in constant:
                    bits |= 1 << self.index[node]
                return bits
            changed = changed | more


def _by_storage(touched: Mapping[Node, frozenset[Storage]]) -> dict[Storage, list[Node]]:
    found: dict[Storage, list[Node]] = {}
    for node, storages in touched.items():
        for storage in storages:
            found.setdefault(storage, []).append(node)
    return found


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)
