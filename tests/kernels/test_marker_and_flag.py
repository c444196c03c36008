"""The marker keeps fused kernels off auxiliary branches, and the flag lets them there."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from marked_graphs import EVERYWHERE, GRAPHS, X, groups, moe
from moe_blocks import HIDDEN, TOKENS, Layer, Model, RoutedOnly
from random_regions import copy_of
from torch import Tensor, nn
from torch.fx import Node

from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.schedule import insert_regions
from auxstream.capture.trace import trace
from auxstream.kernels import FusionError, fuse, fuse_elementwise, safety
from auxstream.kernels.pointwise import CASTS
from auxstream.kernels.reach import region_of, regions_of
from auxstream.runtime.errors import RegionError, SettingsError
from auxstream.runtime.settings import SETTINGS, SafetyRules

pytestmark = pytest.mark.usefixtures("by_torch")


def facts(node: Node) -> tuple[Any, ...]:
    """A node without what it reads: names of constants change where they are folded."""
    operands = [a.name for a in node.all_input_nodes if a.op not in ("get_attr", "call_function")]
    return node.name, node.op, str(node.target), len(node.all_input_nodes), operands, node.meta


# --- marked nodes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_marked_nodes_stay_as_they_were(name: str) -> None:
    """But for casts of weights that their readers do themselves (kernels/weights.py)."""
    gm = GRAPHS[name]()
    nodes = [node for node in gm.graph.nodes if node.meta.get("skip_mlir_fusion")]
    marked = {node.name: facts(node) for node in nodes}
    casts = {n.name for n in nodes if n.target in CASTS and all(a.op == "get_attr" for a in n.all_input_nodes)}
    report = fuse_elementwise(gm)
    after = {node.name: node for node in gm.graph.nodes}
    assert marked
    assert marked.keys() - after.keys() <= casts
    assert {name: facts(after[name]) for name in marked if name in after} == {
        name: told for name, told in marked.items() if name in after
    }
    assert not any(node.meta.get("skip_mlir_fusion") for fusion in report.fusions for node in fusion.group.nodes)
    assert not any(region_of(node) for node in gm.graph.nodes if node.meta.get("auxstream_fused"))
    assert set(report.safety.values()) == {"0"}
    assert report.fusions or name in ("block, cat", "block, opaque experts")


@pytest.mark.parametrize("name", GRAPHS)
def test_the_flag_fuses_them(name: str) -> None:
    gm, default = GRAPHS[name](), GRAPHS[name]()
    report, less = fuse_elementwise(gm, safe=EVERYWHERE), fuse_elementwise(default)
    inside = [fusion for fusion in report.fusions if fusion.group.region]
    assert {fusion.group.region for fusion in inside} == set(regions_of(default))
    for fusion in inside:
        assert {region_of(node) for node in fusion.group.nodes} == {fusion.group.region}
    assert len(groups(less)) < len(groups(report))
    outside = {tuple(members) for members, _ in groups(less)}
    assert outside == {tuple(node.name for node in f.group.nodes) for f in report.fusions if not f.group.region}


def test_a_mark_without_a_region_keeps_a_node() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x * 2 + 1).relu() * 3).tanh()

    gm = trace(Two(), (X,)).graph_module
    relu = next(node for node in gm.graph.nodes if node.name == "relu")
    relu.meta["skip_mlir_fusion"] = True
    report = fuse_elementwise(gm, safe=EVERYWHERE)
    assert [members for members, _ in groups(report)] == [["mul", "add"], ["mul_1", "tanh"]]
    assert "relu" in {node.name for node in gm.graph.nodes}


@pytest.mark.parametrize("mark", [{"skip_mlir_fusion": True}, {"auxstream": "lane"}])
def test_no_group_looks_through_a_marked_view(mark: dict[str, Any]) -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x * 2 + 1).view(TOKENS, 1, HIDDEN) * 3).relu()

    gm = trace(Views(), (X,)).graph_module
    view = next(node for node in gm.graph.nodes if node.name == "view")
    assert len(fuse_elementwise(copy.deepcopy(gm)).fusions) == 1
    view.meta.update(mark)
    assert [members for members, _ in groups(fuse_elementwise(gm))] == [["mul", "add"], ["mul_1", "relu"]]
    assert "view" in {node.name for node in gm.graph.nodes}


def test_elements_of_a_marked_tuple_stay_with_it() -> None:
    class Splits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            low, high = (x * 2).chunk(2, dim=-1)
            values, places = torch.topk(x + 1, 2)
            return (low * high).relu() + values.sum() + places.sum()

    gm, reference = (trace(Splits(), (X,)).graph_module for _ in range(2))
    for node in gm.graph.nodes:
        if node.name in ("chunk", "topk", "mul"):
            node.meta.update(auxstream="parts", skip_mlir_fusion=True)
    for passes in (lambda: fuse_elementwise(gm), lambda: insert_regions(gm), lambda: fuse_elementwise(gm)):
        passes()
        gm.graph.lint()
        assert torch.equal(gm(X), reference(X))


# --- the marker runs first --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [lambda: Layer(), lambda: Layer(form="opaque"), lambda: RoutedOnly()])
def test_an_unmarked_graph_that_routes_is_refused(layer: Callable[[], nn.Module]) -> None:
    gm = trace(Model(layer()), (X,)).graph_module
    code = gm.code
    with pytest.raises(FusionError, match="has not been marked") as caught:
        fuse_elementwise(gm)
    assert "mark_multi_stream_moe_shared_experts" in str(caught.value)
    assert gm.code == code
    mark_multi_stream_moe_shared_experts(gm)
    fuse_elementwise(gm)


def test_copies_of_a_marked_graph_count_as_marked() -> None:
    gm = moe()
    for copied in (copy.deepcopy(gm), copy_of(gm)):
        assert groups(fuse_elementwise(copied)) == groups(fuse_elementwise(copy_of(gm)))


def test_marking_what_is_fused_is_refused() -> None:
    gm = moe()
    fuse_elementwise(gm)
    with pytest.raises(RegionError, match="fused kernels already"):
        mark_multi_stream_moe_shared_experts(gm)


def test_a_graph_that_does_not_route_needs_no_mark() -> None:
    class Dense(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2 + 1).topk(2)[0] * 2 + 1

    assert fuse_elementwise(trace(Dense(), (X,)).graph_module).fusions


# --- the flag ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "fused"),
    [
        ((), []),
        ((("layers.*.shared", "1"),), ["layers.0.shared", "layers.1.shared"]),
        ((("layers.*.shared", "1"), ("layers.1.*", "0")), ["layers.0.shared"]),
        ((("layers.1.*", "0"), ("layers.*.shared", "1")), ["layers.0.shared", "layers.1.shared"]),
        ((("layers.1.shared", "auto"),), ["layers.1.shared"]),
        ((("nothing.*", "1"),), []),
    ],
)
def test_rules(rules: SafetyRules, fused: list[str]) -> None:
    report = fuse_elementwise(moe(), safe=rules)
    assert sorted({fusion.group.region for fusion in report.fusions if fusion.group.region}) == fused


def test_auto_is_fused_on_trial_only() -> None:
    rules: SafetyRules = (("layers.0.*", "1"), ("layers.1.*", "auto"))
    report = fuse_elementwise(moe(), safe=rules, trial=False)
    assert {fusion.group.region for fusion in report.fusions} == {None, "layers.0.shared"}
    assert report.safety == {"layers.0.shared": "1", "layers.1.shared": "auto"}
    assert "to be proved" in str(report)


def test_a_rule_for_no_region_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(SETTINGS, fusion_safe_regions=(("LAYERS_7_SHARED", "1"),))
    monkeypatch.setattr(fuse, "fusion_safety", functools.partial(safety.fusion_safety, settings=wrong))
    gm = moe()
    code = gm.code
    with pytest.raises(SettingsError, match="names no region"):
        fuse_elementwise(gm)
    assert gm.code == code
    assert fuse_elementwise(gm, partial=True).safety == {"layers.0.shared": "0", "layers.1.shared": "0"}
