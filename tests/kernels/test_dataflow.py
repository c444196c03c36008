"""The dataflow's edges are enough to keep values right in any order, and its storages tell views from copies."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Sequence

import pytest
import torch
from random_programs import RandomProgram
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from auxstream.capture.branches import find_branches
from auxstream.capture.trace import trace
from auxstream.kernels.dataflow import RNG, Dataflow, positions


def execute(gm: GraphModule, order: Iterable[Node], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run `gm`'s nodes in another order than the graph's; state is the module's own and changes."""
    given, values = iter(inputs), dict[Node, object]()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(gm)
    for node in order:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    output = next(node for node in gm.graph.nodes if node.op == "output")
    return list(map_arg(output.args[0], values.__getitem__))


def shuffled(count: int, before: Sequence[Iterable[int]], rng: random.Random) -> list[int]:
    """A random linear extension."""
    done, order = set[int](), list[int]()
    waiting = list(range(count))
    while waiting:
        ready = [node for node in waiting if all(other in done for other in before[node])]
        chosen = rng.choice(ready)
        waiting.remove(chosen)
        done.add(chosen)
        order.append(chosen)
    return order


def outcome(gm: GraphModule, order: Sequence[int], x: Tensor) -> list[Tensor]:
    """Results and final buffers of one run from the initial state."""
    nodes = list(gm.graph.nodes)
    state = {name: value.clone() for name, value in gm.named_buffers()}
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            results = [value.clone() for value in execute(gm, [nodes[i] for i in order], [x.clone()])]
        return results + [value.clone() for _, value in gm.named_buffers()]
    finally:
        for name, value in state.items():
            gm.get_buffer(name).copy_(value)


def test_any_order_the_edges_allow_gives_the_same_values() -> None:
    """Against execution itself; the twin, with data edges alone, must go wrong for most programs."""
    wrong_without_memory_edges = 0
    for seed in range(24):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        gm = trace(RandomProgram(seed), (x,)).graph_module
        flow = Dataflow.of(gm)
        count, rng = len(flow.nodes), random.Random(seed)
        data = [[flow.index[a] for a in node.all_input_nodes] for node in flow.nodes]
        expected = outcome(gm, range(count), x)
        for _ in range(8):
            results = outcome(gm, shuffled(count, flow.predecessors, rng), x)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), gm.code
        wrong_without_memory_edges += any(
            not all(
                torch.equal(a, b) for a, b in zip(outcome(gm, shuffled(count, data, rng), x), expected, strict=True)
            )
            for _ in range(8)
        )
    assert wrong_without_memory_edges > 12


def test_branch_pairs_are_convex_and_do_not_reach_each_other() -> None:
    """The structural claims, by plain search over the edges instead of ancestor masks."""
    found = 0
    for seed in range(12):
        gm = trace(RandomProgram(seed), (torch.randn(4, 4),)).graph_module
        flow = Dataflow.of(gm)
        after: dict[int, list[int]] = {}
        for position, before in enumerate(flow.predecessors):
            for other in before:
                after.setdefault(other, []).append(position)

        def reach(sources: Iterable[int], after: dict[int, list[int]] = after) -> set[int]:
            seen, pending = set[int](), list(sources)
            while pending:
                for later in after.get(pending.pop(), []):
                    if later not in seen:
                        seen.add(later)
                        pending.append(later)
            return seen

        for pair in find_branches(gm):
            found += 1
            one, other = ({flow.index[node] for node in side} for side in pair.sides)
            assert one
            assert other
            assert not one & other
            for here, there in ((one, other), (other, one)):
                assert not reach(here) & there
                leaving = {later for node in here for later in after.get(node, []) if later not in here}
                assert not reach(leaving) & here
                assert flow.index[pair.join] in reach(here)
    assert found > 20


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.tied = self.weight
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        same = x.type_as(self.weight)
        kept = torch.nn.functional.dropout(same, 0.5, False)
        reshaped = x.reshape(16)
        copied = x.t().reshape(16)
        wide = x.to(torch.float64)
        first, second = x.chunk(2)
        values, indices = torch.topk(x, 2)
        cast = self.weight.to(torch.float64)
        self.state.add_(1)
        moved = self.state * 2
        return kept + 1, reshaped + 1, copied, wide, first + second, values, indices, cast @ wide, moved, x @ self.tied


