"""Which nodes become one kernel: those that meet row by row, and nothing that would make work wait.

Every rule has a twin: the same graph without its reason, where the nodes do become one kernel.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from auxstream.capture.trace import trace
from auxstream.kernels import fuse_elementwise
from auxstream.kernels.build import Kind
from auxstream.kernels.dataflow import Dataflow, positions
from auxstream.kernels.grouping import MOST_MEMBERS, Group, find_groups
from auxstream.kernels.reach import Order, Reach

SQUARE = torch.arange(16.0).reshape(4, 4) - 5
WIDE = torch.arange(30.0).reshape(2, 3, 5) - 7


class Of(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(*inputs)


def graph_of(body: Callable[..., Any], *inputs: Tensor, regions: dict[str, Sequence[str]] | None = None) -> GraphModule:
    """A traced function; `regions` marks nodes by name."""
    gm = trace(Of(body), inputs).graph_module
    for region, names in (regions or {}).items():
        for node in gm.graph.nodes:
            if node.name in names:
                node.meta["auxstream"] = region
    return gm


def groups_of(gm: GraphModule) -> list[Group]:
    return find_groups(Dataflow.of(gm), lambda node: True)


def names(gm: GraphModule) -> list[list[str]]:
    return [[node.name for node in group.nodes] for group in groups_of(gm)]


def together(gm: GraphModule, *members: str) -> bool:
    return any(set(members) <= set(group) for group in names(gm))


# --- rows that meet ---------------------------------------------------------------------------------------------------

MEETING: dict[str, tuple[Callable[..., Any], Tensor, int]] = {
    "a row's sum, kept as a column": (lambda x: (x * 2) - (x * 2).sum(-1, keepdim=True), WIDE, 1),
    "a row's sum, beside values per row": (lambda x: (x * 2).sum(-1) * 3 + 1, WIDE, 1),
    "a row's sum, made a column again": (lambda x: (x * 2) - (x * 2).sum(-1)[..., None], SQUARE, 1),
    "rows seen through views": (lambda x: ((x * 2).view(6, 5) + 1).view(3, 2, 5).relu(), WIDE, 1),
    "leading dimensions of one": (lambda x: (x * 2)[None] + (x * 3)[None, None], SQUARE, 1),
    "halves of columns": (lambda x: (x * 2)[..., :2] * (x * 3)[..., 2:], SQUARE, 1),
    "columns joined": (lambda x: torch.cat([-(x * 2)[..., 2:], (x * 2)[..., :2]], -1) + 1, SQUARE, 1),
    "one value per row, expanded": (lambda x: x.sum(-1, keepdim=True).expand(4, 4) + x * 2, SQUARE, 1),
    "a vector as rows": (lambda x: (x[:, 0] * 2 + 1)[:, None] * x + 1, SQUARE, 1),
    # A square matrix: a vector of row sums is broadcast along the columns, so every row needs all the sums.
    "row sums along columns": (lambda x: (x * 2) + (x * 2).sum(-1), SQUARE, 2),
    "row sums both ways": (lambda x: (lambda s: s + s[:, None])((x * 2).sum(-1)), SQUARE, 1),
    "row sums along columns, late": (lambda x: (lambda s: (x + s) * 2 + x * 3 + s[:, None])(x.sum(-1) * 2), SQUARE, 2),
    "columns of another row": (lambda x: (x * 2 + 1) + (x * 2 + 1).t(), SQUARE, 2),
    "rows of a slice": (lambda x: (lambda y: y[:2] * y[2:] + 1)(x * 2 + 1), SQUARE, 2),
    "an outer product": (lambda x: (x[0] * 2 + 1)[:, None] * (x[0] * 3 + 1)[None, :] + 1, SQUARE, 3),
}


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("name", MEETING)
def test_members_read_their_own_row(name: str) -> None:
    body, x, count = MEETING[name]
    gm = graph_of(body, x)
    assert len(groups_of(gm)) <= count, names(gm)
    fuse_elementwise(gm)
    assert torch.equal(gm(x), body(x))
    assert any("fused" in str(node.target) for node in gm.graph.nodes)


def test_kinds_of_members_and_views() -> None:
    gm = graph_of(lambda x: ((x * 2).sum(-1, keepdim=True).view(6, 1) + 1).expand(6, 5) * 2, WIDE)
    (group,) = groups_of(gm)
    kinds = {node.name: kind for node, kind in group.kinds.items()}
    assert kinds["mul"] is Kind.FULL
    assert [kinds[name] for name in ("sum_1", "view", "add")] == [Kind.ROW] * 3
    assert kinds["expand"] is kinds["mul_1"] is Kind.FULL
    assert {node.name for node in group.hidden} == {"view", "expand"}
    assert [node.name for node in group.outputs] == ["mul_1"]


def test_a_view_that_leaves_is_kept_and_its_base_written() -> None:
    gm = graph_of(lambda x: ((x * 2).view(6, 5), (x * 2 + 1).sum(-1)), WIDE)
    group = next(group for group in groups_of(gm) if len(group.nodes) > 1)
    assert not group.hidden
    gm = graph_of(lambda x: (lambda y: (y.view(6, 5), (y.view(6, 5) + 1).relu()))(x * 2 + 1), WIDE)
    (group,) = groups_of(gm)
    assert {node.name for node in group.hidden} < {"view", "view_1"}
    assert {"add", "relu"} == {node.name for node in group.outputs}


# --- what lies between ------------------------------------------------------------------------------------------------


def test_no_group_crosses_an_opaque_op() -> None:
    crossing = graph_of(lambda x: (x * 2 + 1) + (x * 2 + 1).flip(-1), SQUARE)
    assert not together(crossing, "mul_1", "add_2"), "add_2 waits for flip, which waits for add_1"
    beside = graph_of(lambda x: (x * 2 + 1) + x.flip(-1), SQUARE)
    assert together(beside, "mul", "add_1")


@torch.library.custom_op("auxstream_test::count", mutates_args=("counts",))
def count(counts: Tensor, x: Tensor) -> Tensor:
    counts += 1
    return x.clone()


@count.register_fake
def _(counts: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda y, x: y.index_copy_(0, torch.tensor([1]), x[:1]), "index_copy_"),
        (lambda y, x: y[0].fill_(3), "fill_"),
        (lambda y, x: count(y, x), "count"),
    ],
    ids=["in place", "through a view", "custom op"],
)
def test_no_group_crosses_a_mutation(write: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    def body(x: Tensor) -> Tensor:
        y = x * 2
        before = y + 1
        write(y, x)
        return before * (y - 1)

    crossing = graph_of(body, SQUARE)
    assert any(name in node.name for node in crossing.graph.nodes)
    assert together(crossing, "mul", "add")
    assert together(crossing, "sub", "mul_1")
    assert not together(crossing, "mul", "sub"), "one reads what is written behind the other"
    quiet = graph_of(lambda x: (lambda y: (y + 1) * (y - 1))(x * 2), SQUARE)
    assert together(quiet, "mul", "sub")


def test_random_numbers_are_drawn_in_their_order() -> None:
    gm = graph_of(lambda x: (torch.rand_like(x) * 2 + 1) * (torch.rand_like(x) * 3), SQUARE)
    assert not any("rand" in name for group in names(gm) for name in group)
    assert [node.name for node in gm.graph.nodes if "rand" in node.name] == ["rand_like", "rand_like_1"]


# --- regions ----------------------------------------------------------------------------------------------------------


def test_a_group_lies_in_one_region_or_outside() -> None:
    def body(x: Tensor) -> Tensor:
        return (((x * 2 + 1).relu() * 3 + 1).relu() * 4 + 1).relu()

    assert together(graph_of(body, SQUARE), "mul", "relu_2")
    gm = graph_of(body, SQUARE, regions={"one": ["mul", "add", "relu"], "two": ["mul_1", "add_1"]})
    assert names(gm) == [["mul", "add", "relu"], ["mul_1", "add_1"], ["relu_1", "mul_2", "add_2", "relu_2"]]
    assert [group.region for group in groups_of(gm)] == ["one", "two", None]


def test_a_region_is_one_step() -> None:
    """The region waits for `mul`, and `add` for the region: though no edge leads from one to the other through it, as
    one kernel they would wait for themselves."""

    def body(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first = x * 2
        lane, own = y.flip(-1), first.flip(0)
        return first + lane, own

    assert together(graph_of(body, SQUARE, SQUARE), "mul", "add"), "twin: no region"
    gm = graph_of(body, SQUARE, SQUARE, regions={"lane": ["flip", "flip_1"]})
    flow = Dataflow.of(gm)
    assert Reach(flow).cyclic(flow.mask(node for node in flow.nodes if node.name in ("mul", "add")), None)
    assert not together(gm, "mul", "add")


def test_a_group_does_not_keep_work_behind_a_region() -> None:
    """`routed * 3` could run beside the region, and is wanted by a product beside it: it must not join what waits."""

    def body(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        lane = (x @ w).flip(-1)
        routed = x.flip(0) * 3
        return routed + lane, routed @ w

    gm = graph_of(body, SQUARE, SQUARE, regions={"lane": ["matmul", "flip"]})
    assert not together(gm, "mul", "add"), "the second product would run behind the region"
    assert together(graph_of(body, SQUARE, SQUARE), "mul", "add"), "twin: nothing runs beside"


def test_what_only_the_group_wants_may_wait() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        lane = (x @ w).flip(-1)
        return (x.flip(0) * 3) + lane

    gm = graph_of(body, SQUARE, SQUARE, regions={"lane": ["matmul", "flip"]})
    assert together(gm, "mul", "add")


def test_a_write_that_comes_later_counts_too() -> None:
    """The cache is read by a member and then written by work beside the region: that would run behind it."""

    def body(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        lane = (x @ w).flip(-1)
        routed = w * 3
        w.index_copy_(0, torch.tensor([1]), x[:1])
        return routed + lane, w.flip(0)

    marks = {"lane": ["matmul", "flip"]}

    def waits(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        lane = (x @ x).flip(-1)
        routed = w * 3
        w.index_copy_(0, torch.tensor([1]), x[:1])
        return routed + lane, w.flip(0)

    assert not together(graph_of(waits, SQUARE, SQUARE.clone(), regions=marks), "mul", "add")
    assert together(graph_of(body, SQUARE, SQUARE.clone(), regions=marks), "mul", "add"), "twin: it waits anyway"


def test_a_group_does_not_keep_a_region_behind_other_work() -> None:
    """`x * 3` feeds the region, `+ far` waits for work beside it: as one kernel the region would wait for that too."""

    def body(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        first = x * 3
        lane = (first @ w).flip(-1)
        far = x.flip(0).flip(-1)
        return first + far, lane

    gm = graph_of(body, SQUARE, SQUARE, regions={"lane": ["matmul", "flip_2", "flip"]})
    order = [node.name for node in gm.graph.nodes]
    assert order.index("matmul") < order.index("flip_1")
    marked = graph_of(body, SQUARE, SQUARE, regions={"lane": ["matmul", "flip"]})
    assert not together(marked, "mul", "add")
    assert together(graph_of(body, SQUARE, SQUARE), "mul", "add"), "twin: no region"


def test_a_region_may_wait_for_a_kernel_that_waits_for_no_more() -> None:
    def body(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        first = x * 3
        lane = (first @ w).flip(-1)
        return (first + w) @ w, lane

    gm = graph_of(body, SQUARE, SQUARE, regions={"lane": ["matmul", "flip"]})
    assert together(gm, "mul", "add"), "inputs are there from the start"


# --- limits and order -------------------------------------------------------------------------------------------------


def test_long_chains_are_cut() -> None:
    def body(x: Tensor) -> Tensor:
        for step in range(400):
            x = x + step
        return x

    found = names(graph_of(body, SQUARE))
    assert sum(map(len, found)) == 400
    assert max(map(len, found)) == MOST_MEMBERS


def test_lone_ops_and_dead_ones_are_left() -> None:
    def body(x: Tensor) -> Tensor:
        (x * 2 + 1).relu()  # nobody reads it; a trace would drop it
        return x.flip(0) * 2

    gm = graph_of(body, SQUARE)
    assert names(gm) == []
    with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op == "output")):
        dead = [gm.graph.call_function(torch.ops.aten.relu.default, (node,)) for node in list(gm.graph.nodes)[:1] * 2]
        dead += [gm.graph.call_function(torch.ops.aten.neg.default, (dead[0],))]
        for node in dead:
            node.meta["val"] = next(iter(gm.graph.nodes)).meta["val"]
    assert names(gm) == []


@pytest.mark.parametrize("block", range(4))
def test_orders_of_contracted_steps(block: int) -> None:
    """Random graphs, in which random sets become one step: against a search along the edges."""
    refused = 0
    for seed in range(25 * block, 25 * block + 25):
        draw = random.Random(seed)
        count = draw.randint(4, 16)
        before = [sorted(draw.sample(range(i), min(i, draw.choice([0, 1, 1, 2, 3])))) for i in range(count)]
        step = list(range(count))  # the set each node belongs to
        order = Order(before, (1 << count) - 1)
        for _ in range(12):
            chosen = draw.sample(range(count), draw.randint(2, 3))
            names = {step[i] for i in chosen}
            mask = sum(1 << i for i in range(count) if step[i] in names)
            merged = [min(names) if name in names else name for name in step]
            cyclic = not sortable(before, merged)
            assert order.cyclic(mask) == cyclic, f"seed {seed}"
            refused += cyclic
            if not cyclic:
                order.contract(mask)
                step = merged
        assert order.first == step, f"seed {seed}"
        assert set(positions(order.firsts)) == set(step), f"seed {seed}"
        for i in set(step):
            above = reached(before, step, i)
            known = {step[p] for p in positions(order.above[i])}
            assert known == above, f"seed {seed}"
            assert all(order.above[i] >> p & 1 == order.below[p] >> i & 1 for p in set(step)), f"seed {seed}"
    assert refused > 5


def reached(before: Sequence[Sequence[int]], step: Sequence[int], start: int) -> set[int]:
    """The steps that node `start`'s step comes after, its own included."""
    found, pending = {step[start]}, [step[start]]
    while pending:
        name = pending.pop()
        more = {step[p] for i, own in enumerate(step) if own == name for p in before[i]} - found
        found |= more
        pending += more
    return found


def sortable(before: Sequence[Sequence[int]], step: Sequence[int]) -> bool:
    """Whether the steps can be put in an order."""
    left = set(step)
    while left:
        free = {
            name
            for name in left
            if not any(step[p] in left - {name} for i, own in enumerate(step) if own == name for p in before[i])
        }
        if not free:
            return False
        left -= free
    return True


def test_contraction_is_transitive() -> None:
    """Groups that depend on each other through a third one, in both directions, are never both allowed."""
    gm = graph_of(lambda x, y: (lambda a, b: (a.flip(0) + b, b.flip(0) + a))(x * 2, y * 2), SQUARE, SQUARE)
    flow = Dataflow.of(gm)
    at = {node.name: flow.index[node] for node in flow.nodes}
    reach = Reach(flow)
    one = 1 << at["mul"] | 1 << at["add_1"]
    other = 1 << at["mul_1"] | 1 << at["add"]
    assert not reach.cyclic(one, None)
    assert not reach.cyclic(other, None)
    reach.contract(one, None)
    assert not reach.cyclic(one, None)
    assert reach.cyclic(other, None), "add waits for the flip of mul, and add_1 for that of mul_1"
