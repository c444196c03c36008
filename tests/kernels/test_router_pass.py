"""Routers found in traced models and replaced by one op: what is matched, what is left, and that nothing changes."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

pytest.importorskip("transformers")
from auxstream.bench.architectures import MODELS
from auxstream.bench.lab import Fusion, Lab, Row, compare, repeatable_attention
from auxstream.capture.branches import find_branches
from auxstream.capture.huggingface import DecodeStep, build
from auxstream.capture.mark import find_shared_experts, mark_multi_stream_moe_shared_experts
from auxstream.capture.proposals import propose
from auxstream.capture.trace import TracedGraph, trace
from auxstream.kernels import fuse_elementwise, router_pass
from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.router import MOST_CHOSEN, Rules, Tensors, moe_router, scored, weighed
from auxstream.kernels.router_closed import Match, Unmatched
from auxstream.kernels.router_match import match
from auxstream.kernels.router_pass import RouterReport, agree, fuse_routers

pytestmark = pytest.mark.usefixtures("by_torch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16 = torch.float32, torch.bfloat16
TOKENS, WIDTH, EXPERTS, TOP_K = 5, 32, 16, 3
aten = torch.ops.aten


def copied(gm: GraphModule) -> GraphModule:
    """Another graph over the same weights and caches."""
    return GraphModule(gm, copy.deepcopy(gm.graph))


def routers(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is moe_router()]


def selections(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is aten.topk.default]


# --- routers by hand, as one layer ------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A router in front of small experts. `route(layer, x)` returns choices, their weights, and what else to return."""

    def __init__(self, route: Callable[[Any, Tensor], tuple[Any, ...]], dtype: torch.dtype = BF16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype))

        self.route = route
        self.weight = normal(EXPERTS, WIDTH, scale=WIDTH**-0.5)
        self.bias = normal(EXPERTS, dtype=F32, scale=0.1)
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=dtype))
        self.expert_scale = nn.Parameter(torch.ones(EXPERTS, dtype=dtype))
        self.experts = normal(EXPERTS, WIDTH, WIDTH, scale=WIDTH**-0.5)
        self.register_buffer("counts", torch.zeros(TOKENS, WIDTH, dtype=dtype))
        self.register_buffer("gain", torch.ones(EXPERTS))

    def forward(self, x: Tensor) -> Any:
        index, weights, *others = self.route(self, x)
        out = torch.einsum("th,tkhi->tki", x, self.experts[index])
        return (out * weights[..., None].to(x.dtype)).sum(1), *others


