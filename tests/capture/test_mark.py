"""The marker finds shared experts by structure, in every form models write them, and nothing else."""

from __future__ import annotations

import operator
from typing import Literal

import pytest
import torch
from moe_blocks import (
    HIDDEN,
    INNER,
    MERGES,
    TOKENS,
    Dense,
    Layer,
    Model,
    Routed,
    RoutedOnly,
    add_rms_norm,
    routed_sum,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from auxstream.capture.mark import MarkedRegion, mark_multi_stream_moe_shared_experts
from auxstream.capture.trace import trace


def traced(model: nn.Module, *args: Tensor) -> GraphModule:
    torch.manual_seed(0)
    return trace(model, args or (torch.randn(TOKENS, HIDDEN),)).graph_module


def marked(model: nn.Module, *args: Tensor) -> tuple[GraphModule, tuple[MarkedRegion, ...]]:
    gm = traced(model, *args)
    return gm, mark_multi_stream_moe_shared_experts(gm)


def modules_of(region: MarkedRegion) -> set[str]:
    """The submodules of the layer that the region's ops come from."""
    paths = [list(node.meta["nn_module_stack"].values())[-1][0].split(".") for node in region.nodes]
    return {path[2] if len(path) > 2 else "" for path in paths}


def assert_is_shared_expert(gm: GraphModule, region: MarkedRegion, layer: int) -> None:
    """Everything traced in the shared expert is in the region, and all weights in it are the shared expert's."""
    assert region.name == f"layers.{layer}.shared"
    for node in gm.graph.nodes:
        if node.op == "call_function":
            path = list(node.meta["nn_module_stack"].values())[-1][0]
            if path.startswith(f"layers.{layer}.shared"):
                assert node in region.nodes, node
            if path.startswith(f"layers.{layer}.routed"):
                assert node not in region.nodes, node
    assert modules_of(region) <= {"shared", "shared_gate", "shared_norm", ""}
    assert [n for n in gm.graph.nodes if n in region.nodes] == list(region.nodes), "graph order"


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("shared_first", [True, False], ids=["shared_first", "routed_first"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_every_way_to_merge_in_either_order(merge: str, shared_first: bool, gated: bool) -> None:
    layers = [Layer(merge=merge, shared_first=shared_first, gated=gated, pre_norm=gated) for _ in range(2)]
    gm, regions = marked(Model(*layers))
    assert len(regions) == 2
    for index, region in enumerate(regions):
        assert_is_shared_expert(gm, region, index)


@pytest.mark.parametrize("form", ["view", "cast"])
def test_a_router_reads_another_form_of_what_both_kinds_of_experts_read(form: str) -> None:
    """A flattened copy of its own, or the value in double precision that the others read rounded."""

    class OtherForm(Layer):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.double() * 2 if form == "cast" else x
            h = wide.float() if form == "cast" else x.view(TOKENS, HIDDEN)
            logits = nn.functional.linear(wide.view(1, TOKENS, HIDDEN), self.routed.router.weight.to(wide.dtype))
            scores, chosen = logits[0].topk(2)
            return self.dense(h) + routed_sum(h, scores.float(), chosen, self.routed.w_up, self.routed.w_down)

    gm, (region,) = marked(Model(OtherForm()))
    assert_is_shared_expert(gm, region, 0)


@pytest.mark.parametrize("form", ["opaque", "latent"])
@pytest.mark.parametrize("shared_first", [True, False], ids=["shared_first", "routed_first"])
def test_opaque_experts_and_latent_projections(form: Literal["opaque", "latent"], shared_first: bool) -> None:
    gm, regions = marked(Model(Layer(form=form, shared_first=shared_first), Layer(form=form, merge="norm_behind")))
    assert len(regions) == 2
    for index, region in enumerate(regions):
        assert_is_shared_expert(gm, region, index)


def test_residual_added_to_the_shared_expert_first() -> None:
    """(residual + shared) + routed: the addition of the residual belongs to the branch."""

    class ResidualFirst(Layer):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return (x + self.dense(h)) + self.routed(h)

    gm, regions = marked(Model(ResidualFirst(), ResidualFirst()))
    assert [region.name for region in regions] == ["layers.0.shared", "layers.1.shared"]
    for index, region in enumerate(regions):
        assert_is_shared_expert(gm, region, index)
        assert region.nodes[-1].target is torch.ops.aten.add.Tensor


def test_residual_added_to_the_routed_side_first() -> None:
    class ResidualFirst(Layer):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return (x + self.routed(h)) + self.dense(h)

    gm, regions = marked(Model(ResidualFirst()))
    (region,) = regions
    assert_is_shared_expert(gm, region, 0)


def test_tuple_valued_forks_and_merges() -> None:
    """A fused op with two results feeds both sides, and another one merges them."""

    class Fused(Layer):
        def forward(self, x: Tensor) -> Tensor:
            for_shared, _ = add_rms_norm(x, x, self.norm.weight)
            normed, residual = add_rms_norm(for_shared, x, self.norm.weight)
            shared, routed = self.dense(normed), self.routed(normed)
            merged, total = add_rms_norm(shared, routed, self.norm.weight)
            return merged + total + residual

    gm, regions = marked(Model(Fused(), Fused()))
    assert len(regions) == 2
    for index, region in enumerate(regions):
        assert_is_shared_expert(gm, region, index)
        assert not any(node.target is operator.getitem for node in region.nodes), "elements of outside tuples stay out"


@pytest.mark.parametrize("grouped", [False, True])
def test_stacked_selections_are_one_routing(grouped: bool) -> None:
    """Group-limited top-k: a selection of groups masks the scores of the selection of experts."""

    class Grouped(Routed):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.router(x)
            if grouped:
                best = logits.view(TOKENS, 2, 2).amax(-1).topk(1, sorted=False)[1]
                mask = torch.zeros(TOKENS, 2).scatter_(1, best, 1.0)
                logits = logits.masked_fill(mask.repeat_interleave(2, 1) == 0, -1e9)
            scores, chosen = logits.topk(2)
            return routed_sum(x, scores, chosen, self.w_up, self.w_down)

    layer = Layer(pre_norm=True)
    layer.routed = Grouped()
    gm, (region,) = marked(Model(layer))
    assert_is_shared_expert(gm, region, 0)


class SeparateRouterNorm(Layer):
    """Inside the routed branch the router's norm runs beside the experts' norm: no weight is multiplied there."""

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.routed.router(nn.functional.rms_norm(x, (HIDDEN,))).topk(2)
        return x + routed_sum(self.norm(x), scores, chosen, self.routed.w_up, self.routed.w_down)


class NormBeside(Layer):
    """Work without a weight beside the experts is no expert."""

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.norm(x).sigmoid()


class Counting(Dense):
    """A branch that writes a buffer of the model's is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return super().forward(x) * self.seen


@pytest.mark.parametrize(
    "layer",
    [
        RoutedOnly(),
        SeparateRouterNorm(),
        NormBeside(),
        Layer(shared=Counting()),
        Layer(form="values_only"),
    ],
    ids=["routed_only", "router_norm", "norm_beside", "writes_buffer", "values_only"],
)
def test_no_shared_expert_no_region(layer: Layer) -> None:
    gm, regions = marked(Model(layer, layer))
    assert regions == ()
    assert not any("auxstream" in node.meta or "skip_mlir_fusion" in node.meta for node in gm.graph.nodes)


def test_work_that_starts_from_integers_is_no_shared_expert() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lin = nn.Embedding(TOKENS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.layer = RoutedOnly()

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            return self.layer(x) + self.lin(self.table(position))

    assert marked(Embedded(), torch.randn(TOKENS, HIDDEN), torch.arange(TOKENS))[1] == ()


def test_a_write_that_the_branch_does_not_depend_on_stays_with_the_caller() -> None:
    class Beside(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return super().forward(x)

    _, (region,) = marked(Model(Layer(shared=Beside())))
    assert not any(node.target is torch.ops.aten.add_.Tensor for node in region.nodes)


def test_two_dense_branches_are_no_mixture_of_experts() -> None:
    class Parallel(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.dense(x) + self.norm(x)

    assert marked(Model(Parallel(), Parallel()))[1] == ()


def test_tables_and_projections_that_span_layers_are_no_shared_experts() -> None:
    """Rotary tables, and per-layer inputs projected once from the embedding, run beside whole layers of routing."""

    class Spanning(Model):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(*layers)
            self.per_layer = nn.Linear(HIDDEN, HIDDEN)
            self.register_buffer("frequencies", torch.randn(HIDDEN // 2))

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            extra = self.per_layer(x)
            angles = position[:, None].float() @ self.frequencies[None, :]
            table = torch.cat([angles, angles], -1).cos()
            for mix, layer in zip(self.mix, self.layers, strict=True):
                h = mix(x) * table
                x = x + h.softmax(-1) @ mix(h).mT @ mix(x)
                x = layer(x) * extra
            return x

    args = (torch.randn(TOKENS, HIDDEN), torch.arange(TOKENS))
    assert marked(Spanning(RoutedOnly(), RoutedOnly()), *args)[1] == ()
    gm, regions = marked(Spanning(Layer(), Layer()), *args)
    assert len(regions) == 2
    for index, region in enumerate(regions):
        assert_is_shared_expert(gm, region, index)


def test_the_marker_annotates_only() -> None:
    gm = traced(Model(Layer(), RoutedOnly()))
    before, code = {node: dict(node.meta) for node in gm.graph.nodes}, gm.code
    (region,) = mark_multi_stream_moe_shared_experts(gm)
    assert gm.code == code
    assert list(gm.graph.nodes) == list(before)
    for node, meta in before.items():
        extra = {"auxstream": region.name, "skip_mlir_fusion": True} if node in region.nodes else {}
        assert node.meta == meta | extra
    assert mark_multi_stream_moe_shared_experts(gm) == (region,), "marking again finds the same"


def test_sides_and_join() -> None:
    gm, (region,) = marked(Model(Layer()))
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    assert not set(region.nodes) & set(region.routed)
    assert all(position[node] < position[region.join] for node in region.nodes + region.routed)
    assert {region.nodes[-1], region.routed[-1]} == set(region.join.all_input_nodes)
    assert "layers.0.shared" in str(region)


def test_a_cast_of_the_branchs_own_weight_travels_with_it() -> None:
    """Otherwise the fork would wait for constant work that the caller does in between."""

    class Casting(Dense):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(
                super().forward(x), self.down.weight.T.to(torch.float64).to(x.dtype)[:HIDDEN].mT.mT
            )

    class CastingLayer(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.routed(x) + self.shared.down(self.shared(x)[:, :INNER])

    gm, (region,) = marked(Model(CastingLayer(shared=Casting())))
    casts = [node for node in gm.graph.nodes if node.target is torch.ops.aten.to.dtype]
    assert casts
    assert set(casts) <= set(region.nodes)


def test_names_without_layers_and_names_that_collide() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Layer(), Layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).tanh() @ torch.ones(HIDDEN, HIDDEN))

    assert [region.name for region in marked(Two())[1]] == ["moe.0.shared", "moe.1.shared"]

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Model(Layer()), Model(Layer())

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x))

    assert [region.name for region in marked(Stage())[1]] == ["layers.0.shared", "layers.0.shared.1"]
