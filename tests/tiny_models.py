"""Decode steps of Hugging Face models, tiny and random, traced once per process."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.trace import TracedGraph, trace

NAMES = ("gemma4", "deepseek_v3", "qwen2_moe", "glm4_moe")
CONTEXT = 16

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}


def _config(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    from auxstream.capture.huggingface import gemma4_config

    experts = {"n_routed_experts": 8, "topk_group": 1, "first_k_dense_replace": 0}
    latent = {
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    match name:
        case "gemma4":
            return gemma4_config(2, "tiny")
        case "deepseek_v3":
            return transformers.DeepseekV3Config(**_COMMON, **experts, **latent, n_group=2, num_key_value_heads=4)
        case "qwen2_moe":
            return transformers.Qwen2MoeConfig(
                **_COMMON, num_experts=8, shared_expert_intermediate_size=48, num_key_value_heads=2
            )
        case _:
            return transformers.Glm4MoeConfig(**_COMMON, **experts, n_group=1, head_dim=16, num_key_value_heads=2)


@functools.cache
def _traced(name: str, batch: int) -> TracedGraph:
    config = _config(name)
    from auxstream.capture.huggingface import DecodeStep, build

    return trace(DecodeStep(build(config), batch, CONTEXT), inputs(batch))


def decode_step(name: str, *, batch: int = 1, marked: bool = True) -> TracedGraph:
    """A traced decode step of its own: nobody else's weights, caches or nodes."""
    found = copy.deepcopy(_traced(name, batch))
    if marked:
        mark_multi_stream_moe_shared_experts(found.graph_module)
    return found


def inputs(batch: int = 1, position: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the position of a decode step."""
    generator = torch.Generator().manual_seed(position)
    return torch.randint(0, 64, (batch, 1), generator=generator), torch.full((batch,), position)
