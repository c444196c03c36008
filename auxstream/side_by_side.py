"""One decode step captured with and without regions, and the same prompts through both.

Enters: a model, and prompts as ids. Leaves: `Step`s with any choice of regions, and what differs between two of them,
bit for bit. Invariant: all steps are one traced graph over the same weights, given its kernels once, before regions are
laid: they run the same kernels, so equal bits are the right thing to ask for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .bench.harness import device_time
from .capture.compiler import warm_up_and_capture
from .capture.huggingface import DecodeStep
from .capture.laying import Laying
from .capture.options import Options
from .capture.policy import ruled, unmatched, unmeasured
from .capture.proof import Report
from .capture.proposals import propose
from .capture.schedule import insert_regions
from .capture.state import bits
from .capture.trace import trace
from .kernels.derive import copy_of
from .kernels.safety import refuse_unknown_regions
from .runtime.errors import AuxstreamWarning
from .runtime.settings import OverlapRules


@dataclass(frozen=True, slots=True)
class Captured:
    """A step as a graph: its replay, the logits that every replay writes, and what was proved."""

    replay: Callable[[], None]
    logits: Tensor
    report: Report


Inputs = tuple[Tensor, Tensor]
Capture = Callable[[GraphModule, Inputs, Sequence[Tensor], str], Captured]
"""How a step, given its inputs and the caches it writes, becomes a graph of that name."""


def capture_step(step: GraphModule, inputs: Inputs, caches: Sequence[Tensor], name: str) -> Captured:
    """A CUDA graph, or a program of the simulated machine. A failed proof is for the caller to report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AuxstreamWarning)
        graph, logits = warm_up_and_capture(step, inputs, caches, inputs[0].device, name=name, verify="warn")
    return Captured(graph.replay, logits, graph.report)


@dataclass(frozen=True, slots=True)
class Step:
    """A captured decode step, over caches of its own."""

    regions: tuple[str, ...]
    inputs: Inputs
    caches: tuple[Tensor, ...]
    captured: Captured

    def __call__(self, ids: Tensor, position: Tensor) -> Tensor:
        """Logits `[batch, vocab]`, until the next call, of tokens `[batch, 1]` at `position` `[batch]`."""
        for mine, given in zip(self.inputs, (ids, position), strict=True):
            mine.copy_(given)
        self.captured.replay()
        return self.captured.logits

    def poisoned(self, ids: Tensor, position: Tensor) -> Tensor:
        """The same, and a replay that writes nothing shows."""
        self.captured.logits.fill_(float("nan"))
        return self(ids, position)

    def reset(self) -> None:
        """Before the first token."""
        for cache in self.caches:
            cache.zero_()


class Workbench:
    """One model's decode step, from which captured ones are made. `rules`: which branches get regions, as
    `Options.overlap` says it; left to them, shared experts.

    Attributes:
        regions: names of the regions, in the order of the model.
        branches: kinds of branches that could have some.
        unmatched: globs of rules that no branch has.
        states: names of the caches.
        fused: what was fused.
    """

    def __init__(
        self, model: nn.Module, batch: int, context: int, rules: OverlapRules = (), capture: Capture = capture_step
    ) -> None:
        self._capture = capture
        device = next(model.parameters()).device
        self.batch = batch
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._inputs = ids, torch.zeros(batch, dtype=torch.int64, device=device)
        traced = trace(DecodeStep(model, batch, context), self._inputs)
        self.states = traced.mutated_buffers
        laying = Laying(traced, Options().in_force(), device.type == "cuda", {})
        proposals = propose(laying.graph)
        self.branches = tuple(dict.fromkeys(proposal.kind for proposal in proposals))
        self.unmatched = tuple(unmatched(proposals, rules))
        refuse_unknown_regions(region.name for proposal in proposals for region in proposal.regions)
        plan = unmeasured(*ruled(proposals, rules)).plan
        self._module, report = laying.marked(plan, trial=False)
        place = {node.name: number for number, node in enumerate(laying.graph.graph.nodes)}
        regions = sorted(plan.regions, key=lambda region: min(place[name] for name in region.nodes))
        self.regions = tuple(region.name for region in regions)
        self.fused = "nothing" if report is None else report.summary

    def step(self, regions: Sequence[str], name: str) -> Step:
        """The step with these regions on lanes, and everything else on one stream."""
        module = copy_of(self._module)
        caches: list[Tensor] = []
        for state in self.states:
            owner, _, leaf = state.rpartition(".")
            caches.append(torch.zeros_like(getattr(module.get_submodule(owner), leaf)))
            setattr(module.get_submodule(owner), leaf, caches[-1])
        if regions:
            insert_regions(module, tuple(regions))
        inputs = self._inputs[0].clone(), self._inputs[1].clone()
        return Step(tuple(regions), inputs, tuple(caches), self._capture(module, inputs, caches, name))


