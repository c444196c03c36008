"""Hugging Face causal LMs as decode steps with explicit static caches (extra `hf`).

Enters: a causal LM built on the device it will run on. Leaves: `DecodeStep`, an `nn.Module` whose `forward(input_ids,
position)` computes the next-token logits and writes each layer's state in place: keys and values, the states of linear
attention, or both. The state is buffers of the step, bound into the model's cache object anew in every call, so a
tracer sees buffer mutation and no hidden constants. Invariant: all state a step reads or writes is a parameter or a
buffer of the step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..runtime.errors import InputError, MissingDependencyError

try:
    import transformers
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer
except ImportError as error:
    raise MissingDependencyError(
        "auxstream.capture.huggingface needs transformers",
        expected="transformers >= 5.17",
        came=str(error),
        remedy="pip install 'auxstream[hf]'",
    ) from error

_ATTENTIONS = ("sdpa", "eager")
# Mask rules by transformers' layer type: whether a query at position q sees the key at position k.
_Sees = Callable[[Tensor, Tensor, Any], Tensor]
_LAYER_MASKS: dict[str, _Sees] = {
    "full_attention": lambda k, q, config: k <= q,
    "sliding_attention": lambda k, q, config: (k <= q) & (k > q - config.sliding_window),
    "chunked_attention": lambda k, q, config: (
        (k <= q) & (k // config.attention_chunk_size == q // config.attention_chunk_size)
    ),
}
_RECURRENT = ("linear_attention", "conv")
_REUSES = "dummy"  # transformers' word for a layer that reads another's keys and values
_STATELESS = ("moe", "mlp", _REUSES)
_UNMASKED = (*_RECURRENT, *_STATELESS)
"""Layer types that attend to no past keys, and one token is never padding."""
_HYBRIDS = {"hybrid": ("full_attention", "linear_attention")}
"""Layer types with two mixers side by side, each with the mask of its own type."""


class _BoundLayer(CacheLayerMixin):
    """One layer's keys and values over buffers that somebody else owns, written at a position that comes as a tensor.

    Sliding-window layers use it too and leave the window to the mask: transformers' own sliding static layer branches
    on a Python integer, which would freeze one branch into a traced graph.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.bound = (keys, values)
        self.position = position
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a bound cache layer is born initialized")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for cache, states in zip(self.bound, (key_states, value_states), strict=True):
            if self.position.shape[0] == 1:
                cache.index_copy_(2, self.position, states)
            else:
                rows = torch.arange(cache.shape[0], device=cache.device)
                # With a slice between two index tensors, the indexed dimensions come first: [batch, heads, head_dim].
                cache[rows, :, self.position] = states[:, :, 0]
        return self.bound

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.bound[0].shape[2], 0

    def get_seq_length(self) -> Any:
        return self.position

    def get_max_length(self) -> int:
        return self.bound[0].shape[2]


