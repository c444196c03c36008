"""Regions in the graph: complete, in launch order, hazard-free, alive until read, and value for value the same."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from moe_blocks import HIDDEN, MERGES, TOKENS, Layer, Model, add_rms_norm
from random_programs import RandomProgram
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from auxstream.capture.branches import find_branches
from auxstream.capture.mark import MarkedRegion, mark_multi_stream_moe_shared_experts
from auxstream.capture.schedule import RegionPlan, insert_regions
from auxstream.capture.trace import trace
from auxstream.runtime import handoff_ops
from auxstream.runtime.errors import RegionError

X = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))


# --- an independent check: positions, schemas and traced storages; no Dataflow -------------------------------------


def storages(node: Node) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)}


def accessed(node: Node) -> tuple[set[int], set[int]]:
    """Storages a node touches, and those it writes or makes."""
    touched = set[int]().union(*(storages(argument) for argument in node.all_input_nodes), storages(node))
    made = storages(node) - set[int]().union(*(storages(argument) for argument in node.all_input_nodes))
    if isinstance(node.target, OpOverload):
        names = {a.name: a for a in node.target._schema.arguments}
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        for name, value in given.items():
            info = names[name].alias_info
            if info is not None and info.is_write:
                made |= set[int]().union(*(storages(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Node)))
    return touched, made


def check(gm: GraphModule, plans: Sequence[RegionPlan]) -> None:
    """Assert the schedule's promises for every region."""
    gm.graph.lint()
    nodes = list(gm.graph.nodes)
    at = {node: index for index, node in enumerate(nodes)}
    inside_of = {node: plan.name for plan in plans for node in plan.nodes}
    for plan in plans:
        fork, enter, leave, join = (at[node] for node in (plan.fork, plan.enter, plan.leave, plan.join))
        assert fork < enter < leave < join, f"{plan.name}: steps out of order"
        inside = nodes[enter + 1 : leave]
        assert set(inside) == set(plan.nodes), f"{plan.name}: the body is not exactly its nodes"
        crossing = [plan.fork.args[1], plan.fork.args[2], plan.join.args[1], plan.leave.args[1]]
        declared = {node for group in crossing for node in group}
        for node in inside:
            for argument in node.all_input_nodes:
                if argument not in plan.nodes and argument.op != "get_attr":
                    assert at[argument] < fork, f"{plan.name}: {argument} is made behind the fork"
                    assert argument in declared or plan.held == plan.recorded == (), f"{argument} is not declared"
            for user in node.users:
                assert user in plan.nodes or user in (plan.leave, plan.join), f"{plan.name}: {user} does not wait"
        touched, made = (set[int]().union(*sets) for sets in zip(*(accessed(node) for node in inside), strict=True))
        for node in nodes[fork + 1 : join]:
            if inside_of.get(node) != plan.name and "auxstream_role" not in node.meta:
                theirs, their_writes = accessed(node)
                assert not touched & their_writes, f"{plan.name}: {node} writes what the branch touches"
                assert not made & theirs, f"{plan.name}: {node} touches what the branch writes"


