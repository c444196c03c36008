"""Regions taken out of a graph for a while, and laid again.

Enters: a graph with region ops, or without. Leaves, inside the `with`: the graph as it was before `insert_regions`,
marks kept. Behind it: regions laid anew, with the options of the first time. So a pass that moves nodes need not know
what handoff depends on their order: which outputs live past a lane's next fork is decided again.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch.fx import GraphModule, Node

from ..runtime.handoff_ops import REGION_OPS, region_join

LAY_AGAIN = "auxstream_lay_regions"
"""Key of `gm.meta`: a callable that inserts regions as they were inserted. `insert_regions` sets it."""


@contextmanager
def lift_regions(gm: GraphModule) -> Generator[None]:
    """Run the block on `gm` without its region ops, and lay them again, on an error too."""
    lay = gm.meta.get(LAY_AGAIN) if any(node.target in REGION_OPS for node in gm.graph.nodes) else None
    if lay is not None:
        _lift(gm)
    try:
        yield
    finally:
        if lay is not None:
            lay(gm)


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
