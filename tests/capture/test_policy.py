"""Which branches run on lanes: what is proposed, what rules demand, what wins a race, what is remembered."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture import Options, compiler, insert_regions, laying, policy, proposals
from auxstream.capture import race as race_module
from auxstream.capture.inputs import StaticInputs
from auxstream.capture.laying import Laying
from auxstream.capture.policy import Choice, Plan, Result, key_of, measured, remember, remembered, ruled, unmeasured
from auxstream.capture.proposals import Proposal, Region, mark, propose
from auxstream.capture.race import judged
from auxstream.capture.trace import trace
from auxstream.kernels import fuse, store
from auxstream.kernels.derive import copy_of
from auxstream.kernels.safety import fusion_safety
from auxstream.runtime.errors import AuxstreamWarning
from auxstream.runtime.settings import Settings, parse_overlap

WIDTH = 16


class Block(nn.Module):
    """Three products beside each other, and a mixture of experts beside a shared one."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "gate", "up", "down", "router"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.experts = nn.Parameter(torch.randn(WIDTH, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)) + torch.relu(self.v(x))
        weight, index = self.router(x).softmax(-1).topk(2)
        routed = (torch.einsum("td,tkde->tke", x, self.experts[index]) * weight[..., None]).sum(1)
        normed = x / (1 + x.abs())
        return x + routed + torch.tanh(self.down(torch.relu(self.gate(normed)) * self.up(normed)))


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "_LEAST_BYTES", 1)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def found(small: None, model: Model) -> tuple[Proposal, ...]:
    return propose(trace(model, (torch.randn(4, WIDTH),)).graph_module)


def of(kind: str, span: proposals.Span = "products", expected: bool = False, weight: int = 1) -> Proposal:
    regions = tuple(
        Region(kind.replace("*", str(i)), (f"{kind}{i}", *([f"norm{i}"] if span == "whole" else []))) for i in range(2)
    )
    return Proposal(kind, span, regions, weight, expected)


SHARED, SHARED_CORE = of("layers.*.shared", "whole", True, 9), of("layers.*.shared", expected=True, weight=9)
K, V = of("layers.*.k", weight=5), of("layers.*.v", weight=4)


# --- proposals ------------------------------------------------------------------------------------------------------


def test_shared_experts_come_first_then_by_bytes(found: tuple[Proposal, ...]) -> None:
    offered = [(proposal.kind, proposal.span) for proposal in found]
    assert offered[:2] == [("layers.*.shared", "whole"), ("layers.*.shared", "products")]
    assert {kind for kind, _ in offered[2:]} >= {"layers.*.q", "layers.*.v"}
    assert [p.expected for p in found] == [True, True] + [False] * (len(found) - 2)
    assert all(len(proposal.regions) == 2 for proposal in found)


def test_the_products_of_a_branch_leave_its_ends_to_the_caller(model: Model, found: tuple[Proposal, ...]) -> None:
    gm = trace(model, (torch.randn(4, WIDTH),)).graph_module
    targets = {node.name: str(node.target) for node in gm.graph.nodes}
    whole, core = ([targets[name] for name in p.regions[0].nodes] for p in found[:2])
    assert [t.split(".")[1] for t in core] == ["linear", "relu", "linear", "mul", "linear"]
    assert "aten.tanh.default" in whole
    assert "aten.abs.default" in whole


def test_small_branches_are_not_worth_a_handoff(model: Model) -> None:
    kinds = {proposal.kind for proposal in propose(trace(model, (torch.randn(4, WIDTH),)).graph_module)}
    assert kinds == {"layers.*.shared"}


def test_every_proposal_can_be_laid_and_computes_the_same(model: Model, found: tuple[Proposal, ...]) -> None:
    x = torch.randn(4, WIDTH)
    gm = trace(model, (x,)).graph_module
    expected = gm(x)
    for proposal in found:
        laid = copy_of(gm)
        mark(laid, proposal.regions)
        assert len(insert_regions(laid)) == len(proposal.regions)
        with auxstream.graph(device="cpu") as g:
            out = laid(x)
        for _ in range(3):
            out.zero_()
            g.replay()
            assert torch.equal(out, expected), proposal


