"""Where the rows of a value are, op by op.

Enters: a node, and the classes of its arguments, of which one at least has rows and none is MIXED. Leaves: the class of
what it returns. Invariant: a value of class `Rows(d, k)` has, at index i of dimension d, nothing in it from any row of
inputs but i // k; one of class FREE has nothing from any. MIXED says nothing, and is what every doubt comes to.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Rows:
    """One row of inputs to each `each` indices of dimension `dim`."""

    dim: int
    each: int = 1


FREE: Final = "free"
MIXED: Final = "mixed"
Class = Rows | str


@dataclass(frozen=True, slots=True)
class _Op:
    """A call with its arguments by name."""

    node: Node
    given: Mapping[str, Any]
    classes: Mapping[Node, Class]

    def of(self, name: str) -> Class:
        """The class of one tensor argument; FREE for none."""
        value = self.given.get(name)
        return self.classes[value] if isinstance(value, Node) else FREE

    def rows(self, name: str) -> Rows:
        """The class of the argument that must be the one with rows."""
        found = self.of(name)
        assert isinstance(found, Rows), f"{self.node} has rows elsewhere than in {name}"
        return found

    def shape(self, name: str) -> Sequence[int]:
        return _shape(self.given[name])

    @property
    def dim(self) -> int:
        return self.given["dim"] % len(self.shape("self"))

    @property
    def tensors(self) -> list[Node]:
        return self.node.all_input_nodes


def class_of(node: Node, classes: Mapping[Node, Class]) -> Class:
    """The class of what an op returns: the same for all it returns."""
    if node.target is operator.getitem:
        return classes[node.all_input_nodes[0]]
    if not isinstance(node.target, OpOverload):
        return MIXED
    schema = node.target._schema
    names = [argument.name for argument in schema.arguments]
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    op = _Op(node, defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs), classes)
    name = schema.name.removeprefix("aten::")
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in node.target.tags:
        rule = _elementwise
    return MIXED if rule is None else rule(op)


def _shape(node: Node) -> Sequence[int]:
    value: Any = node.meta["val"]
    return value.shape if isinstance(value, Tensor) else value[0].shape


def _joined(found: Sequence[Class]) -> Class:
    """One class for values side by side."""
    rows = {one for one in found if one != FREE}
    return FREE if not rows else rows.pop() if len(rows) == 1 else MIXED


def _elementwise(op: _Op) -> Class:
    """Aligned at the last dimension, as broadcasting does it."""
    shape = _shape(op.node)
    found: list[Class] = []
    for tensor in op.tensors:
        one = op.classes[tensor]
        if isinstance(one, Rows):
            dim = one.dim + len(shape) - len(_shape(tensor))
            one = Rows(dim, one.each) if dim >= 0 and shape[dim] == _shape(tensor)[one.dim] else MIXED
        found.append(one)
    return _joined(found)


def _regrouped(op: _Op) -> Class:
    """The same elements in the same order, under another shape."""
    (tensor,) = op.tensors
    one, old, new = op.classes[tensor], _shape(tensor), _shape(op.node)
    assert isinstance(one, Rows)
    count, ahead, behind = old[one.dim] // one.each, math.prod(old[: one.dim]), math.prod(old[one.dim + 1 :]) * one.each
    for dim, size in enumerate(new):
        if size and size % count == 0 and math.prod(new[:dim]) == ahead:
            each = size // count
            if each * math.prod(new[dim + 1 :]) == behind:
                return Rows(dim, each)
    return MIXED


def _permuted(op: _Op) -> Class:
    one, rank = op.of("self"), len(op.shape("self"))
    if "dims" in op.given:
        order = [dim % rank for dim in op.given["dims"]]
    else:
        order = list(range(rank))
        first, second = op.given.get("dim0", -2), op.given.get("dim1", -1)
        if rank >= 2:
            order[first], order[second] = order[second], order[first]
    return Rows(order.index(one.dim), one.each) if isinstance(one, Rows) else one


def _unsqueezed(op: _Op) -> Class:
    one = op.rows("self")
    return Rows(one.dim + (op.given["dim"] % len(_shape(op.node)) <= one.dim), one.each)


def _sliced(op: _Op) -> Class:
    """All rows are kept; other dimensions may be cut."""
    return op.rows("self") if len(op.tensors) == 1 and op.dim != op.rows("self").dim else MIXED


def _selected(op: _Op) -> Class:
    one, dim = op.rows("self"), op.dim
    return MIXED if dim == one.dim else Rows(one.dim - (dim < one.dim), one.each)


def _along(op: _Op) -> Class:
    """Across some dimensions, which stay (softmax, sort) or go (sum)."""
    if "other" in op.given:
        return _elementwise(op)
    one, old, new, dims = op.rows("self"), op.shape("self"), _shape(op.node), op.given.get("dim")
    across = {dim % len(old) for dim in ([dims] if isinstance(dims, int) else dims or range(len(old)))}
    if one.dim in across:
        return MIXED
    return one if len(new) == len(old) else Rows(one.dim - sum(dim < one.dim for dim in across), one.each)


def _normalized(op: _Op) -> Class:
    one = op.of("input")
    kept = len(op.shape("input")) - len(op.given["normalized_shape"])
    weights = [op.of(name) for name in ("weight", "bias")]
    return one if isinstance(one, Rows) and one.dim < kept and weights == [FREE, FREE] else MIXED


def _linear(op: _Op) -> Class:
    one = op.of("input")
    weights = [op.of(name) for name in ("weight", "bias")]
    return one if isinstance(one, Rows) and one.dim < len(op.shape("input")) - 1 and weights == [FREE, FREE] else MIXED


def _product(left: str, right: str, added: str = "") -> Callable[[_Op], Class]:
    """A matrix product: rows of the left one, columns of the right one, or batches of both."""

    def rule(op: _Op) -> Class:
        if op.of(added) != FREE or min(len(op.shape(left)), len(op.shape(right))) < 2:
            return MIXED
        new = _shape(op.node)
        alone = FREE in (op.of(left), op.of(right))
        found: list[Class] = []
        for name, summed in ((left, -1), (right, -2)):
            one, old = op.of(name), op.shape(name)
            if isinstance(one, Rows):
                dim = one.dim - len(old)
                if dim == summed or (dim >= -2 and not alone) or new[dim] != old[dim]:
                    return MIXED
                one = Rows(dim + len(new), one.each)
            found.append(one)
        return _joined(found)

    return rule


def _attention(query: str, key: str, value: str, mask: str) -> Callable[[_Op], Class]:
    """Rows of all four, ahead of heads' positions and numbers."""

    def rule(op: _Op) -> Class:
        rank = len(op.shape(query))
        found: list[Class] = []
        for name in (query, key, value, mask):
            one = op.of(name)
            if isinstance(one, Rows):
                dim = one.dim - len(op.shape(name))
                each_its_own = dim < -2 and op.shape(name)[dim] == _shape(op.node)[dim]  # queries may share a head
                one = Rows(dim + rank, one.each) if each_its_own else MIXED
            found.append(one)
        return _joined(found)

    return rule


