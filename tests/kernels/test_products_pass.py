"""Products in traced models become launches of ours where they win: which, with what metadata, and what stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import NAMES, decode_step, inputs
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

import auxstream
from auxstream.capture import Options
from auxstream.capture.branches import candidates
from auxstream.capture.costs import cost_of
from auxstream.capture.graphs import CapturedGraph
from auxstream.capture.laying import Laying
from auxstream.capture.policy import Plan
from auxstream.capture.program import Op
from auxstream.capture.proposals import propose
from auxstream.capture.schedule import insert_regions
from auxstream.capture.trace import trace
from auxstream.kernels import fuse_elementwise
from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.products import gated_linear, skinny_linear
from auxstream.kernels.products_pass import Times, choose_gated, choose_products
from auxstream.kernels.products_work import Work
from auxstream.kernels.routing import Weights

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops are what they are on a CPU without Triton's interpreter: values must be eager's, bit for bit."""
    monkeypatch.setattr("auxstream.kernels.products.interpreting", lambda: False)


def win(works: Sequence[Work]) -> Times:
    """Ours at once, whatever there is of it."""
    return Times(1.0, 2.0 * len(works[0].weights))


def lose(works: Sequence[Work]) -> Times:
    return Times(1.0, 1.01)


def alone_only(works: Sequence[Work]) -> Times:
    return Times(5.0, 6.0) if len(works[0].weights) > 1 else Times(1.0, 2.0)


def calls(gm: GraphModule, target: Any) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def widths(node: Node) -> list[int]:
    return [weight.meta["val"].shape[0] for weight in node.args[1]]  # type: ignore[union-attr]


def leaves(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_says_the_same(name: str) -> None:
    gm, twin = decode_step(name).graph_module, decode_step(name).graph_module
    report = choose_gated(gm, win), choose_products(gm, win)
    assert report[0].replaced
    assert report[1].replaced
    assert not [node for node in calls(gm, aten.linear.default) if node.args[1].op == "get_attr"]  # others are computed
    for position in range(3):
        given = inputs(position=position)
        assert all(map(torch.equal, leaves(gm(*given)), leaves(twin(*given))))
    assert all(torch.equal(own, other) for own, other in zip(gm.buffers(), twin.buffers(), strict=True))


def test_what_shares_an_input_is_one_launch() -> None:
    gm = decode_step("gemma4").graph_module
    report = choose_products(gm, win)
    found = [widths(node) for node in calls(gm, skinny_linear())]
    assert found == [[64, 32, 32], [64], [96, 96], [64], [8], [128, 32], [64], [96, 96], [64], [8], [512]]
    assert report.products == 16
    assert sum(len(one.nodes) for one in report.replaced) == 16
    assert str(report).startswith("16 of 16 products of few rows in 11 launches")
    assert "[1, 64] by 64 + 32 + 32: 1.00 us, cuBLAS 6.00 us" in str(report)


def test_a_group_that_loses_to_its_members_is_taken_apart() -> None:
    gm = decode_step("gemma4").graph_module
    choose_products(gm, alone_only)
    assert all(len(widths(node)) == 1 for node in calls(gm, skinny_linear()))
    assert not calls(gm, aten.linear.default)


@pytest.mark.parametrize("judge", [lose, lambda works: None, None])
def test_what_does_not_win_stays(judge: Any) -> None:
    """Among them: a machine with no GPU, which has no say."""
    gm = decode_step("gemma4").graph_module
    before = str(gm.graph)
    assert not choose_gated(gm, judge).replaced
    assert not choose_products(gm, judge).replaced
    assert str(gm.graph) == before


def test_each_class_is_judged_once_with_the_graphs_own_weights() -> None:
    gm, seen = decode_step("gemma4").graph_module, []

    def judge(works: Sequence[Work]) -> Times:
        seen.append([tuple(weight.shape for weight in work.weights) for work in works])
        own = {parameter.data_ptr() for parameter in gm.parameters()}
        assert all(weight.data_ptr() in own for work in works for weight in work.weights)
        return Times(1.0, 1.0)

    choose_products(gm, judge)
    assert len(seen) == len({tuple(works[0]) for works in seen})
    assert all(len(set(works)) == 1 for works in seen)
    assert max(len(works) for works in seen) == 4  # both layers' gates and ups, alone


# --- regions ----------------------------------------------------------------------------------------------------------


def test_no_launch_crosses_the_border_of_a_region() -> None:
    gm = decode_step("gemma4").graph_module
    keys = [node for node in calls(gm, aten.linear.default) if "k_proj" in str(node.args[1])]
    assert len(keys) == 2
    for node in keys:
        node.meta["auxstream"] = "layers.keys"
    choose_products(gm, win)
    assert [widths(node) for node in calls(gm, skinny_linear())][:3] == [[64, 32], [32], [64]]
    for node in calls(gm, skinny_linear()):
        regions = {node.meta.get("auxstream"), *(user.meta.get("auxstream") for user in node.users)}
        assert len(regions) == 1
    marked = [node for node in gm.graph.nodes if node.meta.get("auxstream") == "layers.keys"]
    assert len(marked) == 4


def test_without_marks_the_same_products_are_grouped() -> None:
    """Else the test above would find nothing."""
    gm = decode_step("gemma4").graph_module
    choose_products(gm, win)
    assert [32] not in [widths(node) for node in calls(gm, skinny_linear())]


def test_a_tail_of_another_region_stays_outside() -> None:
    gm = decode_step("gemma4").graph_module
    for node in calls(gm, aten.gelu.default):
        node.meta.pop("auxstream", None)
    assert not choose_gated(gm, win).replaced


def test_metadata_is_kept() -> None:
    gm = decode_step("gemma4").graph_module
    before = {node.name: dict(node.meta) for node in calls(gm, aten.linear.default)}
    report = choose_products(gm, win)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op != "output")
    first = report.replaced[0]
    launch, *outs = [node for node in gm.graph.nodes if node.name.startswith("linear")][:4]
    assert launch.meta["nn_module_stack"] == before[first.nodes[0]]["nn_module_stack"]
    for out, name in zip(outs, first.nodes, strict=True):
        old = before[name]
        assert out.meta["nn_module_stack"] == old["nn_module_stack"]
        assert out.meta.get("stack_trace") == old.get("stack_trace")
        assert (out.meta["val"].shape, out.meta["val"].dtype) == (old["val"].shape, old["val"].dtype)


