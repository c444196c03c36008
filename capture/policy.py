"""Which branches run on lanes: decided by measurement.

Enters: the proposals for a graph, the rules of `Options` and of the environment, and a way to race two plans. Leaves: a
`Choice`: the plan to compile, and what it was chosen over. Invariant: beyond what a rule demands, nothing overlaps that
did not win a race against the same graph without it.

From what rules demand, kinds of branches are added one by one, what is expected to pay first, then by the bytes they
could hide, each as a whole branch and as its products alone; at last, the other launch order. A branch opens a lane of
its own if others are open beside it, so a lane too is there only if it won. What was chosen is kept on disk, by model,
device and shape.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, cast

from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..kernels.store import read_choice, write_choice
from ..runtime.settings import Overlap, OverlapRules
from .launch_order import LaunchOrder
from .proposals import Proposal, Region, Span

Source = Literal["measured", "cached", "rules", "nothing measured", "no branches", "rules; AUXSTREAM_DISABLE"]
Race = Callable[["Plan", "Plan"], "Result | str"]
"""Times two plans side by side, or says why the second cannot run."""

_FORMAT: Final = 1
"""Of what is kept on disk."""
_MOST_KINDS: Final = 4
_log: Final = logging.getLogger("auxstream")


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs on lanes, and in which order it is enqueued."""

    parts: tuple[Proposal, ...] = ()
    order: LaunchOrder = "caller_first"

    @property
    def regions(self) -> tuple[Region, ...]:
        """Of two that share nodes, the first."""
        taken: set[str] = set()
        kept: list[Region] = []
        for part in self.parts:
            for region in part.regions:
                if taken.isdisjoint(region.nodes):
                    taken.update(region.nodes)
                    kept.append(region)
        return tuple(kept)

    def __str__(self) -> str:
        if not self.parts:
            return "serial"
        kinds = ", ".join(f"{part.kind} ({part.span})" for part in self.parts)
        return kinds + ("" if self.order == "caller_first" else ", branch first")


@dataclass(frozen=True, slots=True)
class Result:
    """A race of two plans: median microseconds per replay, and whether the second one won beyond noise."""

    before: float
    after: float
    won: bool


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was tried against the best until then."""

    plan: str
    result: Result | str

    def __str__(self) -> str:
        if isinstance(self.result, str):
            return f"{self.plan}: not possible, {self.result}"
        verdict = "kept" if self.result.won else "dropped"
        return f"{self.plan}: {self.result.after:.1f} us against {self.result.before:.1f}, {verdict}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan to compile, and where it comes from."""

    plan: Plan
    source: Source
    trials: tuple[Trial, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.plan} ({self.source})", *(f"  {trial}" for trial in self.trials)])


def ruled(proposals: Iterable[Proposal], rules: OverlapRules) -> tuple[tuple[Proposal, ...], tuple[Proposal, ...]]:
    """What rules demand, and what they leave to measurement. `on` demands a branch as it is expected to pay: whole, if
    it is proposed so; a branch that begins and ends with products is whole for `products` too."""
    demanded: list[Proposal] = []
    left: list[Proposal] = []
    given = tuple(proposals)
    spans: dict[str, set[Span]] = {}
    for proposal in given:
        for region in proposal.regions:
            spans.setdefault(region.name, set()).add(proposal.span)
    for proposal in given:
        parts: dict[str, list[Region]] = {"on": [], "auto": []}
        for region in proposal.regions:
            rule = _rule(region.name, rules)
            wanted: Span = "products" if rule == "products" else "whole"
            if rule == "auto":
                parts["auto"].append(region)
            elif rule != "off" and (proposal.span == wanted or wanted not in spans[region.name]):
                parts["on"].append(region)
        for kept, regions in ((demanded, parts["on"]), (left, parts["auto"])):
            if regions:
                kept.append(replace(proposal, regions=tuple(regions)))
    return tuple(demanded), tuple(left)


