"""Does the number of rows itself reach a value? Two graphs of one model, at two counts, compared node by node.

Enters: the graph of a bucket, and the graph of another count that it serves. Leaves: per output the dimension of its
rows, or a CaptureError. Invariant: if nothing is raised, the graphs are the same ops, and what they compute differs in
nothing but how many rows there are.

Note "where a count can hide". A mean divides by it, a mask is built from it, an index ends at it. In ops that read
inputs it would be a scalar argument: these must be equal. What reads no input is a constant of each count, such as
positions: both are computed, and must agree as far as the smaller goes. Sizes of views and of new tensors are free to
differ; that rows do not mix is told elsewhere (capture/rows.py, capture/padding.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from ..kernels.dataflow import RNG, Dataflow
from ..runtime.errors import CaptureError
from .arguments import Dims
from .state import bits
from .trace import TracedGraph, where


def output_rows(large: TracedGraph, small: TracedGraph, sizes: tuple[int, int]) -> Dims:
    """Per output leaf of `large`, the dimension that has `sizes[0]` rows there and `sizes[1]` in `small`."""
    found: list[int | None] = []
    for number, (one, other) in enumerate(zip(_outputs(large), _outputs(small), strict=True)):
        if not isinstance(one, Node) or not isinstance(other, Node):
            if one != other:
                raise _grows(number, sizes, one, other)
            found.append(None)
            continue
        shapes = tuple(one.meta["val"].shape), tuple(other.meta["val"].shape)
        differ = [dim for dim, pair in enumerate(zip(*shapes, strict=False)) if pair[0] != pair[1]]
        if len(shapes[0]) != len(shapes[1]) or [(shapes[0][d], shapes[1][d]) for d in differ] not in ([], [sizes]):
            raise _grows(number, sizes, *shapes)
        found.append(differ[0] if differ else None)
    return tuple(found)


def _outputs(traced: TracedGraph) -> list[Any]:
    (node,) = (node for node in traced.graph_module.graph.nodes if node.op == "output")
    return pytree.tree_leaves(node.args[0], is_leaf=lambda leaf: isinstance(leaf, Node))


def _grows(number: int, sizes: tuple[int, int], large: object, small: object) -> CaptureError:
    return CaptureError(
        f"output {number} cannot be cut to the rows of a call",
        expected=f"one dimension with a row per token, {sizes[0]} here and {sizes[1]} there; or none that differs",
        came=f"{large} for {sizes[0]} tokens and {small} for {sizes[1]}",
        remedy="return it as [tokens, ...], or leave it to the caller to compute",
    )


def refuse_size_effects(large: TracedGraph, small: TracedGraph, sizes: tuple[int, int]) -> None:
    """Raise CaptureError where the two graphs differ in more than their number of rows."""
    here, there = _Sided(large), _Sided(small)
    varying = _varying(here, there, sizes)
    border = [
        (one, other)
        for one, other in zip(here.nodes, there.nodes, strict=True)
        if one not in here.reading
        and here.flow.storages[one] & varying
        and any(user in here.reading or user.op == "output" for user in one.users)
    ]
    mine, theirs = here.values(one for one, _ in border), there.values(other for _, other in border)
    for one, other in border:
        if not _agree(mine[one], theirs[other]):
            raise _leak(one, sizes, f"values of {one.target} for {sizes[0]} rows", "others")


def _varying(here: _Sided, there: _Sided, sizes: tuple[int, int]) -> set[int]:
    """Storages of `here` that hold constants which differ between the graphs, if only in size. Raises CaptureError if
    the ops differ, or a value given to an op that reads inputs."""
    varying: set[int] = set()
    for one, other in itertools.zip_longest(here.nodes, there.nodes):
        if one is None or other is None or one.op != other.op or (one.op != "get_attr" and one.target != other.target):
            place = one if one is not None else other
            assert place is not None
            raise CaptureError(
                f"the model runs other ops for {sizes[0]} rows than for {sizes[1]}",
                expected="the same: a bucket serves smaller calls, padded, and its graph knows one size",
                came=f"{getattr(one, 'target', 'nothing more')} here and {getattr(other, 'target', 'nothing more')} "
                f"there, at {where(place)}",
                remedy="give a bucket to each size at which the model itself takes another path, or to every size",
            )
        literals = list(_literals(one, other))
        if one in here.reading:
            for name, kind, mine, theirs in literals:
                if kind and mine != theirs:
                    raise _leak(one, sizes, f"{name}={mine!r} of {one.target} for {sizes[0]} rows", repr(theirs))
        elif (
            any(mine != theirs for _, _, mine, theirs in literals)
            or (one.op == "get_attr" and here.attribute(one) is not there.attribute(other))
            or (here.flow.reads[one] | here.flow.storages[one]) & varying
        ):
            varying |= here.flow.writes[one] | here.flow.storages[one]
    return varying


def _leak(node: Node, sizes: tuple[int, int], large: str, small: str) -> CaptureError:
    return CaptureError(
        "the number of rows reaches the values that the model computes",
        expected="the same values for a row, however many rows there are: padding adds rows",
        came=f"{large}, {small} for {sizes[1]}, at {where(node)}",
        remedy="pass the number in as a tensor, or give a bucket for each size, so that nothing is padded",
    )


class _Sided:
    """One of the two graphs, with the nodes whose values may depend on inputs or on what the graph writes."""

    def __init__(self, traced: TracedGraph) -> None:
        self._module: Any = traced.graph_module
        self.flow = Dataflow.of(traced.graph_module)
        self.nodes = self.flow.nodes
        self.reading: set[Node] = set()
        storages = {RNG} | {s for s in self.flow.rewritten if s != RNG and self.flow.owner[s].op == "get_attr"}
        for node in self.nodes:
            touched = self.flow.storages[node] | self.flow.reads[node] | self.flow.writes[node]
            opaque = node.op == "placeholder" or self.flow.barriers >> self.flow.index[node] & 1
            if opaque or touched & storages or any(argument in self.reading for argument in node.all_input_nodes):
                self.reading.add(node)
                storages |= self.flow.writes[node] | self.flow.storages[node]

    def attribute(self, node: Node) -> Any:
        value = self._module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def values(self, wanted: Iterable[Node]) -> dict[Node, Any]:
        """What these constants are, once all that writes them has run."""
        needed = 0
        for node in wanted:
            for storage in self.flow.storages[node]:
                for writer in self.flow.writers.get(storage, ()):
                    needed |= self.flow.ancestors[self.flow.index[writer]]
            needed |= self.flow.ancestors[self.flow.index[node]]
        known: dict[Node, Any] = {}
        with torch.no_grad():
            for node in self.flow.select(needed):
                if node in self.reading:
                    continue
                if node.op == "get_attr":
                    known[node] = self.attribute(node)
                    continue
                assert callable(node.target)
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
        return known


def _literals(one: Node, other: Node) -> Iterator[tuple[str, bool, Any, Any]]:
    """Arguments of a node in both graphs, without the nodes in them; and whether they are values rather than sizes. All
    but integers are, and of a callable without a schema these too."""
    schema = one.target._schema.arguments if isinstance(one.target, OpOverload) else []
    declared = {argument.name: str(argument.type) for argument in schema}
    names = [*declared, *(f"argument {position}" for position in range(len(declared), len(one.args)))]
    given = [dict(zip(names, node.args, strict=False)) | dict(node.kwargs) for node in (one, other)]
    for name in dict.fromkeys((*given[0], *given[1])):
        mine, theirs = (
            [leaf for leaf in pytree.tree_leaves(side.get(name)) if not isinstance(leaf, Node)] for side in given
        )
        yield name, "int" not in declared.get(name, "anything else"), mine, theirs


def _agree(one: Any, other: Any) -> bool:
    """Whether the smaller is the beginning of the larger, in every dimension in which they differ."""
    leaves, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    if len(leaves) != len(others):
        return False
    for mine, theirs in zip(leaves, others, strict=True):
        if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
            if mine != theirs:
                return False
            continue
        if mine.dim() != theirs.dim():
            return False
        for dim, (a, b) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
            mine, theirs = mine.narrow(dim, 0, min(a, b)), theirs.narrow(dim, 0, min(a, b))
        if not torch.equal(bits(mine), bits(theirs)):
            return False
    return True
