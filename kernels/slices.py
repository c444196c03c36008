"""Parts of a tensor as slices.

Enters: a graph. Leaves: the same graph in which an element of a `chunk` or `split` is the slice it stands for, so that
groups can look through it as through any other. Invariant: same values, same strides, same names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from torch.fx import GraphModule, Node

from .call import Call, aten
from .shapes import static

_PARTING: Final = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes})


def slice_parts(gm: GraphModule, allowed: Callable[[Node], bool]) -> int:
    """Rewrite `gm` in place; returns how many parts became slices. `allowed` is the marker's word on a node.

    The module is to be recompiled afterwards.
    """
    found = [node for node in gm.graph.nodes if _is_part(node) and allowed(node)]
    for part in found:
        source, number = part.args
        given = Call.of(source).arguments
        sizes = [value.shape[given["dim"]] for value in source.meta["val"]]
        start = sum(sizes[:number])
        part.target = aten.slice.Tensor
        part.args = (given["self"], given["dim"], start, start + sizes[number])
        if not source.users:
            gm.graph.erase_node(source)
    return len(found)


def _is_part(node: Node) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[0], Node) or node.args[0].target not in _PARTING:
        return False
    parts: Any = node.args[0].meta.get("val")
    return isinstance(parts, tuple | list) and all(isinstance(part, Tensor) and static(part.shape) for part in parts)
