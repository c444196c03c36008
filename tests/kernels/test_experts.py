"""`auxstream::moe_experts`: each form against float64, written another way; what is refused; what is launched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from auxstream.kernels import experts_many as many
from auxstream.kernels import experts_plan, store
from auxstream.kernels.experts import moe_experts
from auxstream.kernels.experts_few import by_pair, row_class
from auxstream.kernels.experts_plan import Experts, Plan, default, down_tiles, form_of, run, tokens_of, up_tiles
from auxstream.kernels.experts_reference import reference
from auxstream.kernels.experts_work import Activation, Work
from auxstream.runtime.errors import CaptureError, InputError

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLACK = {BF16: 6e-3, F16: 8e-4, F32: 2e-6}
"""Of the largest output: activations are rounded once, and outputs once."""
ACTIVATIONS = (
    Activation(),
    Activation("gelu_tanh"),
    Activation("gelu"),
    Activation("silu", limit=1.0),
    Activation("silu", alpha=1.702, limit=0.7, shift=1.0),
    Activation("relu2", gated=False),
    Activation("silu", gated=False),
)


def call(
    tokens: int = 5, experts: int = 6, choices: int = 2, hidden: int = 40, inner: int = 24, dtype: torch.dtype = BF16,
    activation: Activation = ACTIVATIONS[0], biased: bool = False, interleaved: bool = False, transposed: bool = False,
    seed: int = 0,
) -> Work:  # fmt: skip
    """A call with random numbers, on the machine's own device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    outputs = inner * (2 if activation.gated else 1)
    up, down = normal(experts, outputs, hidden, scale=hidden**-0.5), normal(experts, hidden, inner, scale=inner**-0.5)
    if transposed:
        up, down = up.mT.contiguous().mT, down.mT.contiguous().mT
    chosen = torch.rand(tokens, experts, generator=generator).topk(choices).indices.to(DEVICE)
    scale = torch.rand(tokens, choices, generator=generator).to(DEVICE)
    biases = (normal(experts, outputs), normal(experts, hidden)) if biased else (None, None)
    return Work(normal(tokens, hidden), chosen, scale, up, down, *biases, activation, interleaved)


def exact(work: Work) -> Tensor:
    """The layer in float64: token by token, choice by choice, number by number where it is not a product."""
    act, out = work.activation, torch.zeros(work.hidden.shape, dtype=torch.float64)
    x, chosen, scale, up, down = (t.cpu() for t in (work.hidden, work.chosen, work.scale, work.up, work.down))
    for token, choice in itertools.product(range(work.tokens), range(work.choices)):
        expert = int(chosen[token, choice])
        rows = up[expert].double() @ x[token].double()
        if work.up_bias is not None:
            rows += work.up_bias[expert].double().cpu()
        gates, ups = rows.tolist(), [None] * work.inner
        if act.gated:
            turns = rows.view(-1, 2).T if work.interleaved else rows.view(2, -1)
            gates, ups = turns.tolist()
        inner = torch.tensor([activated(g, u, act) for g, u in zip(gates, ups, strict=True)], dtype=torch.float64)
        values = down[expert].double() @ inner
        if work.down_bias is not None:
            values += work.down_bias[expert].double().cpu()
        out[token] += values * float(scale[token, choice])
    return out


def activated(gate: float, up: float | None, act: Activation) -> float:
    if act.limit is not None:
        gate = min(gate, act.limit)
    value = {
        "silu": lambda: gate / (1 + math.exp(-act.alpha * gate)),
        "gelu": lambda: gate * 0.5 * (1 + math.erf(gate / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))),
        "relu2": lambda: max(gate, 0.0) ** 2,
    }[act.name]()
    if up is None:
        return value
    if act.limit is not None:
        up = max(-act.limit, min(up, act.limit))
    return value * (up + act.shift)


def close(found: Tensor, work: Work, slack: float = 1.0) -> bool:
    expected = exact(work)
    error = float((found.double().cpu() - expected).abs().max())
    return error <= slack * SLACK[work.hidden.dtype] * float(expected.abs().max())


def plan_of(work: Work, form: Any) -> Plan:
    return Plan(form, up_tiles(work, form)[0], down_tiles(work, form)[0], tokens_of(work))


