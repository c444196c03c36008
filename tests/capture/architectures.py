"""Decode steps of the architectures people serve, tiny and random, with the branches that each of them has.

`ARCHITECTURES` says how to build one, which pairs of branches its decode step holds, and which layers have a shared
expert. The pairs are written as a table: where in the model the two sides part, and the matrices each side multiplies
by, a module's name standing for all of its own. Pairs of which one side multiplies by no matrix (a norm beside a
router, a mask beside projections) are found too and not listed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from auxstream.capture.trace import trace

transformers = pytest.importorskip("transformers")
from auxstream.capture.huggingface import DecodeStep, build, gemma4_config  # noqa: E402

BATCH, CONTEXT = 2, 32

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
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
class Architecture:
    """How to build a tiny model, and what is to be found in its decode step."""

    config: Callable[[], Any]
    pairs: str
    """A line each: where the sides part, then both sides, with "|" in between."""
    shared: tuple[int, ...] = ()
    """Layers with a shared expert."""
    shared_nodes: int = 0
    """Nodes of each of them, constant casts of its own weights included."""
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model

    def model(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        return self.prepare(build(self.config(), dtype=dtype))


ARCHITECTURES: dict[str, Architecture] = {
    "gemma4": Architecture(
        lambda: gemma4_config(2, "tiny"),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0.mlp gate_proj | up_proj
        layers.0 mlp | router + experts
        layers.0 mlp | router
        layers.1.self_attn q_proj | k_proj
        layers.1.mlp gate_proj | up_proj
        layers.1 mlp | router + experts
        layers.1 mlp | router
        """,
        shared=(0, 1),
        shared_nodes=23,
    ),
    "deepseek_v3": Architecture(
        lambda: transformers.DeepseekV3Config(**{**_COMMON, **_ROUTED, **_LATENT}),
        """
        layers.0.self_attn q_a_proj + q_b_proj | kv_a_proj_with_mqa + kv_b_proj
        layers.0.mlp gate_proj | up_proj
        layers.1.self_attn q_a_proj + q_b_proj | kv_a_proj_with_mqa + kv_b_proj
        layers.1.mlp.shared_experts gate_proj | up_proj
        layers.1.mlp shared_experts | gate + experts
        layers.1.mlp shared_experts | gate
        """,
        shared=(1,),
        shared_nodes=5,
    ),
    "glm4_moe": Architecture(
        lambda: transformers.Glm4MoeConfig(**{**_COMMON, **_ROUTED, "n_group": 1, "head_dim": 16}),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0.mlp gate_proj | up_proj
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1.mlp.shared_experts gate_proj | up_proj
        layers.1.mlp shared_experts | gate + experts
        layers.1.mlp shared_experts | gate
        """,
        shared=(1,),
        shared_nodes=5,
    ),
    "qwen2_moe": Architecture(
        lambda: transformers.Qwen2MoeConfig(**{**_COMMON, **_QWEN}),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0.mlp.shared_expert gate_proj | up_proj
        layers.0.mlp shared_expert | shared_expert_gate
        layers.0.mlp shared_expert + shared_expert_gate | gate + experts
        layers.0.mlp shared_expert + shared_expert_gate | gate
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1.mlp.shared_expert gate_proj | up_proj
        layers.1.mlp shared_expert | shared_expert_gate
        layers.1.mlp shared_expert + shared_expert_gate | gate + experts
        layers.1.mlp shared_expert + shared_expert_gate | gate
        """,
        shared=(0, 1),
        shared_nodes=8,
    ),
    "qwen3_next": Architecture(
        lambda: transformers.Qwen3NextConfig(
            **{**_COMMON, **_QWEN},
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        """
        layers.0.linear_attn in_proj_qkvz + conv1d | in_proj_ba
        layers.0.mlp.shared_expert gate_proj | up_proj
        layers.0.mlp shared_expert | shared_expert_gate
        layers.0.mlp shared_expert + shared_expert_gate | gate + experts
        layers.0.mlp shared_expert + shared_expert_gate | gate
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1.mlp.shared_expert gate_proj | up_proj
        layers.1.mlp shared_expert | shared_expert_gate
        layers.1.mlp shared_expert + shared_expert_gate | gate + experts
        layers.1.mlp shared_expert + shared_expert_gate | gate
        """,
        shared=(0, 1),
        shared_nodes=8,
    ),
    "llama4": Architecture(
        lambda: transformers.Llama4TextConfig(
            **{**_COMMON, "intermediate_size": 32},
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=16,
        ),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0.feed_forward.shared_expert gate_proj | up_proj
        layers.0.feed_forward shared_expert | router + experts
        layers.0.feed_forward shared_expert | router
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1.feed_forward.shared_expert gate_proj | up_proj
        layers.1.feed_forward shared_expert | router + experts
        layers.1.feed_forward shared_expert | router
        """,
        shared=(0, 1),
        shared_nodes=5,
    ),
    "granitemoeshared": Architecture(
        lambda: transformers.GraniteMoeSharedConfig(
            **_COMMON, num_local_experts=8, num_experts_per_tok=2, shared_intermediate_size=48
        ),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0 shared_mlp | block_sparse_moe
        layers.0 shared_mlp | block_sparse_moe.router
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1 shared_mlp | block_sparse_moe
        layers.1 shared_mlp | block_sparse_moe.router
        """,
        shared=(0, 1),
        shared_nodes=7,
    ),
    "nemotron_h": Architecture(
        lambda: transformers.NemotronHConfig(
            **{**_COMMON, **_ROUTED, "num_hidden_layers": 4},
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=2,
            ssm_state_size=8,
            moe_shared_expert_intermediate_size=48,
            moe_latent_size=32,
        ),
        """
        layers.1.mixer fc1_latent_proj | gate
        layers.1.mixer shared_experts | gate + fc1_latent_proj + experts + fc2_latent_proj
        layers.1.mixer shared_experts | gate + fc1_latent_proj
        layers.2.mixer q_proj | k_proj + v_proj
        layers.2.mixer k_proj | q_proj + v_proj
        layers.2.mixer v_proj | q_proj + k_proj
        """,
        shared=(1,),
        shared_nodes=4,
    ),
    "longcat_flash": Architecture(
        lambda: transformers.LongcatFlashConfig(
            **{**_COMMON, **_LATENT},
            num_layers=1,
            ffn_hidden_size=96,
            expert_ffn_hidden_size=32,
            head_dim=8,
            n_routed_experts=8,
            zero_expert_num=4,
            moe_topk=2,
        ),
        """
        layers.0.self_attn.0 q_a_proj + q_b_proj | kv_a_proj_with_mqa + kv_b_proj
        layers.0.mlps.0 gate_proj | up_proj
        layers.0.self_attn.1 q_a_proj + q_b_proj | kv_a_proj_with_mqa + kv_b_proj
        layers.0.mlps.1 gate_proj | up_proj
        layers.0.mlp.experts gate_up_proj | down_proj
        layers.0 mlp | mlps + self_attn.1
        layers.0 mlp.router | mlps + self_attn.1
        """,
        prepare=traceable_longcat,
    ),
    "hunyuan_v1_moe": Architecture(
        lambda: transformers.HunYuanMoEV1Config(**_COMMON, head_dim=16, num_experts=8, moe_topk=2),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0.mlp.shared_mlp gate_proj | up_proj
        layers.0.mlp shared_mlp | gate + experts
        layers.0.mlp shared_mlp | gate
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1.mlp.shared_mlp gate_proj | up_proj
        layers.1.mlp shared_mlp | gate + experts
        layers.1.mlp shared_mlp | gate
        """,
        shared=(0, 1),
        shared_nodes=5,
    ),
    "afmoe": Architecture(
        lambda: transformers.AfmoeConfig(
            **_COMMON,
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
            num_dense_layers=1,
            moe_intermediate_size=32,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
        ),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0.self_attn gate_proj | q_proj + k_proj + v_proj
        layers.0.mlp gate_proj | up_proj
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1.self_attn gate_proj | q_proj + k_proj + v_proj
        layers.1.mlp.shared_experts gate_proj | up_proj
        layers.1.mlp shared_experts | router + experts
        layers.1.mlp shared_experts | router
        """,
        shared=(1,),
        shared_nodes=6,
    ),
    "falcon_h1": Architecture(
        lambda: transformers.FalconH1Config(
            **_COMMON,
            head_dim=16,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=8,
        ),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0 mamba | self_attn
        layers.0.feed_forward gate_proj | up_proj
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1 mamba | self_attn
        layers.1.feed_forward gate_proj | up_proj
        """,
    ),
    "cohere": Architecture(
        lambda: transformers.CohereConfig(**_COMMON),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.0 self_attn | mlp
        layers.0.mlp gate_proj | up_proj
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        layers.1 self_attn | mlp
        layers.1.mlp gate_proj | up_proj
        """,
    ),
    "gpt_neox": Architecture(
        lambda: transformers.GPTNeoXConfig(**_COMMON),
        """
        layers.0 attention | mlp
        layers.1 attention | mlp
        """,
    ),
    "mixtral": Architecture(
        lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
        """
        layers.0.self_attn q_proj | k_proj + v_proj
        layers.0.self_attn k_proj | q_proj + v_proj
        layers.0.self_attn v_proj | q_proj + k_proj
        layers.1.self_attn q_proj | k_proj + v_proj
        layers.1.self_attn k_proj | q_proj + v_proj
        layers.1.self_attn v_proj | q_proj + k_proj
        """,
    ),
}


