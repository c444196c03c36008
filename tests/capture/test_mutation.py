"""A proved decoder layer of Gemma-4 loses one ordering edge at a time: the checker sees each loss that matters.

Whether one matters is decided apart from the checker: bytes are listed one by one, order is found by search.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import auxstream
from auxstream.bench.lab import gemma4_lab
from auxstream.capture import verify
from auxstream.capture.evidence import Evidence, from_program
from auxstream.capture.program import TensorRef

Edge = tuple[int, int]


@pytest.fixture(scope="module")
def layer() -> Evidence:
    """The whole decode step of a model of one layer, with its shared expert on a lane."""
    lab = gemma4_lab("tiny", layers=1, batch=1, context=8, device=torch.device("cpu"))
    module, _, _ = lab.module("unfused", aux=True)
    with torch.no_grad(), auxstream.graph("layer", device="cpu") as g:
        module(lab.ids.clone(), lab.position.clone())
    assert g.report.ok
    assert len(g.regions) == 1
    return from_program(g.program)


def bytes_of(ref: TensorRef, address: int) -> frozenset[int]:
    elements = np.zeros(ref.size, np.int64)
    for dim, (count, stride) in enumerate(zip(ref.size, ref.stride, strict=True)):
        elements += (np.arange(count) * stride).reshape([-1 if d == dim else 1 for d in range(len(ref.size))])
    starts = address + (np.unique(elements) + ref.offset) * ref.dtype.itemsize
    return frozenset((starts[:, None] + np.arange(ref.dtype.itemsize)).ravel().tolist())


def sharing(evidence: Evidence) -> set[Edge]:
    """Pairs of nodes that touch a common byte, at least one writing it."""
    read: list[frozenset[int]] = []
    written: list[frozenset[int]] = []
    for node in evidence.nodes:
        touched = [(bytes_of(ref, evidence.buffers[ref.buffer].address), writes) for ref, writes in node.touches]
        read.append(frozenset().union(*(found for found, writes in touched if not writes)))
        written.append(frozenset().union(*(found for found, writes in touched if writes)))
    return {
        (a, b)
        for a, b in combinations(range(len(evidence.nodes)), 2)
        if written[a] & written[b] or written[a] & read[b] or read[a] & written[b]
    }


def reachable(nodes: int, edges: list[Edge]) -> list[int]:
    """Per node, what a path leads to, as a bit mask; edges go up."""
    after: list[int] = [0] * nodes
    for source, target in sorted(edges, reverse=True):
        after[source] |= after[target] | 1 << target
    return after


def test_every_edge_that_matters_is_missed(layer: Evidence) -> None:
    shared, size = sharing(layer), len(layer.nodes)
    assert len(shared) > size, "a layer's nodes share memory"
    caught = harmless = implied = 0
    for edge in dict.fromkeys(layer.edges):
        edges = [other for other in layer.edges if other != edge]
        after = reachable(size, edges)
        racing = {(a, b) for a, b in shared if not after[a] >> b & 1}
        twin = Evidence(layer.nodes, tuple(edges), layer.buffers, (), ())
        report = verify(twin)
        assert report.ok == (not racing), f"without {edge}: {racing}\n{report}"
        found = {tuple(sorted((race.hazard.first, race.hazard.second))) for race in report.races}
        assert found <= racing
        if after[edge[0]] >> edge[1] & 1:
            implied += 1
            assert not racing, "an edge that others imply is no loss"
        elif racing:
            caught += 1
        else:
            harmless += 1
    assert caught > 100 > harmless, (caught, harmless, implied)


def test_the_layer_without_lifetimes_is_no_such_graph() -> None:
    """The control: enqueued aux first, forked behind the pre-norm, nothing held or recorded, it is not proved, and the
    reused block is named."""
    lab = gemma4_lab("tiny", layers=1, batch=1, context=8, device=torch.device("cpu"))
    module, _, _ = lab.module("unfused", aux=True, unsafe=True)
    with torch.no_grad(), auxstream.graph("unsafe", verify="off", device="cpu") as g:
        module(lab.ids.clone(), lab.position.clone())
    report = verify(g)
    assert any(race.reuse for race in report.races), str(report)
