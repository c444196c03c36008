"""Where a graph is split, what lies in which part, and what waits for what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_blocks import MODELS, Paged, Parallel, Stack, mark_paths
from torch import nn
from torch.fx import GraphModule

from auxstream.capture.schedule import insert_regions
from auxstream.capture.split_ops import ops_of, refuse_unknown, splits_at
from auxstream.capture.splitting import Split, module_of, split_graph
from auxstream.capture.trace import trace
from auxstream.runtime.errors import CaptureError
from auxstream.runtime.handoff_ops import REGION_OPS, region_fork, region_join

ROWS = 5
ORDERS = ("caller_first", "aux_first")


def with_regions(name: str, order: Any = "caller_first") -> GraphModule:
    torch.manual_seed(0)
    make, ends = MODELS[name]
    gm = trace(make(), (torch.randn(ROWS, 8),)).graph_module
    mark_paths(gm, ends)
    insert_regions(gm, order=order)
    return gm


def shape(split: Split) -> list[str]:
    """Per part: where it runs, what it is, what it waits for."""
    return [
        ("caller" if part.lane is None else f"lane{part.lane}")
        + (" point" if not part.nodes else f" {part.kind}")
        + "".join(f" <{other}" for other in part.after)
        for part in split.parts
    ]


def compute(gm: GraphModule, split: Split, x: torch.Tensor) -> torch.Tensor:
    """The parts' own modules, in launch order."""
    values: dict[Any, Any] = {next(node for node in gm.graph.nodes if node.op == "placeholder"): x}
    for part in split.parts:
        given = module_of(gm, split, part)(*(values[node] for node in part.takes))
        values.update(zip(part.gives, given, strict=True))
    (result,) = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    return values[split.value(result)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_parts_in_launch_order_compute_what_the_graph_does(name: str, order: Any) -> None:
    gm = with_regions(name, order)
    split = split_graph(gm)
    x = torch.randn(ROWS, 8)
    assert torch.equal(compute(gm, split, x), gm(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_node_lies_in_one_part_and_waits_for_what_it_uses(name: str, order: Any) -> None:
    gm = with_regions(name, order)
    split = split_graph(gm)
    placed = [node for part in split.parts for node in part.nodes]
    assert len(placed) == len(set(placed))
    apart = {node for node in gm.graph.nodes if node.target in REGION_OPS} - set(placed)
    left_out = {node for node in gm.graph.nodes if node.op == "call_function"} - set(placed)
    assert left_out == apart | set(split.same)
    home = {node: number for number, part in enumerate(split.parts) for node in part.nodes}
    above = split.ancestors()
    for number, part in enumerate(split.parts):
        assert all(home.get(node, number) < number or node.op == "placeholder" for node in part.takes)
        assert all(above[number] >> home[node] & 1 for node in part.takes if node in home), str(part)
        assert all(
            node.kwargs is not None and (part.kind == "eager") == splits_at(part.nodes[0]) for node in part.nodes
        )
    whole = range(len(split.parts))
    assert above[-1] == sum(1 << number for number in whole), "the caller has waited for all when the step ends"


@pytest.mark.parametrize("name", MODELS)
def test_no_region_is_lost(name: str) -> None:
    gm = with_regions(name)
    split = split_graph(gm)
    asked = {node.args[0] for node in gm.graph.nodes if node.target is region_fork}
    inside = {node.args[0] for part in split.parts for node in part.nodes if node.target is region_fork}
    joined = {node.args[0].args[0] for part in split.parts for node in part.nodes if node.target is region_join}
    aside = {part.region for part in split.parts if part.region is not None}
    assert inside == joined
    assert not inside & aside
    assert inside | aside == asked


def test_attention_is_split_at_and_runs_of_the_rest_are_captured() -> None:
    assert shape(split_graph(with_regions("no region"))) == [
        "caller graph", "caller eager", "caller graph", "caller eager", "caller graph"
    ]  # fmt: skip


def test_a_region_with_no_attention_beside_it_stays_in_its_piece() -> None:
    split = split_graph(with_regions("within a piece"))
    assert shape(split) == ["caller graph", "caller eager", "caller graph", "caller eager", "caller graph"]
    assert [sum(node.target in REGION_OPS for node in part.nodes) for part in split.parts] == [0, 0, 4, 0, 4]


def test_a_region_beside_attention_is_launched_on_a_lane() -> None:
    assert shape(split_graph(with_regions("beside attention")))[:9] == [
        "caller graph",  # the norm
        "caller graph",  # q, k, v
        "caller eager",
        "caller graph",  # o
        "lane0 graph <0",  # the feed-forward, behind the norm alone
        "caller graph <4",  # the sum, and the next norm
        "caller graph",
        "caller eager",
        "caller graph",
    ]


def test_a_region_that_holds_attention_runs_in_pieces_on_its_lane() -> None:
    split = split_graph(with_regions("attention beside"))
    first = shape(split)[:6]
    assert first == ["caller graph", "caller graph", "lane0 graph <0", "lane0 eager", "lane0 graph", "caller graph <4"]
    assert split.lanes == 1


def test_two_regions_at_once_have_two_lanes() -> None:
    split = split_graph(with_regions("both sides"))
    assert split.lanes == 2
    assert {part.lane for part in split.parts if part.region and "mlp" in part.region} != {
        part.lane for part in split.parts if part.region and "attention" in part.region
    }


def test_one_stream_for_all() -> None:
    split = split_graph(with_regions("both sides")).on_one_stream()
    assert set(shape(split)) <= {"caller graph", "caller eager", "caller point"}
    x = torch.randn(ROWS, 8)
    gm = with_regions("both sides")
    assert torch.equal(compute(gm, split_graph(gm).on_one_stream(), x), gm(x))


def test_a_region_at_the_ends_of_a_step_waits_from_a_point_and_to_one() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Parallel()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.block.attention(x), self.block.mlp(x)

    gm = trace(Ends(), (torch.randn(ROWS, 8),)).graph_module
    mark_paths(gm, (".mlp",))
    insert_regions(gm)
    found = shape(split_graph(gm))
    assert found[0] == "caller point"
    assert found[-2:] == ["lane0 graph <0", f"caller point <{len(found) - 2}"]


def test_ops_that_the_user_lists_are_split_at() -> None:
    gm = trace(Stack(Paged()), (torch.randn(ROWS, 8),)).graph_module
    assert shape(split_graph(gm)) == ["caller graph"]
    for name in (
        "auxstream_test.paged_attention",
        "auxstream_test::paged_attention",
        "auxstream_test.paged_attention.default",
    ):
        split = split_graph(gm, (name,))
        assert shape(split) == ["caller graph", "caller eager", "caller graph"]
        eager = split.parts[1]
        assert [node.name for node in eager.gives] == ["getitem"], "the element travels with the op"
    refuse_unknown(("auxstream_test.paged_attention",), ops_of(gm))


def test_flex_attention_is_attention() -> None:
    node = torch.fx.Graph().call_function(torch.ops.higher_order.flex_attention)
    assert splits_at(node)
    assert not splits_at(torch.fx.Graph().call_function(torch.ops.higher_order.cond))


def test_a_name_that_no_op_bears_is_refused_with_the_candidates() -> None:
    gm = trace(Stack(Paged()), (torch.randn(ROWS, 8),)).graph_module
    with pytest.raises(CaptureError, match="paged_atention") as refused:
        refuse_unknown(("mylib.paged_atention",), ops_of(gm))
    assert "one of auxstream_test.paged_attention, aten.linear" in str(refused.value)


def test_the_text_of_a_split_says_what_runs_where() -> None:
    text = str(split_graph(with_regions("beside attention")))
    assert "eager on caller: scaled_dot_product_attention" in text
    assert "graph on lane 0, blocks.0.mlp, after 0" in text
