"""The router's kernels against torch, float64 and the models' own modules: choices, weights, ties, and what is odd.

On a GPU the kernels run there; else in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from router_cases import BF16, CASES, F32, GEMMA, SIGMOID, SOFTMAX, Case, run, truth, weights_of
from torch import Tensor

from auxstream.kernels.router import Router, Rules, Tensors, moe_router, reference, refusal
from auxstream.kernels.router_plan import Plan, plan
from auxstream.runtime.errors import AuxstreamError, CaptureError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOISE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}
"""Of a score, relative to the largest logit: a few roundings."""


def kernels(given: Tensors, rules: Rules) -> tuple[Tensor, Tensor]:
    return Router()(given, rules)


def differing(found: Tensor, given: Tensors, rules: Rules) -> list[int]:
    """Tokens whose chosen experts are not those of float64 though noise cannot be why."""
    choice, allowed, scores = truth(given, rules)
    assert all(len(set(row)) == rules.top_k for row in found.tolist())
    assert int(found.min()) >= 0
    assert int(found.max()) < scores.shape[1]
    noise = NOISE[rules.product] * (scores if rules.softmax else torch.ones_like(scores)).amax(-1)
    wrong = []
    for token, row in enumerate(found.tolist()):
        order = choice[token].masked_fill(~allowed[token], -math.inf).sort(descending=True)
        inside = order.values[: rules.top_k].min()
        outside = order.values[rules.top_k :].max() if rules.top_k < scores.shape[1] else -math.inf
        if set(row) != set(order.indices[: rules.top_k].tolist()) and inside - outside > noise[token]:
            wrong.append(token)
    return wrong


def error(index: Tensor, weights: Tensor, given: Tensors, rules: Rules) -> float:
    """Of the weights, given the experts, relative."""
    exact = weights_of(index, truth(given, rules)[2], given, rules)
    return float((weights.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", [case for case in CASES if case.tokens], ids=lambda case: case.name)
def test_kernels_choose_and_weigh_as_float64_does(case: Case) -> None:
    """No further from it than the model's own ops are, on as many tokens as it takes to tell."""
    given = case.given(DEVICE)
    index, weights = kernels(given, case.rules)
    assert index.dtype is torch.int64
    assert weights.dtype is case.rules.out
    assert index.shape == weights.shape == (case.tokens, case.rules.top_k)
    wrong = differing(index, given, case.rules)
    assert len(wrong) <= (len(index) // 20 if case.rules.groups > 1 else 0), wrong  # a group may be lost by a hair
    eager = error(*reference(given, case.rules), given, case.rules)
    # Few weights: the two errors are samples of the same distribution, of which one may be lucky.
    lucky = 1.1 if weights.numel() >= 200 else 2.0
    assert error(index, weights, given, case.rules) <= lucky * eager + 2**-22


def test_the_gate_sees_another_choice_and_another_weight() -> None:
    """What the test above is to find, planted."""
    case = next(case for case in CASES if case.name == "deepseek_v3 many")
    case = replace(case, tokens=50, width=64)
    given = case.given(DEVICE)
    index, weights = kernels(given, case.rules)
    eager = error(*reference(given, case.rules), given, case.rules)
    assert error(index, weights.bfloat16(), given, case.rules) > 1.1 * eager + 2**-22
    assert error(index, weights.roll(1, 1), given, case.rules) > 1.1 * eager + 2**-22
    ungrouped, _ = kernels(given, replace(case.rules, groups=1, kept=1))
    assert len(differing(ungrouped, given, case.rules)) > len(index) // 20
    unbiased, _ = kernels(replace(given, bias=None), case.rules)
    assert len(differing(unbiased, given, case.rules)) > len(index) // 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_chooses_and_weighs_as_float64_does(case: Case) -> None:
    given = case.given()
    index, weights = reference(given, case.rules)
    if case.tokens:
        assert len(differing(index, given, case.rules)) <= len(index) // 20
        assert error(index, weights, given, case.rules) < 4 * NOISE[case.rules.product]
    assert (index.shape, index.dtype) == ((case.tokens, case.rules.top_k), torch.int64)
    assert weights.dtype is case.rules.out


# --- plans ------------------------------------------------------------------------------------------------------------

PLANS = (
    Plan(False, 4, 1, 64, 64, 1),
    Plan(False, 16, 4, 96, 128, 4),
    Plan(False, 2, 8, 192, 256, 2),
    Plan(True, 16, 16, 192, 64, 4, 3),
    Plan(True, 32, 32, 128, 128, 8),
    Plan(True, 64, 64, 64, 64, 4, select_warps=4),
)


@pytest.mark.parametrize("cut", PLANS, ids=str)
@pytest.mark.parametrize("name", ["gemma4 odd", "deepseek_v3 many", "gemma4 float32 many"])
def test_every_plan_computes_the_same(name: str, cut: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(next(case for case in CASES if case.name == name), tokens=3, experts=24, width=200)
    given = case.given(DEVICE)
    usual, monkeyed = kernels(given, case.rules), "auxstream.kernels.router.plan"
    monkeypatch.setattr(monkeyed, lambda *shape: cut)
    index, weights = kernels(given, case.rules)
    assert not differing(index, given, case.rules)
    same = (index == usual[0]).all(1)
    assert same.float().mean() > 0.5
    torch.testing.assert_close(weights[same], usual[1][same], rtol=0.02 if case.scaled else 1e-5, atol=0)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 17, 33, 64, 65, 1000, 8192])