class Group:
    """Prompts that run as one batch: each row takes its own prompt, then what it makes itself, one token a turn."""

    def __init__(self, prompts: Sequence[Sequence[int]], tokens: int, device: torch.device) -> None:
        longest = max(map(len, prompts))
        self.prompts = prompts
        self.tokens = tokens
        self.turns = longest + tokens - 1
        padded = [[*ids, *[0] * (longest - len(ids))] for ids in prompts]
        self._table = torch.tensor(padded, device=device)
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=device)

    def feed(self, turn: int, made: Tensor) -> Inputs:
        """What every row takes next; rows that are done stay where they are."""
        if turn < self._table.shape[1]:
            made = torch.where(turn < self._lengths, self._table[:, turn], made)
        return made[:, None], (self._lengths + self.tokens - 2).clamp(max=turn)

    def made(self, turns: Sequence[Tensor]) -> list[list[int]]:
        """Of what each row made in each turn, what follows its prompt."""
        rows: list[list[int]] = torch.stack(list(turns), 1).tolist()
        return [row[len(p) - 1 : len(p) - 1 + self.tokens] for row, p in zip(rows, self.prompts, strict=True)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one group gave on two steps.

    Attributes:
        turns: how many were compared.
        differing: turns in which logits differed, in any bit.
        rows: of the first such turn, the rows that differed.
        largest: the largest difference in that turn; None where it is no number.
        caches: names of the caches that differed at the end.
        made: the tokens that each row made, by the first step.
        other: the same by the second step; both were given the first one's.
        nan: in how many turns some of the first step's logits were NaN: that these are equal says nothing.
    """

    turns: int
    differing: tuple[int, ...]
    rows: tuple[int, ...]
    largest: float | None
    caches: tuple[str, ...]
    made: list[list[int]]
    other: list[list[int]]
    nan: int = 0

    @property
    def equal(self) -> bool:
        return not self.differing and not self.caches


def compare(one: Step, other: Step, group: Group, states: Sequence[str]) -> Comparison:
    """Run a group through both, from empty caches; both are given the tokens that the first one makes. Nothing waits
    on the host before the end."""
    one.reset()
    other.reset()
    flags: list[Tensor] = []
    gaps: list[Tensor] = []
    nan: list[Tensor] = []
    made: list[Tensor] = []
    theirs: list[Tensor] = []
    with torch.no_grad():
        next_ids = torch.zeros_like(one.inputs[1])
        for turn in range(group.turns):
            ids, position = group.feed(turn, next_ids)
            expected, got = one.poisoned(ids, position), other.poisoned(ids, position)
            flags.append((bits(expected) != bits(got)).any(1))
            gaps.append((expected.float() - got.float()).abs().max())
            nan.append(expected.isnan().any())
            next_ids = expected.argmax(-1)
            made.append(next_ids)
            theirs.append(got.argmax(-1))
        unlike = [(bits(a) != bits(b)).any() for a, b in zip(one.caches, other.caches, strict=True)]
    differing: list[list[bool]] = torch.stack(flags).tolist()
    turns = tuple(turn for turn, rows in enumerate(differing) if any(rows))
    largest = gaps[turns[0]].item() if turns else 0.0
    return Comparison(
        turns=group.turns,
        differing=turns,
        rows=tuple(row for row, flag in enumerate(differing[turns[0]]) if flag) if turns else (),
        largest=largest if math.isfinite(largest) else None,
        caches=tuple(name for name, flag in zip(states, unlike, strict=True) if flag.item()),
        made=group.made(made),
        other=group.made(theirs),
        nan=sum(torch.stack(nan).tolist()),
    )


def decoding_rate(step: Step, group: Group) -> float:
    """Tokens per second of greedy decoding behind the prompts, over the device's own clock (GPU only)."""
    start = group.turns - group.tokens

    def decode() -> None:
        made = torch.zeros_like(step.inputs[1])
        for turn in range(start, group.turns):
            made = step(*group.feed(turn, made)).argmax(-1)

    with torch.no_grad():
        microseconds = device_time(decode, 1)
    return len(group.prompts) * group.tokens * 1e6 / microseconds
