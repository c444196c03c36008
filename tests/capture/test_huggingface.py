"""Real Hugging Face models, tiny and random: decode steps are right and trace bitwise; shared experts are found."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES, traceable_longcat
from torch import Tensor

from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.schedule import insert_regions
from auxstream.capture.trace import trace
from auxstream.runtime.errors import InputError, MissingDependencyError, TraceError

transformers = pytest.importorskip("transformers")
from auxstream.capture.huggingface import DecodeStep, build, gemma4_config  # noqa: E402


def steps(call: Callable[[Tensor, Tensor], Tensor], step: DecodeStep, positions: list[Tensor]) -> list[Tensor]:
    """Logits of a run over `positions` from empty caches, and the caches it leaves."""
    generator = torch.Generator().manual_seed(7)
    step.reset()
    results: list[Tensor] = []
    with torch.no_grad():
        for position in positions:
            tokens = torch.randint(0, 128, (step.batch, 1), generator=generator)
            results.append(call(tokens, position).clone())
    results += [cache.clone() for state in step.caches() for cache in state.values()]
    step.reset()
    return results


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_traced_marked_and_scheduled_steps_equal_eager_bit_for_bit(name: str) -> None:
    architecture = ARCHITECTURES[name]
    step = DecodeStep(architecture.model(), batch=2, context=32)
    ragged = [torch.tensor([i, i + 3]) for i in range(5)]
    expected = steps(step, step, ragged)
    traced = trace(step, (torch.zeros(2, 1, dtype=torch.int64), ragged[0]))
    gm = traced.graph_module
    assert all(torch.equal(a, b) for a, b in zip(steps(gm, step, ragged), expected, strict=True)), "traced"
    state = {f"{kind}_{i}" for i, kinds in enumerate(step.caches()) for kind in kinds}
    assert set(traced.mutated_buffers) == state
    found = mark_multi_stream_moe_shared_experts(gm)
    assert [region.name for region in found] == [f"layers.{layer}.shared" for layer in architecture.shared]
    assert {len(region.nodes) for region in found} <= {architecture.shared_nodes}
    plans = insert_regions(gm)
    assert len(plans) == len(architecture.shared)
    assert all(plan.recorded == () and len(plan.live_ins) == len(plan.live_outs) == 1 for plan in plans)
    assert all(torch.equal(a, b) for a, b in zip(steps(gm, step, ragged), expected, strict=True)), "scheduled"


def test_a_dropped_cache_write_would_be_seen() -> None:
    """The twin of the bitwise test: it compares caches, not only logits of the step that wrote them."""
    step = DecodeStep(build(gemma4_config(1, "tiny")), batch=1, context=8)
    positions = [torch.tensor([i]) for i in range(3)]
    expected = steps(step, step, positions)
    gm = trace(step, (torch.zeros(1, 1, dtype=torch.int64), positions[0])).graph_module
    write = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.index_copy_.default)
    write.replace_all_uses_with(write.args[0])
    gm.graph.erase_node(write)
    gm.recompile()
    assert not all(torch.equal(a, b) for a, b in zip(steps(gm, step, positions), expected, strict=True))


def against_one_forward(model: torch.nn.Module, reference: torch.nn.Module, length: int = 40) -> None:
    """Transformers' own prefill, with its own masks and no static cache, is the reference; windows are crossed."""
    torch.manual_seed(0)
    step = DecodeStep(model, batch=2, context=length)
    tokens = torch.randint(0, 128, (2, length))
    with torch.no_grad():
        expected = reference(input_ids=tokens).logits
        mine = torch.stack([step(tokens[:, i : i + 1], torch.tensor([i])) for i in range(length)], 1)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma4", "llama4", "deepseek_v3", "qwen3_next", "nemotron_h", "falcon_h1"])
def test_a_run_of_steps_equals_one_forward_over_the_sequence(name: str) -> None:
    model = ARCHITECTURES[name].model(torch.float32)
    against_one_forward(model, model)