def test_marks_of_adopted_switches_are_proposed(small: None, model: Model) -> None:
    gm = trace(model, (torch.randn(4, WIDTH),)).graph_module
    own = next(node for node in gm.graph.nodes if "linear" in node.name)
    own.meta["auxstream"] = "mine.3"
    own.meta["skip_mlir_fusion"] = True
    (mine,) = (proposal for proposal in propose(gm) if proposal.expected and proposal.kind != "layers.*.shared")
    assert (mine.kind, mine.span, mine.regions) == ("mine.*", "whole", (Region("mine.3", (own.name,), bare=True),))
    assert "auxstream" not in own.meta
    assert "skip_mlir_fusion" not in own.meta


def test_branches_of_products_alone_share_what_is_fused(
    small: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are marked behind the fusion, and compute the same; others are kept from it."""
    x = torch.randn(4, WIDTH)
    traced = trace(model, (x,))
    found = {(p.kind, p.span): p for p in propose(traced.graph_module)}
    shared, q = found["layers.*.shared", "products"], found["layers.*.q", "products"]
    fused: list[object] = []
    monkeypatch.setattr(laying, "compile_ahead", fused.append)
    each = Laying(traced, Options(), False, {})
    expected = each.lay(Plan(), trial=False).module(x)
    for plan, fusions in (
        (Plan((q,)), 1),
        (Plan((shared,)), 2),
        (Plan((shared, q)), 2),
        (Plan((shared, q), "aux_first"), 2),
    ):
        laid = each.lay(plan, trial=False)
        assert len(fused) == fusions
        assert [plan.name for plan in laid.regions] == sorted(region.name for region in plan.regions)
        assert torch.equal(laid.module(x), expected)
    assert not any(node.meta.get("auxstream") for node in traced.graph_module.graph.nodes)


# --- rules ----------------------------------------------------------------------------------------------------------


def named(proposals_: Sequence[Proposal]) -> list[tuple[str, str]]:
    return [(region.name, proposal.span) for proposal in proposals_ for region in proposal.regions]


@pytest.mark.parametrize(
    ("rules", "demanded", "left"),
    [
        ("", [], ["shared", "shared", "k"]),
        ("*=off", [], []),
        ("*=off,*.shared=on", [("layers.0.shared", "whole"), ("layers.1.shared", "whole")], []),
        ("*=off,*.shared=products", [("layers.0.shared", "products"), ("layers.1.shared", "products")], []),
        ("layers.*.k", [("layers.0.k", "products"), ("layers.1.k", "products")], ["shared", "shared"]),
        ("layers.0.*=off,layers.1.k=on", [("layers.1.k", "products")], ["shared", "shared"]),
    ],
)
def test_rules(rules: str, demanded: list[tuple[str, str]], left: list[str]) -> None:
    got, open_ = ruled((SHARED, SHARED_CORE, K), parse_overlap(rules))
    assert named(got) == demanded
    assert [p.kind.split(".")[-1] for p in open_] == left


def test_a_rule_that_matches_nothing_is_found() -> None:
    assert policy.unmatched((SHARED, K), parse_overlap("layers.*.q=on,layers.1.k=off")) == ["layers.*.q"]


def test_products_of_a_branch_that_is_nothing_else_are_the_whole_branch() -> None:
    """What begins and ends with a product is proposed once."""
    assert ruled((SHARED,), parse_overlap("*=products")) == ((SHARED,), ())
    assert ruled((SHARED, SHARED_CORE), parse_overlap("*=products")) == ((SHARED_CORE,), ())
    one = Proposal(SHARED.kind, "products", SHARED_CORE.regions[:1], 9, True)
    demanded, _ = ruled((SHARED, one), parse_overlap("*=products"))
    assert [(part.span, [region.name for region in part.regions]) for part in demanded] == [
        ("whole", ["layers.1.shared"]),
        ("products", ["layers.0.shared"]),
    ]


@pytest.mark.parametrize("overlap", ["", "*=off", "layers.0.*=off"])
def test_a_variable_may_name_a_region_that_a_plan_leaves_out(
    model: Model, monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Races begin with a plan without regions."""

    def variable(name: str) -> None:
        settings = Settings(fusion_safe_regions=((name, "1"),))
        monkeypatch.setattr(compiler, "SETTINGS", settings)
        for module in (laying, fuse):
            monkeypatch.setattr(module, "fusion_safety", functools.partial(fusion_safety, settings=settings))

    variable("LAYERS_0_SHARED")
    fast = auxstream.compile(model, (torch.randn(4, WIDTH),), Options(overlap=overlap))
    assert fast.fusion is not None
    kept = {"": {"layers.0.shared": "1", "layers.1.shared": "0"}, "*=off": {}}.get(overlap, {"layers.1.shared": "0"})
    assert fast.fusion.safety == kept
    variable("LAYERS_9_SHARED")
    with pytest.warns(AuxstreamWarning, match="LAYERS_9_SHARED matches no branch of model, which has layers.0"):
        auxstream.compile(model, (torch.randn(4, WIDTH),), Options(overlap=overlap))


def test_a_misspelt_rule_is_said(model: Model) -> None:
    x = torch.randn(4, WIDTH)
    for overlap, safe in (("*=off,layer.0.*=on", ""), ("", "layer.0.*")):
        with pytest.warns(AuxstreamWarning, match=r"rule 'layer\.0\.\*' matches no branch of model, which has layers"):
            auxstream.compile(model, (x,), Options(overlap=overlap, fusion_safe=safe))
    with warnings.catch_warnings():
        warnings.simplefilter("error", AuxstreamWarning)
        alone = auxstream.compile(torch.nn.Linear(WIDTH, WIDTH), (x,), Options(fusion_safe="layers.*"))
        auxstream.compile(model, (x,), Options(overlap="layers.*.shared=on"))
    assert str(alone.choice) == "serial (no branches)"


def test_the_kill_switch_shows_in_the_choice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "SETTINGS", Settings(disable=True))
    fast = auxstream.compile(model, (torch.randn(4, WIDTH),))
    assert fast.choice.source == "rules; AUXSTREAM_DISABLE"