# --- what else reads the graph ----------------------------------------------------------------------------------------


def test_the_rest_of_the_pipeline_knows_the_ops() -> None:
    """Products with weights, their bytes and operations; regions and pairs are found as before."""
    gm, twin = (decode_step("gemma4", marked=False).graph_module for _ in range(2))
    choose_gated(gm, win)
    choose_products(gm, win)
    flow, before = Dataflow.of(gm), Dataflow.of(twin)
    weights = Weights.of(flow)
    launches = [*calls(gm, skinny_linear()), *calls(gm, gated_linear())]
    assert all(weights.products >> flow.index[node] & 1 for node in launches)
    assert not any((weights.opaque | weights.stacked) >> flow.index[node] & 1 for node in launches)
    assert not any(flow.barriers >> flow.index[node] & 1 for node in launches)
    linears = sum(cost_of(before, node).flops for node in calls(twin, aten.linear.default))
    assert sum(cost_of(flow, node).flops for node in launches) == linears
    for node in launches:
        read = sum(weight.meta["val"].nbytes for weight in node.all_input_nodes if weight.op == "get_attr")
        assert cost_of(flow, node).bytes > read
    assert len(list(candidates(flow))) > 0
    assert [one.kind for one in propose(gm)][:1] == [one.kind for one in propose(twin)][:1] == ["layers.*.shared"]


def test_fusion_leaves_them_alone_in_either_order() -> None:
    first, second = (decode_step("gemma4").graph_module for _ in range(2))
    choose_gated(first, win)
    choose_products(first, win)
    fuse_elementwise(first)
    fuse_elementwise(second)
    choose_products(second, win)
    assert len(calls(first, gated_linear())) == 2
    for gm, launches in ((first, 9), (second, 11)):
        assert len(calls(gm, skinny_linear())) == launches
        assert not calls(gm, aten.linear.default)
        Dataflow.of(gm)
        gm.graph.lint()