class _BoundRecurrence(LinearAttentionLayer):
    """One layer's convolution and recurrent states over buffers that somebody else owns; a layer without state too.

    Zeros are the state before the first token, so there always is a previous state.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        if (conv := state.get("conv")) is not None:
            self.conv_states[0], self.conv_kernel_size[0] = conv, conv.shape[-1]
            self.is_conv_states_initialized[0] = True
        if (recurrent := state.get("recurrent")) is not None:
            self.recurrent_states[0] = recurrent
            self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True


class _BoundHybrid(_BoundRecurrence):
    """A layer with attention and a recurrence side by side: caches know the one by class, the other by `update`."""

    def __init__(self, state: Mapping[str, Tensor], attention: _BoundLayer) -> None:
        super().__init__(state)
        self.update = attention.update


def _bound(state: Mapping[str, Tensor], position: Tensor) -> Any:
    if "keys" not in state:
        return _BoundRecurrence(state)
    attention = _BoundLayer(state["keys"], state["values"], position)
    return attention if len(state) == 2 else _BoundHybrid(state, attention)


class DecodeStep(nn.Module):
    """One decode step of a causal LM over a static cache of `context` positions.

    `forward(input_ids, position)`: `input_ids` int64 `[batch, 1]`; `position` int64 `[1]` (all rows at one position) or
    `[batch]`; returns logits `[batch, vocab]` in the model's dtype. The state is in buffers, by layer: `keys_<i>` and
    `values_<i>`, `[batch, kv_heads, context, head_dim]`; `conv_<i>`, `[batch, channels, taps]`; `recurrent_<i>`, in the
    model's own shape. `reset()` zeroes them. Raises InputError for a model whose layers keep other state, or attend by
    a rule that is not known here.
    """

    def __init__(self, model: nn.Module, batch: int, context: int) -> None:
        super().__init__()
        if batch < 1 or context < 1:
            raise InputError(
                "DecodeStep needs room for at least one token",
                expected="batch >= 1 and context >= 1",
                came=f"batch={batch}, context={context}",
            )
        config = _text_config(model)
        kinds = (_layer_types(config), (*_LAYER_MASKS, *_UNMASKED))
        known = {"layer types": kinds, "attention": ({_attention(config)}, _ATTENTIONS)}
        for what, (used, supported) in known.items():
            if not used <= set(supported):
                raise InputError(
                    f"{type(model).__name__} has {what} that DecodeStep has no masks for",
                    expected=f"{what} among {sorted(supported)}",
                    came=str(sorted(used - set(supported))),
                    remedy="trace the model's own forward instead of DecodeStep",
                )
        self.model = model
        self.batch = batch
        self.context = context
        self._cache = _cache_argument(model)
        self._states: list[tuple[str, ...]] = []
        for index, samples in enumerate(_probe_states(model)):
            for kind, sample in samples.items():
                shape = [batch, *sample.shape[1:]]
                if kind in ("keys", "values"):
                    shape[2] = context
                buffer = torch.zeros(shape, dtype=sample.dtype, device=sample.device)
                self.register_buffer(f"{kind}_{index}", buffer, persistent=False)
            self._states.append(tuple(samples))

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        layers = [_bound(state, position) for state in self.caches()]
        output = self.model(
            input_ids=input_ids,
            position_ids=position[:, None],
            attention_mask=self._masks(position),
            use_cache=True,
            **{self._cache: Cache(layers=cast(Any, layers))},
        )
        return output.logits[:, -1]

    def caches(self) -> list[dict[str, Tensor]]:
        """Each layer's state buffers by kind: "keys" and "values", "conv" and "recurrent", or none."""
        return [{kind: getattr(self, f"{kind}_{i}") for kind in kinds} for i, kinds in enumerate(self._states)]

    def reset(self) -> None:
        """Zero every layer's state in place."""
        for state in self.caches():
            for buffer in state.values():
                buffer.zero_()

    def _masks(self, position: Tensor) -> Tensor | dict[str, Tensor | None] | None:
        """The masks `[batch, 1, 1, context]` the model expects: one for each layer type, a single causal one, or none.
        """
        config = _text_config(self.model)
        if kinds := _layer_types(config):
            if kinds <= set(_UNMASKED):
                return None
            return {k: None if k in _UNMASKED else self._mask(k, position, config) for k in sorted(kinds)}
        if getattr(config, "sliding_window", None) is not None:
            return self._mask("sliding_attention", position, config)
        return self._mask("full_attention", position, config)

    def _mask(self, kind: str, position: Tensor, config: Any) -> Tensor:
        keys = torch.arange(self.context, device=position.device)
        sees = _LAYER_MASKS[kind](keys[None, :], position[:, None], config)[:, None, None, :]
        sees = sees.expand(self.batch, 1, 1, self.context)
        if _attention(config) != "eager":
            return sees
        # Eager attention adds its mask to the scores.
        dtype = next(self.model.parameters()).dtype
        floor = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=position.device)
        return torch.where(sees, torch.zeros_like(floor), floor)


