"""transformers' experts as `auxstream::moe_experts`: what is known, what keeps its own path, and whole models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture import experts_interface
from auxstream.capture.costs import cost_of
from auxstream.capture.experts_interface import Form, form_of
from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.options import Options
from auxstream.capture.proposals import propose
from auxstream.capture.trace import trace
from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.experts_work import Activation
from auxstream.runtime.errors import AuxstreamWarning, InputError

transformers = pytest.importorskip("transformers")
from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation  # noqa: E402

from auxstream.bench.architectures import MODELS  # noqa: E402
from auxstream.capture.huggingface import DecodeStep, build  # noqa: E402

hf: Any = transformers
SHARED = ["gemma4", "qwen2_moe", "deepseek_v3", "glm4_moe"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH, CONTEXT = 3, 16


def built(name: str, experts: Any = "auxstream", device: str = "cpu") -> nn.Module:
    return MODELS[name].prepare(build(MODELS[name].config(), device, experts=experts))


def inputs(device: str = "cpu", rows: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (rows, 1), generator=generator)
    return ids.to(device), torch.arange(rows, device=device)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_a_layers_experts_are_one_op_beside_the_shared_expert(name: str) -> None:
    """The marker finds the same branches as among grouped products."""
    models = (built(name, "grouped_mm"), built(name))
    graphs = [trace(DecodeStep(model, BATCH, CONTEXT), inputs()).graph_module for model in models]
    found = [[(region.name, len(region.nodes)) for region in mark_multi_stream_moe_shared_experts(gm)] for gm in graphs]
    assert found[0] == found[1] != []
    ops = [node for node in graphs[1].graph.nodes if "moe_experts" in str(node.target)]
    assert len(ops) == len(found[1])
    assert not any("grouped_mm" in str(node.target) for node in graphs[1].graph.nodes)
    assert all(proposal.expected for proposal in propose(graphs[1]) if proposal.kind.endswith("shared"))


def test_an_op_is_said_to_read_the_experts_that_are_chosen() -> None:
    """Two tokens of two choices each reach at most four of eight experts."""
    gm = trace(DecodeStep(built("gemma4"), 2, CONTEXT), inputs(rows=2)).graph_module
    flow = Dataflow.of(gm)
    node = next(node for node in flow.nodes if "moe_experts" in str(node.target))
    weights = sum(a.meta["val"].nbytes for a in node.all_input_nodes if a.meta["val"].dim() == 3)
    rest = sum(a.meta["val"].nbytes for a in (node, *node.all_input_nodes) if a.meta["val"].dim() == 2)
    assert cost_of(flow, node).bytes == weights // 2 + rest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SHARED)
def test_the_error_is_that_of_the_models_own_rounding(name: str, device: str) -> None:
    """Layer by layer over the same routing: against float32, at most 1.1 times what grouped products have."""
    own, mine = errors(built(name, "grouped_mm", device), device)
    assert 0 < mine <= 1.1 * own


def test_another_activation_is_an_error() -> None:
    model = built("qwen2_moe", "grouped_mm")
    for module in experts_of(model):
        form = form_of(module)
        assert isinstance(form, Form)
        setattr(module, experts_interface._FORM, replace(form, activation=Activation("gelu")))
    own, mine = errors(model, "cpu")
    assert mine > 1.1 * own


def errors(model: nn.Module, device: str) -> tuple[float, float]:
    """Of grouped products, and of the op, over all layers and two numbers of tokens."""
    seen: list[tuple[Any, ...]] = []
    for module in experts_of(model):
        module.register_forward_pre_hook(lambda module, given: seen.append((module, *given)))
    with torch.no_grad():
        model(input_ids=torch.arange(20, device=device).view(2, 10))
        found = torch.zeros(2, dtype=torch.float64)
        for module, hidden, index, weights in seen:
            exact = ALL_EXPERTS_FUNCTIONS["batched_mm"](copy.deepcopy(module).float(), hidden.float(), index, weights)
            for tokens in (1, 20):
                given = hidden[:tokens], index[:tokens], weights[:tokens]
                own, mine = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *given), run(module, *given)
                found += torch.stack([(out - exact[:tokens]).norm().double().cpu() for out in (own, mine)])
    assert len(seen) == len(experts_of(model)) > 0
    return float(found[0]), float(found[1])


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "has_gate")]


def run(module: nn.Module, *given: Tensor, checked: bool = False) -> Tensor:
    return experts_interface.experts_forward(module, *given, checked=checked)


@pytest.mark.parametrize(
    ("name", "device"),
    [("qwen2_moe", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in SHARED)],
)
def test_overlapped_and_serial_graphs_have_the_same_bits(name: str, device: str) -> None:
    results: list[list[Tensor]] = []
    for overlapped in (False, True):
        step = DecodeStep(built(name, device=device), BATCH, CONTEXT)
        options = Options(multi_stream_moe=overlapped, overlap="*=off,layers.*.shared=on", verify="error")
        compiled = auxstream.compile(step, inputs(device), options)
        assert bool(compiled.regions) is overlapped
        assert compiled.report.ok
        assert not compiled.report.unattributed
        generator = torch.Generator().manual_seed(1)
        outputs: list[Tensor] = []
        for position in range(3):
            ids = torch.randint(0, 128, (BATCH, 1), generator=generator).to(device)
            outputs.append(compiled(ids, torch.full((BATCH,), position, device=device)).clone())
        results.append(outputs + [buffer.clone() for state in step.caches() for buffer in state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- which modules ----------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Experts as transformers writes them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, hidden, inner = 4, 16, 8
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2 * inner, hidden, generator=generator) / 4)
        self.down_proj = nn.Parameter(torch.randn(4, hidden, inner, generator=generator) / 4)
        self.act_fn = nn.SiLU()
        self.limit = 2.5


class ClampedAfter(Plain):
    """As Step-3.7 does it."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


