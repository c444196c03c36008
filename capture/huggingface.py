"""Hugging Face causal LMs as serving steps with explicit static caches (extra `hf`).

Enters: a causal LM built on the device it will run on. Leaves: `DecodeStep`, an `nn.Module` whose `forward(input_ids,
position)` computes the next-token logits and writes each layer's state in place: keys and values, the states of linear
attention, or both; and `PrefillStep`, which writes many tokens of one sequence into the same state. The state is
buffers of the step, bound into the model's cache object anew in every call, so a tracer sees buffer mutation and no
hidden constants. Invariant: all state a step reads or writes is a parameter or a buffer of the step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..runtime.errors import InputError, MissingDependencyError

try:
    import transformers
    from transformers.cache_utils import Cache, DynamicCache

    from .bound_caches import BoundLayer, BoundRow, bound
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
Experts = Literal["grouped_mm", "auxstream", "auxstream_checked"]
_Masks = Tensor | dict[str, Tensor | None] | None
_RECURRENT = ("linear_attention", "conv")
_REUSES = "dummy"  # transformers' word for a layer that reads another's keys and values
_STATELESS = ("moe", "mlp", _REUSES)
_UNMASKED = (*_RECURRENT, *_STATELESS)
"""Layer types that attend to no past keys, and one token is never padding."""
_HYBRIDS = {"hybrid": ("full_attention", "linear_attention")}
"""Layer types with two mixers side by side, each with the mask of its own type."""


class DecodeStep(nn.Module):
    """One decode step of a causal LM over a static cache of `context` positions, for up to `batch` sequences.

    `forward(input_ids, position)`: `input_ids` int64 `[rows, 1]`, rows in the order of the caches, `rows <= batch`;
    `position` int64 `[1]` (all rows at one position) or `[rows]`; returns logits `[rows, vocab]` in the model's dtype.
    The state is in buffers, by layer: `keys_<i>` and `values_<i>`, `[batch, kv_heads, context, head_dim]`; `conv_<i>`,
    `[batch, channels, taps]`; `recurrent_<i>`, in the model's own shape. `reset()` zeroes them. In buckets, the last
    position is best left to padded rows: `pad={"position": context - 1}`.

    Args:
        model: a causal LM of transformers, in eval mode.
        batch: sequences that the caches hold.
        context: positions that the caches hold.

    Raises:
        InputError: a model whose layers keep other state, or attend by a rule that is not known here.
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
        rows = input_ids.shape[0]
        if type(rows) is int and rows > self.batch:  # a tracer that leaves the number open is not to be asked
            raise InputError(
                "this decode step has no caches for so many sequences",
                expected=f"at most {self.batch} rows of input_ids",
                came=str(rows),
                remedy="make the step with a larger batch",
            )
        states = [{kind: buffer[:rows] for kind, buffer in state.items()} for state in self.caches()]
        return self._logits(
            [bound(state, lambda keys, values: BoundLayer(keys, values, position)) for state in states],
            self._masks(position, lambda sees: sees[:, None, None, :]),
            input_ids=input_ids,
            position_ids=position[:, None],
        )

    def caches(self) -> list[dict[str, Tensor]]:
        """Each layer's state buffers by kind: "keys" and "values", "conv" and "recurrent", or none."""
        return [{kind: getattr(self, f"{kind}_{i}") for kind in kinds} for i, kinds in enumerate(self._states)]

    def reset(self) -> None:
        """Zero every layer's state in place."""
        for state in self.caches():
            for buffer in state.values():
                buffer.zero_()

    def _logits(self, layers: list[Any], masks: _Masks, **inputs: Tensor) -> Tensor:
        cache = Cache(layers=cast(Any, layers))
        output = self.model(**inputs, attention_mask=masks, use_cache=True, **{self._cache: cache})
        return output.logits[:, -1]

    def _masks(self, position: Tensor, placed: Callable[[Tensor], Tensor]) -> _Masks:
        """The masks the model expects: one for each layer type, a single causal one, or none. `placed` gives one of
        `[tokens, context]` its dimensions of batch and heads."""
        config = _text_config(self.model)

        def mask(kind: str) -> Tensor:
            keys = torch.arange(self.context, device=position.device)
            return self._scores(placed(_LAYER_MASKS[kind](keys[None, :], position[:, None], config)))

        if kinds := _layer_types(config):
            if kinds <= set(_UNMASKED):
                return None
            return {kind: None if kind in _UNMASKED else mask(kind) for kind in sorted(kinds)}
        return mask("full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention")

    def _scores(self, sees: Tensor) -> Tensor:
        """The mask as attention takes it: eager attention adds it to the scores."""
        if _attention(_text_config(self.model)) != "eager":
            return sees
        dtype = next(self.model.parameters()).dtype
        floor = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=sees.device)
        return torch.where(sees, torch.zeros_like(floor), floor)


