"""`fuse_elementwise`: chains of pointwise ops and row reductions become Triton kernels, through MLIR.

Enters: a traced graph, marked if it has shared experts. Leaves: the same GraphModule with a call of a fused kernel for
each group, and a `FusionReport`. Reads as the pipeline: group, emit, translate, read back, fold. Invariant: marked
nodes stay as they are unless their region is declared safe.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from ..runtime.errors import AuxstreamError
from ..runtime.settings import SETTINGS, Safety, SafetyRules
from . import mlir
from .accesses import tensors
from .dataflow import RNG, Dataflow
from .emit import Fusion, emit_all
from .fold import fold_constants
from .free import settle_fills
from .grouping import find_groups
from .local import functionalise_locals
from .module import to_fx, to_mlir
from .reach import region_of, regions_of
from .regions import lift_regions
from .routing import MARKED, Weights, routings
from .safety import fusion_safety
from .short_counts import count_short_histograms
from .short_sorts import count_short_sorts
from .slices import slice_parts
from .unroll import unroll_row_sums
from .weights import leave_out_casts, spread_weights


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
    """The graph as an MLIR module, and the kernels' own modules."""
    proved: bool = False
    """Whether the captured graph was proved, so that regions on `auto` may keep their kernels."""

    @property
    def summary(self) -> str:
        """How much was fused, in one line."""
        ops = sum(len(fusion.group.nodes) for fusion in self.fusions)
        kernels = len({fusion.spec for fusion in self.fusions})
        return f"{ops} ops in {len(self.fusions)} launches of {kernels} kernels, {self.folded} constants folded"

    def _says(self, safety: Safety) -> str:
        return "proved safe" if safety == "auto" and self.proved else _SAYS[safety]

    def __str__(self) -> str:
        lines = [self.summary]
        lines += [f"  region {name}: fused kernels {self._says(value)}" for name, value in self.safety.items()]
        return "\n".join([*lines, *(f"  {fusion}" for fusion in self.fusions)])


_SAYS = {"0": "kept off (the marker)", "1": "declared safe", "auto": "to be proved"}


def fuse_elementwise(
    gm: GraphModule, *, safe: SafetyRules = (), trial: bool = True, partial: bool = False
) -> FusionReport:
    """Fuse `gm` in place. With AUXSTREAM_FUSION=off nothing happens.

    Args:
        gm: an ATen graph; every node has `meta["val"]`. Before or after `insert_regions`.
        safe: globs of regions whose aux branch may run fused kernels, each with 0, 1 or auto; AUXSTREAM_FUSION_SAFE and
            AUXSTREAM_FUSION_SAFE_<REGION> come on top.
        trial: whether regions on `auto` are fused; whoever says so proves the captured graph afterwards.
        partial: whether the graph has only some of its model's regions, so that variables may name others.

    Returns:
        what became which kernel; its `str` is a line per kernel, `mlir` the whole module.

    Raises:
        FusionError: the graph routes tokens to experts and the marker has not seen it, or it has nodes without values.
        RegionError: the graph has regions that `insert_regions` did not write.
        MissingDependencyError: the MLIR bindings are not installed.
    """
    if SETTINGS.fusion == "off":
        return FusionReport((), {}, 0, "")
    mlir.bindings()
    _refuse_untraced(gm)
    with _no_collections(), lift_regions(gm):
        _refuse_unmarked(gm)
        safety = fusion_safety(regions_of(gm), safe, partial=partial)
        allowed = _marker(safety, trial)
        flow = _rewritten(gm, allowed)
        fusions = emit_all(find_groups(flow, allowed))
        translation = to_mlir(gm, fusions, flow)
        if fusions:
            gm._graph = to_fx(translation, gm)  # without the setter, which compiles what is not finished
            _drop_unread(gm, flow)
        folded = fold_constants(gm, allowed)
        gm.graph.lint()
        gm.recompile()
    return FusionReport(fusions, safety, folded, str(translation))


@contextmanager
def _no_collections() -> Generator[None]:
    """No garbage collection meanwhile: little of what is made here is garbage, and each one looks at every traced value
    of the process (0.7 s with 30 layers)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rewritten(gm: GraphModule, allowed: Callable[[Node], bool]) -> Dataflow:
    """Make ops fusible, where new nodes can be given values: all traced values are of one fake mode."""
    modes = {id(leaf.fake_mode) for node in gm.graph.nodes for leaf in tensors(node) if isinstance(leaf, FakeTensor)}
    if len(modes) != 1:
        return Dataflow.of(gm)
    slice_parts(gm, allowed)
    flow = Dataflow.of(gm)
    changed = functionalise_locals(flow, allowed) + unroll_row_sums(flow, allowed) + count_short_sorts(flow, allowed)
    changed += count_short_histograms(gm, allowed) + settle_fills(gm, allowed)
    flow = Dataflow.of(gm) if changed else flow
    if leave_out_casts(flow):
        flow = Dataflow.of(gm)
    return Dataflow.of(gm) if spread_weights(flow, allowed) else flow


def _marker(safety: Mapping[str, Safety], trial: bool) -> Callable[[Node], bool]:
    """The marker's word on a node: whether it may become part of a kernel."""

    def allowed(node: Node) -> bool:
        region = region_of(node)
        if region is not None:
            return safety[region] == "1" or (trial and safety[region] == "auto")
        return not node.meta.get("skip_mlir_fusion")

    return allowed


def _drop_unread(gm: GraphModule, flow: Dataflow) -> None:
    """Take out pure nodes that only fused ops mentioned: what a cast took its dtype from, constants written anew."""
    read = {node.name: node for node in flow.nodes if node.users}
    for node in reversed(gm.graph.nodes):
        before = read.get(node.name)
        if node.users or before is None or node.op not in ("call_function", "get_attr"):
            continue
        writes = {s for s in flow.writes[before] if s == RNG or flow.owner[s] is not before}
        if not writes and not flow.barriers >> flow.index[before] & 1:
            gm.graph.erase_node(node)


def _refuse_untraced(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        tensor = node.op != "get_attr" or isinstance(_attribute(gm, str(node.target)), Tensor)
        if "val" not in node.meta and node.op != "output" and tensor:
            raise FusionError(
                f"node {node.name} ({node.op} {node.target}) has no traced value",
                expected='meta["val"] on every node: without it nobody can tell what shares memory',
                came="a graph that was traced symbolically, or a pass that makes nodes without their values",
                remedy="trace the model with auxstream.capture.trace, or run torch's FakeTensorProp over the graph",
            )


def _attribute(gm: GraphModule, target: str) -> object:
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _refuse_unmarked(gm: GraphModule) -> None:
    if gm.meta.get(MARKED) or regions_of(gm):
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