FORMS: dict[str, tuple[int, Callable[[Work], Tensor]]] = {
    "one": (1, lambda work: run(work, plan_of(work, "one"))),
    "few": (5, lambda work: run(work, plan_of(work, "few"))),
    "few for one": (1, lambda work: run(work, plan_of(work, "few"))),
    "few by pair": (3, lambda work: run(work, plan_of(work, "few"))),
    "many": (18, lambda work: run(work, plan_of(work, "many"))),
    "reference": (5, reference),
}


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_a_form_computes_the_layer(form: str, dtype: torch.dtype) -> None:
    tokens, form_run = FORMS[form]
    work = call(tokens, dtype=dtype, biased=dtype is F32)
    assert close(form_run(work), work)


@pytest.mark.parametrize("form", ["one", "few", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.name}-{a.gated}-{a.limit}")
def test_every_activation(form: str, activation: Activation) -> None:
    tokens, form_run = FORMS[form]
    work = call(tokens, dtype=F32, activation=activation, biased=activation.limit is not None)
    assert close(form_run(work), work)
    changed = replace(work, activation=replace(activation, name="gelu" if activation.name != "gelu" else "silu"))
    assert not close(form_run(changed), work)


@pytest.mark.parametrize("form", ["one", "few", "many", "reference"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_layout(form: str, interleaved: bool, transposed: bool) -> None:
    if form == "one" and transposed:
        form = "few for one"  # the form for one reads rows
    tokens, form_run = FORMS[form]
    work = call(tokens, dtype=F32, biased=True, interleaved=interleaved, transposed=transposed)
    assert close(form_run(work), work)
    assert not close(form_run(replace(work, interleaved=not interleaved)), work)


@pytest.mark.parametrize("form", ["few", "many", "reference"])
def test_all_tokens_may_choose_one_expert(form: str) -> None:
    tokens, form_run = FORMS[form]
    work = call(tokens, choices=1)
    work = replace(work, chosen=torch.full_like(work.chosen, 4))
    assert close(form_run(work), work)


@pytest.mark.parametrize("form", ["one", "few", "few by pair", "many", "reference"])
def test_a_token_may_choose_an_expert_twice(form: str) -> None:
    tokens, form_run = FORMS[form]
    work = call(tokens, choices=3)
    work.chosen[0] = torch.tensor([5, 2, 5])
    assert close(form_run(work), work)


@pytest.mark.parametrize("form", ["one", "few", "few by pair", "many", "reference"])
def test_experts_nobody_chose_are_not_read(form: str) -> None:
    tokens, form_run = FORMS[form]
    work = call(tokens)
    work.chosen.clamp_(max=3)
    for weight in (work.up, work.down):
        weight[4:] = torch.nan
    found = form_run(work)
    assert found.isfinite().all()
    work.chosen[0, 0] = 4  # they would be seen
    assert not form_run(work)[0].isfinite().any()


@pytest.mark.parametrize("form", ["few", "many"])
def test_what_is_not_finite_stays_in_its_token(form: str) -> None:
    tokens, form_run = FORMS[form]
    work = call(tokens, activation=Activation(limit=1.0))
    expected = form_run(work)
    work.hidden[1] = torch.nan
    found = form_run(work)
    assert found[1].isnan().all()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2:], expected[2:])


@pytest.mark.parametrize("form", ["few", "many"])
def test_a_token_has_the_same_bits_in_any_company(form: str) -> None:
    """Within a class of numbers of tokens, and every time: one kernel, and sums in one order."""
    tokens, form_run = FORMS[form]
    work = call(tokens)
    found = form_run(work)
    assert torch.equal(found, form_run(work))
    most = row_class(tokens)
    assert most > tokens
    others = call(most, seed=1)
    hidden, chosen, scale = (torch.cat([a, b[tokens:]]) for a, b in (
        (work.hidden, others.hidden), (work.chosen, others.chosen), (work.scale, others.scale)))  # fmt: skip
    together = replace(work, hidden=hidden, chosen=chosen, scale=scale)
    assert by_pair(together) == by_pair(work)
    assert torch.equal(form_run(together)[:tokens], found)


def test_rows_of_hidden_states_may_lie_apart() -> None:
    work = call(5)
    wide = torch.cat([work.hidden, work.hidden], 1)[:, :40]
    assert wide.stride() == (80, 1)
    assert torch.equal(run(replace(work, hidden=wide), plan_of(work, "few")), run(work, plan_of(work, "few")))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.name}-{a.gated}-{a.limit}")
