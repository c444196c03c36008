"""Marked graphs of mixtures of experts, and what was fused in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_models
import torch
from moe_blocks import HIDDEN, MERGES, TOKENS, Layer, Model
from torch.fx import GraphModule

from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.trace import trace
from auxstream.kernels import FusionReport
from auxstream.runtime.settings import SafetyRules

EVERYWHERE: SafetyRules = (("*", "1"),)
X = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))


def moe(**options: Any) -> GraphModule:
    torch.manual_seed(0)
    gm = trace(Model(Layer(**options), Layer(**options)), (X,)).graph_module
    assert mark_multi_stream_moe_shared_experts(gm)
    return gm


GRAPHS: dict[str, Callable[[], GraphModule]] = {
    **{f"block, {merge}": lambda merge=merge: moe(merge=merge) for merge in MERGES},
    "block, opaque experts": lambda: moe(form="opaque"),
    "block, gate and norm": lambda: moe(gated=True, pre_norm=True, merge="norm_behind"),
    **{name: lambda name=name: tiny_models.decode_step(name).graph_module for name in tiny_models.NAMES},
}


def groups(report: FusionReport) -> list[tuple[list[str], str]]:
    """Names of members, and the kernel, of every group."""
    return sorted(([node.name for node in fusion.group.nodes], fusion.spec.name) for fusion in report.fusions)