def _by_token(*tokens: str) -> Callable[[_Op], Class]:
    """One token at each index of the first dimension of these; whatever else it is given is the same for all."""

    def rule(op: _Op) -> Class:
        leaves = pytree.tree_leaves([value for name, value in op.given.items() if name not in tokens])
        others = _joined([op.classes[leaf] for leaf in leaves if isinstance(leaf, Node)])
        one = _joined([op.of(name) for name in tokens])
        return one if isinstance(one, Rows) and one.dim == 0 and others == FREE else MIXED

    return rule


def _looked_up(table: str, index: str) -> Callable[[_Op], Class]:
    """Rows of a table that no row of inputs is in."""

    def rule(op: _Op) -> Class:
        return op.of(index) if op.of(table) == FREE else MIXED

    return rule


def _indexed(op: _Op) -> Class:
    """`table[i]` along the first dimension."""
    indices = op.given["indices"]
    return op.classes[indices[0]] if len(indices) == 1 and op.of("self") == FREE else MIXED


def _gathered(op: _Op) -> Class:
    one = op.of("self")
    if not isinstance(one, Rows) or op.of("index") not in (one, FREE) or op.dim == one.dim:
        return MIXED
    return one if _shape(op.node)[one.dim] == op.shape("self")[one.dim] else MIXED


def _side_by_side(op: _Op) -> Class:
    """Parts put together along a dimension that no rows are in."""
    one, dim = _joined([op.classes[tensor] for tensor in op.tensors]), op.given["dim"] % len(_shape(op.node))
    if not isinstance(one, Rows):
        return MIXED
    if op.node.target is torch.ops.aten.stack.default:
        return Rows(one.dim + (dim <= one.dim), one.each)
    return MIXED if dim == one.dim else one


_RULES: Final[Mapping[str, Callable[[_Op], Class]]] = {
    **dict.fromkeys(("to", "_to_copy", "contiguous", "clone", "detach", "alias", "dropout", "type_as"), _elementwise),
    **dict.fromkeys(("expand", "masked_fill", "where", "lift_fresh_copy", "copy"), _elementwise),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"), _regrouped),
    **dict.fromkeys(("permute", "transpose", "t", "mT"), _permuted),
    "unsqueeze": _unsqueezed,
    **dict.fromkeys(("slice", "split", "split_with_sizes", "chunk", "narrow"), _sliced),
    **dict.fromkeys(("select", "unbind"), _selected),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "cumsum", "sort", "topk", "argsort"), _along),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "prod", "argmax", "argmin", "any", "all", "var", "std"), _along),
    **dict.fromkeys(("max", "min", "logsumexp", "linalg_vector_norm", "norm"), _along),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    "linear": _linear,
    "mm": _product("self", "mat2"),
    "bmm": _product("self", "mat2"),
    "matmul": _product("self", "other"),
    "addmm": _product("mat1", "mat2", "self"),
    "scaled_dot_product_attention": _attention("query", "key", "value", "attn_mask"),
    "auxstream::decode_attention": _attention("q", "k", "v", "mask"),
    "auxstream::moe_experts": _by_token("hidden", "chosen", "scale"),
    "auxstream::moe_router": _by_token("hidden"),
    "auxstream::skinny_linear": _by_token("x"),
    "embedding": _looked_up("weight", "indices"),
    "index": _indexed,
    "gather": _gathered,
    **dict.fromkeys(("cat", "stack"), _side_by_side),
}