@pytest.mark.parametrize(("experts", "width"), [(8, 64), (60, 2048), (128, 2816), (256, 7168), (384, 7168), (128, 100)])
@pytest.mark.parametrize("operands", ["half", "split", "wide"])
def test_plans_fit(tokens: int, experts: int, width: int, operands: Any) -> None:
    """Tiles are powers of two that tensor cores take, columns are all covered, and parts stay small."""
    cut = plan(tokens, experts, width, operands)
    for size in (cut.block_e, cut.block_t, cut.block_k, cut.warps, cut.select_warps):
        assert size & (size - 1) == 0
    assert cut.splits(width) * cut.span >= width > (cut.splits(width) - 1) * cut.span
    if cut.many:
        assert min(cut.block_e, cut.block_t, cut.block_k) >= 16
    else:
        assert cut.block_k >= cut.span
    assert cut.splits(width) * tokens * experts * 4 <= 4 << 20 or cut.splits(width) == 1
    item = 2 if operands == "half" else 4
    assert cut.stages * cut.block_k * (cut.block_t + cut.block_e) * item <= 200 << 10  # shared memory


# --- ties and odd values ----------------------------------------------------------------------------------------------


def equal_rows(rules: Rules, experts: int, groups_of_equals: int, tokens: int = 3) -> Tensors:
    """Experts whose weights are the same, exactly, so that their scores are."""
    width = 32
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-3, 4, (groups_of_equals, width), generator=generator)
    weight = rows[torch.arange(experts) % groups_of_equals].to(DEVICE, torch.bfloat16) / 8
    hidden = torch.randint(-2, 3, (tokens, width), generator=generator).to(DEVICE, torch.bfloat16)
    return Tensors(hidden, weight, None, None, None)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("rules", [SOFTMAX, replace(SOFTMAX, product=F32), SIGMOID, replace(SIGMOID, groups=4, kept=2)])
def test_of_equals_the_lowest_index_comes_first(rules: Rules, tokens: int) -> None:
    given = equal_rows(rules, 32, 3, tokens)
    index, _ = kernels(given, rules)
    assert torch.equal(index, reference(given, rules)[0])
    alike, _ = kernels(equal_rows(rules, 32, 1, tokens), rules)
    assert alike.tolist() == [list(range(rules.top_k))] * tokens


@pytest.mark.parametrize("rules", [SOFTMAX, replace(SOFTMAX, product=F32), SIGMOID, replace(SIGMOID, groups=4, kept=2)])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias"])
def test_choices_are_experts_whatever_the_scores_are(rules: Rules, value: float, where: str) -> None:
    """Experts index memory by them: each is one, and none comes twice."""
    case = Case("odd", 3, 24, 40, rules, biased=not rules.softmax)
    given = case.given(DEVICE)
    if where == "hidden":
        given.hidden[1, 3] = value
    elif where == "weight":
        given.weight[5] = value
    elif given.bias is not None:
        given.bias[7] = value
    index, _ = kernels(given, rules)
    assert int(index.min()) >= 0
    assert int(index.max()) < 24
    assert all(len(set(row)) == rules.top_k for row in index.tolist())
    if where == "hidden":  # the others are as if alone
        clean = replace(given, hidden=given.hidden[[0, 2]])
        assert torch.equal(index[[0, 2]], kernels(clean, rules)[0])


