"""Regions taken out of a graph for a while, and laid again.

Enters: a graph with region ops, or without. Leaves, inside the `with`: the graph as it was before `insert_regions`,
marks kept. Behind it: regions laid anew, with the options of the first time. So a pass that moves nodes need not know
what handoff depends on their order: which outputs live past a lane's next fork is decided again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule, Node

from ..runtime.errors import RegionError
from ..runtime.handoff_ops import REGION_OPS, region_fork, region_join

LAY_AGAIN = "auxstream_lay_regions"
"""Key of a fork node's `meta`: a callable that inserts regions as they were inserted. `insert_regions` sets it."""


@contextmanager
def lift_regions(gm: GraphModule) -> Generator[None]:
    """Run the block on `gm` without its region ops, and lay them again, on an error too.

    Raises RegionError for region ops that `insert_regions` did not write.
    """
    lay = _layer(gm)
    if lay is None:
        yield
        return
    _lift(gm)
    try:
        yield
    finally:
        lay(gm)


def _layer(gm: GraphModule) -> Callable[[GraphModule], Any] | None:
    """What lays the regions of a graph again; None for a graph without regions."""
    ops = [node for node in gm.graph.nodes if node.target in REGION_OPS]
    for node in ops:
        if node.target is region_fork and LAY_AGAIN not in node.meta:
            raise RegionError(
                f"region op {node.name} was not inserted by insert_regions",
                expected="a graph without regions, or with regions that can be taken out and laid again",
                remedy="mark the nodes (meta['auxstream']) and call insert_regions(gm) instead",
            )
    return ops[0].meta[LAY_AGAIN] if ops else None


def _lift(gm: GraphModule) -> None:
    for join in [node for node in gm.graph.nodes if node.target is region_join]:
        outputs = join.args[1]
        for result in list(join.users):
            source = outputs[result.args[1]]
            assert isinstance(source, Node)
            result.replace_all_uses_with(source)
            gm.graph.erase_node(result)
    for node in reversed(list(gm.graph.nodes)):
        if node.target in REGION_OPS:
            gm.graph.erase_node(node)
    gm.graph.lint()