def run(module: Callable[..., Any], state: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Results and final buffers of two calls, from the initial buffers, which are put back."""
    kept = {name: value.clone() for name, value in state.named_buffers()}
    with torch.no_grad():
        results = [leaf.clone() for _ in range(2) for leaf in tree_leaves(module(*(x.clone() for x in inputs)))]
    results += [value.clone() for _, value in state.named_buffers()]
    for name, value in kept.items():
        state.get_buffer(name).copy_(value)
    return results


def scheduled(
    model: nn.Module, *inputs: Tensor, regions: Any = None, **options: Any
) -> tuple[GraphModule, tuple[RegionPlan, ...]]:
    """Trace, mark (or take `regions(gm)`), insert, eliminate dead code, and hold the result against the model."""
    inputs = inputs or (X,)
    gm = trace(model, inputs).graph_module
    if regions is None:
        mark_multi_stream_moe_shared_experts(gm)
    plans = insert_regions(gm, None if regions is None else regions(gm), **options)
    count = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert len(gm.graph.nodes) == count, "region ops survive dead-code elimination"
    check(gm, plans)
    for mine, reference in zip(run(gm, model, *inputs), run(model, model, *inputs), strict=True):
        assert torch.equal(mine, reference)
    return gm, plans


def of_modules(**names: str) -> Callable[[GraphModule], list[MarkedRegion]]:
    """Regions by hand: all ops traced in the module `path`, for each name=path."""

    def find(gm: GraphModule) -> list[MarkedRegion]:
        regions = []
        for name, path in names.items():
            nodes = [
                node
                for node in gm.graph.nodes
                if node.op == "call_function" and list(node.meta["nn_module_stack"].values())[-1][0].startswith(path)
            ]
            regions.append(MarkedRegion(name, tuple(nodes), (), nodes[-1]))
        return regions

    return find


# --- marked models --------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"handoff": "record"},
    {"order": "aux_first"},
    {"fork_at": "first_product"},
    {"order": "aux_first", "fork_at": "first_product", "unsafe_no_lifetime": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "default")
@pytest.mark.parametrize("shared_first", [True, False], ids=["shared_first", "routed_first"])
def test_every_option_keeps_values_and_promises(options: dict[str, Any], shared_first: bool) -> None:
    layers = [Layer(merge="norm_behind", shared_first=shared_first, pre_norm=True, gated=True) for _ in range(2)]
    _, plans = scheduled(Model(*layers), **options)
    assert [plan.name for plan in plans] == ["layers.0.shared", "layers.1.shared"]
    assert {plan.lane for plan in plans} == {0}, "one region after the other share a lane"


@pytest.mark.parametrize("merge", MERGES)
def test_every_merge(merge: str) -> None:
    scheduled(Model(Layer(merge=merge), Layer(merge=merge, shared_first=False)))


@pytest.mark.parametrize("form", ["opaque", "latent"])
def test_every_form_of_experts(form: Any) -> None:
    scheduled(Model(Layer(form=form), Layer(form=form, shared_first=False)))


@pytest.mark.parametrize("order", ["caller_first", "aux_first"])
@pytest.mark.parametrize("shared_first", [True, False], ids=["shared_first", "routed_first"])
def test_the_work_beside_is_enqueued_where_the_order_says(order: Any, shared_first: bool) -> None:
    """The marks alone are enough to find the work beside, whichever side the model wrote first."""
    gm = trace(Model(Layer(shared_first=shared_first)), (X,)).graph_module
    (region,) = mark_multi_stream_moe_shared_experts(gm)
    (plan,) = insert_regions(gm, order=order)
    at = {node: index for index, node in enumerate(gm.graph.nodes)}
    steps = (plan.fork, plan.enter) if order == "caller_first" else (plan.leave, plan.join)
    assert all(at[steps[0]] < at[node] < at[steps[1]] for node in region.routed)
    consumer = next(user for result in plan.join.users for user in result.users)
    assert at[consumer] - at[plan.join] == 1 + len(plan.live_outs), "join just before the first use"
    last_live_in = max(at[node] for node in plan.live_ins)
    assert all(node.op == "get_attr" for node in list(gm.graph.nodes)[last_live_in + 1 : at[plan.fork]]), "fork at once"


def test_region_ops_carry_values_and_marks_survive() -> None:
    gm, (plan,) = scheduled(Model(Layer()))
    assert plan.fork.meta["val"] == handoff_ops.RegionValue("layers.0.shared")
    assert plan.enter.meta["val"] is None
    assert plan.leave.meta["val"] is None
    (value,) = plan.join.meta["val"]
    (result,) = plan.join.users
    assert value is plan.live_outs[0].meta["val"] is result.meta["val"]
    roles = [node.meta["auxstream_role"] for node in gm.graph.nodes if "auxstream_role" in node.meta]
    assert roles == ["fork", "enter", "leave", "join", "result"]
    assert {node for node in gm.graph.nodes if node.meta.get("auxstream") == plan.name} == set(plan.nodes)
    assert all(node.meta["skip_mlir_fusion"] for node in plan.nodes)
    assert "layers.0.shared" in str(plan)


# --- the checker's twins: each promise broken on purpose -----------------------------------------------------------


def break_body(plan: RegionPlan) -> None:
    plan.leave.append(plan.nodes[-1])


def break_join(plan: RegionPlan) -> None:
    for result in list(plan.join.users):
        result.replace_all_uses_with(plan.live_outs[0])


def break_fork(plan: RegionPlan) -> None:
    plan.live_ins[0].prepend(plan.fork)
    plan.fork.args = (plan.name, [], [], 0, [])


def break_declaration(plan: RegionPlan) -> None:
    plan.fork.args = (plan.name, [], [], 0, [])
    plan.join.args = (plan.join.args[0], plan.join.args[1], [])


@pytest.mark.parametrize("damage", [break_body, break_join, break_fork, break_declaration])
def test_the_checker_sees_damage(damage: Callable[[RegionPlan], None]) -> None:
    gm, plans = scheduled(Model(Layer()))
    damage(plans[0])
    with pytest.raises((AssertionError, RuntimeError)):
        check(gm, plans)


# --- live-ins and live-outs ---------------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


class Wrapped(nn.Module):
    """`aux` is the branch; `body(aux, x)` the model around it."""

    def __init__(self, fn: Callable[..., Any], body: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.aux, self.body = Branch(fn), body
        for name, value in buffers.items():
            self.register_buffer(name, value)
            self.aux.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def test_all_live_outs_in_lists_kwargs_and_results() -> None:
    """Two tensors leave the branch: into a list, a keyword argument, and the graph's output."""

    def body(model: Wrapped, x: Tensor) -> Any:
        a, b = model.aux(x * 2, [x + 1])
        c = x.cos()
        return torch.cat([a, c, b]), torch.add(input=c, other=a), {"a": a}

    _, (plan,) = scheduled(Wrapped(lambda y, zs: (y.sin(), zs[0].exp()), body), regions=of_modules(aux="aux"))
    assert len(plan.live_ins) == len(plan.live_outs) == 2
    recorded = plan.leave.args[1]
    assert [node.name for node in recorded] == ["sin"], "what leaves the graph outlives every fork"


def test_a_tuple_made_inside_crosses_by_element() -> None:
    def body(model: Wrapped, x: Tensor) -> Any:
        values, indices = model.aux(x)
        return x.cos() + values.sum() + indices.sum()

    _, (plan,) = scheduled(Wrapped(lambda x: torch.topk(x, 2), body), regions=of_modules(aux="aux"))
    assert [node.target for node in plan.live_outs] == [operator.getitem] * 2


def test_tuples_used_whole_across_the_border() -> None:
    def body(model: Wrapped, x: Tensor) -> Any:
        inner = model.aux(x.chunk(3))
        return torch.cat(inner) + x.cos()

    _, (plan,) = scheduled(Wrapped(lambda parts: torch.cat(parts[::-1]).chunk(3), body), regions=of_modules(aux="aux"))
    assert len(plan.live_ins) == 3
    assert len(plan.live_outs) == 3


def test_a_fused_fork_with_several_results() -> None:
    weight = torch.ones(HIDDEN)

    def body(model: Wrapped, x: Tensor) -> Any:
        normed, residual = add_rms_norm(x, x, model.weight)
        return normed.cos() + model.aux(normed, residual)

    _, (plan,) = scheduled(Wrapped(lambda n, r: n.sin() + r, body, weight=weight), regions=of_modules(aux="aux"))
    assert [node.target for node in plan.live_ins] == [operator.getitem] * 2


# --- hazards through memory ---------------------------------------------------------------------------------------


def test_writes_of_the_branch_are_joined_before_they_are_read() -> None:
    def fn(x: Tensor) -> Tensor:
        model.cache.index_copy_(0, torch.tensor([1]), x[:1])
        return x.sin()

    def body(model: Wrapped, x: Tensor) -> Any:
        y = model.aux(x + 1)
        z = x.cos()
        seen = model.cache.sum()
        return z + seen + y

    model = Wrapped(fn, body, cache=torch.zeros(TOKENS, HIDDEN))
    gm, (plan,) = scheduled(model, regions=of_modules(aux="aux"))
    at = {node.name: index for index, node in enumerate(gm.graph.nodes)}
    assert at["cos"] < at[plan.enter.name], "independent work runs beside"
    assert at[plan.join.name] < at["sum_1"], "a reader of the branch's write waits"
    assert [node.name for node in plan.fork.args[4]] == ["aux_cache"]


def test_the_callers_writes_keep_their_side_of_the_fork_and_the_join() -> None:
    """It overwrites the cache before the branch reads it, and again afterwards."""

    def body(model: Wrapped, x: Tensor) -> Any:
        model.cache.copy_(x)
        y = model.aux(x)
        model.cache.mul_(3)
        return x.cos() + y + model.cache

    model = Wrapped(lambda x: x.sin() + model.cache, body, cache=torch.zeros(TOKENS, HIDDEN))
    gm, (plan,) = scheduled(model, regions=of_modules(aux="aux"))
    at = {node.name: index for index, node in enumerate(gm.graph.nodes)}
    assert at["copy_"] < at[plan.fork.name] < at[plan.join.name] < at["mul_"]


def test_branch_pairs_of_programs_with_hazards_can_all_be_scheduled() -> None:
    """Any side of any pair is a region; the values and the checker agree every time."""
    done = 0
    for seed in range(10):
        model, x = RandomProgram(seed), torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        pairs = find_branches(trace(model, (x,)).graph_module)
        for number, pair in enumerate(pairs[:3]):
            names = {node.name for node in pair.sides[number % 2]}

            def pick(gm: GraphModule, names: set[str] = names) -> list[MarkedRegion]:
                nodes = tuple(node for node in gm.graph.nodes if node.name in names)
                return [MarkedRegion("aux", nodes, (), nodes[-1])]

            gm = trace(model, (x,)).graph_module
            plans = insert_regions(gm, pick(gm), order=("caller_first", "aux_first")[seed % 2])
            check(gm, plans)
            torch.manual_seed(0)
            mine = run(gm, model, x)
            torch.manual_seed(0)
            assert all(torch.equal(a, b) for a, b in zip(mine, run(model, model, x), strict=True)), gm.code
            done += 1
    assert done > 15


# --- lifetimes ------------------------------------------------------------------------------------------------------


class ReadsOfRegions(TorchDispatchMode):
    """Notes which storages branches read, and at each join which of them are gone already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.read: dict[str, set[StorageWeakRef]] = {}
        self.open: str | None = None
        self.lost: list[str] = []
        watch = self

        class Region:
            def __init__(self, name: str, **_: Any) -> None:
                self.name = name

            def __enter__(self) -> None:
                watch.open = self.name
                watch.read[self.name] = set()

            def __exit__(self, *_: object) -> None:
                watch.open = None

            def returns(self, values: Any) -> Any:
                return values

            def join(self) -> None:
                watch.lost += [self.name for reference in watch.read[self.name] if reference.expired()]

        monkeypatch.setattr(handoff_ops, "open_region", Region)
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.open is not None:
            self.made |= {t.untyped_storage()._cdata for t in tree_leaves(result) if isinstance(t, Tensor)} - {
                t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
            }
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.made:
                    self.read[self.open].add(StorageWeakRef(leaf.untyped_storage()))
        return result


@pytest.mark.parametrize(
    ("options", "safe"),
    [
        ({}, True),
        ({"order": "aux_first"}, True),
        ({"order": "aux_first", "fork_at": "first_product"}, True),
        ({"order": "aux_first", "fork_at": "first_product", "unsafe_no_lifetime": True}, False),
    ],
    ids=["default", "aux_first", "behind_the_norm", "unsafe"],
)
def test_what_a_branch_reads_lives_until_the_join(
    options: dict[str, Any], safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last case is the twin: the fork behind the pre-norm, its result dropped while the lane may still read it."""
    gm = trace(Model(Layer(pre_norm=True), Layer(pre_norm=True)), (X,)).graph_module
    mark_multi_stream_moe_shared_experts(gm)
    insert_regions(gm, **options)
    with ReadsOfRegions(monkeypatch) as watch, torch.no_grad():
        gm(X.clone())
    assert set(watch.read) == {"layers.0.shared", "layers.1.shared"}
    assert all(watch.read.values())
    assert (watch.lost == []) is safe


def two_regions(uses: Callable[[Tensor, Tensor, Tensor], Tensor]) -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Branch(lambda x: x.sin()), Branch(lambda x: x.exp())

        def forward(self, x: Tensor) -> Tensor:
            first = self.one(x * 2)
            merged = x.cos() + first
            second = self.two(merged * 3)
            return uses(first, merged.tan(), second)

    return Two()


@pytest.mark.parametrize(
    ("uses", "recorded"),
    [
        (lambda first, middle, second: middle + second, []),
        (lambda first, middle, second: middle + second + first, ["sin"]),
        (lambda first, middle, second: middle + second + first.view(-1).view_as(middle), ["sin"]),
        (lambda first, middle, second: (middle + second, first), ["sin"]),
        (lambda first, middle, second: (middle, second), ["exp"]),
    ],
    ids=["dropped_in_time", "used_behind_the_next_fork", "through_a_view", "returned", "second_returned"],
)
def test_live_outs_are_recorded_only_when_they_outlive_the_lanes_next_fork(uses: Any, recorded: list[str]) -> None:
    _, plans = scheduled(two_regions(uses), regions=of_modules(one="one", two="two"))
    assert [node.name for plan in plans for node in plan.leave.args[1]] == recorded
    assert all(plan.fork.args[1] == [] for plan in plans)
    assert all(set(plan.held) == set(plan.live_ins) for plan in plans)
    _, plans = scheduled(two_regions(uses), regions=of_modules(one="one", two="two"), handoff="record")
    for plan in plans:
        assert list(plan.fork.args[1]) == list(plan.live_ins)
        assert list(plan.leave.args[1]) == list(plan.live_outs)
        assert plan.held == ()


# --- several regions ------------------------------------------------------------------------------------------------


def test_overlapping_regions_get_lanes_of_their_own() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Branch(lambda x: x.sin()), Branch(lambda x: x.exp())

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            return torch.stack([self.one(h), h.cos(), self.two(h)]).sum(0)

    gm, plans = scheduled(Both(), regions=of_modules(one="one", two="two"))
    assert sorted(plan.lane for plan in plans) == [0, 1]
    at = {node: index for index, node in enumerate(gm.graph.nodes)}
    assert max(at[plan.leave] for plan in plans) < min(at[plan.join] for plan in plans), "all enqueued before any wait"


def test_one_region_feeds_another() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Branch(lambda x: x.sin()), Branch(lambda x: x.exp())

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x * 2)) + x.cos()

    _, plans = scheduled(Chain(), regions=of_modules(one="one", two="two"))
    (result,) = plans[0].join.users
    assert plans[1].fork.args[2] == [result]


