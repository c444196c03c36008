"""`fuse_elementwise`: chains of pointwise ops and row reductions become Triton kernels, through MLIR.

Enters: a traced graph, marked if it has shared experts. Leaves: the same GraphModule with a call of a fused kernel for
each group, and a `FusionReport`. Reads as the pipeline: fold, group, emit, translate, read back. Invariant: marked
nodes stay as they are unless their region is declared safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ..runtime.errors import AuxstreamError
from ..runtime.settings import Safety, SafetyRules
from .dataflow import Dataflow
from .emit import Fusion, emit
from .fold import fold_constants
from .free import is_free
from .grouping import find_groups
from .local import functionalise_locals
from .module import to_fx, to_mlir
from .reach import region_of, regions_of
from .regions import lift_regions
from .routing import MARKED, Weights, routings
from .safety import fusion_safety
from .slices import slice_parts
from .unroll import unroll_row_sums


class FusionError(AuxstreamError):
    """A graph that may not be fused as it is."""


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What was fused."""

    fusions: tuple[Fusion, ...]
    safety: Mapping[str, Safety]
    """Per region: whether its branch may run fused kernels."""
    folded: int
    """Values that depend on parameters alone, computed once."""
    mlir: str
    """The graph as an MLIR module."""

    def __str__(self) -> str:
        ops = sum(len(fusion.group.nodes) for fusion in self.fusions)
        kernels = len({fusion.spec for fusion in self.fusions})
        lines = [
            f"fused {ops} ops into {len(self.fusions)} launches of {kernels} kernels; folded {self.folded} constants"
        ]
        lines += [f"  region {name}: fused kernels {_SAYS[value]}" for name, value in self.safety.items()]
        return "\n".join([*lines, *(f"  {fusion}" for fusion in self.fusions)])


_SAYS = {"0": "kept off (the marker)", "1": "declared safe", "auto": "to be proved"}


def fuse_elementwise(gm: GraphModule, *, safe: SafetyRules = (), trial: bool = True) -> FusionReport:
    """Fuse `gm` in place.

    Args:
        gm: an ATen graph; every node has `meta["val"]`. Before or after `insert_regions`.
        safe: globs of regions whose aux branch may run fused kernels, each with 0, 1 or auto; AUXSTREAM_FUSION_SAFE and
            AUXSTREAM_FUSION_SAFE_<REGION> come on top.
        trial: whether regions on `auto` are fused; whoever says so proves the captured graph afterwards.

    Raises:
        FusionError: the graph routes tokens to experts and the marker has not seen it.
        MissingDependencyError: the MLIR bindings are not installed.
    """
    with lift_regions(gm):
        _refuse_unmarked(gm)
        safety = fusion_safety(regions_of(gm), safe)
        slice_parts(gm)
        unroll_row_sums(gm, lambda node: _allowed(node, safety, trial))
        functionalise_locals(gm)
        folded = fold_constants(gm, keep=is_free)
        flow = Dataflow.of(gm)
        groups = find_groups(flow, lambda node: _allowed(node, safety, trial))
        fusions = tuple(emit(group) for group in groups)
        translation = to_mlir(gm, fusions, flow)
        gm.graph = to_fx(translation, gm)
        gm.graph.eliminate_dead_code()
        folded += fold_constants(gm)  # what is free and still read by something else than a kernel
        gm.graph.lint()
        gm.recompile()
    return FusionReport(fusions, safety, folded, str(translation))


def _allowed(node: Node, safety: Mapping[str, Safety], trial: bool) -> bool:
    region = region_of(node)
    if region is not None:
        return safety[region] == "1" or (trial and safety[region] == "auto")
    return not node.meta.get("skip_mlir_fusion")


def _refuse_unmarked(gm: GraphModule) -> None:
    if gm.meta.get(MARKED):
        return
    flow = Dataflow.of(gm)
    routing = next(routings(flow, Weights.of(flow)), None)
    if routing is not None:
        raise FusionError(
            "this graph routes tokens to experts and has not been marked",
            expected="the marker first: it keeps fused kernels off branches that will run on auxiliary streams",
            came=f"{flow.nodes[routing.selection]} selects experts for {flow.nodes[routing.expert]}",
            remedy="call auxstream.capture.mark_multi_stream_moe_shared_experts(gm) before fuse_elementwise(gm)",
        )
