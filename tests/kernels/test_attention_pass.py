"""Attention of one query per row in traced models: what becomes one op, what stays as it was and why, and what the
rest of the pipeline makes of the op."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, NAMES, decode_step, inputs
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.functional import dropout, scaled_dot_product_attention

import auxstream
from auxstream.capture.branches import candidates
from auxstream.capture.costs import cost_of
from auxstream.capture.mark import find_shared_experts
from auxstream.capture.proposals import propose
from auxstream.capture.rows import find_mixing
from auxstream.capture.split_ops import splits_at
from auxstream.capture.trace import TracedGraph, trace
from auxstream.kernels import attention_pass, fuse_elementwise
from auxstream.kernels.attention import Work, decode_attention
from auxstream.kernels.attention_choice import Choice
from auxstream.kernels.attention_pass import fuse_decode_attention
from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.routing import Weights

pytestmark = pytest.mark.usefixtures("by_torch")
aten = torch.ops.aten
BATCH = 3


def always(choice: Choice) -> Callable[[Work], Choice]:
    return lambda work: choice


def calls(gm: GraphModule, target: Any) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def ours(gm: GraphModule) -> list[Node]:
    return calls(gm, decode_attention())


def sites(gm: GraphModule, choice: Choice = "own") -> list[str]:
    """What becomes of each attention."""
    return [f"{site.choice} {site.reason}".strip() for site in fuse_decode_attention(gm, always(choice)).sites]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# --- models -----------------------------------------------------------------------------------------------------------


@functools.cache
def _eager() -> TracedGraph:
    """Attention by hand, with a softcap."""
    transformers = pytest.importorskip("transformers")
    from auxstream.capture.huggingface import DecodeStep, build

    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=2, max_position_embeddings=64, attn_implementation="eager", attn_logit_softcapping=3.0,
    )  # fmt: skip
    return trace(DecodeStep(build(config), BATCH, CONTEXT), inputs(BATCH))


def graph_of(name: str) -> GraphModule:
    found = copy.deepcopy(_eager()) if name == "eager" else decode_step(name, batch=BATCH, marked=False)
    return found.graph_module


def logits(gm: GraphModule) -> Tensor:
    """Of three positions, one behind the other."""
    with torch.no_grad():
        outs = [torch.utils._pytree.tree_leaves(gm(*inputs(BATCH, position)))[0] for position in range(3)]
    return torch.stack(outs)


@pytest.mark.parametrize("name", [*NAMES, "eager"])
def test_a_model_says_the_same(name: str) -> None:
    gm, twin, wrong = (graph_of(name) for _ in range(3))
    before = len(gm.graph.nodes)
    assert sites(gm) == ["own", "own"]
    gm.graph.lint()
    assert len(gm.graph.nodes) < before or name == "deepseek_v3"  # whose heads share no keys
    assert not calls(gm, aten.scaled_dot_product_attention.default)
    assert not calls(gm, aten.softmax.int) or name != "eager"
    expected = logits(twin)
    assert error(logits(gm), expected) < 0.02
    fuse_decode_attention(wrong, always("own"))
    for node in ours(wrong):
        node.args = (*node.args[:4], 8.0 * node.args[4], *node.args[5:])  # type: ignore[operator]
    wrong.recompile()
    assert error(logits(wrong), expected) > 0.02, "the gate sees nothing"


@pytest.mark.parametrize("name", ["gemma4", "qwen2_moe", "eager"])
def test_caches_are_read_as_they_lie(name: str) -> None:
    """No copy between what writes a cache and what attends to it."""
    gm = graph_of(name)
    fuse_decode_attention(gm, always("own"))
    for node in ours(gm):
        for cache in node.args[1:3]:
            assert isinstance(cache, Node)
            assert cache.target is aten.index_put_.default
            assert cache.meta["val"].shape[1] < node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
    flow = Dataflow.of(gm)
    assert not any(not node.users and not flow.writes[node] and node.op == "call_function" for node in flow.nodes)


@pytest.mark.parametrize("name", ["gemma4", "eager"])
def test_metadata_and_marks_are_kept(name: str) -> None:
    gm, twin = graph_of(name), graph_of(name)
    target = aten.matmul.default if name == "eager" else aten.scaled_dot_product_attention.default
    ends = calls(gm, target)[1::2] if name == "eager" else calls(gm, target)
    for number, node in enumerate(ends):
        node.meta.update(auxstream=f"layers.{number}", skip_mlir_fusion=True)
    fuse_decode_attention(gm, always("own"))
    for number, node in enumerate(ours(gm)):
        old = next(one for one in twin.graph.nodes if node.name == f"{one.name}_decode")
        assert old.meta["nn_module_stack"] == node.meta["nn_module_stack"]
        assert old.meta.get("stack_trace") == node.meta.get("stack_trace")
        assert (old.meta["val"].shape, old.meta["val"].dtype) == (node.meta["val"].shape, node.meta["val"].dtype)
        assert (node.meta["auxstream"], node.meta["skip_mlir_fusion"]) == (f"layers.{number}", True)


def test_torchs_own_over_unexpanded_caches() -> None:
    gm, twin = graph_of("gemma4"), graph_of("gemma4")
    assert sites(gm, "grouped") == ["grouped", "grouped"]
    assert [node.kwargs["enable_gqa"] for node in calls(gm, aten.scaled_dot_product_attention.default)] == [True] * 2
    assert len(gm.graph.nodes) < len(twin.graph.nodes)
    assert error(logits(gm), logits(twin)) < 0.02


def test_what_is_not_worth_it_stays() -> None:
    gm, twin = graph_of("gemma4"), graph_of("gemma4")
    assert sites(gm, "kept") == ["kept torch's own is as fast here"] * 2
    assert gm.code == twin.code


def test_a_prompt_is_left_alone() -> None:
    pytest.importorskip("transformers")
    import tiny_models

    from auxstream.capture.huggingface import DecodeStep, PrefillStep, build

    step = DecodeStep(build(tiny_models._config("gemma4")), 2, CONTEXT)
    given = torch.arange(5)[None], torch.arange(5), torch.tensor([1]), torch.tensor([4])
    gm = trace(PrefillStep(step), given).graph_module
    before = gm.code
    assert calls(gm, aten.scaled_dot_product_attention.default)
    assert sites(gm) == []
    assert gm.code == before


# --- forms by hand ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A function of queries [2, 4, 1, 16], caches of two heads and eight keys, and what each row sees of them."""

    def __init__(self, compute: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.compute = compute
        generator = torch.Generator().manual_seed(0)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(2, 2, 8, 16, generator=generator).to(dtype))

    def forward(self, q: Tensor, sees: Tensor) -> Any:
        return self.compute(q, self.keys, self.values, sees)


