"""What a node moves and computes, from shapes alone: bytes read and written, operations of products.

Enters: a graph's dataflow. Leaves: a `Cost` per node. A node reads its operands and writes its results once, views are
free, and nothing is assumed fused or cached. An op that picks by integers touches what it picks, not the whole table:
no more rows than its result holds, no more of what it writes than it was given to write, no more experts than it was
given tokens for. Only products count as operations; all else is bound by its bytes. These are estimates to rank
branches by, and nothing but a ranking may depend on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..kernels import accesses
from ..kernels.dataflow import Dataflow
from ..kernels.routing import is_floating

_FIRST_FACTOR: Final = {
    "linear": 0,
    "matmul": 0,
    "mm": 0,
    "mv": 0,
    "dot": 0,
    "bmm": 0,
    "_int_mm": 0,
    "_scaled_mm": 0,
    "_grouped_mm": 0,
    "_scaled_grouped_mm": 0,
    "grouped_mm_fallback": 0,
    "addmm": 1,
    "addmv": 1,
    "baddbmm": 1,
}
"""Products by name, and which operand's last dimension they sum over."""
_OVERWRITE: Final = frozenset(("copy_", "fill_", "zero_", "index_copy_", "index_put_", "scatter_", "index_fill_"))
"""In-place ops that do not read what they write."""
_ALLOCATE: Final = ("empty", "new_empty")
"""What the names of ops begin with whose results are not written yet."""
_ATTENTION: Final = "decode_attention"
"""Of this library, with the arguments of torch's."""
_BYTES: Final = ("B", "KiB", "MiB", "GiB")
_FLOPS: Final = ("flop", "kflop", "Mflop", "Gflop", "Tflop")
_FUSED: Final = "auxstream_fused"
_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes moved, and operations (two for a multiply and add) of products."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __str__(self) -> str:
        moved, computed = _scaled(self.bytes, 1024, _BYTES), _scaled(self.flops, 1000, _FLOPS)
        return f"{moved}, {computed}"


def _scaled(amount: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if amount < base:
            return f"{amount:.3g} {unit}"
        amount /= base
    return f"{amount:.3g} {units[-1]}"


def cost_of(flow: Dataflow, node: Node) -> Cost:
    """The cost of one node; nothing for inputs, attributes, scalars, views and bare allocations."""
    if node.op != "call_function" or flow.is_view(node) or flow.symbolic >> flow.index[node] & 1:
        return Cost()
    name = _name(node)
    if name.startswith(_ALLOCATE):
        return Cost()
    allocates = any(flow.owner[storage] is node for storage in flow.storages[node])
    made = moved = _bytes(node) if allocates else 0
    for argument in node.all_input_nodes:
        touched = min(_touched(flow, node, argument, made), _bytes(argument))
        twice = flow.storages[argument] & flow.writes[node] and name not in _OVERWRITE
        moved += 2 * touched if twice else touched
    return Cost(moved, _flops(flow, node))


def _touched(flow: Dataflow, node: Node, argument: Node, made: int) -> int:
    """A bound on the bytes of `argument` that `node` can touch; the caller takes the argument's size where smaller."""
    whole, indices = _bytes(argument), _indices(node)
    if is_stacked(flow, argument) and (_is_others(node) or (indices and _is_product(node))):
        return whole // max(_shape(argument)[0], 1) * _picks(flow, node, argument)
    if not indices or argument in indices or _is_product(node) or _is_pointwise(node):
        return whole
    if flow.storages[argument] & flow.writes[node]:
        width = max(leaf.element_size() for leaf in accesses.tensors(argument))
        given = [_bytes(a) for a in node.all_input_nodes if a is not argument and a not in indices]
        return max(given + [_count(a) * width for a in indices])
    return made or whole


def _flops(flow: Dataflow, node: Node) -> int:
    name = _name(node)
    shapes = [_shape(a) for a in (*node.args, *node.kwargs.values())]
    if name in _FIRST_FACTOR and (factor := shapes[_FIRST_FACTOR[name]]):
        return 2 * _count(node) * factor[-1]
    if name.startswith(("conv1d", "conv2d", "conv3d", "convolution")):
        return 2 * _count(node) * math.prod(shapes[1][1:])
    if ("scaled_dot_product" in name or name == _ATTENTION) and all(len(shape) == 4 for shape in shapes[:3]):
        query, key, value = shapes[:3]
        return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])
    if name == "einsum":
        return _einsum(node)
    if not _is_others(node):
        return 0
    total = 0
    for weight in node.all_input_nodes:
        if is_stacked(flow, weight):
            total += 2 * _picks(flow, node, weight, distinct=False) * math.prod(_shape(weight)[1:])
        elif flow.constants >> flow.index[weight] & 1 and len(_shape(weight)) == 2:
            total += 2 * _rows(flow, node) * _count(weight)
    return total


