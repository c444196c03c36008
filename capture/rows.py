"""Do rows mix? Where a graph keeps the rows of its inputs apart, proved op by op.

Enters: a `TracedGraph`, the dimension of each input's rows. Leaves: `Mixing`: per output whether it is free of all but
its own row, and what the graph writes besides. Invariant: what is said to keep rows apart does, for all inputs; of
whatever capture/row_rules.py has no rule for nothing is said, and capture/padding.py looks at numbers.

Note "memory that is written". A class belongs to a view of memory at all times. A write that keeps the class of what it
writes changes none; after any other, all that lives in that storage counts as MIXED, before the write too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..kernels.dataflow import RNG, Dataflow
from .arguments import Dims
from .row_rules import FREE, MIXED, Class, Rows, class_of
from .trace import TracedGraph


@dataclass(frozen=True, slots=True)
class Mixing:
    """What is known of a graph's rows.

    Attributes:
        unproved: outputs, and inputs that are written, which may hold something of other rows.
        blame: the first op that is not known to keep rows apart, if something is unproved.
        written: names of the model's tensors, and of inputs without rows, that are written with or at something that
            depends on rows.
    """

    unproved: tuple[str, ...]
    blame: Node | None
    written: tuple[str, ...]


def find_mixing(traced: TracedGraph, rows: Dims, outputs: Dims) -> Mixing:
    """What the graph does with its rows; `outputs`: the dimension of each output's rows, None for no rows."""
    reader = _Reader(traced, rows)
    while reader.read():
        pass
    return reader.mixing(outputs)


class _Reader:
    """Passes over a graph until no more storage turns out to mix rows."""

    def __init__(self, traced: TracedGraph, rows: Dims) -> None:
        self._flow = Dataflow.of(traced.graph_module)
        self._rows = dict(zip(traced.input_names, rows, strict=True))
        self._mixed: set[int] = set()
        self._written: dict[str, None] = {}
        self._blame: Node | None = None
        self._classes: dict[Node, Class] = {}

    def read(self) -> bool:
        """One pass; whether it found more storages that mix."""
        before = len(self._mixed)
        self._classes, self._blame = {}, None
        for node in self._flow.nodes:
            given = [self._classes[argument] for argument in node.all_input_nodes]
            found = self._class(node, given)
            if node.op == "call_function" and found == MIXED and MIXED not in given and self._blame is None:
                self._blame = node
            self._classes[node] = found
            if node.op == "call_function":
                self._note_writes(node, found, given)
        return len(self._mixed) > before

    def _class(self, node: Node, given: list[Class]) -> Class:
        if isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags:
            self._mixed |= self._flow.storages[node]  # its argument has another shape from here on
        if self._flow.storages[node] & self._mixed or MIXED in given:
            return MIXED
        if node.op == "placeholder":
            dim = self._rows[node.name]
            return FREE if dim is None else Rows(dim)
        if all(one == FREE for one in given) and not self._flow.barriers >> self._flow.index[node] & 1:
            return FREE
        return class_of(node, self._classes)

    def _note_writes(self, node: Node, found: Class, given: list[Class]) -> None:
        """See the note "memory that is written"."""
        old = self._flow.writes[node] - {RNG}
        old = frozenset(storage for storage in old if self._flow.owner[storage] is not node)
        if not old or all(one == FREE for one in given):
            return
        for argument in node.all_input_nodes:
            if self._flow.storages[argument] & old and (found == MIXED or self._classes[argument] != found):
                self._mixed |= self._flow.storages[argument] & old
        for storage in old:
            owner = self._flow.owner[storage]
            if owner.op == "get_attr" or (owner.op == "placeholder" and self._rows[owner.name] is None):
                self._written[str(owner.target)] = None

    def mixing(self, outputs: Dims) -> Mixing:
        (output,) = (node for node in self._flow.nodes if node.op == "output")
        leaves = pytree.tree_leaves(output.args[0])
        classes = [self._classes[leaf] if isinstance(leaf, Node) else FREE for leaf in leaves]
        pairs = enumerate(zip(classes, outputs, strict=True))
        unproved = [f"output {n}" for n, (one, dim) in pairs if one != FREE and (dim is None or one != Rows(dim))]
        unproved += [
            f"input {owner.name!r}"
            for storage, owner in self._flow.owner.items()
            if storage in self._mixed and owner.op == "placeholder" and self._rows[owner.name] is not None
        ]
        return Mixing(tuple(unproved), self._blame if unproved else None, tuple(self._written))