def test_layers_that_read_anothers_keys_and_convolutions_without_attention() -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sharing = transformers.Gemma3nTextConfig(
        **sizes,
        num_key_value_heads=2,
        num_hidden_layers=4,
        head_dim=16,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        sliding_window=8,
    )
    convolving = transformers.Lfm2Config(
        **sizes, num_key_value_heads=2, num_hidden_layers=2, layer_types=["conv", "full_attention"]
    )
    for config in (sharing, convolving):
        model = build(config, dtype=torch.float32)
        against_one_forward(model, model, length=12)


def test_longcats_experts_as_products_equal_its_own_loop() -> None:
    config = ARCHITECTURES["longcat_flash"].config()
    model, own = build(config, dtype=torch.float32), build(config, dtype=torch.float32)
    against_one_forward(traceable_longcat(model), own)
    step = DecodeStep(own, batch=1, context=8)
    with pytest.raises(TraceError, match="values of tensors"):
        trace(step, (torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0])))


def test_a_forgotten_window_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["auxstream.capture.huggingface"]
    masks = {**module._LAYER_MASKS, "sliding_attention": module._LAYER_MASKS["full_attention"]}
    monkeypatch.setattr(module, "_LAYER_MASKS", masks)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_a_run_of_steps_equals_one_forward_over_the_sequence("gemma4")


def test_eager_attention_and_one_position_for_all_rows() -> None:
    torch.manual_seed(0)
    model = build(gemma4_config(2, "tiny"), dtype=torch.float32)
    step = DecodeStep(model, batch=2, context=24)
    shared = steps(step, step, [torch.tensor([i]) for i in range(20)])
    each = steps(step, step, [torch.tensor([i, i]) for i in range(20)])
    assert all(torch.equal(a, b) for a, b in zip(shared, each, strict=True))
    model.set_attn_implementation("eager")  # pyright: ignore
    for a, b in zip(steps(step, step, [torch.tensor([i]) for i in range(20)]), shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_eager_expert_loop_is_refused_with_the_remedy() -> None:
    model = build(gemma4_config(1, "tiny"))
    model.set_experts_implementation("eager")  # pyright: ignore
    step = DecodeStep(model, batch=1, context=8)
    with pytest.raises(TraceError, match="values of tensors") as caught:
        trace(step, (torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0])))
    assert "experts_implementation='grouped_mm'" in caught.value.remedy
    assert "modeling_gemma4.py" in caught.value.came


@pytest.mark.parametrize("name", ["gemma4", "qwen2_moe", "nemotron_h"])
def test_batched_experts_are_found_too(name: str) -> None:
    """Experts as gathered weights and batched products: the routing is the same, the ops are not."""
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    model.set_experts_implementation("batched_mm")  # pyright: ignore
    step = DecodeStep(model, batch=1, context=8)
    gm = trace(step, (torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0]))).graph_module
    found = [len(region.nodes) for region in mark_multi_stream_moe_shared_experts(gm)]
    assert found == [architecture.shared_nodes] * len(architecture.shared)


def test_the_full_configuration_is_the_26b_model() -> None:
    config = gemma4_config(30, "full")
    model = build(config, device="meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 25233
    assert config.layer_types.count("full_attention") == 5
    for layers in (1, 2, 5, 6, 8):
        kinds = gemma4_config(layers, "tiny").layer_types
        assert len(kinds) == layers
        assert kinds[-1] == "full_attention"


def test_build_leaves_the_global_rng_alone_and_follows_its_seed() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one, again, other = (build(gemma4_config(1, "tiny"), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(one.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_models_that_keep_their_state_elsewhere_are_refused() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 64, "num_attention_heads": 4, "lru_width": 64}
    griffin = build(transformers.RecurrentGemmaConfig(**sizes, intermediate_size=96))
    with pytest.raises(InputError, match="layer 0 of RecurrentGemmaForCausalLM") as caught:
        DecodeStep(griffin, batch=1, context=8)
    assert "nothing in it" in caught.value.came
    with pytest.raises(InputError, match="at least one token"):
        DecodeStep(build(gemma4_config(1, "tiny")), batch=0, context=8)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "auxstream.capture.huggingface")
    with pytest.raises(MissingDependencyError) as caught:
        importlib.import_module("auxstream.capture.huggingface")
    assert "auxstream[hf]" in caught.value.remedy
