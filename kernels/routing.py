"""Where a mixture of experts routes: products with weights, selections, and the experts they reach.

Enters: a graph's dataflow. Leaves: `Weights` (which nodes consume weights) and `Routing`s (where it is decided which
experts see a token, and the first op over stacked weights that decision reaches). Structure alone, except for ops that
hide their weights: those are known by name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .dataflow import Dataflow, positions

_NO_EXPERTS: Final = ("aten", "auxstream_fused")
"""Namespaces whose ops are no mixture of experts, whatever weights they read: the second holds fused row kernels."""
_ATTENTION: Final = "auxstream::decode_attention"
"""Whose caches look like experts where nothing writes them."""
EXPERT_OPS: Final = ("auto_deploy::*moe*", "sglang::*fused_experts*", "vllm::*fused_experts*", "vllm::moe_forward*")
"""Ops that are a mixture of experts whatever they are given: weights one by one, or found by a layer's name."""
_ROUTERS: Final = ("*router*",)
EXPERTS = "auxstream_experts"
"""Key of a node's `meta`: its op is a mixture of experts, on somebody's word (see `mark_experts`)."""
MARKED = "auxstream_marked"
"""Key of `gm.meta`: the marker has seen this graph."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Which nodes consume weights, as masks."""

    products: int
    """Products of floating-point activations with a matrix or more."""
    stacked: int
    """Where activations meet a weight of three or more dimensions, as experts are stored, or a part picked from it."""
    opaque: int
    """A fused mixture of experts: ops from outside ATen that consume two or more stacked weights, or known by name."""

    @staticmethod
    def of(flow: Dataflow) -> Weights:
        products = stacked = opaque = 0
        picked: set[Node] = set()  # computed from stacked weights and indices: experts' weights before any activation
        for position, node in enumerate(flow.nodes):
            if node.op != "call_function" or flow.constants >> position & 1 or node.target is operator.getitem:
                continue
            given = [a for a in node.all_input_nodes if flow.constants >> flow.index[a] & 1]
            moving = any(is_floating(a) for a in node.all_input_nodes if a not in given and a not in picked)
            experts = [a for a in given if _rank(flow, a) >= 3]
            if not moving and (experts or any(a in picked for a in node.all_input_nodes)):
                picked.add(node)
                continue
            pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
            if moving and not pointwise and any(_rank(flow, a) >= 2 for a in given):
                products |= 1 << position
            if not pointwise and (experts or any(a in picked for a in node.all_input_nodes)):
                stacked |= 1 << position
            known = isinstance(node.target, OpOverload) and (
                node.target.namespace in _NO_EXPERTS or node.target._schema.name == _ATTENTION
            )
            if not known and (len({flow.storages[a] for a in experts}) >= 2 or _is_expert_op(node)):
                opaque |= 1 << position
        return Weights(products, stacked, opaque)


def mark_experts(gm: GraphModule, globs: Sequence[str]) -> None:
    """Say of the ops whose `namespace::name` matches one of `globs` that they are a whole mixture of experts."""
    for node in gm.graph.nodes:
        if isinstance(node.target, OpOverload) and _matches(node.target, globs):
            node.meta[EXPERTS] = True


def _is_expert_op(node: Node) -> bool:
    if node.meta.get(EXPERTS):
        return True
    op = node.target
    return isinstance(op, OpOverload) and _matches(op, EXPERT_OPS) and not _matches(op, _ROUTERS)


def _matches(op: OpOverload, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(op._schema.name, glob) for glob in globs)


@dataclass(frozen=True, slots=True)
class Routing:
    """A decision which experts see a token: where it is taken, and the first op over stacked weights it reaches."""

    selection: int
    expert: int


def routings(flow: Dataflow, weights: Weights) -> Iterator[Routing]:
    for position, node in enumerate(flow.nodes):
        if weights.opaque >> position & 1:
            yield Routing(position, position)
        elif _is_selection(node):
            expert = _first_expert(flow, weights, position)
            if expert is not None:
                yield Routing(position, expert)


def _is_selection(node: Node) -> bool:
    """Integers computed from floats other than by a cast: top-k, argmax, sort, and their fused forms."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if not any(_is_integer(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))):
        return False
    if isinstance(node.target, OpOverload):
        casts = any(argument.name == "dtype" for argument in node.target._schema.arguments)
        if casts or torch.Tag.pointwise in node.target.tags:
            return False
    return any(is_floating(argument) for argument in node.all_input_nodes)


def _first_expert(flow: Dataflow, weights: Weights, selection: int) -> int | None:
    """The first op over a stacked weight that the selection's indices reach; its values alone do not count."""
    reached = 0
    chosen = flow.nodes[selection]
    for position in range(selection + 1, len(flow.nodes)):
        before = flow.predecessors[position]
        if any(reached >> other & 1 for other in before) or _takes_indices(flow, flow.nodes[position], chosen):
            if weights.stacked >> position & 1:
                return position
            reached |= 1 << position
    return None


def _takes_indices(flow: Dataflow, node: Node, chosen: Node) -> bool:
    if chosen in node.all_input_nodes:
        value = node.meta.get("val") if node.target is operator.getitem else chosen.meta.get("val")
        return any(_is_integer(leaf) for leaf in pytree.tree_leaves(value))
    # A selection may also write its results into tensors it was given.
    memory = flow.writes[chosen]
    return any(flow.storages[a] & memory and _is_integer(a.meta.get("val")) for a in node.all_input_nodes)


def is_floating(node: Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)


def _is_integer(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.int64, torch.int32, torch.int16)


def _rank(flow: Dataflow, node: Node) -> int:
    """Dimensions of a weight as consumed, capped by those it was stored with: broadcasting a vector makes no matrix."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    stored = 0
    for position in positions(flow.ancestors[flow.index[node]]):
        source = flow.nodes[position]
        if source.op == "get_attr" and isinstance(source.meta.get("val"), Tensor):
            stored = max(stored, source.meta["val"].dim())
    return min(value.dim(), stored)