def _marks(gm: GraphModule) -> list[tuple[str, object]]:
    return [(node.name, node.meta["auxstream"]) for node in gm.graph.nodes if "auxstream" in node.meta]


def test_the_markers_regions_survive() -> None:
    """A gated product takes the place of four nodes of its region; all others keep their marks."""
    gm = decode_step("gemma4").graph_module
    before, flow = _marks(gm), Dataflow.of(gm)
    tails = [node for node in flow.nodes if node.target is aten.mul.Tensor and "gelu" in str(node.args)]
    gone = {gate for node in tails for gate in (node.name, *(given.name for given in node.all_input_nodes))}
    gone |= {node.args[0].name for node in calls(gm, aten.gelu.default)}
    choose_gated(gm, win)
    launches = calls(gm, gated_linear())
    own = {node.name for node in launches}
    assert {mark for _, mark in before} == {node.meta["auxstream"] for node in launches}
    assert len(launches) == 2 == len({mark for _, mark in before})
    assert [one for one in _marks(gm) if one[0] not in own] == [one for one in before if one[0] not in gone]
    assert len(before) - len(_marks(gm)) == 3 * len(launches)
    assert sorted(region.name for region in insert_regions(gm)) == sorted({str(mark) for _, mark in before})


def compiled(**options: Any) -> tuple[list[Tensor], CapturedGraph]:
    from auxstream.capture.huggingface import DecodeStep, build, gemma4_config

    model = DecodeStep(build(gemma4_config(2, "tiny")), 1, 16)
    asked = Options(mlir_elementwise_fusion=False, product_kernels=True, **options)
    fast = auxstream.compile(model, inputs(position=3), asked)
    with torch.no_grad():
        found = [fast(*inputs(position=position)).clone() for position in range(4)]
    return [*found, *(buffer.clone() for state in model.caches() for buffer in state.values())], fast.graph


def _ops(graph: CapturedGraph) -> list[str]:
    return [str(step.func) for step in graph.program.steps if isinstance(step, Op)]