Q = torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(1))
SEES = (torch.arange(8) <= torch.tensor([2, 7])[:, None])[:, None, None]


def repeated(x: Tensor, times: int = 2) -> Tensor:
    """As transformers writes it."""
    batch, heads, keys, d = x.shape
    return x[:, :, None].expand(batch, heads, times, keys, d).reshape(batch, heads * times, keys, d)


def sdpa(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None, **options: Any) -> Tensor:
    return scaled_dot_product_attention(q, repeated(k), repeated(v), sees, **options)


def by_hand(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, softcap: float = 2.0, inner: float = 2.0) -> Tensor:
    scores = torch.tanh(q @ repeated(k).transpose(2, 3) * 0.25 / inner) * softcap
    scores = scores + torch.zeros(2, 1, 1, 8).masked_fill(~sees, torch.finfo(torch.float32).min)
    return dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), 0.1, training=False) @ repeated(v)


def scores_too(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ repeated(k).transpose(2, 3)).softmax(-1)
    return weights @ repeated(v), weights


def written_between(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    expanded = repeated(k)
    k.mul_(-3.0)
    return scaled_dot_product_attention(q, expanded, repeated(v), sees)


def written_before(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    k.mul_(-3.0)
    return sdpa(q, k, v, sees)


KNOWN: dict[str, Callable[..., Any]] = {
    "repeated": sdpa,
    "no mask": lambda q, k, v, s: sdpa(q, k, v, None),
    "numbers as a mask": lambda q, k, v, s: sdpa(q, k, v, torch.zeros(2, 1, 1, 8).masked_fill(~s, -torch.inf)),
    "a mask of three dimensions": lambda q, k, v, s: sdpa(q, k, v, s[1]),
    "a scale": lambda q, k, v, s: sdpa(q, k, v, s, scale=0.5),
    "interleaved": lambda q, k, v, s: scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1), s
    ),
    "not repeated": lambda q, k, v, s: scaled_dot_product_attention(q[:, ::2], k, v, s),
    "grouped": lambda q, k, v, s: scaled_dot_product_attention(q, k, v, s, enable_gqa=True),
    "by hand": by_hand,
    "written before": written_before,
    "written behind": lambda q, k, v, s: [sdpa(q, k, v, s), k.mul_(2)][0],
    "one behind the other": lambda q, k, v, s: sdpa(sdpa(q, k, v, s), k, v, s),
}


