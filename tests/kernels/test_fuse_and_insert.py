"""Fusing and inserting regions in either order: the same groups, the same regions, the same bits."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import tiny_models
import torch
from exact_programs import ExactProgram, draw
from marked_graphs import EVERYWHERE, GRAPHS, X, groups, moe
from moe_blocks import Layer, Model
from random_regions import copy_of, draw_regions
from torch import Tensor
from torch.fx import GraphModule

import auxstream
from auxstream.capture.mark import MarkedRegion, mark_multi_stream_moe_shared_experts
from auxstream.capture.schedule import RegionPlan, insert_regions
from auxstream.capture.trace import trace
from auxstream.kernels import fuse, fuse_elementwise
from auxstream.kernels.reach import region_of
from auxstream.runtime.errors import RegionError
from auxstream.runtime.handoff_ops import REGION_OPS, region_fork
from auxstream.runtime.settings import SafetyRules

pytestmark = pytest.mark.usefixtures("by_torch")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "recorded, aux first": {"handoff": "record", "order": "aux_first"},
    "behind the norm": {"fork_at": "first_product"},
}


def laid(gm: GraphModule) -> list[Any]:
    """Every region op with the names of its arguments, in order."""
    return [
        (node.name, str(node.target.__name__), str(node.args))
        for node in gm.graph.nodes
        if node.target in REGION_OPS  # their arguments name live-ins, live-outs, held and recorded tensors
    ]


# --- either order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [(), EVERYWHERE], ids=["default", "everywhere"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["block, plain", "block, gate and norm", "block, in_place", "gemma4", "deepseek_v3"])
def test_fusing_and_inserting_commute(name: str, options: str, safe: SafetyRules) -> None:
    one, other = GRAPHS[name](), GRAPHS[name]()
    first = fuse_elementwise(one, safe=safe)
    plans = insert_regions(one, **OPTIONS[options])
    insert_regions(other, **OPTIONS[options])
    second = fuse_elementwise(other, safe=safe)
    assert plans
    assert groups(first) == groups(second)
    assert laid(one) == laid(other)
    assert {node.name for node in one.graph.nodes} == {node.name for node in other.graph.nodes}
    check_plans(one, plans)


def check_plans(gm: GraphModule, plans: tuple[RegionPlan, ...]) -> None:
    """What a join holds and returns, read off the graph and not off the plan."""
    at = {node: index for index, node in enumerate(gm.graph.nodes)}
    for plan in plans:
        inside = [node for node in gm.graph.nodes if at[plan.enter] < at[node] < at[plan.leave]]
        read = dict.fromkeys(a for node in inside for a in node.all_input_nodes if a not in inside)
        read = [a for a in read if a.op != "get_attr" and isinstance(a.meta.get("val"), Tensor)]
        assert all(at[a] < at[plan.fork] for a in read)
        fork, returned, held = plan.join.args
        assert fork is plan.fork
        assert set(held) == set(plan.held)
        assert set(plan.held) | set(plan.recorded) >= set(read), "nothing keeps what the branch reads"
        for node in inside:
            assert all(user in inside or user in (plan.leave, plan.join) for user in node.users), (
                "used ahead of the join"
            )
            if any(user is plan.join for user in node.users):
                assert node in returned


@pytest.mark.parametrize("name", ["block, plain", "block, gate and norm", "gemma4"])
@pytest.mark.parametrize("safe", [(), EVERYWHERE], ids=["default", "everywhere"])
def test_a_fused_graph_with_regions_replays_on_the_simulated_machine(name: str, safe: SafetyRules) -> None:
    gm, reference = GRAPHS[name](), GRAPHS[name]()
    fuse_elementwise(gm, safe=safe)
    fuse_elementwise(reference, safe=safe)
    plans = insert_regions(gm)
    given = (X.clone(),) if name.startswith("block") else tiny_models.inputs()
    static = tuple(t.clone() for t in given)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with auxstream.graph(name, device="cpu") as g:
            got = gm(*static)
        assert g.report.ok, str(g.report)
        assert len(g.regions) == len(plans)
        for (buffer, value), expected in zip(gm.named_buffers(), reference.buffers(), strict=True):
            assert torch.equal(value, expected), buffer
        for position in range(4):
            call = (X * (position + 1),) if name.startswith("block") else tiny_models.inputs(position=position)
            for tensor, value in zip(static, call, strict=True):
                tensor.copy_(value)
            g.replay()
            assert torch.equal(got, reference(*call)), f"replay {position}"
        assert all(torch.equal(a, b) for a, b in zip(gm.buffers(), reference.buffers(), strict=True))


@pytest.mark.parametrize("block", range(6))
def test_any_regions_of_any_program(block: int) -> None:
    """Both orders, any options: the same groups, the bits of the unfused graph, and replays of the capture too."""
    inserted = fused = 0
    for seed in range(6 * block, 6 * block + 6):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        gm = trace(ExactProgram(seed, length=32), draw(generator)).graph_module
        for region in draw_regions(gm, rng):
            for node in region.nodes:
                node.meta.update(auxstream=region.name, skip_mlir_fusion=True)
        reference, one, other = copy_of(gm), copy_of(gm), copy_of(gm)
        safe: SafetyRules = rng.choice([(), EVERYWHERE, (("region0", "1"),)])
        options = rng.choice(list(OPTIONS.values()))
        try:
            insert_regions(other, **options)
        except RegionError:  # regions with holes, or which wait for each other
            continue
        second, first = fuse_elementwise(other, safe=safe), fuse_elementwise(one, safe=safe)
        plans = insert_regions(one, **options)
        assert groups(first) == groups(second), f"seed {seed}"
        inserted, fused = inserted + len(plans), fused + len(first.fusions)
        for fusion in first.fusions:
            assert {region_of(node) for node in fusion.group.nodes} == {fusion.group.region}
            assert fusion.group.region is None or first.safety[fusion.group.region] == "1"
        fresh = copy_of(one)
        for number in range(2):
            x, y = draw(generator)
            expected = run(reference, x, y, number)
            for which in (one, other):
                got = run(which, x, y, number)
                assert all(map(torch.equal, got, expected)), f"seed {seed}"
                assert all(torch.equal(getattr(which, name), value) for name, value in reference.named_buffers())
        check_capture(fresh, copy_of(gm), generator, f"seed {seed}")
    assert inserted > 3
    assert fused > 6


def run(gm: GraphModule, x: Tensor, y: Tensor, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        return gm(x.clone(), y.clone())


def check_capture(gm: GraphModule, reference: GraphModule, generator: torch.Generator, name: str) -> None:
    x, y = draw(generator)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with auxstream.graph(name, device="cpu") as g:
            got = gm(x, y)
        for _ in range(3):
            for tensor, value in zip((x, y), draw(generator), strict=True):
                tensor.copy_(value)
            state = torch.get_rng_state()
            g.replay()
            torch.set_rng_state(state)
            assert all(map(torch.equal, got, reference(x.clone(), y.clone()))), name
            buffers = dict(gm.named_buffers())
            assert all(torch.equal(buffers[n], value) for n, value in reference.named_buffers() if n in buffers), name


# --- regions laid again -----------------------------------------------------------------------------------------------


def test_regions_are_laid_again_as_they_were() -> None:
    gm = moe()
    plans = insert_regions(gm, ["layers.1.shared"], priority=-1)
    before = laid(gm)
    report = fuse_elementwise(gm, safe=EVERYWHERE)
    assert report.fusions
    forks = [node for node in gm.graph.nodes if node.target is region_fork]
    assert [fork.args[0] for fork in forks] == ["layers.1.shared"], "the region that was not asked for stays out"
    assert forks[0].args[3] == -1
    assert [row[:2] for row in laid(gm)] == [row[:2] for row in before]
    assert plans[0].name == "layers.1.shared"


def test_regions_asked_for_by_their_nodes_are_found_again() -> None:
    gm = trace(Model(Layer()), (X,)).graph_module
    marked = mark_multi_stream_moe_shared_experts(copy.deepcopy(gm))
    nodes = {node.name: node for node in gm.graph.nodes}
    chosen = [
        MarkedRegion("mine", tuple(nodes[n.name] for n in region.nodes), (), nodes["output"]) for region in marked
    ]
    insert_regions(gm, chosen)
    fuse_elementwise(gm)
    assert [node.args[0] for node in gm.graph.nodes if node.target is region_fork] == ["mine"]
    assert not [node for node in gm.graph.nodes if node.meta.get("auxstream_fused") and region_of(node)]


def test_regions_by_hand_are_refused() -> None:
    gm = moe()
    insert_regions(gm)
    fork = next(node for node in gm.graph.nodes if node.target is region_fork)
    fork.meta.clear()
    fork.meta["val"] = None
    code = gm.code
    with pytest.raises(RegionError, match="not inserted by insert_regions"):
        fuse_elementwise(gm)
    assert gm.code == code


def test_an_error_leaves_the_regions_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = moe()
    insert_regions(gm)
    before = laid(gm)

    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel today")

    monkeypatch.setattr(fuse, "emit_all", fails)
    with pytest.raises(RuntimeError, match="no kernel today"):
        fuse_elementwise(gm)
    assert [row[1] for row in laid(gm)] == [row[1] for row in before]
    gm.graph.lint()
    assert torch.equal(gm(X), moe()(X))


def test_fusing_again_is_harmless() -> None:
    gm = moe()
    reference = copy.deepcopy(gm)
    first = fuse_elementwise(gm)
    insert_regions(gm)
    assert not fuse_elementwise(gm).fusions
    more = fuse_elementwise(gm, safe=EVERYWHERE)
    assert first.fusions
    assert more.fusions
    assert all(fusion.group.region for fusion in more.fusions)
    assert not fuse_elementwise(gm, safe=EVERYWHERE).fusions
    torch.testing.assert_close(gm(X), reference(X))
