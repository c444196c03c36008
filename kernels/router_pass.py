"""`fuse_routers`: the routers of a traced graph become calls of `auxstream::moe_router`.

Enters: a traced graph, before the marker and the fusion of the rest. Leaves: the same GraphModule with one op from the
hidden states to the choices and their weights for each router that is known by its structure (`router_match.py`), and a
`RouterReport`. Invariant: before a router is replaced, its own ops and the op's reference are run on the same random
inputs, with the model's weights and with random ones, and agree: every choice is as good as the reference's up to
rounding, and so is every weight. A router that is not understood, or does not agree, stays as it is, with the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .call import aten
from .dataflow import Dataflow
from .derive import derived
from .router import Rules, Tensors, best_of_groups, choices, chosen, logits, moe_router, scored, weighed
from .router_closed import Match, Unmatched
from .router_forms import RESHAPING
from .router_match import match
from .routing import Weights, routings

_ROWS: Final = 64
"""Tokens that a router is tried on, with each set of weights."""
_ROUNDINGS: Final = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-18}
"""By the type of the product: how far rounding may move a logit, relative to the largest (or to one)."""


@dataclass(frozen=True, slots=True)
class FusedRouter:
    """One router that became an op: the op's node, and what it does."""

    node: str
    rules: Rules
    replaced: int
    """How many nodes it took the place of."""

    def __str__(self) -> str:
        rules = self.rules
        said = [f"{'softmax' if rules.softmax else 'sigmoid'}, the best {rules.top_k}"]
        said += ["behind a norm"] if rules.eps is not None else []
        said += [f"of {rules.kept} of {rules.groups} groups"] if rules.kept < rules.groups else []
        said += ["renormalised"] if rules.renormalised else []
        return f"{self.node}: {', '.join(said)}; for {self.replaced} nodes"