def test_where_nothing_is_measured_shared_experts_overlap() -> None:
    assert str(unmeasured((), (SHARED, SHARED_CORE, K)).plan) == "layers.*.shared (whole)"
    assert str(unmeasured((K,), ()).plan) == "layers.*.k (products)"


@pytest.mark.parametrize("text", ["=on", "layers.*=maybe", "layers.*.shared=1"])
def test_malformed_rules_are_refused(text: str) -> None:
    with pytest.raises(auxstream.AuxstreamError, match="malformed"):
        Options(overlap=text)


def test_options_reach_the_graph(model: Model) -> None:
    x = torch.randn(4, WIDTH)
    expected = model(x)
    for overlap, regions in (("", 2), ("*=off", 0), ("layers.1.*=off", 1)):
        fast = auxstream.compile(model, (x,), Options(overlap=overlap, mlir_elementwise_fusion=False))
        assert len(fast.regions) == regions == len(fast.choice.plan.regions)
        torch.testing.assert_close(fast(x), expected)


# --- races ----------------------------------------------------------------------------------------------------------


def by_price(price: Callable[[Plan], float]) -> policy.Race:
    def run(best: Plan, plan: Plan) -> Result:
        return Result(price(best), price(plan), price(plan) < price(best))

    return run


def kinds(plan: Plan) -> set[tuple[str, str]]:
    return {(part.kind.split(".")[-1], part.span) for part in plan.parts}


