"""Hugging Face causal LMs as decode steps with explicit static caches (extra `hf`).

Enters: a causal LM built on the device it will run on. Leaves: `DecodeStep`, an `nn.Module` whose `forward(input_ids,
position)` computes the next-token logits and writes each layer's key and value caches in place. The caches are buffers
of the step and are bound into the model's cache object anew in every call, so a tracer sees buffer mutation and no
hidden constants. Invariant: all state a step reads or writes is a parameter or a buffer of the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..runtime.errors import InputError, MissingDependencyError

try:
    import transformers
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
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


class _BoundLayer(CacheLayerMixin):
    """One layer's cache over buffers that somebody else owns, written at a position that comes as a tensor.

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


class DecodeStep(nn.Module):
    """One decode step of a causal LM over a static cache of `context` positions.

    `forward(input_ids, position)`: `input_ids` int64 `[batch, 1]`; `position` int64 `[1]` (all rows at one position) or
    `[batch]`; returns logits `[batch, vocab]` in the model's dtype. The caches are the buffers `keys_<i>` and
    `values_<i>`, `[batch, kv_heads, context, head_dim]`, a pair per layer; `reset()` zeroes them. Raises InputError
    for a model whose layers keep other state than keys and values, or attend by a rule that is not known here.
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
        known = {"layer types": (_layer_types(config), _LAYER_MASKS), "attention": ({_attention(config)}, _ATTENTIONS)}
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
        self.cached_layers = 0
        for index, pair in enumerate(_probe_caches(model)):
            for kind, sample in zip(("keys", "values"), pair, strict=True):
                shape = (batch, sample.shape[1], context, sample.shape[3])
                buffer = torch.zeros(shape, dtype=sample.dtype, device=sample.device)
                self.register_buffer(f"{kind}_{index}", buffer, persistent=False)
            self.cached_layers += 1

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        layers = [_BoundLayer(keys, values, position) for keys, values in self.caches()]
        output = self.model(
            input_ids=input_ids,
            position_ids=position[:, None],
            attention_mask=self._masks(position),
            past_key_values=Cache(layers=cast(Any, layers)),
            use_cache=True,
        )
        return output.logits[:, -1]

    def caches(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's key and value buffers."""
        return [(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")) for i in range(self.cached_layers)]

    def reset(self) -> None:
        """Zero every cache in place."""
        for keys, values in self.caches():
            keys.zero_()
            values.zero_()

    def _masks(self, position: Tensor) -> Tensor | dict[str, Tensor]:
        """The masks `[batch, 1, 1, context]` the model expects: one for each layer type, or a single causal one."""
        config = _text_config(self.model)
        if kinds := _layer_types(config):
            return {kind: self._mask(kind, position, config) for kind in sorted(kinds)}
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
    return set(getattr(config, "layer_types", None) or ())


def _attention(config: Any) -> str:
    return str(config._attn_implementation)


def _probe_caches(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each layer's key and value states after one token: shapes come from the model itself, not from its config.

    Latent attention, per-layer head sizes and shared caches make any formula over the config wrong somewhere.
    """
    cache = DynamicCache(config=_text_config(model))
    token = torch.zeros((1, 1), dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    probed: list[tuple[Tensor, Tensor]] = []
    for index, layer in enumerate(cast(Any, cache).layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.ndim != 4:
            raise InputError(
                f"layer {index} of {type(model).__name__} does not keep a key/value cache",
                expected="keys and values of shape [batch, heads, positions, head_dim]",
                came=type(layer).__name__,
                remedy="trace the model's own forward instead of DecodeStep",
            )
        probed.append((keys, values))
    return probed
