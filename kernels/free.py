"""Ops that read nothing: constants and ranges, computed wherever they are used.

Enters: a node such as `full` or `arange`, or a view of one. Leaves: its value inside a group, written anew. Invariant:
only a tensor that nothing writes to is treated so (the caller knows), and only one every element of which is a literal
or, over columns, its column's number times a whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from torch.fx import GraphModule, Node

from .body import MLIR_TYPE, Number
from .build import GroupBuilder, Value
from .call import UNREAD, Call, aten
from .shapes import static
from .views import seen_through

_FILLED: Final[dict[Any, Number | None]] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full.default: None,
    aten.full_like.default: None,
    aten.new_full.default: None,
    aten.scalar_tensor.default: None,
}
"""The value an op fills with; None where an argument says it."""
_RANGES: Final = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})
_EXACT: Final = 1 << 24
"""Whole numbers up to here are the same in float32."""

FREE: Final = frozenset({*_FILLED, *_RANGES})
"""The ops of this file."""


def is_free(node: Node) -> bool:
    """Whether the elements of a node's value can be written down, seen through views."""
    origin, value = _origin(node), node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in MLIR_TYPE:
        return False
    return _filling(origin) is not None or (_range(origin) is not None and _over_columns(node, origin))


def free_value(builder: GroupBuilder, node: Node, width: Any) -> Value | None:
    """The value of a free node in a group of `width` columns; None for a range that does not run over them."""
    origin, dtype = _origin(node), node.meta["val"].dtype
    filling = _filling(origin)
    if filling is not None:
        return builder.constant(filling, dtype)
    found = _range(origin)
    assert found is not None, f"{node} is not free"
    start, step, count = found
    if count != width:
        return None
    return builder.iota(count, dtype, lambda body, column: body.add(body.mul(column, step), start))


def settle_fills(gm: GraphModule, allowed: Callable[[Node], bool]) -> int:
    """Rewrite what fills "like" another tensor to say its shape itself, so that it no longer waits for that tensor.

    Changes `gm` in place, which is to be recompiled afterwards; returns how many nodes were rewritten. `allowed` says
    which nodes may be fused at all.
    """
    found = [node for node in gm.graph.nodes if _fills_like(node) and allowed(node)]
    for node in found:
        value: Tensor = node.meta["val"]
        node.args = (list(value.shape), _filling(node))
        node.kwargs = {"dtype": value.dtype, "device": value.device}
        node.target = aten.full.default
    return len(found)


def _fills_like(node: Node) -> bool:
    """Whether a node fills a contiguous tensor of known shape, and names another tensor for its shape or dtype."""
    value = node.meta.get("val")
    if node.target not in UNREAD or _filling(node) is None or not isinstance(value, Tensor):
        return False
    return static(value.shape) and value.is_contiguous()


def _origin(node: Node) -> Node:
    source = seen_through(node)
    return node if source is None else _origin(source)


def _filling(node: Node) -> Number | None:
    if node.op != "call_function" or node.target not in _FILLED:
        return None
    given = Call.of(node).arguments
    value = given.get("fill_value", given.get("s")) if _FILLED[node.target] is None else _FILLED[node.target]
    return value if isinstance(value, bool | int | float) else None


def _range(node: Node) -> tuple[int, int, int] | None:
    """Start, step and length of a range of whole numbers whose length is known."""
    if node.op != "call_function" or node.target not in _RANGES:
        return None
    given, value = Call.of(node).arguments, node.meta["val"]
    start, step, count = given.get("start", 0), given.get("step", 1), value.shape[0]
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in (start, step, count)):
        return None
    if value.dtype.is_floating_point and max(abs(start), abs(start + step * count)) > _EXACT:
        return None
    return start, step, count


def _over_columns(node: Node, origin: Node) -> bool:
    """Whether a view of a range still runs over the last dimension, alike in all others."""
    shape, count = node.meta["val"].shape, origin.meta["val"].shape[0]
    return isinstance(shape[-1], int) and shape[-1] == count and math.prod(shape) == count