def unmatched(proposals: Iterable[Proposal], rules: Iterable[tuple[str, str]]) -> list[str]:
    """Globs that no proposed region has."""
    names = {region.name for proposal in proposals for region in proposal.regions}
    return [glob for glob, _ in rules if not any(fnmatchcase(name, glob) for name in names)]


def unmeasured(demanded: Sequence[Proposal], left: Sequence[Proposal]) -> Choice:
    """Where there is nothing to measure with: what is expected to pay."""
    expected = tuple(proposal for proposal in left if proposal.expected and proposal.span == "whole")
    return Choice(Plan((*demanded, *expected)), "nothing measured" if expected else "rules")


def measured(demanded: Sequence[Proposal], left: Sequence[Proposal], race: Race) -> Choice:
    """Race, and keep what wins."""
    best = Plan(tuple(demanded))
    trials: list[Trial] = []
    for plan_of in _steps(demanded, left):
        plan = plan_of(best)
        if (plan.regions == best.regions and plan.order == best.order) or not plan.parts:
            continue
        result = race(best, plan)
        trials.append(Trial(str(plan), result))
        _log.info("%s", trials[-1])
        if not isinstance(result, str) and result.won:
            best = plan
    return Choice(best, "measured" if trials else "rules", tuple(trials))


def _steps(demanded: Sequence[Proposal], left: Sequence[Proposal]) -> Iterator[Callable[[Plan], Plan]]:
    kinds = list(dict.fromkeys(proposal.kind for proposal in left))[:_MOST_KINDS]
    for proposal in left:
        if proposal.kind in kinds:
            yield lambda best, proposal=proposal: _with(best, proposal, demanded)
    yield lambda best: replace(best, order="aux_first")


def _with(plan: Plan, proposal: Proposal, demanded: Sequence[Proposal]) -> Plan:
    """The plan with a kind more, or with the other span of a kind that it has."""
    others = tuple(part for part in plan.parts if part in demanded or part.kind != proposal.kind)
    return replace(plan, parts=(*others, proposal))


def _rule(region: str, rules: OverlapRules) -> Overlap:
    found: Overlap = "auto"
    for glob, value in rules:
        if fnmatchcase(region, glob):
            found = value
    return found


# --- on disk --------------------------------------------------------------------------------------------------------


def key_of(gm: GraphModule, proposals: Iterable[Proposal], rest: Iterable[object]) -> str:
    """Of a graph by what its nodes compute, in any order: tracing may number and order them differently each time.
    `rest`: whatever else the choice depends on."""
    nodes = sorted(f"{node.op} {node.target if node.op == 'call_function' else ''} {_shapes(node.meta.get('val'))}"
                   for node in gm.graph.nodes)  # fmt: skip
    offered = [f"{p.kind} {p.span} {len(p.regions)} {p.bytes}" for p in proposals]
    text = "\n".join([*nodes, *offered, *map(str, rest)])
    return "overlap-" + hashlib.sha256(text.encode()).hexdigest()


def _shapes(value: Any) -> str:
    leaves = pytree.tree_leaves(value)
    return " ".join(f"{tuple(leaf.shape)} {leaf.dtype}" for leaf in leaves if isinstance(leaf, Tensor))


def remembered(key: str, demanded: Sequence[Proposal], left: Sequence[Proposal]) -> Choice | None:
    """The choice kept under `key`, if it still can be made."""
    match read_choice(key):
        case {"format": found, "parts": [*parts], "order": "caller_first" | "aux_first" as order} if found == _FORMAT:
            chosen = [next((p for p in left if [p.kind, p.span] == part), None) for part in parts]
            offered = [part for part in chosen if part is not None]
            plan = Plan((*demanded, *offered), cast(LaunchOrder, order))
            return Choice(plan, "cached") if len(offered) == len(parts) else None
        case _:  # nothing, or a damaged file
            return None


def remember(key: str, demanded: Sequence[Proposal], choice: Choice) -> None:
    """Keep a measured choice for later processes."""
    parts = [(part.kind, part.span) for part in choice.plan.parts if part not in demanded]
    write_choice(key, {"format": _FORMAT, "parts": parts, "order": choice.plan.order})
