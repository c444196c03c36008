"""Sums over few rows as additions.

Enters: a graph. Leaves: the same graph in which a sum over a short second-to-last dimension (the experts of a token) is
a chain of additions, in float32, of its slices. A chain fuses with what follows it; a reduction across rows does not.
Where what is summed was gathered by rows, each slice is gathered on its own, and the gathered tensor is never made; nor
is the one it was gathered from, if it was computed row by row for that alone (the experts' outputs times their scores).
Invariant: same values up to the order of the additions, which is that of the index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.node import map_arg

from .call import Call, aten
from .dataflow import Dataflow
from .derive import derived
from .gathers import index_of
from .lower import fusible
from .pointwise import CASTS, POINTWISE
from .reach import region_of
from .shapes import static

MOST_TERMS: Final = 16
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
_RESHAPING: Final = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def unroll_row_sums(flow: Dataflow, allowed: Callable[[Node], bool]) -> int:
    """Rewrite the graph of `flow` in place; returns how many sums were unrolled. `allowed` is the marker's word.

    The module is to be recompiled afterwards, and the dataflow read again.
    """
    found = [node for node in flow.nodes if _is_short_sum(node) and allowed(node)]
    for node in found:
        chain = _Chain(flow, node, allowed)
        node.replace_all_uses_with(chain.total())
        for replaced in (node, *chain.looked_through):
            if not replaced.users:
                node.graph.erase_node(replaced)
    return len(found)


def _is_short_sum(node: Node) -> bool:
    if node.op != "call_function" or node.target is not aten.sum.dim_IntList:
        return False
    call = Call.of(node)
    value, dims = call.source.meta.get("val"), call.arguments["dim"]
    if not isinstance(value, FakeTensor) or value.dim() < 2 or len(dims or ()) != 1:
        return False
    if value.dtype not in _FLOATS or call.arguments["dtype"] not in (None, value.dtype):
        return False
    terms, width = value.shape[-2], value.shape[-1]
    short = static((terms, width)) and 2 <= terms <= MOST_TERMS and width > 1
    if not short or dims[0] % value.dim() != value.dim() - 2 or call.arguments["keepdim"]:
        return False
    with value.fake_mode:  # additions keep their operands' order in memory; where a sum does not, it stays
        term = value.select(-2, 0)
        return (term + term).stride() == node.meta["val"].stride()


class _Chain:
    """The nodes that take the place of one sum."""

    def __init__(self, flow: Dataflow, node: Node, allowed: Callable[[Node], bool]) -> None:
        self.flow = flow
        self.node = node
        self.allowed = allowed
        self.looked_through: list[Node] = []
        self.call = Call.of(node)
        self.shape = tuple(self.call.source.meta["val"].shape)

    def total(self) -> Node:
        dtype: torch.dtype = self.node.meta["val"].dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        terms = [self._cast(term, wide) for term in self._terms()]
        total = terms[0]
        for number, term in enumerate(terms[1:], 1):
            total = self._new(aten.add.Tensor, (total, term), f"to{number}")
        return self._cast(total, dtype)

    def _terms(self) -> Sequence[Node]:
        """The slices to be added, the first index first."""
        source, count = self.call.source, self.shape[-2]
        gathered = source.args[0] if source.target in _RESHAPING else None
        if isinstance(gathered, Node) and _picks_rows(gathered, self.shape) and self._may_move(source, gathered):
            call = Call.of(gathered)
            index, table = index_of(call), call.source
            assert index is not None
            grid = self._new(aten.view.default, (index, list(self.shape[:-1])), "index")
            picks = [self._new(aten.select.int, (grid, -1, k), f"index{k}") for k in range(count)]
            self.looked_through = [source, gathered]
            if list(table.users) == [gathered] and _is_row_by_row(table) and self._may_move(table):
                self.looked_through.append(table)
                return [self._computed(table, pick, f"row{k}") for k, pick in enumerate(picks)]
            return [self._new(aten.index.Tensor, (table, [pick]), f"row{k}") for k, pick in enumerate(picks)]
        return [self._new(aten.select.int, (source, -2, k), f"row{k}") for k in range(count)]

    def _computed(self, op: Node, pick: Node, role: str) -> Node:
        """Some rows of what `op` would compute, computed from those rows of its operands."""

        def rows(operand: Node) -> Node:
            shape, name = operand.meta["val"].shape, f"{role}_{operand.name}"
            if len(shape) < 2 or shape[0] == 1:
                return operand  # the same for all rows
            if shape[1] > 1:
                return self._new(aten.index.Tensor, (operand, [pick]), name)
            one = self._new(
                aten.index.Tensor, (self._new(aten.select.int, (operand, 1, 0), f"{name}_all"), [pick]), name
            )
            return self._new(aten.unsqueeze.default, (one, -1), f"{name}_column")

        args, kwargs = map_arg((op.args, op.kwargs), rows)
        return derived(self.node, role, op.target, args, kwargs)

    def _may_move(self, *nodes: Node) -> bool:
        """Whether ops may run where the sum stands: nothing writes, behind them, to what they read or make, and no mark
        keeps them where they are."""
        touched, before = frozenset[int](), -1
        for node in nodes:
            touched |= self.flow.reads[node] | self.flow.storages[node]
            before &= self.flow.ancestors[self.flow.index[node]]
        written = any(
            not before >> self.flow.index[node] & 1 and node not in nodes
            for storage in touched
            for node in self.flow.writers.get(storage, ())
        )
        return not written and all(self.allowed(n) and region_of(n) == region_of(self.node) for n in nodes)

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        if node.meta["val"].dtype == dtype:
            return node
        return self._new(aten.to.dtype, (node, dtype), f"as_{str(dtype)[6:]}_{node.name}")

    def _new(self, target: Any, args: tuple[Any, ...], role: str) -> Node:
        return derived(self.node, role, target, args)


def _is_row_by_row(node: Node) -> bool:
    """Whether a matrix is computed element by element, from matrices, columns, rows and numbers."""
    if node.target not in POINTWISE or node.target in CASTS or not fusible(node):
        return False
    shape = tuple(node.meta["val"].shape)
    operands = [tuple(a.meta["val"].shape) for a in Call.of(node).read()]
    return static(shape) and shape[0] > 1 and shape in operands and all(len(s) <= 2 and static(s) for s in operands)


def _picks_rows(node: Node, shape: tuple[Any, ...]) -> bool:
    """Whether a node gathers rows of a matrix by a vector, one for each row of `shape`."""
    if node.op != "call_function" or node.target is not aten.index.Tensor or len(node.args[1]) != 1:  # pyright: ignore
        return False
    call = Call.of(node)
    index = index_of(call)
    if index is None or index.meta["val"].dim() != 1 or call.source.meta["val"].dim() != 2:
        return False
    return tuple(node.meta["val"].shape)[-1] == shape[-1] and index.meta["val"].is_contiguous()
