"""Which branches of a graph could run on lanes, by kind.

Enters: a traced graph. Leaves: `Proposal`s: the same branch of every layer that has it, as regions of named nodes, with
what it could hide at most. The graph is not changed but for marks that hand-written switches left in it, which become
proposals. Invariant: each region alone can be laid into the graph (`insert_regions`).

Shared experts, and what switches were adopted for, are proposed whole. Of any branch that holds products there is also
the span from its first product to its last: what is before and behind it (norms, gates, rotations) then stays with the
caller, where it may be fused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch.fx import GraphModule, Node

from ..kernels.dataflow import Dataflow, positions
from ..kernels.routing import MARKED, Weights
from .branches import Candidate, candidates
from .costs import cost_of
from .mark import find_shared_experts, unique, with_own_constants, without_leading_getitems
from .module_paths import module_path, title

Span = Literal["whole", "products"]

_LAYER: Final = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
_PLAIN: Final = str.maketrans({"{": None, "}": None, ",": "+", " ": None})
_LEAST_BYTES: Final = 1 << 20
"""What a branch that is no shared expert must move: below it, its handoff costs more than it could hide."""


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes by name, so that it fits every copy of its graph. `bare`: nothing but products and views."""

    name: str
    nodes: tuple[str, ...]
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Proposal:
    """Branches of one kind.

    Attributes:
        kind: `layers.*.shared`: the names of its regions, with `*` for numbers.
        span: `whole` branches, or from their first `products` to their last.
        regions: in graph order.
        bytes: what the shorter of the two sides moves, over all regions.
        expected: whether a branch of this kind overlaps where nothing can be measured.
    """

    kind: str
    span: Span
    regions: tuple[Region, ...]
    bytes: int
    expected: bool

    def __str__(self) -> str:
        return f"{self.kind} ({self.span}): {len(self.regions)} regions, {self.bytes / 2**20:.1f} MiB to hide"


@dataclass(frozen=True, slots=True)
class _Found:
    """One branch: its nodes, as a mask for each span."""

    name: str
    spans: dict[Span, int]
    bytes: int
    expected: bool


def propose(gm: GraphModule) -> tuple[Proposal, ...]:
    """What is expected to overlap first, then what could hide most."""
    flow = Dataflow.of(gm)
    weights = Weights.of(flow)
    found: list[_Found] = []
    adopted = 0
    for name, nodes in _take_marks(gm).items():
        mask = flow.mask(nodes)
        adopted |= mask
        found.append(_Found(name, {"whole": mask}, _bytes(flow, mask), True))
    for shared in find_shared_experts(flow):
        nodes, routed = flow.mask(shared.nodes), flow.mask(shared.routed)
        if not nodes & adopted:
            spans: dict[Span, int] = {"whole": nodes}
            core = _core(flow, weights, nodes)
            if core != nodes:
                spans["products"] = core
            found.append(_Found(shared.name, spans, min(_bytes(flow, nodes), _bytes(flow, routed)), True))
    names = {branch.name for branch in found}
    cores = {branch.spans.get("products", branch.spans["whole"]) for branch in found}
    for pair in candidates(flow):
        branch = _beside(flow, weights, pair)
        if branch is not None and branch.spans["products"] not in cores:
            cores.add(branch.spans["products"])
            name = unique(branch.name, names)
            names.add(name)
            found.append(_Found(name, branch.spans, branch.bytes, False))
    return tuple(sorted(_by_kind(flow, weights, found), key=lambda proposal: (not proposal.expected, -proposal.bytes)))


def mark(gm: GraphModule, regions: Iterable[Region]) -> None:
    """Mark the nodes of `regions` in a copy of the graph they were proposed for, as the marker does."""
    home = {name: region.name for region in regions for name in region.nodes}
    for node in gm.graph.nodes:
        if node.name in home:
            node.meta["auxstream"] = home[node.name]
            node.meta["skip_mlir_fusion"] = True
    gm.meta[MARKED] = True


def _take_marks(gm: GraphModule) -> dict[str, list[Node]]:
    marked: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if name := node.meta.pop("auxstream", None):
            node.meta.pop("skip_mlir_fusion", None)
            marked.setdefault(str(name), []).append(node)
    return marked


def _beside(flow: Dataflow, weights: Weights, pair: Candidate) -> _Found | None:
    """The side of a pair that is worth a lane: the one that moves less, if both multiply by weights in one layer."""
    layers = [_layer(flow, side & weights.products) for side in (pair.one, pair.other)]
    if layers[0] is None or layers[0] != layers[1]:
        return None
    cores = [_core(flow, weights, side) for side in (pair.one, pair.other)]
    moved = [_bytes(flow, core) for core in cores]
    side = moved.index(min(moved))
    core = cores[side]
    if moved[side] < _LEAST_BYTES or core & flow.barriers or core & weights.stacked:
        return None
    name = title(flow.select(core & weights.products)).translate(_PLAIN)
    return _Found(name, {"products": core}, moved[side], False)


def _core(flow: Dataflow, weights: Weights, side: int) -> int:
    """From the first products of a side to its last: convex, as the side is."""
    products = side & weights.products
    before = 0
    for position in positions(products):
        before |= flow.ancestors[position]
    core = side & before & flow.descendants(products)
    return with_own_constants(flow, without_leading_getitems(flow, core))


def _layer(flow: Dataflow, products: int) -> str | None:
    """The layer that all products lie in; None where there are several, or one that is in none."""
    layer = None
    for position in positions(products):
        found = _LAYER.match(module_path(flow.nodes[position]))
        if found is None or layer not in (None, found.group()):
            return None
        layer = found.group()
    return layer


def _bytes(flow: Dataflow, mask: int) -> int:
    return sum(cost_of(flow, node).bytes for node in flow.select(mask))


def _by_kind(flow: Dataflow, weights: Weights, found: Sequence[_Found]) -> Iterator[Proposal]:
    groups: dict[tuple[str, Span], list[_Found]] = {}
    for branch in found:
        for span in branch.spans:
            groups.setdefault((kind_of(branch.name), span), []).append(branch)
    for (kind, span), branches in groups.items():
        regions = [_region(flow, weights, branch.name, branch.spans[span]) for branch in branches]
        moved = sum(branch.bytes for branch in branches)
        yield Proposal(kind, span, tuple(regions), moved, all(branch.expected for branch in branches))


def _region(flow: Dataflow, weights: Weights, name: str, mask: int) -> Region:
    nodes = flow.select(mask)
    bare = all(weights.products >> flow.index[node] & 1 or flow.is_view(node) for node in nodes)
    return Region(name, tuple(node.name for node in nodes), bare)


def kind_of(name: str) -> str:
    """`layers.*.shared` of `layers.3.shared`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