def outputs(gm: Any) -> Sequence[Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(gm(Q.clone(), SEES.clone()))


@pytest.mark.parametrize("form", KNOWN)
def test_known_forms(form: str) -> None:
    gm = trace(Layer(KNOWN[form]), (Q, SEES)).graph_module
    assert set(sites(gm)) == {"own"}
    gm.graph.lint()
    twin = Layer(KNOWN[form])
    for _ in range(2):
        torch.testing.assert_close(outputs(gm), outputs(twin), rtol=1e-5, atol=1e-5)
    assert torch.equal(gm.get_buffer("keys"), twin.keys)


LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "causal": (lambda q, k, v, s: sdpa(q, k, v, None, is_causal=True), "is_causal"),
    "dropout": (lambda q, k, v, s: sdpa(q, k, v, s, dropout_p=0.1), "dropout"),
    "written between": (written_between, "before it is used"),
    "repeated unlike": (
        lambda q, k, v, s: scaled_dot_product_attention(q, repeated(k), v.repeat(1, 2, 1, 1), s),
        "keys repeated 2 times and values 1 times",
    ),
    "scores used elsewhere": (scores_too, "used elsewhere"),
    "no softcap": (lambda q, k, v, s: by_hand(q, k, v, s, 2.0, 3.0), "no softcap"),
    "more than scores": (lambda q, k, v, s: (q @ repeated(k).mT).sin().softmax(-1) @ repeated(v), "softmax of a prod"),
    "over rows": (lambda q, k, v, s: (q @ repeated(k).mT).softmax(0) @ repeated(v), "something else than keys"),
    "keys as they are": (lambda q, k, v, s: (q @ q.reshape(2, 4, 16, 1)).softmax(-1) @ q, "transposed keys"),
    "float64": (
        lambda q, k, v, s: sdpa(q.double(), k.double(), v.double(), s),
        "queries in torch.float64",
    ),
    "numbers apart": (
        lambda q, k, v, s: scaled_dot_product_attention(q, repeated(k), v.repeat_interleave(2, 1).mT.contiguous().mT),
        "keys repeated 2 times and values 1 times",
    ),
}


@pytest.mark.parametrize("form", LEFT)
def test_what_is_left_alone(form: str) -> None:
    compute, why = LEFT[form]
    gm = trace(Layer(compute), (Q, SEES)).graph_module
    before = gm.code
    (found,) = sites(gm)
    assert found.startswith("kept")
    assert why in found
    assert gm.code == before


def test_other_shapes_are_no_attention_at_one_query() -> None:
    two = Q.expand(-1, -1, 2, -1)
    for compute in (
        lambda q, k, v, s: sdpa(two, k, v, None),
        lambda q, k, v, s: scaled_dot_product_attention(q[0], repeated(k)[0], repeated(v)[0]),
        lambda q, k, v, s: q @ q.mT,
    ):
        assert sites(trace(Layer(compute), (Q, SEES)).graph_module) == []