def test_only_what_wins_is_kept() -> None:
    gain = {("shared", "whole"): 5.0, ("shared", "products"): 7.0, ("k", "products"): -1.0, ("v", "products"): 2.0}
    choice = measured((), (SHARED, SHARED_CORE, K, V), by_price(lambda plan: 100 - sum(gain[k] for k in kinds(plan))))
    assert kinds(choice.plan) == {("shared", "products"), ("v", "products")}
    assert choice.source == "measured"
    assert choice.plan.order == "caller_first"
    assert [trial.result.won for trial in choice.trials if isinstance(trial.result, Result)] == [
        True, True, False, True, False,
    ]  # fmt: skip


def test_nothing_overlaps_where_nothing_wins() -> None:
    choice = measured((), (SHARED, SHARED_CORE, K), by_price(lambda plan: 100 + len(plan.parts)))
    assert choice.plan == Plan()
    assert str(choice.plan) == "serial"


def test_the_other_launch_order_is_tried_last() -> None:
    choice = measured((), (SHARED,), by_price(lambda plan: 100 - len(plan.parts) - (plan.order == "aux_first")))
    assert choice.plan.order == "aux_first"
    assert "branch first" in str(choice.trials[-1])


def test_what_rules_demand_stays_though_it_loses() -> None:
    choice = measured((K,), (SHARED,), by_price(lambda plan: 100 + len(plan.parts)))
    assert choice.plan.parts == (K,)


def test_a_plan_that_cannot_run_is_dropped_with_its_reason() -> None:
    choice = measured((), (SHARED,), lambda best, plan: "no memory left")
    assert choice.plan == Plan()
    assert "no memory left" in str(choice)


def test_of_two_branches_that_share_nodes_one_is_laid() -> None:
    other = Proposal("layers.*.gate", "products", (Region("layers.0.gate", SHARED.regions[0].nodes),), 1, False)
    plan = Plan((SHARED, other))
    assert [region.name for region in plan.regions] == ["layers.0.shared", "layers.1.shared"]
    tried = measured((SHARED,), (other,), by_price(lambda plan: -len(plan.parts))).trials
    assert [str(trial).split(":")[0] for trial in tried] == ["layers.*.shared (whole), branch first"]


@pytest.mark.parametrize(
    ("after", "won"),
    [
        ([0.9] * 12, True),
        ([0.998] * 12, False),  # within noise
        ([0.9] * 9 + [1.1] * 3, False),  # too many rounds lost
        ([1.1] * 12, False),
        ([1.0] * 12, False),
    ],
)
def test_a_draw_is_no_win(after: list[float], won: bool) -> None:
    assert judged([1.0] * 12, after).won is won


