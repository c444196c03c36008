"""Random graphs, fused, against themselves: bit for bit, every way their kernels can run."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import disagreement
from hypothesis import HealthCheck, assume, given, settings, target
from random_graphs import graphs
from torch import Tensor
from torch.fx import GraphModule
from ways import every_way

from auxstream.kernels import fuse_elementwise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_a_fused_graph_is_bit_for_bit_the_graph(drawn: tuple[GraphModule, list[Tensor]]) -> None:
    gm, inputs = drawn
    eager = GraphModule(torch.nn.Module(), copy.deepcopy(gm.graph))
    try:
        wanted = eager(*inputs)
    except (RuntimeError, NotImplementedError):
        assume(False)
    report = fuse_elementwise(gm)
    target(float(sum(len(fusion.group.nodes) for fusion in report.fusions)))
    for way, found in every_way(gm, report, inputs):
        for ours, other in zip(found, wanted, strict=True):
            wrong = disagreement(ours, other)
            assert wrong is None, f"{way}: {wrong}\n{eager.graph}\n{report}"
