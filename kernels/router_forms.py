"""The pieces that routers are written in: casts, numbers multiplied by, norms.

Enters: a node. Leaves: what it is, or that it is none of these. Invariant: doubt is a no.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from .call import Call, aten

RESHAPING: Final = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default)
CASTS: Final = (aten.to.dtype, aten.type_as.default, aten._to_copy.default)
TIMES: Final = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar)
DIVISIONS: Final = (aten.div.Tensor, aten.div_.Tensor)


def value_of(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def rank_of(node: Any) -> int:
    value = value_of(node)
    return -1 if value is None else value.dim()


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm without a weight."""

    source: Node
    eps: float
    nodes: tuple[Node, ...]


def norm_of(node: Node) -> Norm | None:
    """`x * (mean(x^2) + eps)^-0.5`, in float32, rounded to the type of x."""
    rounded = [node] if node.target in CASTS else []
    product = Call.of(node).source if rounded else node
    if product.target is not aten.mul.Tensor:
        return None
    for wide, root in (product.args[:2], product.args[1::-1]):
        found = _root(root)
        if not isinstance(wide, Node) or found is None or found.source is not wide:
            continue
        source = Call.of(wide).source if wide.target in CASTS else wide
        cast = [wide] if source is not wide else []
        before, between, after = value_of(source), value_of(wide), value_of(node)
        if before is None or between is None or after is None or between.dtype is not torch.float32:
            return None
        if after.dtype is not before.dtype or before.dim() != 2:
            return None
        return replace(found, source=source, nodes=(*cast, *found.nodes, product, *rounded))
    return None


def _root(node: Any) -> Norm | None:
    """`(mean(x^2) + eps)^-0.5`."""
    if not isinstance(node, Node):
        return None
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5
    if not (power or node.target is aten.rsqrt.default):
        return None
    shifted = node.args[0]
    if not isinstance(shifted, Node) or shifted.target is not aten.add.Tensor:
        return None
    mean, eps = shifted.args[:2]
    if not isinstance(mean, Node) or mean.target is not aten.mean.dim or not isinstance(eps, int | float):
        return None
    call = Call.of(mean)
    squares = call.source
    if list(call.arguments["dim"]) not in ([-1], [1]) or not call.arguments["keepdim"] or call.arguments["dtype"]:
        return None
    square = squares.target is aten.pow.Tensor_Scalar and squares.args[1] == 2
    product = squares.target is aten.mul.Tensor and squares.args[0] is squares.args[1]
    source = squares.args[0]
    if not (square or product) or not isinstance(source, Node) or "alpha" in shifted.kwargs:
        return None
    return Norm(source, float(eps), (squares, mean, shifted, node))


def is_plain(node: Node) -> bool:
    """A view, a cast or a copy that changes neither shape nor type."""
    if node.target not in (*RESHAPING, *CASTS, aten.contiguous.default, aten.clone.default, aten.alias.default):
        return False
    before, after = value_of(node.args[0]), value_of(node)
    return before is not None and after is not None and before.shape == after.shape and before.dtype == after.dtype


def is_exact_cast(node: Node) -> bool:
    """To float32, from less."""
    if node.target not in CASTS:
        return False
    before, after = value_of(node.args[0]), value_of(node)
    return before is not None and after is not None and before.element_size() == 2 and after.dtype is torch.float32


def number_of(node: Node) -> float | None:
    """What a node multiplies by, if by a number."""
    if node.target not in TIMES:
        return None
    other = Call.of(node).arguments["other"]
    return float(other) if isinstance(other, int | float) and not isinstance(other, bool) else None