def _einsum(node: Node) -> int:
    """Every combination of indices is one multiply and add, if two tensors meet."""
    equation, tensors = node.args[0], node.all_input_nodes
    terms = str(equation).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, tensors, strict=False):
        sizes.update(zip(term, _shape(tensor), strict=False))
    return 2 * math.prod(sizes.values()) if len(terms) == len(tensors) == 2 and "." not in sizes else 0


def _is_product(node: Node) -> bool:
    return _name(node) in (*_FIRST_FACTOR, "einsum") or _is_others(node)


def _is_others(node: Node) -> bool:
    """Whether the op is of another library, and may be anything: a product with the weights that it reads."""
    known = isinstance(node.target, OpOverload) and node.target.namespace in ("aten", _FUSED)
    return isinstance(node.target, OpOverload) and not known and _name(node) != _ATTENTION


def is_stacked(flow: Dataflow, node: Node) -> bool:
    """A weight with a slice for each expert."""
    return bool(flow.constants >> flow.index[node] & 1) and len(_shape(node)) >= 3


def _picks(flow: Dataflow, node: Node, weight: Node, *, distinct: bool = True) -> int:
    """How many of a stacked weight's slices a product uses; each may be used several times, if not `distinct`."""
    experts = _shape(weight)[0]
    indices = _indices(node)
    # One integer per slice says where its rows end; otherwise there is one integer per use.
    uses = _rows(flow, node) if all(_count(a) == experts for a in indices) else sum(_count(a) for a in indices)
    return min(uses, experts) if distinct else uses


def _rows(flow: Dataflow, node: Node) -> int:
    """Rows of the widest activation that `node` reads."""
    moving = [a for a in node.all_input_nodes if not flow.constants >> flow.index[a] & 1 and is_floating(a)]
    return max((math.prod(_shape(a)[:-1]) for a in moving if _shape(a)), default=0)


def _indices(node: Node) -> list[Node]:
    return [a for a in node.all_input_nodes if _shape(a) and a.meta["val"].dtype in _INTEGERS]


def _is_pointwise(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _name(node: Node) -> str:
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, OpOverload) else ""


def _shape(argument: Any) -> tuple[int, ...]:
    """Of a node's tensor; empty for whatever else an argument may be."""
    value = argument.meta.get("val") if isinstance(argument, Node) else None
    return _sizes(value) if isinstance(value, Tensor) else ()


def _count(node: Node) -> int:
    return sum(math.prod(_sizes(leaf)) for leaf in accesses.tensors(node))


def _bytes(node: Node) -> int:
    """Of the memory behind a node's tensors: what they repeat (a stride of 0) counts once."""
    total = 0
    for leaf in accesses.tensors(node):
        strides = leaf.stride() if leaf.layout == torch.strided else (1,) * leaf.dim()
        repeated = (_hint(stride) == 0 for stride in strides)
        sizes = (1 if again and size else size for size, again in zip(_sizes(leaf), repeated, strict=True))
        total += math.prod(sizes) * leaf.element_size()
    return total


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    """A symbolic size counts as what it was traced with, or as one: asking for its value would pin the graph to it."""
    return tuple(_hint(size) for size in tensor.shape)


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1