class PrefillStep(nn.Module):
    """Many tokens of one sequence at once, into the caches of a `DecodeStep`.

    `forward(input_ids, position, slot, last)`: `input_ids` int64 `[1, tokens]`; `position` int64 `[tokens]`, of each
    token its own; `slot` int64 `[1]`, the row of the caches; `last` int64 `[1]`, the index of the token whose logits
    are wanted; returns logits `[1, vocab]`. A token sees what that row of the caches holds at its own position and
    before it, so a long prompt may come in pieces. In buckets, tokens that pad are sent to a position that nobody sees,
    `pad={"position": context - 1}`, and the example's `last` is 0: a token that every call has.

    Args:
        step: whose model and caches these are.

    Raises:
        InputError: a model with recurrent state, which has no positions to write tokens to, or one that computes the
            logits of all tokens or of none.
    """

    def __init__(self, step: DecodeStep) -> None:
        super().__init__()
        model = step.model
        if recurrent := [i for i, state in enumerate(step.caches()) if {"conv", "recurrent"} & set(state)]:
            raise InputError(
                f"{type(model).__name__} keeps recurrent state, which PrefillStep cannot fill",
                expected="attention layers, whose keys and values have positions",
                came=f"a convolution or a recurrence in layers {', '.join(map(str, recurrent))}",
                remedy="give a prompt to the decode step token by token, or to the model itself",
            )
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise InputError(
                f"{type(model).__name__} cannot be asked for the logits of one token",
                expected="a forward that takes logits_to_keep",
                came=", ".join(inspect.signature(model.forward).parameters),
                remedy="give a prompt to the decode step token by token",
            )
        self.step = step

    def forward(self, input_ids: Tensor, position: Tensor, slot: Tensor, last: Tensor) -> Tensor:
        return self.step._logits(
            [bound(state, lambda k, v: BoundRow(k, v, position, slot)) for state in self.step.caches()],
            self.step._masks(position, lambda sees: sees[None, None]),
            input_ids=input_ids,
            position_ids=position[None],
            logits_to_keep=last,
        )


def gemma4_config(layers: int, size: Literal["tiny", "full"]) -> Any:
    """The text configuration of a Gemma-4 MoE: five sliding layers to one full layer, and the last one always full.

    Args:
        layers: decoder layers.
        size: "full": the layer dimensions of Gemma-4-26B-A4B (hidden 2816, 128 experts top-8, vocabulary 262144; all of
            the model at 30 layers). "tiny": the same structure in dimensions a CPU steps through in milliseconds.

    Returns:
        a `Gemma4TextConfig` of transformers.

    Raises:
        InputError: fewer than one layer.
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
    config: Any,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    experts: Experts = "grouped_mm",
) -> nn.Module:
    """A causal LM with random weights, in eval mode; nothing is downloaded. The global RNG is left as it was.

    Args:
        config: a configuration of transformers.
        device: where it is made.
        dtype: of its weights.
        seed: of its weights.
        experts: "grouped_mm": grouped matrix products, the form of transformers that traces into one graph;
            "auxstream": one op a layer (docs/experts.md); "auxstream_checked": and indices are checked on the device.

    Returns:
        the model.
    """
    if experts != "grouped_mm":
        from .experts_interface import register

        register()
    place = torch.device(device)
    forked = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), place:
        torch.manual_seed(seed)
        make = transformers.AutoModelForCausalLM.from_config
        # Not `.to(dtype)` afterwards: that would cast rope's float32 frequencies too.
        model = with_grouped_experts(lambda **how: make(copy.deepcopy(config), dtype=dtype, **how), experts)
    return cast(nn.Module, model.eval())


def with_grouped_experts(make: Callable[..., Any], experts: Experts = "grouped_mm") -> Any:
    """What `make` makes when it is told to run experts as grouped products, or so; models with one way to run them
    (Llama4) refuse to be told which."""
    try:
        return make(experts_implementation=experts)
    except ValueError as error:
        if "experts implementation" not in str(error):
            raise
        return make()


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