def softmax(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    weights, index = nn.functional.linear(x, layer.weight).softmax(-1, dtype=F32).topk(TOP_K)
    return index, weights


def renormalised(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    index, weights = softmax(layer, x)
    weights /= weights.sum(-1, keepdim=True)
    return index, weights.to(x.dtype)


def late(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    values, index = nn.functional.linear(x, layer.weight).topk(TOP_K)
    return index, values.softmax(-1, dtype=F32)


def normed(layer: Layer, x: Tensor, eps: float = 1e-6) -> tuple[Tensor, ...]:
    wide = x.float()
    unit = (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype)
    index, weights = softmax(layer, layer.scale * unit * 0.25)
    weights /= weights.sum(-1, keepdim=True)
    return index, weights * layer.expert_scale[index]


def sigmoid(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    scores = nn.functional.linear(x.float(), layer.weight.float()).sigmoid()
    index = (scores + layer.bias).topk(TOP_K, sorted=False).indices
    weights = scores.gather(1, index)
    return index, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5


def grouped(
    layer: Layer, x: Tensor, best: int = 2, fill: float = -torch.inf, outside: bool = False, rows: int = -1
) -> tuple[Tensor, ...]:
    scores = nn.functional.linear(x.float(), layer.weight.float()).sigmoid()
    choice = scores + layer.bias
    sums = choice.view(rows, 4, EXPERTS // 4).topk(best, dim=-1).values.sum(-1)
    kept = sums.topk(2, dim=-1, sorted=False).indices
    mask = torch.zeros_like(sums).scatter_(1, kept, 1).bool()
    mask = mask[..., None].expand(-1, 4, EXPERTS // 4).reshape(rows, EXPERTS)
    index = choice.masked_fill(mask if outside else ~mask, fill).topk(TOP_K, dim=-1).indices
    return index, scores.gather(1, index) * 2.5


KNOWN: dict[str, Callable[..., tuple[Any, ...]]] = {
    "softmax": softmax,
    "renormalised": renormalised,
    "late": late,
    "normed": normed,
    "sigmoid": sigmoid,
    "grouped": grouped,
    "rows named": functools.partial(grouped, rows=TOKENS),
}


def inputs(seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(route: Callable[..., tuple[Any, ...]], dtype: torch.dtype = BF16) -> GraphModule:
    return trace(Layer(route, dtype).eval(), (inputs(dtype=dtype),)).graph_module


def match_of(gm: GraphModule) -> Match:
    return match(Dataflow.of(gm), selections(gm)[-1])


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_router_becomes_the_op_and_gives_the_same(name: str, dtype: torch.dtype) -> None:
    gm = layer_of(KNOWN[name], dtype)
    fused = copied(gm)
    report = fuse_routers(fused)
    assert len(report.fused) == len(routers(fused)) == 1, report
    assert not report.left
    assert not selections(fused)
    for seed in range(4):
        expected, found = gm(inputs(seed, dtype))[0], fused(inputs(seed, dtype))[0]
        torch.testing.assert_close(found, expected, rtol=0.02 if dtype is BF16 else 1e-5, atol=1e-6)
    assert not fuse_routers(fused).fused
    assert not fuse_routers(fused).left


def test_what_was_read_of_each() -> None:
    rules = {name: match_of(layer_of(route)).rules for name, route in KNOWN.items()}
    assert rules["softmax"].out is F32
    assert (rules["renormalised"].renormalised, rules["renormalised"].out) == (True, BF16)
    assert (rules["late"].softmax, rules["late"].renormalised) == (True, True)
    assert (rules["normed"].eps, rules["normed"].factor) == (1e-6, 0.25)
    assert (rules["sigmoid"].softmax, rules["sigmoid"].smallest, rules["sigmoid"].routed_scale) == (False, 1e-20, 2.5)
    assert (rules["grouped"].groups, rules["grouped"].kept, rules["grouped"].product) == (4, 2, F32)


# --- what is left alone -----------------------------------------------------------------------------------------------


def logits_too(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    logits = nn.functional.linear(x, layer.weight)
    weights, index = logits.softmax(-1, dtype=F32).topk(TOP_K)
    return index, weights, logits


def a_loss(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    scores = nn.functional.linear(x, layer.weight).softmax(-1, dtype=F32)
    weights, index = scores.topk(TOP_K)
    return index, weights, scores.mean(0)


def written_between(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    layer.counts.copy_(x)
    logits = nn.functional.linear(layer.counts, layer.weight)
    layer.counts.add_(1)
    weights, index = logits.softmax(-1, dtype=F32).topk(TOP_K)
    return index, weights


def gain_written(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    index, weights = softmax(layer, x)
    layer.gain.view(-1).add_(1)
    return index, weights * layer.gain[index]


def index_written(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    scores = nn.functional.linear(x.float(), layer.weight.float()).sigmoid()
    index = scores.topk(TOP_K).indices
    index.clamp_(max=EXPERTS - 2)
    return index, scores.gather(1, index)


def with_a_bias(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    weights, index = nn.functional.linear(x, layer.weight, layer.bias.to(x.dtype)).softmax(-1, dtype=F32).topk(TOP_K)
    return index, weights


def rounded_scores(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    weights, index = nn.functional.linear(x, layer.weight).sigmoid().topk(TOP_K)
    return index, weights


def biased_weights(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    weights, index = (nn.functional.linear(x.float(), layer.weight.float()).sigmoid() + layer.bias).topk(TOP_K)
    return index, weights


def smallest(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    weights, index = nn.functional.linear(x, layer.weight).softmax(-1, dtype=F32).topk(TOP_K, largest=False)
    return index, weights


def all_of_them(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    order = nn.functional.linear(x, layer.weight).softmax(-1, dtype=F32).sort(-1, descending=True)
    return order.indices[:, :TOP_K], order.values[:, :TOP_K]


LEFT: dict[str, tuple[Callable[..., tuple[Any, ...]], str]] = {
    "logits are returned": (logits_too, "uses linear too"),
    "a loss of the scores": (a_loss, "uses softmax too"),
    "hidden states change on the way": (written_between, "writes to what it reads"),
    "a scale changes behind the selection": (gain_written, "writes to what it reads"),
    "the index changes on the way": (index_written, "writes to what it reads|are taken 0 times"),
    "a product with a bias": (with_a_bias, "not a product without a bias"),
    "scores in bfloat16": (rounded_scores, "scores are not float32"),
    "weights with the bias in them": (biased_weights, "are taken 1 times|what experts were chosen by"),
    "the smallest": (smallest, "not of the largest"),
    "a sort": (all_of_them, "sort.* selects, not topk"),
    "groups by one expert": (functools.partial(grouped, best=1), "by their 1 best"),
    "experts outside count zero": (functools.partial(grouped, fill=0.0), "count 0.0, not -inf"),
    "the worst groups": (functools.partial(grouped, outside=True), "chooses other experts"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_the_op_stays_and_the_reason_is_said(name: str) -> None:
    route, why = LEFT[name]
    gm = layer_of(route)
    before = str(gm.graph)
    report = fuse_routers(gm)
    assert not report.fused
    assert str(gm.graph) == before
    assert len(report.left) == 1
    with pytest.raises(Unmatched, match=why):
        raise Unmatched(report.left[0].why)
    assert report.left[0].why in str(report)


def test_only_the_guard_sees_that_the_worst_groups_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = layer_of(functools.partial(grouped, outside=True))
    fused = copied(gm)
    monkeypatch.setattr(router_pass, "agree", lambda gm, found: None)
    assert len(fuse_routers(fused).fused) == 1
    assert not torch.allclose(fused(inputs())[0].float(), gm(inputs())[0].float(), rtol=0.1)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {"softmax": False}),
    ("softmax", {"renormalised": True}),
    ("softmax", {"routed_scale": 1.1}),
    ("softmax", {"factor": 2.0}),
    ("softmax", {"out": BF16}),
    ("renormalised", {"smallest": 0.5}),
    ("normed", {"eps": 1.0}),
    ("normed", {"eps": None}),
    ("normed", {"factor": 0.5}),
    ("grouped", {"kept": 3}),
    ("grouped", {"groups": 1, "kept": 1}),
    ("grouped", {"groups": 8, "kept": 4}),
    ("sigmoid", {"renormalised": False}),
    ("sigmoid", {"softmax": True}),
]


@pytest.mark.parametrize(("name", "fields"), WRONG, ids=lambda value: str(value))
def test_the_guard_sees_rules_that_are_not_the_routers(name: str, fields: dict[str, Any]) -> None:
    gm = layer_of(KNOWN[name])
    found = match_of(gm)
    agree(gm, found)
    with pytest.raises(Unmatched, match=r"other experts|weights are"):
        agree(gm, replace(found, rules=replace(found.rules, **fields)))


@pytest.mark.parametrize(("name", "tensor"), [("sigmoid", "bias"), ("normed", "scale"), ("normed", "expert_scale")])
def test_the_guard_draws_weights_too(name: str, tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of ones, a bias of zeros in the model: a graph that leaves it out is seen all the same."""
    gm = layer_of(KNOWN[name])
    if tensor == "bias":
        gm.get_parameter("bias").data.zero_()
    found = match_of(gm)
    assert getattr(found, tensor) is not None
    own = router_pass._run

    def without(found: Match, given: Any) -> tuple[Tensor, Tensor]:
        plain = torch.zeros_like(given.bias) if tensor == "bias" else torch.ones_like(getattr(given, tensor))
        return own(found, replace(given, **{tensor: plain}))

    monkeypatch.setattr(router_pass, "_run", without)
    with pytest.raises(Unmatched, match=r"other experts|weights are"):
        agree(gm, found)


def test_what_no_kernel_does_stays() -> None:
    def many(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
        weight = layer.weight.repeat(4, 1)
        weights, index = nn.functional.linear(x, weight).softmax(-1, dtype=F32).topk(MOST_CHOSEN + 1)
        return index % EXPERTS, weights

    report = fuse_routers(layer_of(many))
    assert f"{MOST_CHOSEN + 1} of 64 experts" in report.left[0].why


def test_other_uses_of_a_cast_keep_the_cast() -> None:
    def route(layer: Layer, x: Tensor) -> tuple[Any, ...]:
        wide = x.float()
        scores = nn.functional.linear(wide, layer.weight.float()).sigmoid()
        weights, index = scores.topk(TOP_K)
        return index, weights, wide.mean(0)

    gm = layer_of(route)
    fused = copied(gm)
    assert len(fuse_routers(fused).fused) == 1
    assert torch.equal(gm(inputs())[1], fused(inputs())[1])


def test_a_norm_that_others_use_stays() -> None:
    def route(layer: Layer, x: Tensor) -> tuple[Any, ...]:
        wide = x.float()
        unit = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        index, weights = softmax(layer, unit)
        return index, weights, unit

    gm = layer_of(route)
    fused = copied(gm)
    report = fuse_routers(fused)
    assert len(report.fused) == 1
    assert report.fused[0].rules.eps is None
    assert torch.equal(gm(inputs())[1], fused(inputs())[1])


def test_values_that_are_not_fake_are_said() -> None:
    gm = layer_of(sigmoid)
    for node in gm.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
    assert "values of one kind" in fuse_routers(gm).left[0].why


def test_marks_go_with_the_op_and_part_of_a_router_cannot_be_marked() -> None:
    gm = layer_of(sigmoid)
    partly, wholly = copied(gm), copied(gm)
    selections(partly)[-1].meta["auxstream"] = "router"
    assert "marked for a region" in fuse_routers(partly).left[0].why
    for node in wholly.graph.nodes:
        node.meta["auxstream"] = "router"
    fuse_routers(wholly)
    assert [node.meta["auxstream"] for node in routers(wholly)] == ["router"]


def test_nothing_that_may_do_anything_stands_in_the_middle() -> None:
    gm = layer_of(sigmoid)
    between, before = copied(gm), copied(gm)
    for graph, name in ((between, "sigmoid"), (before, "x")):
        node = next(n for n in graph.graph.nodes if n.name == name)
        with graph.graph.inserting_after(node):
            graph.graph.call_function(print, ()).meta["val"] = None
    assert "may do anything" in fuse_routers(between).left[0].why
    assert len(fuse_routers(before).fused) == 1


def test_the_random_state_and_the_weights_are_left_as_they_were() -> None:
    gm, state = layer_of(normed), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    fuse_routers(gm)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in gm.state_dict().items())


# --- whole models -----------------------------------------------------------------------------------------------------

SAME = {"gemma4": 2, "deepseek_v3": 1, "qwen2_moe": 2, "glm4_moe": 1}
"""Models whose routers must be known, and how many each has."""
BATCH, CONTEXT = 3, 16
FORMS = [*((name, "grouped_mm") for name in SAME), ("gemma4", "auxstream"), ("deepseek_v3", "auxstream")]


def model_of(name: str, experts: str, dtype: torch.dtype = BF16) -> nn.Module:
    return MODELS[name].prepare(build(MODELS[name].config(), DEVICE, dtype, experts=experts))


def step(name: str, experts: str = "grouped_mm") -> TracedGraph:
    return _step(name, experts)


@functools.cache
def _step(name: str, experts: str) -> TracedGraph:
    return trace(DecodeStep(model_of(name, experts), BATCH, CONTEXT), prompt())


def prompt(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (BATCH, 1), generator=generator)
    return ids.to(DEVICE), torch.randint(0, CONTEXT, (BATCH,), generator=generator).to(DEVICE)


def fused_step(name: str, experts: str = "grouped_mm") -> tuple[TracedGraph, RouterReport]:
    """To be copied before it is changed."""
    return _fused_step(name, experts)


@functools.cache
def _fused_step(name: str, experts: str) -> tuple[TracedGraph, RouterReport]:
    traced = step(name, experts)
    gm = copied(traced.graph_module)
    report = fuse_routers(gm)
    return replace(traced, graph_module=gm), report


class Held(Interpreter):
    """A decode step from empty caches, with the experts of each layer given, and noted if they are not."""

    def __init__(self, traced: TracedGraph, gm: GraphModule, held: list[Tensor] | None = None) -> None:
        super().__init__(gm)
        self.traced, self.gm, self.held, self.noted = traced, gm, held, list[Tensor]()
        self.last = set(routers(gm) or router_pass._selections(Dataflow.of(gm)))

    def run_node(self, n: Node) -> Any:
        if n not in self.last:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        held = self.held[len(self.noted)] if self.held is not None else None
        if n.target is aten.topk.default:  # of equal ones, the lowest index first
            order = args[0].sort(descending=True, stable=True).indices[:, : args[1]].contiguous()
            index = order if held is None else held
            values = args[0].gather(1, index)
        else:
            index, values = super().run_node(n)
            rules, given = Rules(*args[5:]), Tensors(*args[:5])
            if held is not None and not torch.equal(held, index):
                index, values = held, weighed(scored(given, rules), held, given, rules)
        self.noted.append(index)
        return (values, index) if n.target is aten.topk.default else (index, values)

    @torch.no_grad()
    def step(self, seed: int) -> tuple[Tensor, list[Tensor]]:
        self.noted.clear()
        caches = [self.gm.get_buffer(name) for name in self.traced.mutated_buffers]
        for cache in caches:
            cache.zero_()
        return self.run(*prompt(seed)), [cache.clone() for cache in caches]


@pytest.mark.parametrize(("name", "experts"), FORMS)
def test_the_routers_of_models_are_known_and_the_model_gives_the_same(name: str, experts: str) -> None:
    """On a CPU the op is its reference, rounded where eager rounds: the same bits, caches and all."""
    traced, report = fused_step(name, experts)
    assert len(report.fused) == len(routers(traced.graph_module)) == SAME[name], report
    assert not report.left
    plain, fused = Held(traced, step(name, experts).graph_module), Held(traced, traced.graph_module)
    for seed in range(3):
        expected, own = plain.step(seed)
        found, ours = fused.step(seed)
        if DEVICE == "cpu":
            assert all(map(torch.equal, plain.noted, fused.noted))
            assert torch.equal(found, expected)
            assert all(map(torch.equal, own, ours))


def test_the_routers_of_a_model_that_are_not_known_are_said() -> None:
    _, report = fused_step("llama4")
    assert not report.fused
    assert ["linear" in router.why for router in report.left] == [True, True]


@pytest.mark.parametrize("name", SAME)
def test_the_op_has_the_meta_of_what_it_replaces(name: str) -> None:
    before = {node.name: node for node in step(name).graph_module.graph.nodes}
    traced, report = fused_step(name)
    assert [node.name for node in routers(traced.graph_module)] == [router.node for router in report.fused]
    for node in routers(traced.graph_module):
        origin = before[node.name.removesuffix("_router")]
        for key in ("nn_module_stack", "stack_trace"):
            assert node.meta[key] == origin.meta[key]
        index, weights = node.users
        assert index.target is operator.getitem
        assert index.meta["nn_module_stack"] == weights.meta["nn_module_stack"] == origin.meta["nn_module_stack"]
        chosen: Any = before[index.name.removesuffix("_index")].meta["val"]
        weights_before: Any = before[weights.name.removesuffix("_weights")].meta["val"]
        for old, new in ((chosen, index.meta["val"]), (weights_before, weights.meta["val"])):
            assert (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride())


def matrices(gm: GraphModule) -> list[tuple[list[str], ...]]:
    """The matrices that the two sides of each pair of branches read, followed through casts."""
    flow, found = Dataflow.of(gm), []
    for pair in find_branches(gm):
        sides = []
        for side in pair.sides:
            above = 0
            for node in side:
                for source in node.all_input_nodes:
                    if flow.constants >> flow.index[source] & 1:
                        above |= flow.ancestors[flow.index[source]]
            weights = [n for n in flow.select(above) if n.op == "get_attr" and n.meta["val"].dim() > 1]
            sides.append(sorted(str(n.target) for n in weights))
        if all(sides):
            found.append(tuple(sorted(sides)))
    return sorted(found)


@pytest.mark.parametrize(("name", "experts"), FORMS)
def test_shared_experts_and_branches_are_found_as_before(name: str, experts: str) -> None:
    """The router alone too stands beside the shared expert, where it did."""
    gm, fused = step(name, experts).graph_module, fused_step(name, experts)[0].graph_module
    before, after = find_shared_experts(Dataflow.of(gm)), find_shared_experts(Dataflow.of(fused))
    assert [(r.name, [n.name for n in r.nodes]) for r in after] == [(r.name, [n.name for n in r.nodes]) for r in before]
    assert len(after) == SAME[name]
    for region in after:
        assert any(node.target is moe_router() for node in region.routed)
    kinds = [[(p.kind, p.span, len(p.regions)) for p in propose(copied(graph))] for graph in (gm, fused)]
    assert sorted(kinds[0]) == sorted(kinds[1])
    assert matrices(gm) == matrices(fused)


LAID: list[tuple[str, str, Fusion]] = [
    *((name, "grouped_mm", "unfused") for name in SAME),
    ("deepseek_v3", "auxstream", "everywhere"),
]


@pytest.mark.parametrize(("name", "experts", "fusion"), LAID)
def test_streams_change_no_bit_and_fusion_leaves_the_op(name: str, experts: str, fusion: Fusion) -> None:
    """One stream against the shared experts on a lane, on the machine that is here."""
    traced, _ = fused_step(name, experts)
    gm = copied(traced.graph_module)
    mark_multi_stream_moe_shared_experts(gm)
    ids, position = prompt()
    lab = Lab(replace(traced, graph_module=gm), ids, position, vocabulary=128, context=CONTEXT)
    with repeatable_attention():
        aux = lab.captured(Row("graph", "aux", fusion), 4, aux=True)
        one = lab.captured if lab.gpu else lab.eager
        compare(lab, one(Row("eager", "one", fusion), 0, aux=False), [aux], 0)
    assert len(routers(lab.base(fusion))) == SAME[name]
    fused = [node for node in lab.base(fusion).graph.nodes if node.meta.get("auxstream_fused")]
    assert bool(fused) == (fusion != "unfused")
    assert (aux.row.passed, aux.row.runs, aux.row.checker) == (True, 4, "no race"), aux.row
    assert len(lab.regions) == SAME[name]


@pytest.mark.parametrize("name", ["gemma4", "deepseek_v3"])
def test_the_model_is_as_exact_as_without_the_op(name: str) -> None:
    """Against the same weights in float32, with the experts of the unfused graph in all of them."""
    traced, _ = fused_step(name)
    ours = copied(traced.graph_module)
    mark_multi_stream_moe_shared_experts(ours)
    fuse_elementwise(ours)
    wide = model_of(name, "grouped_mm", F32)
    wide.load_state_dict({key: value.float() for key, value in model_of(name, "grouped_mm").state_dict().items()})
    exact = trace(DecodeStep(wide, BATCH, CONTEXT), prompt())
    errors = {"plain": 0.0, "op": 0.0, "coarse": 0.0}
    for seed in range(4):
        plain = Held(traced, step(name).graph_module)
        found = {"plain": plain.step(seed)[0]}
        held = list(plain.noted)
        truth = Held(exact, exact.graph_module, held).step(seed)[0]
        found["op"] = Held(traced, ours, held).step(seed)[0]
        found["coarse"] = found["op"] + found["op"].abs().mean() * 2**-6  # what the gate must not pass
        for key, logits in found.items():
            errors[key] += float((logits.double() - truth.double()).norm() / truth.double().norm())
    assert errors["op"] <= 1.1 * errors["plain"]
    assert errors["coarse"] > 1.1 * errors["plain"]