def test_nan_is_the_largest_as_for_topk() -> None:
    case = Case("nan", 1, 16, 40, SIGMOID, biased=True)
    given = case.given(DEVICE)
    assert given.bias is not None
    given.bias[9] = math.nan
    assert kernels(given, SIGMOID)[0][0, 0] == 9


# --- layouts, and what is refused -------------------------------------------------------------------------------------


def test_no_tokens() -> None:
    case = next(case for case in CASES if not case.tokens)
    index, weights = kernels(case.given(DEVICE), case.rules)
    assert index.shape == weights.shape == (0, 4)


@pytest.mark.parametrize("tokens", [3, 20])
def test_rows_may_lie_apart_and_columns_too(tokens: int) -> None:
    case = Case("strided", tokens, 16, 48, GEMMA, scaled=True)
    given = case.given(DEVICE)
    usual = kernels(given, GEMMA)
    wide = torch.empty(tokens, 64, dtype=BF16, device=DEVICE)
    wide[:, 3:51] = given.hidden
    tall = torch.empty(16, 64, dtype=BF16, device=DEVICE)
    tall[:, 7:55] = given.weight
    apart = replace(given, hidden=wide[:, 3:51], weight=tall[:, 7:55])
    turned = replace(given, hidden=given.hidden.T.contiguous().T, weight=given.weight.T.contiguous().T)
    for other in (apart, turned):
        assert all(map(torch.equal, usual, kernels(other, GEMMA)))


def changed(**fields: Any) -> tuple[Tensors, Rules]:
    given = Case("refused", 2, 16, 48, SIGMOID, BF16, F32, biased=True).given()
    tensors = {name: value for name, value in fields.items() if hasattr(given, name)}
    return replace(given, **tensors), replace(SIGMOID, **{k: v for k, v in fields.items() if k not in tensors})


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hidden": torch.zeros(2, 3, 48)}, "not \\[T, H\\]"),
        ({"hidden": torch.zeros(2, 40)}, "not \\[T, H\\]"),
        ({"weight": torch.zeros(16, 48, dtype=torch.float64)}, "float64"),
        ({"weight": torch.zeros(16, 48, dtype=torch.int8)}, "int8"),
        ({"bias": torch.zeros(15)}, "\\(15,\\)"),
        ({"scale": torch.zeros(1)}, "\\(1,\\)"),
        ({"top_k": 17}, "17 of 16 experts"),
        ({"top_k": 0}, "0 of 16 experts"),
        ({"groups": 3}, "3 groups"),
        ({"groups": 4, "kept": 5}, "5 of 4 groups"),
        ({"groups": 16}, "16 groups"),
        ({"product": torch.bfloat16}, "a product in torch.bfloat16"),
        ({"out": torch.float64}, "float64"),
    ],
)
def test_what_no_kernel_does_is_refused_with_the_reason(fields: dict[str, Any], why: str) -> None:
    given, rules = changed(**fields)
    with pytest.raises(AuxstreamError, match=why):
        Router()(given, rules)


def test_what_is_not_odd_is_not_refused() -> None:
    given, rules = changed()
    assert not refusal(given, rules)
    given, rules = changed(groups=4, kept=2, bias=None, top_k=16)
    assert not refusal(given, rules)


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma4 three tokens", "deepseek_v3 many", "qwen2_moe", "no tokens"])
def test_the_op_keeps_its_word(name: str) -> None:
    """Its schema, and what it says of its results before it runs."""
    case = next(case for case in CASES if case.name == name)
    given = case.given()
    torch.library.opcheck(
        moe_router(), (*given.all(), *case.rules.fields), test_utils=("test_schema", "test_faketensor")
    )


def test_the_op_on_the_cpu_is_the_reference() -> None:
    case = CASES[2]
    given = case.given()
    assert all(map(torch.equal, run(given, case.rules), reference(given, case.rules)))


# --- the models' own modules ------------------------------------------------------------------------------------------


