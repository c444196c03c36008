"""The order in which a graph runs once each of its groups is one step.

Enters: a graph's dataflow and its fusions. Leaves: nodes and fusions, each once. Invariant: a linear extension of the
dataflow's edges, as near to the graph's own order as it can be; views that groups look through and nothing else reads
are left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from torch.fx import Node

from .dataflow import Dataflow
from .emit import Fusion


def steps(flow: Dataflow, fusions: Sequence[Fusion]) -> Iterator[Node | Fusion]:
    """Yields each step as soon as all it waits for is done, the one that stood first in the graph first."""
    home = {node: fusion for fusion in fusions for node in (*fusion.group.nodes, *fusion.group.hidden)}
    step_of: list[Node | Fusion] = [home.get(node, node) for node in flow.nodes]
    # A fusion stands where its last member stood: there all of its inputs are made.
    place = {step: position for position, step in enumerate(step_of)}
    before: dict[Node | Fusion, set[Node | Fusion]] = {step: set() for step in place}
    for position, step in enumerate(step_of):
        # A view that others read too comes behind its group, which reads the view's base instead.
        own = step.group.kinds if isinstance(step, Fusion) else ()
        before[step].update(step_of[p] for p in flow.predecessors[position] if flow.nodes[p] not in own)
    after: dict[Node | Fusion, list[Node | Fusion]] = {step: [] for step in place}
    waiting: dict[Node | Fusion, int] = {}
    for step, others in before.items():
        others.discard(step)
        waiting[step] = len(others)
        for other in others:
            after[other].append(step)
    ready = [(place[step], step) for step, count in waiting.items() if not count]
    heapq.heapify(ready)
    done = 0
    while ready:
        _, step = heapq.heappop(ready)
        done += 1
        yield step
        for other in after[step]:
            waiting[other] -= 1
            if not waiting[other]:
                heapq.heappush(ready, (place[other], other))
    assert done == len(place), "the groups wait for each other"
