"""Decode steps of the architectures people serve, tiny and random, with the branches that each of them has.

`ARCHITECTURES` says how to build one, which pairs of branches its decode step holds, and which layers have a shared
expert. The pairs are written as a table: where in the model the two sides part, and the matrices each side multiplies
by, a module's name standing for all of its own. Pairs of which one side multiplies by no matrix (a norm beside a
router, a mask beside projections) are found too and not listed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from auxstream.capture.trace import trace

pytest.importorskip("transformers")
from auxstream.bench.architectures import MODELS, TinyModel
from auxstream.bench.architectures import traceable_longcat as traceable_longcat
from auxstream.capture.huggingface import DecodeStep

BATCH, CONTEXT = 2, 32


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to build a tiny model, and what is to be found in its decode step."""

    tiny: TinyModel
    pairs: str
    """A line each: where the sides part, then both sides, with "|" in between."""
    shared: tuple[int, ...] = ()
    """Layers with a shared expert."""
    shared_nodes: int = 0
    """Nodes of each of them, constant casts of its own weights included."""

    def config(self) -> Any:
        return self.tiny.config()

    def model(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        return self.tiny.build(dtype=dtype)


ARCHITECTURES: dict[str, Architecture] = {
    "gemma4": Architecture(
        MODELS["gemma4"],
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
        MODELS["deepseek_v3"],
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
        MODELS["glm4_moe"],
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
        MODELS["qwen2_moe"],
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
        MODELS["qwen3_next"],
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
        MODELS["llama4"],
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
        MODELS["granitemoeshared"],
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
        MODELS["nemotron_h"],
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
        MODELS["longcat_flash"],
        """
        layers.0.self_attn.0 q_a_proj + q_b_proj | kv_a_proj_with_mqa + kv_b_proj
        layers.0.mlps.0 gate_proj | up_proj
        layers.0.self_attn.1 q_a_proj + q_b_proj | kv_a_proj_with_mqa + kv_b_proj
        layers.0.mlps.1 gate_proj | up_proj
        layers.0.mlp.experts gate_up_proj | down_proj
        layers.0 mlp | mlps + self_attn.1
        layers.0 mlp.router | mlps + self_attn.1
        """,
    ),
    "hunyuan_v1_moe": Architecture(
        MODELS["hunyuan_v1_moe"],
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
        MODELS["afmoe"],
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
        MODELS["falcon_h1"],
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
        MODELS["cohere"],
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
        MODELS["gpt_neox"],
        """
        layers.0 attention | mlp
        layers.1 attention | mlp
        """,
    ),
    "mixtral": Architecture(
        MODELS["mixtral"],
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


class Matrices:
    """What the nodes of a graph multiply by. Of the graph as it is: made anew once it has changed."""

    def __init__(self, gm: GraphModule) -> None:
        self.constant = set[Node]()
        """Parameters, and what is computed from them alone."""
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                known = isinstance(attrgetter(str(node.target))(gm), nn.Parameter)
            else:
                inputs = node.all_input_nodes
                known = node.op == "call_function" and bool(inputs) and self.constant.issuperset(inputs)
            if known:
                self.constant.add(node)
        self.everything = [name for name, p in gm.named_parameters(remove_duplicate=False) if p.dim() > 1]
        self._parts = dict[frozenset[str], frozenset[str]]()

    def of(self, nodes: Iterable[Node]) -> frozenset[str]:
        """The parameters of two dimensions or more that `nodes` consume, by name; followed through casts and such."""
        nodes = tuple(nodes)
        found, seen = set[str](), set(nodes)
        pending = [argument for node in nodes for argument in node.all_input_nodes]
        while pending:
            node = pending.pop()
            if node in self.constant and node not in seen:
                seen.add(node)
                pending += node.all_input_nodes
                if node.op == "get_attr" and node.meta["val"].dim() > 1:
                    found.add(str(node.target))
        return frozenset(found)

    def parts(self, names: frozenset[str]) -> frozenset[str]:
        """Modules that together have exactly the matrices `names`, as few as can be."""
        if names not in self._parts:
            self._parts[names] = frozenset(filter(None, (self._largest(name, names) for name in names)))
        return self._parts[names]

    def _largest(self, name: str, within: frozenset[str]) -> str | None:
        path = name.removesuffix(".weight").split(".")
        for length in range(1, len(path) + 1):
            prefix = ".".join(path[:length])
            own = {other for other in self.everything if other == prefix or other.startswith(prefix + ".")}
            if own and own <= within:
                return prefix
        return None

    def described(self, sides: Iterable[Iterable[Node]]) -> str | None:
        """Two branches as a line of the tables, normalised; None where one of them has no matrix."""
        named = [self.parts(self.of(side)) for side in sides]
        if not all(named):
            return None
        paths = [name.split(".") for side in named for name in side]
        common = 0
        while len({tuple(path[: common + 1]) for path in paths}) == 1 and all(len(path) > common + 1 for path in paths):
            common += 1
        shared = paths[0][:common]
        where = ".".join(shared[shared.index("layers") :] if "layers" in shared else shared)
        return _line(where, frozenset(frozenset(".".join(n.split(".")[common:]) for n in side) for side in named))


def _line(where: str, sides: frozenset[frozenset[str]]) -> str:
    return f"{where}: {' | '.join(sorted(' + '.join(sorted(side)) for side in sides))}"


def expected(table: str) -> list[str]:
    """The lines of a table, normalised and sorted."""
    found: list[str] = []
    for text in table.strip().splitlines():
        where, _, sides = text.strip().partition(" ")
        found.append(
            _line(where, frozenset(frozenset(n.strip() for n in side.split("+")) for side in sides.split("|")))
        )
    return sorted(found)
