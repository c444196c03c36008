"""How one call of the experts is launched: which form, and which tiles.

Enters: a call. Leaves: a `Plan`, settled once per class of numbers of tokens, layout of the inputs and card: what is
likely is compiled side by side, and timed on made-up tokens with the layer's own weights; choices are remembered on
disk. Invariant: nothing is compiled or timed in a capture, and the same class gives the same bits for a token whatever
the others are.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor

from ..runtime.errors import CaptureError
from . import experts_few as few
from . import experts_many as many
from .ahead import make_ready
from .experts_few import Launch, Tile
from .experts_work import Work, require
from .tune import choose
from .variants import next_power_of_two

Form = Literal["one", "few", "many", "grouped"]
_Choice = TypeVar("_Choice")
_TRIALS: Final = 8
"""Calls that a trial goes round, so that a few experts' weights are not found in a cache."""
_PROGRAM_BYTES: Final = 96 * 1024
"""Shared memory that every card has which these kernels were made for (sm_80 on) lets a program have."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A form, the tiles of both products, and how many pairs a program of the grouped form takes at a time."""

    form: Form
    up: Tile | None = None
    down: Tile | None = None
    tokens: int = 16

    def __str__(self) -> str:
        return f"{self.form}: up {self.up}, down {self.down}" + (f", {self.tokens}" if self.form == "many" else "")


# --- running ----------------------------------------------------------------------------------------------------------


def run(work: Work, plan: Plan) -> Tensor:
    """The layer's output, launched as planned."""
    if plan.form == "grouped":
        return many.grouped(work)
    assert plan.up is not None
    assert plan.down is not None
    out = work.hidden.new_empty(work.hidden.shape)
    act = few.activations(work)
    if plan.form == "one":
        few.up_one(work, act, plan.up)()
        few.down_one(work, act, out, plan.down)()
        return out
    part = few.parts(work)
    if plan.form == "few":
        few.up_few(work, act, plan.up)()
        few.down_few(work, act, part, plan.down)()
    else:
        order, start = many.groups(work)
        many.group(work, order, start)()
        many.up_many(work, order, start, act, plan.up, plan.tokens)()
        many.down_many(work, order, start, act, part, plan.down, plan.tokens)()
    few.sum_of(work, part, out, once=plan.form == "few")()
    return out


# --- candidates -------------------------------------------------------------------------------------------------------


def default(work: Work) -> Plan:
    """What is likely to be fastest."""
    form = form_of(work)
    if form == "grouped":
        return Plan("grouped")
    return Plan(form, up_tiles(work, form)[0], down_tiles(work, form)[0], tokens_of(work))


def form_of(work: Work) -> Form:
    """The form that is likely to be fastest; of the last two that is measured, where both can be had."""
    if work.tokens == 1 and work.up.stride(2) == work.down.stride(2) == 1 and work.choices <= 32:
        return "one"
    if work.tokens <= few.MOST_FEW:
        return "few"
    return "grouped" if work.pairs > many.MOST_PAIRS and many.groupable(work) else "many"


def tokens_of(work: Work) -> int:
    """Pairs that a program of the grouped form takes at a time: about twice what an expert has on average."""
    each = 2 * few.row_class(work.tokens) * work.choices // work.experts
    return min(128, max(16, next_power_of_two(each)))


def up_tiles(work: Work, form: Form) -> list[Tile]:
    if form == "one":
        return [Tile(4, 128, 2), Tile(8, 128, 4), Tile(8, 256, 4), Tile(4, 256, 2)]
    if form == "few":
        return _that_fit(work, 16, 2, [Tile(32, 128, 4, 4), Tile(64, 128, 4, 3), Tile(16, 128, 2, 4)])
    tiles = [Tile(32, 128, 4, 4), Tile(64, 128, 8, 3)]
    wide = [Tile(64, 64, 4, 4), Tile(128, 64, 8, 3)]
    return _that_fit(work, tokens_of(work), 2, tiles if tokens_of(work) <= 32 else wide)


