"""A traced graph under a plan: with the kernels of its own that it is given, fused, and with the plan's regions in it.

Enters: a traced graph and `Options`, then plans. Leaves: a `Laid` graph per plan. Invariant: the traced graph itself is
not changed, nor the `graph` that plans are made for, so any number of plans can be laid.

Attention and routers are replaced first, whatever the plan. Products come after the marks: those that share their input
may become one launch, but not across a region's border.

Regions of nothing but products and views (`Region.bare`) leave fusion nothing to keep off them: they are marked when
the rest is fused. So plans that differ in them alone share one fused graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..kernels.attention_pass import fuse_decode_attention
from ..kernels.derive import copy_of
from ..kernels.fuse import FusionReport, fuse_elementwise
from ..kernels.launch import compile_ahead
from ..kernels.products_pass import choose_gated, choose_products
from ..kernels.router_pass import fuse_routers
from ..kernels.safety import fusion_safety
from ..runtime.settings import parse_safety
from .options import Options
from .policy import Plan
from .proposals import Region, mark
from .schedule import RegionPlan, insert_regions
from .state import bits
from .trace import TracedGraph


@dataclass(frozen=True, slots=True)
class Laid:
    """A graph ready to be captured, over the traced one's parameters and buffers."""

    module: GraphModule
    fusion: FusionReport | None
    regions: tuple[RegionPlan, ...]


class Laying:
    """
    Args:
        traced: a graph that no pass has been through.
        options: what is done to it.
        on_gpu: whether what is left to the machine is done.
        constants: what fusion computed ahead for graphs of the same model, by name; they share it.

    Attributes:
        graph: what plans are made for.
        notes: what became of attention and routers, as text.
    """

    def __init__(self, traced: TracedGraph, options: Options, on_gpu: bool, constants: dict[str, Tensor]) -> None:
        self.graph = copy_of(traced.graph_module)
        self.notes: list[str] = []
        self._options = options
        self._on_gpu = on_gpu
        self._constants = constants
        if self._wanted(options.decode_attention) and options.mode != "piecewise":  # there, attention is no kernel
            self.notes.append(str(fuse_decode_attention(self.graph)))
        if self._wanted(options.router_kernels):
            self.notes.append(str(fuse_routers(self.graph)))
        self._known = {name for name, _ in self.graph.named_buffers()}
        self._fused: dict[tuple[tuple[Region, ...], bool], tuple[GraphModule, FusionReport | None]] = {}

    def _wanted(self, option: bool | None) -> bool:
        return self._on_gpu if option is None else option

    def trials(self, plan: Plan) -> tuple[bool, ...]:
        """Whether to fuse regions on `auto` as if they were safe: first so, then not, if any region is."""
        if not self._options.mlir_elementwise_fusion:
            return (False,)
        rules = parse_safety(self._options.fusion_safe)
        safety = fusion_safety([region.name for region in plan.regions], rules, partial=True)
        return (True, False) if "auto" in safety.values() else (False,)

    def lay(self, plan: Plan, trial: bool) -> Laid:
        """A graph with these regions. Raises RegionError where they cannot be laid together."""
        module, report = self.marked(plan, trial)
        regions = insert_regions(module, handoff=self._options.handoff, order=plan.order)
        return Laid(module, report, regions)

    def marked(self, plan: Plan, trial: bool) -> tuple[GraphModule, FusionReport | None]:
        """The same graph before regions are inserted: with all kernels, and the marks of these regions."""
        bare = [region for region in plan.regions if region.bare]
        fused, report = self._base(tuple(region for region in plan.regions if not region.bare), trial)
        module = copy_of(fused)
        mark(module, bare)
        if self._wanted(self._options.product_kernels):
            choose_products(module)
        return module, report

    def _base(self, regions: tuple[Region, ...], trial: bool) -> tuple[GraphModule, FusionReport | None]:
        if (regions, trial) not in self._fused:
            module, report = copy_of(self.graph), None
            mark(module, regions)
            if self._wanted(self._options.product_kernels):
                choose_gated(module)
            if self._options.mlir_elementwise_fusion:
                rules = parse_safety(self._options.fusion_safe)
                report = fuse_elementwise(module, safe=rules, trial=trial, partial=True)
                compile_ahead(report.fusions)
                self._share_constants(module)
            self._fused[regions, trial] = module, report
        return self._fused[regions, trial]

    def _share_constants(self, module: GraphModule) -> None:
        """Buffers that fusion computed for this graph as for an earlier one: one is enough."""
        for name, own in list(module.named_buffers()):
            if name not in self._known:
                shared = self._constants.setdefault(name, own)
                alike = shared.dtype == own.dtype and shared.stride() == own.stride()
                if alike and torch.equal(bits(shared), bits(own)):
                    setattr(module, name, shared)