@dataclass(frozen=True, slots=True)
class LeftRouter:
    """A selection of experts that keeps its own ops, and why."""

    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.node} stays: {self.why}"


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What became of each router, in graph order."""

    fused: tuple[FusedRouter, ...]
    left: tuple[LeftRouter, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} routers as one op each, {len(self.left)} left alone"]
        return "\n".join([*lines, *(f"  {router}" for router in (*self.fused, *self.left))])


def fuse_routers(gm: GraphModule) -> RouterReport:
    """Replace what is known of the routers of `gm`, in place: before the marker and before `fuse_elementwise`.

    Args:
        gm: an ATen graph whose nodes have `meta["val"]`.

    Returns:
        the routers that became an op, and those that stay, with the reason.
    """
    fused, left = list[FusedRouter](), list[LeftRouter]()
    flow = Dataflow.of(gm)
    matches = list[Match]()
    for selection in _selections(flow):
        try:
            matches.append(match(flow, selection))
            agree(gm, matches[-1])
        except Unmatched as reason:
            left.append(LeftRouter(selection.name, str(reason)))
            matches = [found for found in matches if found.selection is not selection]
    for found in matches:
        fused.append(FusedRouter(_replace(found), found.rules, len(found.nodes)))
    if fused:
        gm.graph.lint()
        gm.recompile()
    return RouterReport(tuple(fused), tuple(left))


def _selections(flow: Dataflow) -> Iterator[Node]:
    """For each mixture of experts, what selects for it last."""
    last = dict[int, int]()
    for routing in routings(flow, Weights.of(flow)):
        if routing.selection != routing.expert:
            last[routing.expert] = max(routing.selection, last.get(routing.expert, 0))
    for position in sorted(set(last.values())):
        if flow.nodes[position].target is not moe_router():
            yield flow.nodes[position]


# --- the guard --------------------------------------------------------------------------------------------------------


def agree(gm: GraphModule, found: Match) -> None:
    """Raise Unmatched unless the router's ops do what the op's reference does; no state of the program is touched."""
    rows, times = _rows(found)
    generator = torch.Generator().manual_seed(0)
    for own in (True, False):
        told = 0
        for _ in range(times):
            given = _inputs(gm, found, rows, generator, own)
            told += _require_alike(given, found.rules, *_run(found, given))
    if not told or told < rows * times / 2:  # of random weights: the model's own may all be equal
        raise Unmatched(f"ties leave {told} of {rows * times} tokens to compare")


def _rows(found: Match) -> tuple[int, int]:
    """How many tokens to run at once, and how often: the graph's own number if its views name one."""
    rows: Any = found.hidden.meta["val"].shape[0]
    named = any(node.target in (*RESHAPING, aten.expand.default) and _leads(node) != -1 for node in found.nodes)
    if not named or not isinstance(rows, int):
        return _ROWS, 1
    return rows, -(-_ROWS // max(rows, 1))


def _leads(node: Node) -> Any:
    sizes: Any = node.args[1]
    return sizes[0] if isinstance(sizes, list | tuple) and sizes else -1


def _inputs(gm: GraphModule, found: Match, rows: int, generator: torch.Generator, own: bool) -> Tensors:
    """Random hidden states, and the model's weights or random ones (a bias may be zeros, a scale ones)."""
    device = found.weight.meta["val"].device
    experts, width = found.weight.meta["val"].shape

    def random(node: Node | None, *shape: int, scale: float, offset: float = 0.0) -> Tensor | None:
        if node is None:
            return None
        if own and node is not found.hidden and (weight := _attribute(gm, node)) is not None:
            return weight.detach()
        drawn = torch.randn(shape, generator=generator) * scale + offset
        return drawn.to(device, node.meta["val"].dtype)

    hidden = random(found.hidden, rows, width, scale=1.0)
    weight = random(found.weight, experts, width, scale=1.0 / math.sqrt(width) / found.rules.factor)
    assert hidden is not None
    assert weight is not None
    return Tensors(
        hidden,
        weight,
        random(found.scale, width, scale=0.25, offset=1.0),
        random(found.bias, experts, scale=1.0 / experts if found.rules.softmax else 0.125),
        random(found.expert_scale, experts, scale=0.25, offset=1.0),
    )


def _attribute(gm: GraphModule, node: Node) -> Tensor | None:
    value: Any = gm
    if node.op != "get_attr":
        return None
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _run(found: Match, given: Tensors) -> tuple[Tensor, Tensor]:
    """The router's own ops."""
    values: dict[Node, Any] = {n: t for n, t in zip(found.tensors, given.all(), strict=True) if n is not None}

    def value(node: Node) -> Any:
        if node not in values:
            raise Unmatched(f"it needs {node}, which is none of its tensors")
        return values[node]

    with torch.no_grad():
        for node in found.nodes:
            if node.target is aten.type_as.default:
                values[node] = value(node.args[0]).to(node.meta["val"].dtype)  # pyright: ignore[reportArgumentType]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), value)
                values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return values[found.index], values[found.weights]


def _require_alike(given: Tensors, rules: Rules, index: Tensor, weights: Tensor) -> int:
    """Raise Unmatched where choices or weights differ by more than rounding; returns how many tokens could tell."""
    scores = scored(given, rules)
    choice = choices(scores, given, rules)
    slack = _ROUNDINGS[rules.product] * logits(given, rules).float().abs().amax(1, keepdim=True).clamp_min(1.0)
    noise = slack * (scores.amax(1, keepdim=True) if rules.softmax else 1.0)
    clear = torch.ones_like(noise[:, 0], dtype=torch.bool)
    if rules.kept < rules.groups:
        best = best_of_groups(scores if given.bias is None else scores + given.bias, rules)
        ranked = best.sort(descending=True).values
        clear = ranked[:, rules.kept - 1] - ranked[:, rules.kept] > 4 * noise[:, 0]
    # In any order: a selection may be one without.
    best = choice.gather(1, chosen(scores, given, rules))
    found = choice.gather(1, index).sort(descending=True).values
    alike = (best == found) | ((best - found).abs() <= 2 * noise)
    wrong = clear & ~alike.all(1)
    if wrong.any():
        raise Unmatched(f"it chooses other experts than the op would, for {int(wrong.sum())} of {len(wrong)} tokens")
    if weights.dtype is not rules.out or weights.shape != index.shape:
        raise Unmatched(f"its weights are {weights.dtype} {tuple(weights.shape)}")
    expected, came = weighed(scores, index, given, rules).float(), weights.float()
    rounding = slack + 2 * torch.finfo(rules.out).eps
    off = clear & ~((came - expected).abs() <= 2 * rounding * expected.abs() + 1e-30).all(1)
    if off.any():
        raise Unmatched(f"its weights are not the op's, for {int(off.sum())} of {len(off)} tokens")
    return int(clear.sum())


# --- replacing --------------------------------------------------------------------------------------------------------


def _replace(found: Match) -> str:
    """One op in place of a match; returns its name."""
    selection, inside = found.selection, set(found.nodes)
    for node in found.tensors:
        if node is not None and node.op == "get_attr" and selection < node:
            selection.prepend(node)
    op = derived(selection, "router", moe_router(), (*found.tensors, *found.rules.fields))
    for number, node in enumerate((found.index, found.weights)):
        with node.graph.inserting_before(selection):
            element = node.graph.create_node(
                "call_function", operator.getitem, (op, number), name=f"{node.name}_{('index', 'weights')[number]}"
            )
        element.meta = {**node.meta, "val": op.meta["val"][number]}
        node.replace_all_uses_with(element, delete_user_cb=lambda user: user not in inside)
    for node in reversed(found.nodes):
        if not node.users:
            node.graph.erase_node(node)
    return op.name