def module_of(name: str) -> tuple[Any, Rules, dict[str, str]]:
    """A router of transformers with random weights, its rules, and which of its tensors is which."""
    models = pytest.importorskip("transformers").models
    common = {"hidden_size": 64, "num_experts_per_tok": 4}
    match name:
        case "gemma4":
            config = models.gemma4.Gemma4TextConfig(hidden_size=64, num_experts=32, top_k_experts=4, rms_norm_eps=1e-6)
            module = models.gemma4.modeling_gemma4.Gemma4TextRouter(config)
            names = {"weight": "proj.weight", "scale": "scale", "expert_scale": "per_expert_scale"}
            return module, replace(SOFTMAX, eps=1e-6, factor=64**-0.5, renormalised=True), names
        case "qwen2_moe":
            config = models.qwen2_moe.Qwen2MoeConfig(**common, num_experts=32, norm_topk_prob=True)
            module = models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeTopKRouter(config)
            return module, replace(SOFTMAX, renormalised=True, out=BF16), {"weight": "weight"}
        case "deepseek_v3":
            config = models.deepseek_v3.DeepseekV3Config(**common, n_routed_experts=32, n_group=4, topk_group=2)
            module = models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter(config)
            rules = replace(SIGMOID, groups=4, kept=2)
        case _:
            config = models.glm4_moe.Glm4MoeConfig(**common, n_routed_experts=32, n_group=1, topk_group=1)
            module = models.glm4_moe.modeling_glm4_moe.Glm4MoeTopkRouter(config)
            rules = replace(SIGMOID, routed_scale=config.routed_scaling_factor)
    return module, rules, {"weight": "weight", "bias": "e_score_correction_bias"}


@pytest.mark.parametrize("name", ["gemma4", "qwen2_moe", "deepseek_v3", "glm4_moe"])
def test_the_op_is_the_models_own_router(name: str) -> None:
    module, rules, names = module_of(name)
    module = module.to(DEVICE, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8 + (tensor.dim() == 1))
    hidden = torch.randn(50, 64, generator=generator).to(DEVICE, torch.bfloat16) * 3
    _, weights, index = module(hidden)
    given = Tensors(hidden, *(tensors.get(names.get(part, "")) for part in ("weight", "scale", "bias", "expert_scale")))
    found = run(given, rules)
    assert found[1].dtype == weights.dtype

    def dense(index: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(50, 32, device=DEVICE).scatter(1, index, weights.float())

    own, ours = dense(index, weights.detach()), dense(found[0], found[1].detach())
    alike = ((own > 0) == (ours > 0)).all(1)
    assert alike.float().mean() > 0.8  # the logits of the others are equal in bfloat16
    torch.testing.assert_close(ours[alike], own[alike], rtol=1e-6 if DEVICE == "cpu" else 0.02, atol=0)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 8, 32, 64, 300])
@pytest.mark.parametrize("name", ["gemma4", "deepseek_v3"])
def test_the_same_bits_every_time(name: str, tokens: int) -> None:
    rules = replace(GEMMA, top_k=8) if name == "gemma4" else replace(SIGMOID, top_k=8, groups=8, kept=4)
    sizes = (128, 2816) if name == "gemma4" else (256, 7168)
    weight = BF16 if name == "gemma4" else F32
    case = Case(name, tokens, *sizes, rules, weight=weight, scaled=name == "gemma4", biased=name != "gemma4")
    given, router = case.given("cuda"), Router()
    first = router(given, rules)
    assert len(differing(first[0], given, rules)) <= tokens // 20
    eager = error(*reference(given, rules), given, rules)
    # Tensor cores add float32 with fewer bits than the rest: 5.4e-7 at 300 tokens, where eager is off by 7.4e-8.
    rounding = 2**-20 if weight is F32 and tokens >= 32 else 2**-22
    assert error(*first, given, rules) <= (1.1 if tokens >= 32 else 2.0) * eager + rounding
    for _ in range(20):
        assert all(map(torch.equal, first, router(given, rules)))


@pytest.mark.gpu
def test_graphs_on_two_streams_do_not_meet() -> None:
    """Each has a workspace of its own: replayed beside one another, both say what they say alone."""
    case = Case("gemma4", 1, 128, 2816, replace(GEMMA, top_k=8), scaled=True)
    router, both = Router(), [case.given("cuda", seed) for seed in (0, 1)]
    alone = [router(given, case.rules) for given in both]
    streams, graphs, found = [torch.cuda.Stream() for _ in both], [], []
    for given, stream in zip(both, streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found.append([router(given, case.rules) for _ in range(50)])
        graphs.append(graph)
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for expected, results in zip(alone, found, strict=True):
        for result in results:
            assert all(map(torch.equal, expected, result))


@pytest.mark.gpu
def test_a_layout_that_is_new_to_a_capture_is_refused() -> None:
    case = Case("new", 3, 128, 256, GEMMA, scaled=True)
    given, graph = case.given("cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError, match="new input layout"), torch.cuda.graph(graph):
        Router()(given, case.rules)