class ClampedBefore(Plain):
    """As DeepSeek-V4 does it."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class ClampedByWhatIsNotSaid(Plain):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=9.5)) * up


class Demanding(Plain):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        raise RuntimeError("only on a TPU")


def made(kind: type[nn.Module] = Plain, **changed: Any) -> Any:
    experts_interface.register()
    fresh = type(kind.__name__, (kind,), {})
    module: Any = use_experts_implementation(fresh)(SimpleNamespace(num_experts=4, _experts_implementation="auxstream"))
    for name, value in changed.items():
        setattr(module, name, value)
    return module


def test_activations_are_known_by_what_they_do() -> None:
    known = {
        "silu": nn.SiLU(), "gelu_tanh": nn.GELU(approximate="tanh"), "gelu": nn.GELU(),
        "relu2": ACT2FN["relu2"],
    }  # fmt: skip
    for name, act_fn in known.items():
        assert form_of(made(act_fn=act_fn)) == Form(Activation(name), False, False)
    assert form_of(made(ClampedBefore)) == Form(Activation(limit=2.5), False, False)


UNKNOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "an activation of its own": (lambda: made(act_fn=nn.Tanh()), "activation is none of"),
    "clamped behind": (lambda: made(ClampedAfter), "activation is none of"),
    "clamped by a number nobody knows": (lambda: made(ClampedByWhatIsNotSaid), "activation is none of"),
    "an activation that cannot be asked": (lambda: made(Demanding), "RuntimeError: only on a TPU"),
    "a norm behind": (lambda: made(has_post_expert_norm=True), "norm"),
    "some experts, said": (lambda: made(_is_expert_parallel=True), "only some"),
    "some experts, seen": (lambda: made(config=SimpleNamespace(num_local_experts=16)), "only some"),
    "one matrix": (lambda: made(down_proj=nn.Parameter(torch.ones(2, 2))), "matrix per expert"),
    "quantised": (
        lambda: made(down_proj=nn.Parameter(torch.ones(4, 16, 8).to(torch.float8_e4m3fn), requires_grad=False)),
        "float8_e4m3fn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_has_a_reason(name: str) -> None:
    make, why = UNKNOWN[name]
    found = form_of(make())
    assert isinstance(found, str)
    assert why in found


def given() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    scale, index = torch.rand(5, 4, generator=generator).topk(2)
    return torch.randn(5, 16, generator=generator), index, scale


def test_what_is_not_known_keeps_its_own_path_and_says_so_once() -> None:
    experts_interface._say.cache_clear()
    modules = [made(ClampedAfter), made(ClampedAfter)]
    with torch.no_grad():
        with pytest.warns(AuxstreamWarning, match="ClampedAfter keeps transformers' grouped products.*none of silu"):
            found = modules[0](*given())
        assert torch.equal(found, ALL_EXPERTS_FUNCTIONS["grouped_mm"](modules[0], *given()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            modules[0](*given())
            modules[1](*given())


def test_gradients_keep_the_own_path() -> None:
    experts_interface._say.cache_clear()
    module = made()
    with pytest.warns(AuxstreamWarning, match="no gradients"):
        module(*given()).sum().backward()
    assert module.down_proj.grad is not None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(module(*given()), ALL_EXPERTS_FUNCTIONS["batched_mm"](module, *given()))


def test_hidden_states_wider_than_the_weights_are_rounded_as_grouped_products_do() -> None:
    module = made().bfloat16()
    with torch.no_grad():
        found = module(*given())
        expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *given())
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


class Layer(nn.Module):
    """A router before its experts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.router = nn.Parameter(torch.randn(16, 4, generator=generator))
        self.experts = made()

    def forward(self, hidden: Tensor) -> Tensor:
        scale, index = (hidden @ self.router).softmax(-1).topk(2)
        return hidden + self.experts(hidden, index, scale)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_do_not_mix_so_calls_may_be_padded(device: str) -> None:
    layer, hidden = Layer().to(device), torch.randn(4, 16, device=device)
    compiled = auxstream.compile(layer, (hidden,), Options(buckets=(1, 2, 4)))
    for rows in (1, 3, 4):
        with torch.no_grad():
            torch.testing.assert_close(compiled(hidden[:rows]), layer(hidden[:rows]))


def test_checked() -> None:
    module, (hidden, index, scale) = made(), given()
    index[3, 0] = 4
    module.config._experts_implementation = experts_interface.CHECKED
    with torch.no_grad(), pytest.raises(InputError, match="index outside"):
        module(hidden, index, scale)


GPT_OSS = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def test_transposed_interleaved_clamped_and_biased() -> None:
    """GPT-OSS has all of it at once."""
    model = build(hf.GptOssConfig(**GPT_OSS), dtype=torch.float32, experts="auxstream")
    (experts,) = experts_of(model)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    hidden, index, scale = torch.randn(5, 64), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    assert form_of(experts) == Form(Activation("silu", True, 1.702, 7.0, 1.0), True, True)
    with torch.no_grad():
        expected = ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, hidden, index, scale)
        torch.testing.assert_close(run(experts, hidden, index, scale), expected, rtol=1e-4, atol=1e-4)


def test_without_a_gate() -> None:
    (experts,) = experts_of(built("nemotron_h"))
    assert form_of(experts) == Form(Activation("relu2", gated=False), False, False)
