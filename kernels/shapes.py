"""Arithmetic on shapes whose sizes may be symbolic, and the order of a tensor's dimensions in memory.

Enters: sizes and traced tensors. Leaves: products, and answers that hold for every value of the symbols: where that is
not known the answer is no. Invariant: no guard is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def product(sizes: Sequence[Any]) -> Any:
    """The product of sizes: an int, or a symbolic expression."""
    total: Any = 1
    for size in sizes:
        total = total * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return int(total) if getattr(total, "is_Integer", False) else total


def same(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for certain."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return bool(product([one]) == product([other]))


def static(sizes: Sequence[Any]) -> bool:
    """Whether all sizes are plain numbers."""
    return all(isinstance(size, int) for size in sizes)


def row_dims(value: Tensor) -> tuple[Any, ...]:
    """All dimensions but the last."""
    return tuple(value.shape[:-1])


def width_of(value: Tensor) -> Any:
    """The size of the last dimension; 1 for a tensor without dimensions."""
    return value.shape[-1] if value.dim() else 1


def memory_order(value: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a dense tensor from the slowest to the fastest; None for one with gaps or overlaps.

    Dimensions of size 1 go where they give the strides the tensor has, if there is such a place.
    """
    shape, strides = list(value.shape), list(value.stride())
    order = list(range(value.dim()))
    if not any(isinstance(s, torch.SymInt) for s in (*strides, *shape)):
        order.sort(key=lambda dim: (-strides[dim], shape[dim] == 1))
    step: Any = 1
    for dim in reversed(order):
        if not same(shape[dim], 1):
            if not same(strides[dim], step):
                return None
            step = product([step, shape[dim]])
    return tuple(order)