def test_storages_tell_views_from_copies() -> None:
    gm = trace(Views(), (torch.randn(4, 4),)).graph_module
    flow = Dataflow.of(gm)
    by_name = {node.name: node for node in flow.nodes}
    (x,) = flow.storages[by_name["x"]]
    views = {name for name, node in by_name.items() if flow.storages[node] == {x}}
    assert {"type_as", "reshape", "t", "chunk", "getitem", "getitem_1"} <= views
    assert x in flow.storages[by_name["dropout"]], "in eval it returns its input, whatever the trace says"
    assert not views & {"reshape_1", "to", "topk", "getitem_2", "getitem_3"}
    assert flow.storages[by_name["getitem_2"]] != flow.storages[by_name["getitem_3"]]
    assert flow.is_view(by_name["t"])
    assert not flow.is_view(by_name["reshape_1"])
    constants = {node.name for node in flow.select(flow.constants)}
    assert "to_1" in constants, "a weight's cast depends on parameters alone"
    assert not constants & {"state", "mul"}, "a buffer the graph writes is no constant"
    assert flow.mutated("get_attr") == ("state",)
    weights = [node for node in flow.nodes if node.op == "get_attr" and str(node.target) in ("weight", "tied")]
    assert len({flow.storages[node] for node in weights}) == 1


def opaque(x: Tensor) -> Tensor:
    return x


def test_a_callable_without_a_schema_is_a_barrier_and_random_ops_stay_in_order() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a = torch.rand_like(x)
            b = y * 2
            c = torch.rand_like(x)
            return a + b + c

    gm = trace(Model(), (torch.randn(4), torch.randn(4))).graph_module
    flow = Dataflow.of(gm)
    first, second = (node for node in flow.nodes if "rand" in node.name)
    assert flow.index[first] in flow.predecessors[flow.index[second]]
    assert RNG in flow.writes[first]
    doubled = next(node for node in flow.nodes if node.name == "mul")
    assert flow.index[doubled] not in set(positions(flow.ancestors[flow.index[second]]))
    with gm.graph.inserting_after(doubled):
        barrier = gm.graph.call_function(opaque, (doubled,))
        barrier.meta["val"] = doubled.meta["val"]
    flow = Dataflow.of(gm)
    above = set(positions(flow.ancestors[flow.index[barrier]]))
    assert {flow.index[first], flow.index[doubled]} <= above, "it comes after everything before it"
    assert flow.index[barrier] in set(positions(flow.ancestors[flow.index[second]])), "and before everything after"
    assert flow.storages[doubled] <= flow.storages[barrier], "what it returns may be what it was given"


def test_an_op_that_returns_nothing_and_writes_nothing_is_a_barrier() -> None:
    """A stream switch, say: what it does shows in no tensor, and nothing may pass it."""
    with torch.library._scoped_library("dataflow_test", "DEF") as library:
        library.define("switch(int stream) -> ()")
        library.impl("switch", lambda stream: None, "CompositeExplicitAutograd")
        gm = trace(Doubled(), (torch.randn(2),)).graph_module
        doubled, added = (node for node in gm.graph.nodes if node.op == "call_function")
        with gm.graph.inserting_after(doubled):
            switch = gm.graph.call_function(torch.ops.dataflow_test.switch.default, (1,))
            switch.meta["val"] = None
        flow = Dataflow.of(gm)
        assert flow.barriers == 1 << flow.index[switch]
        assert flow.index[doubled] in flow.predecessors[flow.index[switch]]
        assert flow.index[switch] in flow.predecessors[flow.index[added]]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + 1


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_attention_draws_random_numbers_only_with_dropout(p: float) -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=p)

    flow = Dataflow.of(trace(Model(), (torch.randn(1, 2, 3, 4),)).graph_module)
    assert any(RNG in writes for writes in flow.writes.values()) is (p > 0)
