"""Real Hugging Face models, tiny and random: decode steps are right and trace bitwise; shared experts are found."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES, traceable_longcat
from torch import Tensor

import auxstream
from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.options import Options
from auxstream.capture.schedule import insert_regions
from auxstream.capture.trace import trace
from auxstream.runtime.errors import CaptureError, InputError, MissingDependencyError, TraceError

transformers = pytest.importorskip("transformers")
from auxstream.capture.huggingface import DecodeStep, PrefillStep, build, gemma4_config  # noqa: E402


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


# --- fewer rows, and prompts ------------------------------------------------------------------------------------------

CONTEXT = 40
PROMPTS = (20, 7)


def own_continuation(model: torch.nn.Module, tokens: Tensor, prompt: int) -> tuple[list[Tensor], list[Tensor]]:
    """The reference: the model's own forward and cache, over the prompt and then token by token; logits, and keys."""
    cache = transformers.DynamicCache(config=model.config)
    logits: list[Tensor] = []
    pieces = tokens.split([prompt, *[1] * (tokens.shape[1] - prompt)], dim=1)
    with torch.no_grad():
        for piece in pieces:
            logits.append(model(input_ids=piece, past_key_values=cache, logits_to_keep=1).logits[:, -1])
    return logits, [layer.keys for layer in cache.layers]


def prompted(prefill: PrefillStep, tokens: Tensor, slot: int, start: int = 0) -> Tensor:
    """The logits of the last of `tokens`, [1, n], written into `slot` from position `start` on."""
    count = tokens.shape[1]
    with torch.no_grad():
        return prefill(tokens, torch.arange(start, start + count), torch.tensor([slot]), torch.tensor([count - 1]))


@pytest.mark.parametrize("name", ["gemma4", "deepseek_v3", "qwen2_moe", "llama4"])
def test_prompts_and_steps_after_them_equal_the_models_own_forward(name: str) -> None:
    """Two sequences of other lengths, in rows 0 and 1 of three; windows and chunks are crossed."""
    model, further = ARCHITECTURES[name].model(torch.float32), 6
    step = DecodeStep(model, batch=3, context=CONTEXT)
    prefill = PrefillStep(step)
    tokens = [torch.randint(0, 128, (1, prompt + further)) for prompt in PROMPTS]
    expected = [own_continuation(model, row, prompt)[0] for row, prompt in zip(tokens, PROMPTS, strict=True)]
    for slot, (row, prompt) in enumerate(zip(tokens, PROMPTS, strict=True)):
        torch.testing.assert_close(prompted(prefill, row[:, :prompt], slot), expected[slot][0], rtol=1e-4, atol=1e-5)
    for turn in range(further):
        position = torch.tensor([prompt + turn for prompt in PROMPTS])
        ids = torch.cat([row[:, at : at + 1] for row, at in zip(tokens, position.tolist(), strict=True)])
        with torch.no_grad():
            mine = step(ids, position)
        torch.testing.assert_close(mine, torch.cat([e[1 + turn] for e in expected]), rtol=1e-4, atol=1e-5)
    assert not any(buffer[2].any() for state in step.caches() for buffer in state.values()), "nobody's row"


@pytest.mark.parametrize("name", ["gemma4", "deepseek_v3", "qwen2_moe"])
def test_a_prompt_as_long_as_the_context_has_the_bits_of_the_models_own_forward(name: str) -> None:
    model = ARCHITECTURES[name].model()
    model.set_attn_implementation("eager")  # pyright: ignore
    tokens = torch.randint(0, 128, (1, 20))
    (expected,), keys = own_continuation(model, tokens, 20)
    step = DecodeStep(model, batch=2, context=20)
    assert torch.equal(prompted(PrefillStep(step), tokens, 1), expected)
    for state, own in zip(step.caches(), keys, strict=True):
        assert torch.equal(state["keys"][1:, :, -own.shape[2] :], own)  # of a sliding layer, the last ones are kept


@pytest.mark.parametrize("name", ["gemma4", "deepseek_v3", "qwen2_moe"])
def test_a_traced_prompt_has_the_bits_of_the_eager_one_and_writes_in_place(name: str) -> None:
    """In two pieces: the second reads what the first has written."""
    config = ARCHITECTURES[name].config()
    config.vocab_size = 131  # unlike any other size
    model = build(config)
    mine, other = (DecodeStep(model, batch=2, context=CONTEXT) for _ in range(2))
    tokens = torch.randint(0, 128, (1, 24))
    args = torch.zeros(1, 12, dtype=torch.int64), torch.arange(12), torch.tensor([0]), torch.tensor([0])
    traced = trace(PrefillStep(mine), args)
    kinds = [f"step.{kind}_{i}" for i, state in enumerate(mine.caches()) for kind in state]
    assert sorted(traced.mutated_buffers) == sorted(kinds)
    values = [node.meta.get("val") for node in traced.graph_module.graph.nodes if node.op == "call_function"]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    assert {shape[:-1].numel() for shape in shapes if shape[-1:] == (131,)} == {1}, "the logits of one token"
    for start in (0, 12):
        piece = tokens[:, start : start + 12]
        expected = prompted(PrefillStep(other), piece, 1, start)
        assert torch.equal(prompted(traced.graph_module, piece, 1, start), expected)  # pyright: ignore
    for state, theirs in zip(mine.caches(), other.caches(), strict=True):
        assert all(torch.equal(state[kind], theirs[kind]) for kind in state)
        assert not state["keys"][0].any()