def test_a_cache_read_too_late_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of "written between": without the check, the op reads what was written meanwhile."""
    monkeypatch.setattr(attention_pass, "_require_unchanged", lambda *_: None)
    gm = trace(Layer(written_between), (Q, SEES)).graph_module
    assert sites(gm) == ["own"]
    assert error(outputs(gm)[0], outputs(Layer(written_between))[0]) > 0.1


def test_the_report_can_be_read() -> None:
    report = fuse_decode_attention(trace(Layer(sdpa), (Q, SEES)).graph_module, always("own"))
    assert (report.fused, str(report)) == (1, "scaled_dot_product_attention: own")
    report = fuse_decode_attention(trace(Layer(LEFT["dropout"][0]), (Q, SEES)).graph_module)
    assert (report.fused, str(report)) == (0, "scaled_dot_product_attention: kept, dropout")
    nothing = fuse_decode_attention(trace(Layer(lambda q, k, v, s: q * 2), (Q, SEES)).graph_module)
    assert str(nothing) == "no attention at one query per row"


# --- what else reads the graph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_the_pipeline_sees_the_same_branches(name: str) -> None:
    gm, twin = graph_of(name), graph_of(name)
    fuse_decode_attention(gm, always("own"))
    flow, before = Dataflow.of(gm), Dataflow.of(twin)
    assert not any(flow.barriers >> flow.index[node] & 1 for node in ours(gm))
    own, old = ([(one.name, len(one.nodes)) for one in find_shared_experts(which)] for which in (flow, before))
    assert own == old
    assert [one.kind for one in propose(gm)] == [one.kind for one in propose(twin)]
    assert len(list(candidates(flow))) == len(list(candidates(before)))


def test_its_cost_is_that_of_attention_that_copies_nothing() -> None:
    gm, twin = graph_of("qwen2_moe"), graph_of("qwen2_moe")
    fuse_decode_attention(gm, always("own"))
    flow, before = Dataflow.of(gm), Dataflow.of(twin)
    for node, old in zip(ours(gm), calls(twin, aten.scaled_dot_product_attention.default), strict=True):
        assert cost_of(flow, node).flops == cost_of(before, old).flops > 0
        tensors = [one.meta["val"] for one in (*node.all_input_nodes, node)]
        assert cost_of(flow, node).bytes == sum(one.nbytes for one in tensors) < cost_of(before, old).bytes


def test_caches_that_nobody_writes_are_no_experts() -> None:
    gm = trace(Layer(sdpa), (Q, SEES)).graph_module
    fuse_decode_attention(gm, always("own"))
    flow = Dataflow.of(gm)
    (node,) = ours(gm)
    assert not Weights.of(flow).opaque >> flow.index[node] & 1
    assert cost_of(flow, node).bytes == sum(one.meta["val"].nbytes for one in (*node.all_input_nodes, node))


def test_graphs_are_split_at_it() -> None:
    gm = trace(Layer(sdpa), (Q, SEES)).graph_module
    fuse_decode_attention(gm, always("own"))
    assert [node for node in gm.graph.nodes if splits_at(node)] == ours(gm)


@pytest.mark.parametrize("mixes", [False, True])
def test_its_rows_are_proved_to_stay_apart(mixes: bool) -> None:
    class Rows(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
            k = k.flip(0) if mixes else k * 2
            return decode_attention()(q, k, v, sees, 0.25)

    traced = trace(Rows(), (Q, torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16), SEES))
    assert bool(find_mixing(traced, (0, 0, 0, 0), (0,)).unproved) == mixes


def test_fusion_before_and_behind() -> None:
    first, second, plain = (decode_step("gemma4", batch=BATCH).graph_module for _ in range(3))
    fuse_decode_attention(first, always("own"))
    for gm in (first, plain):
        assert fuse_elementwise(gm).fusions
    assert len(ours(first)) == 2
    assert fuse_elementwise(second).fusions
    fuse_decode_attention(second, always("own"))
    assert error(logits(first), logits(plain)) < 0.02
    assert len(ours(second)) == 2
    assert error(logits(second), logits(graph_of("gemma4"))) < 0.02


# --- through compile, on the simulated machine ------------------------------------------------------------------------


def compiled(name: str, **options: Any) -> Any:
    from bucket_steps import serving_step

    step = serving_step(name, batch=4)
    example = torch.arange(4)[:, None], torch.arange(4)
    how = auxstream.Options(mlir_elementwise_fusion=False, pad={"position": CONTEXT - 1}, **options)
    return auxstream.compile(step, example, how)


def tokens(rows: int, turn: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(turn)
    return torch.randint(0, 64, (rows, 1), generator=generator), torch.randint(0, 15, (rows,), generator=generator)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
def test_a_decode_step_has_the_same_bits_serial_and_overlapped(name: str) -> None:
    serial = compiled(name, decode_attention=True, multi_stream_moe=False)
    overlapped = compiled(name, decode_attention=True)
    assert overlapped.graph.regions
    assert not serial.graph.regions
    for fast in (serial, overlapped):
        assert fast.graph.report.ok
        assert sum("decode_attention" in str(getattr(step, "func", "")) for step in fast.graph.program.steps) == 2
    for turn in range(3):
        assert torch.equal(serial(*tokens(4, turn)), overlapped(*tokens(4, turn)))


def test_buckets_with_it_are_checked_as_without() -> None:
    """And a call of fewer rows gets what the model itself says."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", auxstream.AuxstreamWarning)
        fast, plain = (compiled("gemma4", buckets=(1, 4), decode_attention=on) for on in (True, False))
    assert [verdict.how for verdict in fast.padding] == [verdict.how for verdict in plain.padding]
    assert fast.padding[-1].how == "checked"
    for bucket in fast.buckets.values():
        assert any("decode_attention" in str(getattr(step, "func", "")) for step in bucket.graph.program.steps)
    for rows in (3, 1, 2, 4):
        assert error(fast(*tokens(rows, rows)), plain(*tokens(rows, rows))) < 0.02