def gemma4_config(layers: int, size: Literal["tiny", "full"]) -> Any:
    """The text configuration of a Gemma-4 MoE with `layers` decoder layers.

    "full": the layer dimensions of Gemma-4-26B-A4B (hidden 2816, 128 experts top-8, vocabulary 262144; all of the
    model at 30 layers). "tiny": the same structure in dimensions a CPU steps through in milliseconds. Both keep the
    pattern of five sliding layers to one full layer, and the last layer is always a full one.
    """
    if layers < 1:
        raise InputError("a model needs layers", expected="layers >= 1", came=str(layers))
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
    kinds[-1] = "full_attention"
    dims: dict[str, dict[str, Any]] = {
        "full": {
            "vocab_size": 262144,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 1024,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
            "max_position_embeddings": 262144,
        },
        "tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 16,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "max_position_embeddings": 4096,
        },
    }
    return transformers.Gemma4TextConfig(
        **dims[size],
        num_hidden_layers=layers,
        layer_types=kinds,
        attention_k_eq_v=True,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    )


def build(
    config: Any, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """A causal LM of `config` with random weights, made on `device` in eval mode; nothing is downloaded.

    The experts run as grouped matrix products, the form that traces into one graph. The global RNG is left as it was.
    """
    place = torch.device(device)
    forked = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), place:
        torch.manual_seed(seed)
        make = transformers.AutoModelForCausalLM.from_config
        # Not `.to(dtype)` afterwards: that would cast rope's float32 frequencies too.
        try:
            model = make(copy.deepcopy(config), dtype=dtype, experts_implementation="grouped_mm")
        except ValueError as error:
            # Models with one way to run their experts (Llama4) refuse to be told which.
            if "experts implementation" not in str(error):
                raise
            model = make(copy.deepcopy(config), dtype=dtype)
    return cast(nn.Module, model.eval())


def _text_config(model: nn.Module) -> Any:
    return cast(Any, model).config.get_text_config()


def _layer_types(config: Any) -> set[str]:
    """Hybrid layers count as the types of their two mixers."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return {part for kind in kinds for part in _HYBRIDS.get(kind, (kind,))}


def _attention(config: Any) -> str:
    return str(config._attn_implementation)


def _cache_argument(model: nn.Module) -> str:
    """What forward calls its cache: transformers renamed it between 5.17 and 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _probe_states(model: nn.Module) -> list[dict[str, Tensor]]:
    """Each layer's state after one token: shapes come from the model itself, not from its config.

    Latent attention, per-layer head sizes and shared caches make any formula over the config wrong somewhere.
    """
    config = _text_config(model)
    cache = DynamicCache(config=config)
    token = torch.zeros((1, 1), dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=token, use_cache=True, **{_cache_argument(model): cache})
    layers: list[Any] = list(cast(Any, cache).layers)
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * len(layers))
    for index, mode in enumerate(getattr(config, "kv_sharing_modes", None) or ()):
        kinds[index] = _REUSES if mode == "reuse" else kinds[index]
    # Before kv_sharing_modes, caches ended where the layers begin that share.
    return [_state(model, index, kind, layer) for index, (kind, layer) in enumerate(zip(kinds, layers, strict=False))]


def _state(model: nn.Module, index: int, kind: str, layer: Any) -> dict[str, Tensor]:
    """A cache layer's tensors by name. State that its type promises and that is not there is kept somewhere else."""
    named = (("conv", "conv_states"), ("recurrent", "recurrent_states"))
    recurrences: dict[str, dict[int, Tensor | None]] = {name: getattr(layer, field, {}) for name, field in named}
    found: dict[str, Tensor | None] = {name: getattr(layer, name, None) for name in ("keys", "values")}
    found |= {name: states.get(0) for name, states in recurrences.items()}
    state = {name: tensor for name, tensor in found.items() if tensor is not None}
    attention = [state[name].ndim for name in ("keys", "values") if name in state]
    parts = _HYBRIDS.get(kind, (kind,))
    whole = (
        attention == ([4, 4] if set(parts) - set(_UNMASKED) else [])
        and any(name in state for name in recurrences) == any(part in _RECURRENT for part in parts)
        and all(len(states) <= 1 for states in recurrences.values())
    )
    if not whole:
        raise InputError(
            f"layer {index} of {type(model).__name__} ({kind}) keeps state that DecodeStep cannot hold",
            expected="in transformers' Cache: keys and values of shape [batch, heads, positions, head_dim] for "
            "attention, a convolution's or a recurrence's state for linear attention, both for hybrids",
            came=f"{type(layer).__name__} with {', '.join(state) or 'nothing in it'}",
            remedy="trace the model's own forward instead of DecodeStep",
        )
    return state
