"""The steps of a region as callables for FX graphs.

Enters: the tensors that cross a region's border, as arguments of the nodes. Leaves: four functions with which
`insert_regions` writes fork, enter, leave and join into a graph. Invariant: each maps to one step of
`runtime.regions.Region`, and dead-code elimination keeps all four, whether or not anything uses their results.

The join takes the tensors the branch reads as arguments it does not touch. FX drops a value after the last node that
mentions it, so a mention by the join keeps the value's memory until the caller's stream has waited for the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.fx import node as fx_node

from .regions import Region, open_region


@dataclass(frozen=True, slots=True)
class RegionValue:
    """Stands for a `Region` in `meta["val"]` of a fork node."""

    name: str


def region_fork(
    name: str, recorded: Sequence[Tensor], held: Sequence[Tensor], priority: int = 0, writes: Sequence[Tensor] = ()
) -> Region:
    """Fork: `recorded` get `record_stream`, `held` outlive the join by the graph's own references."""
    return open_region(name, recorded=recorded, held=held, priority=priority)


def region_enter(region: Region) -> None:
    """The region's lane becomes the current stream."""
    region.__enter__()


def region_leave(region: Region, recorded_outputs: Sequence[Tensor]) -> None:
    """The caller's stream is current again; `recorded_outputs` get `record_stream` for the streams that join."""
    if recorded_outputs:
        region.returns(list(recorded_outputs))
    region.__exit__(None, None, None)


def region_join(region: Region, outputs: Sequence[Tensor], reads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The current stream waits; returns `outputs`. `reads` only lengthen lives: see the module's docstring."""
    region.held_returns = outputs
    region.join()
    return tuple(outputs)


REGION_OPS: tuple[Callable[..., Any], ...] = (region_fork, region_enter, region_leave, region_join)
"""In the order a region runs through them."""

for _op in REGION_OPS:
    cast(Callable[[Any], Any], fx_node.has_side_effect)(_op)