def test_overlapped_is_serial_bit_for_bit_on_the_simulated_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `compile`; ops of our own are there, and regions too."""
    monkeypatch.setattr("auxstream.kernels.products_pass.measured", win)
    serial, alone = compiled(multi_stream_moe=False)
    overlapped, graph = compiled()
    assert not alone.regions
    assert len(graph.regions) == 2
    assert graph.report.ok
    for found in (_ops(alone), _ops(graph)):
        assert sum("skinny_linear" in name for name in found) >= 9
        assert sum("gated_linear" in name for name in found) == 2
        assert not any("linear.default" in name and "aten" in name for name in found)
    assert all(map(torch.equal, serial, overlapped))


@pytest.mark.parametrize("on", [True, False])
def test_the_switch_decides(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("auxstream.kernels.products_pass.measured", win)
    laying = Laying(decode_step("gemma4"), Options(mlir_elementwise_fusion=False, product_kernels=on), False, {})
    gm = laying.lay(Plan(()), False).module
    assert bool(calls(gm, skinny_linear())) == bool(calls(gm, gated_linear())) == on


# --- forms of products, and what is none ------------------------------------------------------------------------------


class Block(nn.Module):
    """A function of an input and two square weights."""

    def __init__(self, compute: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.compute = compute
        self.a, self.b = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Any:
        return self.compute(x, self.a, self.b, self.bias)


def replaced(compute: Callable[[Tensor, Tensor, Tensor, Tensor], Any], rows: int = 3, gated: bool = False) -> list[int]:
    """How many products each launch stands for; values are checked."""
    torch.manual_seed(0)
    x = torch.randn(rows, 16)
    model = Block(compute)
    gm = trace(model, (x,)).graph_module
    report = choose_gated(gm, win) if gated else choose_products(gm, win)
    own, ours = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(leaves(gm(ours)), leaves(model(own)))
    assert torch.equal(own, ours)
    return [len(one.nodes) for one in report.replaced]


@pytest.mark.parametrize(
    ("compute", "found"),
    [
        (lambda x, a, b, c: (functional.linear(x, a), functional.linear(x, b)), [2]),
        (lambda x, a, b, c: (functional.linear(x, a, c), functional.linear(x, b, c)), [2]),
        (lambda x, a, b, c: (functional.linear(x, a, c), functional.linear(x, b)), [1, 1]),
        (lambda x, a, b, c: (x @ a.t(), torch.mm(x, b.transpose(0, 1))), [2]),
        (lambda x, a, b, c: torch.addmm(c, x, a.t()), [1]),
        (lambda x, a, b, c: torch.addmm(c, x, a.t(), beta=2), []),
        (lambda x, a, b, c: x @ a, []),
        (lambda x, a, b, c: functional.linear(x, a + 1), []),
        (lambda x, a, b, c: functional.linear(a, b), []),
        (lambda x, a, b, c: functional.linear(x, x.repeat(6, 1)[:16]), []),
        (lambda x, a, b, c: functional.linear(functional.linear(x, a), b), [1, 1]),
        (lambda x, a, b, c: [functional.linear(x, w) for w in (a, b, a, b, a)], [4, 1]),
        (lambda x, a, b, c: (functional.linear(x, a), x.add_(1), functional.linear(x, b)), [1, 1]),
    ],
)
def test_what_is_a_product(compute: Any, found: list[int]) -> None:
    assert replaced(compute) == found


def test_more_rows_are_none_of_ours() -> None:
    assert replaced(lambda x, a, b, c: functional.linear(x, a), rows=32) == [1]
    assert replaced(lambda x, a, b, c: functional.linear(x, a), rows=33) == []


def _gated_twice(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    for _ in range(2):
        x = functional.silu(functional.linear(x, a)) * functional.linear(x, b)
    return x


@pytest.mark.parametrize(
    ("compute", "found"),
    [
        (lambda x, a, b, c: functional.silu(functional.linear(x, a)) * functional.linear(x, b), [2]),
        (lambda x, a, b, c: functional.linear(x, b) * functional.silu(functional.linear(x, a)), [2]),
        (
            lambda x, a, b, c: (
                functional.gelu(functional.linear(x, a, c), approximate="tanh") * functional.linear(x, b, c)
            ),
            [2],
        ),
        (lambda x, a, b, c: functional.gelu(functional.linear(x, a)) * functional.linear(x, b), []),
        (lambda x, a, b, c: functional.silu(functional.linear(x, a, c)) * functional.linear(x, b), []),
        (lambda x, a, b, c: functional.silu(functional.linear(x, a)) * functional.linear(x + 1, b), []),
        (lambda x, a, b, c: functional.silu(functional.linear(x, a)) * 2, []),
        (lambda x, a, b, c: _gated_twice(x, a, b), [2, 2]),
        (lambda x, a, b, c: [g := functional.linear(x, a), functional.silu(g) * functional.linear(x, b)], []),
        (
            lambda x, a, b, c: [u := functional.linear(x, b), x.add_(1), functional.silu(functional.linear(x, a)) * u],
            [],
        ),
    ],
)
def test_what_is_a_gated_product(compute: Any, found: list[int]) -> None:
    assert replaced(compute, rows=1, gated=True) == found
    assert replaced(compute, rows=2, gated=True) == []


@pytest.mark.gpu
def test_what_was_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph twice, the second time with nothing to measure with: the same choices, and near to float64."""
    x = torch.randn(1, 2816, device="cuda", dtype=torch.bfloat16)
    layers = nn.ModuleList(nn.Linear(2816, n, bias=False) for n in (512, 1024)).to("cuda", torch.bfloat16)

    class Both(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in layers]

    model = Both()
    model.layers = layers
    first, second = (trace(model, (x,)).graph_module for _ in range(2))
    found = choose_products(first)
    monkeypatch.setattr("auxstream.kernels.products_plan.measure", None)
    assert choose_products(second) == found
    with torch.no_grad():
        for ours, own, layer in zip(first(x), model(x), layers, strict=True):
            exact = x.double() @ layer.weight.double().T
            assert (ours.double() - exact).norm() <= 1.1 * (own.double() - exact).norm()
