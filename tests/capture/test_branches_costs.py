"""Bytes and operations of branches: against hand-made sums, torch's own counter, and what picking ops touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_blocks import EXPERTS, HIDDEN, INNER, TOKENS, Layer, Model
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from auxstream.capture.costs import Cost, cost_of
from auxstream.capture.trace import trace
from auxstream.kernels.dataflow import Dataflow

F32, I64 = 4, 8


def costs(forward: Callable[..., Any], *inputs: Tensor, **state: Tensor) -> list[Cost]:
    """Of each op with a cost, in order, for a function of a module that holds `state`."""

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in state.items():
                self.register_buffer(name, value)

        def forward(self, *given: Tensor) -> Any:
            return forward(self, *given)

    return costs_of(trace(Program(), inputs).graph_module)


def costs_of(gm: GraphModule) -> list[Cost]:
    flow = Dataflow.of(gm)
    found = [(node, cost_of(flow, node)) for node in flow.nodes]
    assert all(cost == Cost() for node, cost in found if node.op != "call_function")
    return [cost for node, cost in found if cost != Cost() and not flow.constants >> flow.index[node] & 1]


X = torch.randn(3, 8)
EDGES = torch.randn(4, 8)


def test_a_node_reads_its_operands_and_writes_its_results() -> None:
    assert costs(lambda m, x: x.relu() + x, X) == [Cost(2 * 96), Cost(3 * 96)]
    assert costs(lambda m, x: x.topk(2), X) == [Cost(96 + 6 * F32 + 6 * I64)]


def test_views_are_free_and_what_they_hide_is_not_touched() -> None:
    assert costs(lambda m, x: x.t()[2:4].relu(), X) == [Cost(2 * 6 * F32)]
    assert costs(lambda m, x: x + x[:, :1].expand(3, 8), X) == [Cost(96 + 3 * F32 + 96)]
    assert costs(lambda m, x: torch.empty_like(x).copy_(x), X) == [Cost(2 * 96)], "an allocation moves nothing"


def test_in_place_ops_read_what_they_write_unless_they_replace_it() -> None:
    assert costs(lambda m, x: m.s.add_(x), X, s=torch.zeros(3, 8)) == [Cost(3 * 96)]
    assert costs(lambda m, x: m.s.copy_(x), X, s=torch.zeros(3, 8)) == [Cost(2 * 96)]


ONE = torch.tensor([5])


@pytest.mark.parametrize(
    ("forward", "moved"),
    [
        (lambda m, i: torch.nn.functional.embedding(i, m.table), I64 + 2 * 8 * F32),
        (lambda m, i: m.table[i], I64 + 2 * 8 * F32),
        (lambda m, i: m.table.index_select(0, i), I64 + 2 * 8 * F32),
        (lambda m, i: m.table.gather(0, i[:, None]), I64 + 2 * F32),
        (lambda m, i: m.table.index_copy_(0, i, m.row), I64 + 2 * 8 * F32),
        (lambda m, i: m.table.index_put_((i,), m.row), I64 + 2 * 8 * F32),
        (lambda m, i: m.table.scatter_(0, i[:, None], 1.0), I64 + F32),
        (lambda m, i: m.table.index_add_(0, i, m.row), I64 + 3 * 8 * F32),
    ],
    ids=["embedding", "index", "index_select", "gather", "index_copy_", "index_put_", "scatter_", "index_add_"],
)
def test_ops_that_pick_touch_what_they_pick(forward: Callable[..., Any], moved: int) -> None:
    assert costs(forward, ONE, table=torch.zeros(1000, 8), row=torch.ones(1, 8)) == [Cost(moved)]
    (all_of_it,) = costs(lambda m, i: m.table * i, ONE, table=torch.zeros(1000, 8))
    assert all_of_it == Cost(I64 + 2 * 8000 * F32), "an integer factor picks nothing"


@pytest.mark.parametrize(("tokens", "experts"), [(2, 2), (6, 4)])
def test_grouped_products_read_the_experts_their_rows_can_reach(tokens: int, experts: int) -> None:
    given = torch.randn(tokens, 16, dtype=torch.bfloat16)
    ends = torch.full((4,), tokens, dtype=torch.int32)
    weight = torch.randn(4, 16, 8, dtype=torch.bfloat16)
    (cost,) = costs(lambda m, x, offs: torch._grouped_mm(x, m.w, offs=offs), given, ends, w=weight)
    assert cost == Cost(tokens * 32 + 16 + experts * 256 + tokens * 16, 2 * tokens * 16 * 8)


def test_opaque_experts_are_counted_by_their_tokens() -> None:
    gm = trace(Model(Layer(form="opaque")), (torch.randn(TOKENS, HIDDEN),)).graph_module
    flow = Dataflow.of(gm)
    (experts,) = [node for node in flow.nodes if "fused_moe" in str(node.target)]
    expert, moved = HIDDEN * INNER, TOKENS * (2 * HIDDEN + EXPERTS)
    reached = min(TOKENS, EXPERTS)
    assert cost_of(flow, experts) == Cost((moved + 2 * reached * expert) * F32, 2 * 2 * TOKENS * expert)


def test_contractions_written_as_einsum() -> None:
    (cost,) = costs(lambda m, x: torch.einsum("th,khi->tki", x, m.w), X, w=torch.zeros(2, 8, 5))
    assert cost == Cost((24 + 80 + 30) * F32, 2 * 3 * 8 * 2 * 5)


def test_operations_are_those_torch_counts() -> None:
    """On real architectures; the counter knows no grouped product, so it is told of it."""
    pytest.importorskip("transformers")
    from architectures import ARCHITECTURES, BATCH, traced

    def grouped(x: list[int], weight: list[int], *args: Any, out_shape: list[int], **kwargs: Any) -> int:
        return 2 * x[0] * x[1] * weight[-1]

    given = (torch.zeros(BATCH, 1, dtype=torch.int64), torch.tensor([3, 5]))
    for name in ARCHITECTURES:
        gm = traced(name)[1]
        mapping = {torch.ops.aten._grouped_mm: grouped}
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            gm(*given)
        flow = Dataflow.of(gm)
        counted = sum(cost_of(flow, node).flops for node in flow.nodes)
        assert counted == counter.get_total_flops(), name


def test_decode_steps_move_at_least_their_weights_once() -> None:
    """A bound from the module: all parameters but tables and experts are read in full, once at least."""
    pytest.importorskip("transformers")
    from architectures import traced

    gm = traced("cohere")[1]
    moved = sum(cost.bytes for cost in costs_of(gm))
    weights = sum(p.numel() * p.element_size() for p in gm.parameters())
    caches = sum(b.numel() * b.element_size() for name, b in gm.named_buffers() if name.startswith(("keys", "values")))
    assert weights < moved < 2 * (weights + caches)


def test_symbolic_sizes_count_as_traced_and_stay_symbolic() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() @ x.mT

    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Dynamic(), (torch.randn(5, 8),), dynamic_shapes={"x": {0: rows}})
    gm = program.module()
    assert isinstance(gm, GraphModule)
    flow = Dataflow.of(gm)
    found = {str(node): cost_of(flow, node) for node in flow.nodes if "aten" in str(node.target)}
    assert found["relu"] == Cost(2 * 40 * F32)
    assert found["matmul"] == Cost((40 + 40 + 25) * F32, 2 * 5 * 8 * 5)
    relu = next(node for node in flow.nodes if str(node) == "relu")
    assert not relu.meta["val"].shape[0].node.expr.is_number, "still free"


def test_costs_add_up_and_read_well() -> None:
    assert sum([Cost(1000, 5), Cost(1048, 1995)], Cost()) == Cost(2048, 2000)
    assert str(Cost(2048, 2000)) == "2 KiB, 2 kflop"
    assert str(Cost(0, 0)) == "0 B, 0 flop"
    assert str(Cost(3 << 40, 7 * 10**15)) == "3.07e+03 GiB, 7e+03 Tflop"
