"""The architectures people serve, as models tiny enough for any machine: random weights, every kind of layer.

Enters: a name of `MODELS`. Leaves: a causal LM in eval mode, on a device. Needs the extra `hf`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

from ..capture.huggingface import build, gemma4_config

hf: Any = transformers  # its configurations take what their models know, which their signatures do not say
VOCABULARY: Final = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_QWEN = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def traceable_longcat(model: nn.Module) -> nn.Module:
    """LongCat's experts as batched products over gathered weights: its own loop visits the experts that were hit.

    Choices beyond the routed experts are its "zero" experts, which hand the token through.
    """

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        token = hidden_states[:, None, :, None]
        gate, up = (self.gate_up_proj[top_k_index] @ token).chunk(2, 2)
        inner = self.act_fn(gate) * up
        last = self.num_routed_experts - 1
        routed = (self.down_proj[top_k_index.clamp(max=last)] @ inner)[..., 0]
        chosen = torch.where((top_k_index > last)[..., None], token[..., 0], routed)
        return (chosen * top_k_weights[..., None]).to(hidden_states.dtype).sum(1)

    for module in model.modules():
        if type(module).__name__ == "LongcatFlashExperts":
            module.forward = MethodType(forward, module)
    return model


@dataclass(frozen=True, slots=True)
class TinyModel:
    """How to build one."""

    config: Callable[[], Any]
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        return self.prepare(build(self.config(), device, dtype))


MODELS: Final[dict[str, TinyModel]] = {
    "gemma4": TinyModel(lambda: gemma4_config(2, "tiny")),
    "deepseek_v3": TinyModel(lambda: hf.DeepseekV3Config(**{**_COMMON, **_ROUTED, **_LATENT})),
    "glm4_moe": TinyModel(lambda: hf.Glm4MoeConfig(**{**_COMMON, **_ROUTED, "n_group": 1, "head_dim": 16})),
    "qwen2_moe": TinyModel(lambda: hf.Qwen2MoeConfig(**{**_COMMON, **_QWEN})),
    "qwen3_next": TinyModel(
        lambda: hf.Qwen3NextConfig(
            **{**_COMMON, **_QWEN},
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        )
    ),
    "llama4": TinyModel(
        lambda: hf.Llama4TextConfig(
            **{**_COMMON, "intermediate_size": 32},
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=16,
        )
    ),
    "granitemoeshared": TinyModel(
        lambda: hf.GraniteMoeSharedConfig(
            **_COMMON, num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=48
        )
    ),
    "nemotron_h": TinyModel(
        lambda: hf.NemotronHConfig(
            **{**_COMMON, **_ROUTED, "num_hidden_layers": 4},
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=2,
            ssm_state_size=8,
            moe_shared_expert_intermediate_size=48,
            moe_latent_size=32,
        )
    ),
    "longcat_flash": TinyModel(
        lambda: hf.LongcatFlashConfig(
            **{**_COMMON, **_LATENT},
            num_layers=1,
            ffn_hidden_size=96,
            expert_ffn_hidden_size=32,
            head_dim=8,
            n_routed_experts=8,
            zero_expert_num=4,
            moe_topk=2,
        ),
        traceable_longcat,
    ),
    "hunyuan_v1_moe": TinyModel(lambda: hf.HunYuanMoEV1Config(**_COMMON, head_dim=16, num_experts=8, moe_topk=2)),
    "afmoe": TinyModel(
        lambda: hf.AfmoeConfig(
            **_COMMON,
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
            num_dense_layers=1,
            moe_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
        )
    ),
    "falcon_h1": TinyModel(
        lambda: hf.FalconH1Config(
            **_COMMON,
            head_dim=16,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=8,
        )
    ),
    "cohere": TinyModel(lambda: hf.CohereConfig(**_COMMON)),
    "gpt_neox": TinyModel(lambda: hf.GPTNeoXConfig(**_COMMON)),
    "mixtral": TinyModel(lambda: hf.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2)),
}