def test_torchs_grouped_product(activation: Activation) -> None:
    """It rounds what it adds up, as models do."""
    work = call(40, hidden=64, inner=32, activation=activation, biased=True, interleaved=activation.shift != 0)
    assert many.groupable(work)
    assert close(run(work, Plan("grouped")), work, slack=2)
    assert not close(run(replace(work, up_bias=None), Plan("grouped")), work, slack=2)


# --- which form -------------------------------------------------------------------------------------------------------


def test_the_form_follows_the_number_of_tokens() -> None:
    big = call(4, 16, 4, dtype=BF16)
    found = {}
    for tokens in (1, 2, 32, 33, 1024, 1025):
        chosen = torch.zeros(tokens, 4, dtype=torch.int64, device="meta")
        hidden = torch.empty(tokens, 40, dtype=BF16, device="meta")
        found[tokens] = form_of(replace(big, hidden=hidden, chosen=chosen))
    assert found == {1: "one", 2: "few", 32: "few", 33: "many", 1024: "many", 1025: "grouped"}
    assert form_of(call(1, transposed=True)) == "few"


def test_float32_is_never_left_to_torch_and_cut_where_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "MOST_PAIRS", 80)
    work = call(100, dtype=F32)
    assert not many.groupable(work)
    seen: list[int] = []
    before = experts_plan.run
    monkeypatch.setattr(experts_plan, "run", lambda part, plan: seen.append(part.tokens) or before(part, plan))
    assert close(Experts()(work), work)
    assert seen == [40, 40, 20]


def test_tiles_leave_room_for_other_programs() -> None:
    for tokens, dtype in itertools.product((1, 8, 32, 128, 512), (BF16, F32)):
        work = call(tokens, 16, 4, 512, 16, dtype)
        form = default(work).form
        tiles = up_tiles(work, form) + down_tiles(work, form)
        assert 2 <= len(tiles) <= 8
        for tile in tiles if form != "one" else ():
            assert tile.rows * tile.cols * work.hidden.element_size() * (tile.stages - 1) <= 96 * 1024


def test_no_tokens_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_plan, "run", None)
    for found in (Experts()(call(0)), op(call(0))):
        assert found.shape == (0, 40)
        assert found.dtype == BF16


# --- the op -----------------------------------------------------------------------------------------------------------


def arguments(work: Work, transposed: bool = False, checked: bool = False) -> list[Any]:
    act, up, down = work.activation, work.up, work.down
    if transposed:
        up, down = up.mT, down.mT
    return [
        work.hidden, work.chosen, work.scale, up, down, work.up_bias, work.down_bias, act.name, act.gated, act.alpha,
        act.limit, act.shift, work.interleaved, transposed, checked,
    ]  # fmt: skip


def op(work: Work, **how: bool) -> Tensor:
    return moe_experts()(*arguments(work, **how))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_op(tokens: int, transposed: bool) -> None:
    work = call(tokens, hidden=48, transposed=transposed, biased=True, activation=ACTIVATIONS[4])
    assert close(op(work, transposed=transposed), work)


def test_the_ops_schema_and_shapes() -> None:
    work = call(5, biased=True, activation=ACTIVATIONS[4])
    torch.library.opcheck(moe_experts(), tuple(arguments(work)), test_utils=("test_schema", "test_faketensor"))