def down_tiles(work: Work, form: Form) -> list[Tile]:
    if form == "one":  # a program holds a row of every choice: what they hold together is what counts
        cols = max(16, 1024 // next_power_of_two(work.choices))
        return [Tile(1, cols, 4), Tile(1, 2 * cols, 4), Tile(1, 2 * cols, 2), Tile(2, 2 * cols, 8)]
    if form == "few":
        return _that_fit(work, 16, 1, [Tile(64, 128, 4, 4), Tile(32, 128, 4, 4), Tile(128, 128, 4, 4)])
    tiles = [Tile(64, 128, 4, 3), Tile(32, 128, 4, 4)]
    wide = [Tile(64, 64, 4, 4), Tile(128, 64, 8, 4)]
    return _that_fit(work, tokens_of(work), 1, tiles if tokens_of(work) <= 32 else wide)


def _that_fit(work: Work, tokens: int, products: int, tiles: Iterable[Tile]) -> list[Tile]:
    """Tiles of at least 64 rows where those lie side by side, and with columns halved until a program has room."""
    found: dict[Tile, None] = {}
    transposed = work.up.stride(2) != 1
    for tile in tiles:
        rows, cols = max(tile.rows, 64) if transposed else tile.rows, tile.cols
        while cols > 16 and _shared(work, rows, cols, tile.stages, tokens, products) > _PROGRAM_BYTES:
            cols //= 2
        found[Tile(rows, cols, tile.warps, tile.stages)] = None
    return list(found)


def _shared(work: Work, rows: int, cols: int, stages: int, tokens: int, products: int) -> int:
    return (products * rows + tokens) * cols * work.hidden.element_size() * (stages - 1)


# --- choosing ---------------------------------------------------------------------------------------------------------


def settle(work: Work, device: str) -> Plan:
    """The plan for calls like this one, timed on the device of this name. What it is timed on are other tokens."""
    form = form_of(work)
    if form == "grouped":
        return Plan("grouped")
    trials = _trials(work)
    key = _key(work, device)
    plan = default(work)
    launches = [_candidates(trial, plan) for trial in trials]
    make_ready((launch.compile for product in launches[0] for launch in product.values()), work.hidden.device)
    plan = replace(
        plan,
        up=_fastest(f"{key}-{form}-up", {tile: [up[tile] for up, _ in launches] for tile in launches[0][0]}),
        down=_fastest(f"{key}-{form}-down", {tile: [down[tile] for _, down in launches] for tile in launches[0][1]}),
    )
    if form == "many" and many.groupable(work):
        plans = (plan, Plan("grouped"))
        plan = _fastest(f"{key}-form", {each: [_call(trial, each) for trial in trials] for each in plans})
    return plan


def _fastest(key: str, calls: Mapping[_Choice, Sequence[Callable[[], object]]]) -> _Choice:
    rounds = {choice: _Round(each) for choice, each in calls.items()}
    best = choose(key, rounds, ())
    return next(choice for choice, each in rounds.items() if each is best)


class _Round:
    """One call after the other, round and round, as `tune` launches them."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._calls = itertools.cycle(calls)

    def __call__(self, _: Sequence[Tensor]) -> None:
        next(self._calls)()


def _call(work: Work, plan: Plan) -> Callable[[], object]:
    return lambda: run(work, plan)


def _candidates(work: Work, plan: Plan) -> tuple[Mapping[Tile, Launch], Mapping[Tile, Launch]]:
    """Launches of both products by tile, on workspaces of their own."""
    act, form = few.activations(work), plan.form
    ups, downs = up_tiles(work, form), down_tiles(work, form)
    if form == "one":
        out = torch.empty_like(work.hidden)
        return {t: few.up_one(work, act, t) for t in ups}, {t: few.down_one(work, act, out, t) for t in downs}
    part = few.parts(work)
    if form == "few":
        return {t: few.up_few(work, act, t) for t in ups}, {t: few.down_few(work, act, part, t) for t in downs}
    order, start = many.groups(work)
    many.group(work, order, start)()
    return (
        {t: many.up_many(work, order, start, act, t, plan.tokens) for t in ups},
        {t: many.down_many(work, order, start, act, part, t, plan.tokens) for t in downs},
    )


def _trials(work: Work) -> list[Work]:
    """Calls with as many tokens as the class has, for the largest one by chance, and experts chosen at random."""
    tokens, device = few.row_class(work.tokens), work.hidden.device
    while few.by_pair(work) != (tokens * work.choices <= work.experts):
        tokens -= 1  # within one class the grid may have a slot per pair, or one per expert
    random = torch.Generator(device).manual_seed(0)
    found: list[Work] = []
    for _ in range(_TRIALS):
        scores = torch.rand(tokens, work.experts, generator=random, device=device)
        scale, chosen = scores.topk(work.choices)
        hidden = torch.randn(tokens, work.hidden.shape[1], generator=random, device=device).to(work.hidden.dtype)
        chosen, scale = chosen.to(work.chosen.dtype), scale.to(work.scale.dtype)
        found.append(replace(work, hidden=hidden, chosen=chosen, scale=scale))
    return found


def _key(work: Work, device: str) -> str:
    """A file name for the choices of this class."""
    facts: tuple[Any, ...] = (
        few.row_class(work.tokens), few.by_pair(work), work.choices, work.hidden.dtype, tuple(work.up.shape),
        work.up.stride(), work.down.stride(), work.up_bias is None, work.activation, work.interleaved,
    )  # fmt: skip
    return f"moe_experts-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}-{device}"


# --- by layout --------------------------------------------------------------------------------------------------------


class Experts:
    """What launches; remembers plans by class of tokens and layout of the inputs."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}

    def __call__(self, work: Work) -> Tensor:
        if not work.tokens:
            require(work)
            return work.hidden.new_empty(work.hidden.shape)
        if work.pairs > many.MOST_PAIRS and not many.groupable(work):
            most = max(1, many.MOST_PAIRS // work.choices)
            return torch.cat([self(part) for part in _cut(work, most)])
        key = (
            few.row_class(work.tokens), few.by_pair(work), work.choices, work.hidden.device, work.hidden.stride(0),
            work.hidden.dtype, work.chosen.dtype, work.scale.dtype, work.up.shape, work.up.stride(), work.down.stride(),
            work.up_bias is None, work.down_bias is None, work.activation, work.interleaved,
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._settle(work)
        return run(work, plan)

    def _settle(self, work: Work) -> Plan:
        require(work)
        if not work.hidden.is_cuda:
            return default(work)
        if torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                "moe_experts meets a new layout or number of tokens inside a capture",
                expected="one it was launched with before: nothing is compiled or timed inside a capture",
                came=f"{work.tokens} tokens, hidden states with strides {work.hidden.stride()}",
                remedy="run the graph once with these shapes before capturing it (auxstream.compile does)",
            )
        return settle(work, _device_name(work.hidden.device))


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "_")


def _cut(work: Work, most: int) -> list[Work]:
    parts = zip(work.hidden.split(most), work.chosen.split(most), work.scale.split(most), strict=True)
    rest = (work.up, work.down, work.up_bias, work.down_bias, work.activation, work.interleaved)
    return [Work(*part, *rest) for part in parts]
