"""Regions drawn at random over the graph of any program."""

from __future__ import annotations

import copy
import random

from torch.fx import GraphModule

from auxstream.capture.mark import MarkedRegion
from auxstream.kernels.dataflow import Dataflow, positions


def copy_of(gm: GraphModule) -> GraphModule:
    """The same graph over buffers of its own."""
    return GraphModule(copy.deepcopy(gm), copy.deepcopy(gm.graph))


def draw_regions(gm: GraphModule, draw: random.Random) -> list[MarkedRegion]:
    """Up to three disjoint sets of ops, each what lies between two of them or what only one of two needs."""
    flow = Dataflow.of(gm)
    ops = [index for index, node in enumerate(flow.nodes) if node.op == "call_function"]
    free = flow.mask(flow.nodes[index] for index in ops)
    regions: list[MarkedRegion] = []
    for number in range(draw.randint(1, 3)):
        first, last = sorted(draw.choices(ops, k=2))
        between = flow.ancestors[last] & flow.descendants(1 << first)
        chosen = free & (between if draw.random() < 0.5 else flow.ancestors[last] & ~flow.ancestors[first])
        free &= ~chosen
        nodes = tuple(flow.nodes[index] for index in positions(chosen))
        if nodes:
            regions.append(MarkedRegion(f"region{number}", nodes, (), flow.nodes[-1]))
    return regions
