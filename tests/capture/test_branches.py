"""Pairs of branches in small modules: what is found, what crosses, and what keeps a pair from being one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from moe_blocks import HIDDEN, TOKENS, Layer, Model, RoutedOnly
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from auxstream.capture.branches import BranchPair, find_branches
from auxstream.capture.module_paths import title
from auxstream.capture.trace import trace

WIDTH, ROWS = 8, 3
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Three linear layers and two buffers, and a forward given as a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.register_buffer("state", torch.zeros(ROWS, WIDTH))
        self.register_buffer("other", torch.zeros(ROWS, WIDTH))
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def graph_of(forward: Callable[[Any, Tensor], Any]) -> GraphModule:
    return trace(Branches(forward), (X,)).graph_module


def weights_of(nodes: tuple[Node, ...]) -> str:
    """The layers whose weights `nodes` multiply by, in order."""
    read = [str(a.target) for node in nodes for a in node.all_input_nodes if a.op == "get_attr"]
    return "".join(target.removesuffix(".weight") for target in read if target.endswith(".weight"))


def found(gm: GraphModule) -> list[tuple[str, str]]:
    """The linear layers of both sides of each pair, sides in order of name; pairs without one on each side left out."""
    sides = [sorted(weights_of(side) for side in pair.sides) for pair in find_branches(gm)]
    return [(one, other) for one, other in sides if one and other]


# --- what is found ----------------------------------------------------------------------------------------------------


def test_what_a_pair_says() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.state.copy_(m.b(x))
        return m.a(x.tanh()).relu() + m.b(x) * 2

    (pair,) = find_branches(graph_of(forward))
    left, right = pair.branches
    assert pair.sides == (left.nodes, right.nodes)
    assert [str(node) for node in left.nodes] == ["tanh", "linear_1", "relu"]
    assert [str(node) for node in right.nodes] == ["linear_2", "mul"]
    tensor, weight = ROWS * WIDTH * 4, WIDTH * WIDTH * 4
    assert (left.bytes, left.flops) == (2 * tensor + (2 * tensor + weight) + 2 * tensor, 2 * ROWS * WIDTH * WIDTH)
    assert (right.bytes, right.flops) == ((2 * tensor + weight) + 2 * tensor, left.flops)
    assert [str(node) for node in (*left.live_ins, *left.live_outs, *left.writes)] == ["x", "relu"]
    assert str(pair) == (
        "a (3 ops, 832 B, 384 flop; reads x; gives relu)\n"
        "  beside b (2 ops, 640 B, 384 flop; reads x; gives mul)\n"
        "  met at add"
    )


def test_a_side_that_writes_memory_of_others_says_so() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.state[1:2].copy_(m.a(x)[:1])
        return m.state.sum(0) + m.b(x)

    pair = next(p for p in find_branches(graph_of(forward)) if weights_of(p.branches[0].nodes) == "a")
    assert [str(node.target) for node in pair.branches[0].writes] == ["state"]
    assert "writes state" in str(pair)
    assert pair.branches[1].writes == ()


def test_three_operands_are_three_pairs() -> None:
    gm = graph_of(lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)]))
    assert found(gm) == [("a", "bc"), ("ac", "b"), ("ab", "c")]


def test_branches_that_meet_nowhere_but_in_the_output() -> None:
    (pair,) = find_branches(graph_of(lambda m, x: (m.a(x).relu(), m.b(x))))
    assert (weights_of(pair.sides[0]), weights_of(pair.sides[1]), pair.join.op) == ("a", "b", "output")


def test_pairs_nest_and_come_in_the_order_of_their_joins() -> None:
    gm = graph_of(lambda m, x: (m.a(x) * m.b(x)).relu() + m.c(x))
    assert found(gm) == [("a", "b"), ("ab", "c")]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(m.a(x)),
        lambda m, x: x + m.a(x),
        lambda m, x: m.a(x) + m.a.weight.tanh().sum(),
        lambda m, x: m.a(x) + x.t().t()[:, :1],
        lambda m, x: m.a(x) * x.shape[0],
        lambda m, x: m.a(x) + torch.arange(WIDTH).float(),
    ],
    ids=["chain", "residual", "constant", "views", "scalar", "literals"],
)
def test_no_pair(forward: Callable[[Any, Tensor], Tensor]) -> None:
    assert find_branches(graph_of(forward)) == []


# --- negative controls: every kind of edge, and its twin over another buffer ------------------------------------------


def read_after_write(m: Any, x: Tensor, buffer: Tensor) -> Tensor:
    return m.state.addmm_(x, m.a.weight).sum() + m.b(buffer)


def write_after_read(m: Any, x: Tensor, buffer: Tensor) -> Tensor:
    return m.a(m.state) + buffer.addmm_(x, m.b.weight).sum()


def write_after_write(m: Any, x: Tensor, buffer: Tensor) -> Tensor:
    return m.state.addmm_(x, m.a.weight).sum() + buffer.addmm_(x, m.b.weight).sum()


@pytest.mark.parametrize("program", [read_after_write, write_after_read, write_after_write])
def test_memory_that_both_sides_touch_is_an_edge(program: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    def over(name: str) -> Callable[[Any, Tensor], Tensor]:
        def forward(m: Any, x: Tensor) -> Tensor:
            changing = {"state": m.state.mul_(2), "other": m.other.mul_(2)}  # a buffer nobody writes is a constant
            return program(m, x, changing[name])

        return forward

    assert found(graph_of(over("other"))) == [("a", "b")]
    assert found(graph_of(over("state"))) == []


def test_a_view_of_memory_is_that_memory() -> None:
    program = read_after_write
    assert found(graph_of(lambda m, x: program(m, x, m.other.mul_(2)[1:, :]))) == [("a", "b")]
    assert found(graph_of(lambda m, x: program(m, x, m.state[1:, :]).sum(0))) == []


def test_a_dependency_is_an_edge() -> None:
    assert found(graph_of(lambda m, x: m.a(x) + m.b(x))) == [("a", "b")]
    assert found(graph_of(lambda m, x: (left := m.a(x)) + m.b(x + left.sum() * 0))) == []


def test_random_numbers_come_in_order() -> None:
    assert found(graph_of(lambda m, x: torch.rand_like(m.a(x)) + m.b(x))) == [("a", "b")]
    assert found(graph_of(lambda m, x: torch.rand_like(m.a(x)) + torch.rand_like(m.b(x)))) == []


def test_a_call_that_nothing_is_known_of_is_an_edge_to_everything() -> None:
    gm = graph_of(lambda m, x: m.a(x) + m.b(x))
    first = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default)
    with gm.graph.inserting_after(first):
        opaque = gm.graph.call_function(lambda x: x, (first,))
    opaque.meta["val"] = first.meta["val"]
    first.replace_all_uses_with(opaque, delete_user_cb=lambda user: user is not opaque)
    assert found(gm) == []


# --- routers ----------------------------------------------------------------------------------------------------------


def beside_shared(pairs: list[BranchPair]) -> list[set[str]]:
    """The modules of what runs beside whole shared experts."""
    sides = [(modules(one), modules(other)) for one, other in (pair.sides for pair in pairs)]
    turned = [(one, other) if "shared.down" in one else (other, one) for one, other in sides]
    return [other for one, other in turned if "shared.down" in one]


def modules(nodes: tuple[Node, ...]) -> set[str]:
    """The parameters that nodes consume, by the modules or the names they have in a layer."""
    targets = {str(a.target) for node in nodes for a in node.all_input_nodes if a.op == "get_attr"}
    return {target.removeprefix("layers.0.").removesuffix(".weight").removesuffix(".bias") for target in targets}


@pytest.mark.parametrize("form", ["traced", "opaque", "latent"])
def test_a_router_can_run_beside_the_dense_branch(form: Literal["traced", "opaque", "latent"]) -> None:
    gm = trace(Model(Layer(form=form)), (torch.randn(TOKENS, HIDDEN),)).graph_module
    routed, router = beside_shared(find_branches(gm))
    experts = {"routed.w_up", "routed.w_down"}
    latent = {"routed.into", "routed.out"} if form == "latent" else set()
    assert routed == {"routed.router"} | experts | latent
    assert router == {"routed.router"} | (latent - {"routed.out"}), "no expert's weights, gathered or not"


def test_no_router_where_nothing_dense_runs_beside_it() -> None:
    gm = trace(Model(RoutedOnly()), (torch.randn(TOKENS, HIDDEN),)).graph_module
    assert beside_shared(find_branches(gm)) == []


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (["model.model.layers.0.mlp.up"], "layers.0.mlp.up"),
        (["layers.0.mlp.up", "layers.0.mlp.up"], "layers.0.mlp.up"),
        (["layers.0.mlp.up", "layers.0.mlp.down.inner"], "layers.0.mlp.{up, down}"),
        (["layers.0.mlps.0.up", "layers.0.attn.1.q", "layers.0.attn.1.k"], "layers.0.{mlps.0, attn.1}"),
        (["layers.0.mlp", "layers.0.mlp.up"], "layers.0.mlp"),
        (["embed", "head"], "{embed, head}"),
        (["", "layers['3'].mlp"], "layers.3.mlp"),
        (["", ""], "n0..n1"),
    ],
)
def test_titles(paths: list[str], text: str) -> None:
    graph = Graph()
    nodes = [graph.create_node("call_function", torch.relu, name=f"n{i}") for i, _ in enumerate(paths)]
    for node, path in zip(nodes, paths, strict=True):
        if path:
            node.meta["nn_module_stack"] = {"outer": ("outer", nn.Module), "inner": (path, nn.Module)}
    assert title(nodes) == text


# --- size -------------------------------------------------------------------------------------------------------------


def test_five_thousand_nodes_take_less_than_two_seconds() -> None:
    block = trace(Model(Layer(gated=True, pre_norm=True)), (torch.randn(TOKENS, HIDDEN),)).graph_module
    graph, count = Graph(), 0
    x = graph.placeholder("x")
    x.meta = next(iter(block.graph.nodes)).meta
    while len(graph.nodes) < 5000:
        known: dict[Node, Node] = {}
        for node in block.graph.nodes:
            if node.op == "placeholder":
                known[node] = x
            elif node.op == "output":
                x = known[node.args[0][0]]
            else:
                known[node] = graph.node_copy(node, known.__getitem__)
        count += 1
    graph.output((x,))
    gm = GraphModule(block, graph)
    seconds: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        pairs = find_branches(gm)
        seconds.append(time.perf_counter() - start)
    assert len(pairs) == count * len(find_branches(block))
    assert min(seconds) < 2.0