@functools.cache
def traced(name: str) -> tuple[DecodeStep, GraphModule]:
    """The decode step, and its graph: shared by the tests of a process, so change a `copied` one."""
    step = DecodeStep(ARCHITECTURES[name].model(), batch=BATCH, context=CONTEXT)
    return step, trace(step, (torch.zeros(BATCH, 1, dtype=torch.int64), torch.tensor([3, 5]))).graph_module


def copied(gm: GraphModule) -> GraphModule:
    """Another graph over the same weights and caches."""
    return GraphModule(gm, copy.deepcopy(gm.graph))


def matrices(gm: GraphModule, nodes: tuple[Node, ...]) -> set[str]:
    """The parameters of two dimensions or more that `nodes` consume, by name; followed through casts and the like."""
    constant = set[Node]()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            known = isinstance(attrgetter(str(node.target))(gm), nn.Parameter)
        else:
            inputs = node.all_input_nodes
            known = node.op == "call_function" and bool(inputs) and constant.issuperset(inputs)
        if known:
            constant.add(node)
    found, seen = set[str](), set(nodes)
    pending = [argument for node in nodes for argument in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in constant and node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
            if node.op == "get_attr" and node.meta["val"].dim() > 1:
                found.add(str(node.target))
    return found


def parts(gm: GraphModule, names: set[str]) -> set[str]:
    """Modules that together have exactly the matrices `names`, as few as can be."""
    everything = [name for name, p in gm.named_parameters(remove_duplicate=False) if p.dim() > 1]
    found = set[str]()
    for name in names:
        path = name.removesuffix(".weight").split(".")
        for length in range(1, len(path) + 1):
            prefix = ".".join(path[:length])
            own = {other for other in everything if other == prefix or other.startswith(prefix + ".")}
            if own and own <= names:
                found.add(prefix)
                break
    return found


def _line(where: str, sides: frozenset[frozenset[str]]) -> str:
    return f"{where}: {' | '.join(sorted(' + '.join(sorted(side)) for side in sides))}"


def described(gm: GraphModule, sides: Iterable[tuple[Node, ...]]) -> str | None:
    """Two branches as a line of the tables, normalised; None where one of them has no matrix."""
    named = [parts(gm, matrices(gm, side)) for side in sides]
    if not all(named):
        return None
    paths = [name.split(".") for side in named for name in side]
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and all(len(path) > common + 1 for path in paths):
        common += 1
    shared = paths[0][:common]
    where = ".".join(shared[shared.index("layers") :] if "layers" in shared else shared)
    return _line(where, frozenset(frozenset(".".join(n.split(".")[common:]) for n in side) for side in named))


def expected(table: str) -> list[str]:
    """The lines of a table, normalised and sorted."""
    found: list[str] = []
    for text in table.strip().splitlines():
        where, _, sides = text.strip().partition(" ")
        found.append(
            _line(where, frozenset(frozenset(n.strip() for n in side.split("+")) for side in sides.split("|")))
        )
    return sorted(found)
