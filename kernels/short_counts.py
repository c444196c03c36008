"""Running counts of a few integers, by comparing.

Enters: a graph. Leaves: the same graph in which the running sum of a histogram of a short integer vector (where each
expert's tokens end) is one comparison and one sum: how many of the numbers are that small. Eager clears, counts and
adds up in kernels of their own. Invariant: the same whole numbers; what lies outside the histogram is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .call import Call, aten
from .derive import derived
from .pointwise import CASTS
from .reach import region_of
from .shapes import static

MOST_ELEMENTS: Final = 256
_MOST_BINS: Final = 1024
_INTEGERS: Final = (torch.int32, torch.int64)


def count_short_histograms(gm: GraphModule, allowed: Callable[[Node], bool]) -> int:
    """Rewrite `gm` in place; returns how many running counts were rewritten. `allowed` says which nodes may be fused.

    The module is to be recompiled afterwards.
    """
    found = [chain for node in gm.graph.nodes if (chain := _chain(node)) and _may_go(chain, allowed)]
    for chain in found:
        chain[0].replace_all_uses_with(_counts(chain))
        for node in chain:
            if not node.users:
                node.graph.erase_node(node)
    return len(found)


def _chain(node: Node) -> list[Node] | None:
    """A running sum, the histogram it is of, and the cast that made its numbers floats, if there is one."""
    if node.target is not aten.cumsum.default or node.meta["val"].dtype not in _INTEGERS:
        return None
    histogram = Call.of(node).source
    if histogram.target is not aten.histc.default or list(histogram.users) != [node]:
        return None
    given = Call.of(histogram).arguments
    source: Node = given["self"]
    chain = [node, histogram, source] if source.target in CASTS else [node, histogram]
    value: Tensor = _numbers(chain).meta["val"]
    short = value.dim() == 1 and static(value.shape) and 1 < value.shape[0] <= MOST_ELEMENTS
    bins = given["bins"]
    whole = (given["min"], given["max"]) == (0, bins - 1) and 1 < bins <= _MOST_BINS
    return chain if short and whole and value.dtype in _INTEGERS else None


def _numbers(chain: list[Node]) -> Node:
    """What is counted."""
    return Call.of(chain[-1]).source


def _may_go(chain: list[Node], allowed: Callable[[Node], bool]) -> bool:
    return all(allowed(node) and region_of(node) == region_of(chain[0]) for node in chain)


def _counts(chain: list[Node]) -> Node:
    """The running counts, read where the chain reads its numbers: whoever writes to them later does not matter."""
    first, numbers = chain[-1], _numbers(chain)
    value: Tensor = numbers.meta["val"]

    def new(role: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        return derived(first, f"counts_{role}", target, args, kwargs)

    bins = new("bins", aten.arange.default, Call.of(chain[1]).arguments["bins"], dtype=value.dtype, device=value.device)
    across = new("across", aten.unsqueeze.default, numbers, 0)
    small = new("small", aten.le.Tensor, across, new("down", aten.unsqueeze.default, bins, 1))
    inside = new("inside", aten.ge.Scalar, across, 0)
    counted = new("counted", aten.logical_and.default, small, inside)
    return new("total", aten.sum.dim_IntList, counted, [-1], dtype=chain[0].meta["val"].dtype)