def test_a_prompt_in_pieces_equals_the_whole() -> None:
    tokens = torch.randint(0, 128, (1, 24))
    whole = DecodeStep(ARCHITECTURES["gemma4"].model(torch.float32), batch=2, context=CONTEXT)
    pieces = DecodeStep(whole.model, batch=2, context=CONTEXT)
    prompted(PrefillStep(pieces), tokens[:, :9], 0)
    last = prompted(PrefillStep(pieces), tokens[:, 9:], 0, 9)
    torch.testing.assert_close(last, prompted(PrefillStep(whole), tokens, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma4", "deepseek_v3", "qwen2_moe"])
def test_a_padded_prompt_equals_the_one_that_is_not(name: str) -> None:
    """Tokens that pad go to the scratch position; the last token is named, so they may follow it."""
    model = ARCHITECTURES[name].model()
    mine, other = (DecodeStep(model, batch=2, context=24) for _ in range(2))
    example = torch.arange(8)[None], torch.arange(8), torch.tensor([1]), torch.tensor([0])
    options = Options(buckets=(8,), pad={"position": 23}, mlir_elementwise_fusion=False)
    fast = auxstream.compile(PrefillStep(mine), example, options)
    assert [verdict.how for verdict in fast.padding] == ["checked"]
    for count, slot in ((5, 0), (3, 1), (8, 0), (1, 1)):
        tokens = torch.randint(0, 128, (1, count))
        expected = prompted(PrefillStep(other), tokens, slot)
        torch.testing.assert_close(prompted(fast, tokens, slot), expected, rtol=2e-2, atol=1e-2)
        for state, theirs in zip(mine.caches(), other.caches(), strict=True):
            for kind in state:
                torch.testing.assert_close(state[kind][:, :, :-1], theirs[kind][:, :, :-1], rtol=2e-2, atol=1e-2)


def test_a_prompt_padded_into_its_own_positions_is_refused() -> None:
    prefill = PrefillStep(DecodeStep(ARCHITECTURES["qwen2_moe"].model(), batch=1, context=24))
    example = torch.arange(8)[None], torch.arange(8), torch.tensor([0]), torch.tensor([0])
    with pytest.raises(CaptureError, match=r"would write 'step\.keys_0'"):
        auxstream.compile(prefill, example, Options(buckets=(8,), pad={"position": 3}, mlir_elementwise_fusion=False))


def test_tokens_in_another_row_or_unmasked_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins of the tests above."""
    module = sys.modules["auxstream.capture.huggingface"]
    row = module.BoundRow
    with monkeypatch.context() as patch:
        patch.setattr(module, "BoundRow", lambda keys, values, position, slot: row(keys, values, position, slot * 0))
        with pytest.raises(AssertionError):
            test_prompts_and_steps_after_them_equal_the_models_own_forward("qwen2_moe")
    masks = {**module._LAYER_MASKS, "full_attention": lambda k, q, config: k >= 0 * q}
    monkeypatch.setattr(module, "_LAYER_MASKS", masks)
    with pytest.raises(AssertionError):
        test_a_prompt_as_long_as_the_context_has_the_bits_of_the_models_own_forward("qwen2_moe")


def test_recurrent_models_have_no_prefill_and_too_many_rows_no_caches() -> None:
    with pytest.raises(InputError, match="keeps recurrent state") as caught:
        PrefillStep(DecodeStep(ARCHITECTURES["qwen3_next"].model(), batch=1, context=8))
    assert caught.value.came == "a convolution or a recurrence in layers 0"
    step = DecodeStep(build(gemma4_config(1, "tiny")), batch=2, context=8)
    with pytest.raises(InputError, match="so many sequences") as caught:
        step(torch.zeros(3, 1, dtype=torch.int64), torch.arange(3))
    assert caught.value.came == "3"


def test_fewer_rows_leave_the_others_alone_in_every_kind_of_state() -> None:
    for name in ("gemma4", "nemotron_h", "falcon_h1"):
        step = DecodeStep(ARCHITECTURES[name].model(), batch=3, context=8)
        tokens = torch.randint(0, 128, (3, 1))
        with torch.no_grad():
            step(tokens, torch.tensor([0]))
            before = [buffer.clone() for state in step.caches() for buffer in state.values()]
            assert step(tokens[:2], torch.tensor([1, 2])).shape[0] == 2
        after = [buffer for state in step.caches() for buffer in state.values()]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))
        assert not all(torch.equal(a[:2], b[:2]) for a, b in zip(after, before, strict=True))