BAD: dict[str, tuple[Callable[[Work], Work], str]] = {
    "flat hidden states": (lambda w: replace(w, hidden=w.hidden[0]), "tensors of 1, 2, 2, 3, 3 dimensions"),
    "one expert's weight": (lambda w: replace(w, up=w.up[0]), "tensors of 2, 2, 2, 2, 3 dimensions"),
    "another width": (lambda w: replace(w, up=w.up[:, :, :-1]), r"first weight .*\(6, 48, 39\) where \(6, 48, 40\)"),
    "an odd number of outputs": (lambda w: replace(w, up=w.up[:, :-1]), r"\(6, 47, 40\) where \(6, 48, 40\)"),
    "fewer experts below": (lambda w: replace(w, down=w.down[:5]), r"second weight .*\(5, 40, 24\)"),
    "no experts": (lambda w: replace(w, up=w.up[:0], down=w.down[:0]), "0 experts"),
    "more tokens than choices": (lambda w: replace(w, chosen=w.chosen[:3]), "choices of"),
    "weights of other choices": (lambda w: replace(w, scale=w.scale[:, :1]), "weights of the choices"),
    "no choices": (lambda w: replace(w, chosen=w.chosen[:, :0], scale=w.scale[:, :0]), "0 choices"),
    "too many choices": (
        lambda w: replace(w, chosen=w.chosen.repeat(1, 33), scale=w.scale.repeat(1, 33)), "66 choices",
    ),
    "choices that are no integers": (lambda w: replace(w, chosen=w.chosen.float()), "choices in torch.float32"),
    "weights of another type": (lambda w: replace(w, up=w.up.half()), "torch.bfloat16 and weights in torch.float16"),
    "quantised weights": (lambda w: replace(w, down=w.down.to(torch.float8_e4m3fn)), "float8"),
    "a bias of another shape": (lambda w: replace(w, up_bias=w.up[:, 0]), "first bias"),
    "an unknown activation": (lambda w: replace(w, activation=Activation("tanh")), "name='tanh'"),
    "a sharper gelu": (lambda w: replace(w, activation=Activation("gelu", alpha=2.0)), "alpha=2.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_no_form_does_is_refused(name: str) -> None:
    change, came = BAD[name]
    work = change(call(5))
    with pytest.raises(InputError, match=came) as error:
        op(work)
    assert "own experts" in error.value.remedy
    with pytest.raises(InputError, match=came), torch.device("meta"):
        op(replace(work, **{n: getattr(work, n).to("meta") for n in ("hidden", "chosen", "scale", "up", "down")}))


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion that fails on a GPU ends the process' use of it")
def test_indices_are_checked_if_asked_to() -> None:
    work = call(5)
    assert torch.equal(op(work, checked=True), op(work))
    for index in (-1, 6):
        work.chosen[2, 1] = index
        with pytest.raises(InputError, match=f"index outside the experts[^$]*{index}"):
            op(work, checked=True)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is remembered, kept here and not on disk."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(store, "read_choice", kept.get)
    monkeypatch.setattr(store, "write_choice", kept.__setitem__)
    return kept


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "expected"), [(1, 2), (8, 2), (64, 3)])
def test_tiles_are_timed_once_for_a_class(tokens: int, expected: int, choices: dict[str, Any]) -> None:
    work = call(tokens, 32, 4, 256, 128)
    experts = Experts()
    found = experts(work)
    assert close(found, work)
    assert len(choices) == expected
    before = dict(choices)
    assert torch.equal(experts(work), found)
    assert torch.equal(Experts()(work), found)  # another process would read them
    assert choices == before


@pytest.mark.gpu
def test_a_class_that_is_new_to_a_capture_is_refused() -> None:
    graph, work = torch.cuda.CUDAGraph(), call(3, 32, 4, 256, 128)
    with pytest.raises(CaptureError, match="inside a capture"), torch.cuda.graph(graph):
        Experts()(work)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 100])
def test_a_replay_follows_its_inputs(tokens: int) -> None:
    """Other choices, other weights, other tokens: nothing of the capture's own values stays."""
    work, other = call(tokens, 32, 4, 256, 128), call(tokens, 32, 4, 256, 128, seed=1)
    experts = Experts()
    experts(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(work)
    for field in ("hidden", "chosen", "scale"):
        getattr(work, field).copy_(getattr(other, field))
    graph.replay()
    assert close(out, work)
    assert torch.equal(out, experts(work))


@pytest.mark.gpu
def test_numbers_of_tokens_of_one_class_need_one_warm_up() -> None:
    experts = Experts()
    experts(call(16, 64, 4, 256, 128))
    work, graph = call(7, 64, 4, 256, 128), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(work)
    graph.replay()
    assert close(out, work)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 32, 128, 600])
def test_a_layer_of_gemma4_against_the_grouped_product(tokens: int) -> None:
    """No further from float64 than 1.1 times what the model's own rounding is."""
    work = call(tokens, 128, 8, 2816, 704, activation=Activation("gelu_tanh"))
    expected = reference(work, torch.float64, rounds=False)
    own = (run(work, Plan("grouped")).double() - expected).norm()
    assert (Experts()(work).double() - expected).norm() <= 1.1 * own