# --- refusals -------------------------------------------------------------------------------------------------------


def region(gm: GraphModule, name: str, *nodes: str) -> MarkedRegion:
    found = tuple(node for node in gm.graph.nodes if node.name in nodes)
    assert len(found) == len(nodes)
    return MarkedRegion(name, found, (), found[-1])


class Line(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin().cos().exp() + x.tan()


def test_a_region_with_a_hole_is_refused_by_name() -> None:
    gm = trace(Line(), (X,)).graph_module
    with pytest.raises(RegionError, match="'aux' cannot run in one piece") as caught:
        insert_regions(gm, [region(gm, "aux", "sin", "exp")])
    assert "cos" in caught.value.came


def test_regions_that_wait_for_each_other_are_refused() -> None:
    class Crossed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin().cos() + x.tan().exp()

    gm = trace(Crossed(), (X,)).graph_module
    with pytest.raises(RegionError, match="one, two wait for each other"):
        insert_regions(gm, [region(gm, "one", "sin", "exp"), region(gm, "two", "tan", "cos")])


def test_shared_nodes_and_a_second_insertion_are_refused() -> None:
    gm = trace(Line(), (X,)).graph_module
    with pytest.raises(RegionError, match="shares nodes"):
        insert_regions(gm, [region(gm, "one", "sin", "cos"), region(gm, "two", "cos")])
    insert_regions(gm, [region(gm, "one", "sin")])
    with pytest.raises(RegionError, match="already"):
        insert_regions(gm, [region(gm, "two", "tan")])


def test_no_regions_no_change() -> None:
    gm = trace(Line(), (X,)).graph_module
    code = gm.code
    assert insert_regions(gm) == ()
    assert gm.code == code