def test_a_race_leaves_what_it_wrote_as_it_was_and_keeps_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = torch.zeros(3)
    built: list[str] = []

    class Writes:
        def replay(self) -> None:
            cache.add_(1)

    def build(plan: Plan) -> Any:
        if K in plan.parts:
            raise auxstream.AuxstreamError("no such plan")
        if SHARED_CORE in plan.parts:
            raise torch.OutOfMemoryError("CUDA out of memory\nTried to allocate")
        built.append(str(plan))
        return Writes()

    def timed(one: Callable[[], object], other: Callable[[], object]) -> Result:
        one()
        other()
        return Result(2.0, 1.0, won=True)

    monkeypatch.setattr(race_module, "race", timed)
    racing = race_module.Racing(build, [cache], torch.device("cpu"))
    assert racing(Plan(), Plan((SHARED,))) == Result(2.0, 1.0, won=True)
    assert racing(Plan((SHARED,)), Plan((SHARED, V))) == Result(2.0, 1.0, won=True)
    assert racing(Plan((SHARED, V)), Plan((K,))) == "no such plan"
    assert not racing.starved
    assert racing(Plan((SHARED, V)), Plan((SHARED_CORE,))) == "CUDA out of memory"
    assert racing.starved
    assert cache.eq(0).all()
    assert built == [str(Plan()), str(Plan((SHARED,))), str(Plan((SHARED, V)))]  # the winner is not captured again


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_choice_is_remembered_and_fits_a_graph_traced_again(
    small: None, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    graphs = [trace(model, (torch.randn(4, WIDTH),)).graph_module for _ in range(2)]
    offered = [propose(gm) for gm in graphs]
    one, other = (key_of(gm, found, ("H200",)) for gm, found in zip(graphs, offered, strict=True))
    assert one == other != key_of(graphs[0], offered[0], ("H100",))
    wider = trace(model, (torch.randn(8, WIDTH),)).graph_module
    assert key_of(wider, propose(wider), ("H200",)) != one
    assert remembered(one, (), offered[0]) is None
    choice = measured((), offered[0], by_price(lambda plan: 100 - len(plan.parts) - (plan.order == "aux_first")))
    remember(one, (), choice)
    again = remembered(other, (), offered[1])
    assert again is not None
    assert again.source == "cached"
    assert again.plan == choice.plan
    assert remembered(other, (), offered[1][:1]) is None  # what it chose is not offered any more


def test_a_choice_made_under_other_rules_is_not_taken(
    small: None, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raced: list[int] = []

    def measured_here(demanded: Sequence[Proposal], left: Sequence[Proposal], race: object) -> Choice:
        raced.append(len(left))
        return Choice(Plan(tuple(demanded)), "measured")

    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(compiler, "measured", measured_here)
    racing = race_module.Racing(lambda plan: pytest.fail("nothing is built"), (), torch.device("cpu"))
    monkeypatch.setattr(compiler._Pipeline, "_racing", lambda *given: racing)
    static = StaticInputs((torch.randn(4, WIDTH),))
    traced = trace(model, static.args)

    def source() -> str:
        pipeline = compiler._Pipeline(Options(), torch.device("cuda"), "model", {}, ())
        return pipeline._choose(static, traced, Laying(traced, Options(), False, {})).source

    assert [source(), source()] == ["measured", "cached"]
    for settings in (Settings(overlap=(("layers.1.*", "off"),)), Settings(fusion_safe=(("*", "1"),))):
        monkeypatch.setattr(compiler, "SETTINGS", settings)
        assert [source(), source()] == ["measured", "cached"]
    assert len(raced) == 3
    racing.starved = True
    monkeypatch.setattr(compiler, "SETTINGS", Settings(overlap=(("layers.0.*", "off"),)))
    assert [source(), source()] == ["measured", "measured"]


def test_a_damaged_file_is_no_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    good = {"format": 1, "parts": [["layers.*.shared", "whole"]], "order": "caller_first"}
    damaged: list[Any] = [["no", "choice"], None, {}, {**good, "format": 0}, {**good, "order": "any"}]
    damaged += [{name: value for name, value in good.items() if name != missing} for missing in good]
    damaged += [{**good, "parts": parts} for parts in (None, 3, "ab", [3], [["layers.*.shared"]], [[{}, []]], [None])]
    for kept in damaged:
        store.write_choice("key", kept)
        assert remembered("key", (), (SHARED,)) is None, kept
    store.write_choice("key", good)
    assert remembered("key", (), (SHARED,)) == Choice(Plan((SHARED,)), "cached")


@pytest.mark.gpu
def test_on_a_gpu_the_faster_plan_is_compiled_and_remembered(tmp_path: Path) -> None:
    script = """
import torch, auxstream
from auxstream.capture.huggingface import DecodeStep, build, gemma4_config
step = DecodeStep(build(gemma4_config(2, "full"), "cuda"), 1, 64)
inputs = torch.zeros(1, 1, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
fast = auxstream.compile(step, inputs)
print(fast.choice)
assert all(not buffer.any() for state in step.caches() for buffer in state.values())
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "AUXSTREAM_CACHE_DIR": str(tmp_path)},
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert "(measured)" in outputs[0]
    assert " us against " in outputs[0]
    assert "(cached)" in outputs[1]
    assert outputs[0].splitlines()[0].replace("measured", "cached") == outputs[1].splitlines()[0]
