"""Which node of a graph each kernel of a replay is.

Enters: the plan of a graph, and the kernels that one replay showed. Leaves: per work of the plan, its kernel.
Invariant: names agree one to one, and no kernel began before one that it waits for; if that cannot be had, it is an
error that says why.

Note "told apart". A profiler says a kernel's name and stream. Newer ones say the node too, by a number that grows in
the order in which nodes were captured; where it is there, and agrees with names and edges, it decides. Else kernels of
one name are told apart by the order that the graph leaves them: kernels are taken as they began, and each is one of the
nodes of its name whose waits are over. Where several are, all are followed, and those kept that break the least with
what a replay usually does: a kernel runs on the stream of one that it waited for, after all it waited for has ended,
and a stream does not change between lanes for nothing. The streams of a replay are not those of the capture: they
weigh, and decide nothing by themselves. Branches that are the same kernel by kernel stay alike, as do their figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ..runtime.errors import AuxstreamError
from .trace_intervals import Interval
from .trace_plan import Plan

BY_NODE: Final = "the profiler's node numbers"
BY_ORDER: Final = "names and the graph's own order"
_MOST_GUESSES: Final = 24
_SLACK_US: Final = 0.5  # of the profiler's clock
_MOST_NAMED: Final = 4


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel, copy or fill as a profiler saw it; times in microseconds. `node` numbers it within its graph."""

    name: str
    start: float
    end: float
    stream: int
    node: int | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """One replay: `kernels[n]` is work n of its plan. `how` they were told apart."""

    kernels: tuple[Kernel, ...]
    how: str = BY_ORDER

    @property
    def start(self) -> float:
        return min(kernel.start for kernel in self.kernels)

    @property
    def span(self) -> float:
        """From the first start to the last end."""
        return max(kernel.end for kernel in self.kernels) - self.start

    def times(self, works: Iterable[int]) -> list[Interval]:
        """When those works ran."""
        return [(self.kernels[work].start, self.kernels[work].end) for work in works]


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph and its replays, in the order they were made. `lost`: why others could not be matched, one each."""

    plan: Plan
    replays: tuple[Replay, ...]
    lost: tuple[MatchError, ...] = ()

    @property
    def typical(self) -> Replay:
        """The replay of the median length."""
        return sorted(self.replays, key=lambda replay: replay.span)[(len(self.replays) - 1) // 2]


class MatchError(AuxstreamError):
    """Kernels of a replay that are not those of the graph."""


def trace_of(plan: Plan, launches: Iterable[Sequence[Kernel]]) -> Traced:
    """A graph's replays, matched one by one.

    Raises:
        MatchError: not one of them is the graph's.
    """
    replays: list[Replay] = []
    lost: list[MatchError] = []
    for kernels in launches:
        try:
            replays.append(match(plan, kernels))
        except MatchError as error:
            lost.append(error)
    if not replays:
        raise lost[0] if lost else MatchError("no replay of the graph was seen", remedy="replay it while it is traced")
    return Traced(plan, tuple(replays), tuple(lost))


def match(plan: Plan, kernels: Sequence[Kernel]) -> Replay:
    """The kernel of each work.

    Raises:
        MatchError: kernels are missing or unknown, or began in an order that the graph forbids.
    """
    if not plan.works:
        raise MatchError(
            "the graph's kernels are not known",
            expected="a CUDA graph that was read back",
            came="one of which only the recording is known, or nothing",
            remedy="unset AUXSTREAM_VERIFY=off, and capture with a driver whose graphs can be read",
        )
    _same_names(plan, kernels)
    by_node = _by_node(plan, kernels)
    if by_node is not None:
        return Replay(by_node, BY_NODE)
    return Replay(_by_order(plan, sorted(kernels, key=lambda kernel: (kernel.start, kernel.end))))


def _same_names(plan: Plan, kernels: Sequence[Kernel]) -> None:
    planned = Counter(work.kernel for work in plan.works)
    came = Counter(kernel.name for kernel in kernels)
    if planned == came:
        return
    lacks, extra = planned - came, came - planned
    raise MatchError(
        "a replay did not show the kernels of its graph",
        expected=f"{len(plan.works)} kernels, as the captured graph has them",
        came=f"{len(kernels)}" + _listed(", without ", lacks) + _listed(", and besides ", extra),
        remedy="trace fewer replays at a time if the profiler lost some; a graph that was changed after its capture, "
        "or that branches on the device, cannot be traced",
    )


def _listed(head: str, names: Counter[str]) -> str:
    shown = [f"{count} x {name[:60]}" for name, count in names.most_common(_MOST_NAMED)]
    rest = len(names) - len(shown)
    return head + ", ".join(shown) + (f" and {rest} more names" if rest > 0 else "") if names else ""


def _by_node(plan: Plan, kernels: Sequence[Kernel]) -> tuple[Kernel, ...] | None:
    """By the numbers of the nodes, if each has its own and they agree with the names and with the order."""
    numbers = [kernel.node for kernel in kernels if kernel.node is not None]
    if len(set(numbers)) != len(kernels):
        return None
    ordered = tuple(sorted(kernels, key=lambda kernel: kernel.node or 0))
    if any(work.kernel != kernel.name for work, kernel in zip(plan.works, ordered, strict=True)):
        return None
    for kernel, waits in zip(ordered, plan.before, strict=True):
        if any(ordered[earlier].start > kernel.start for earlier in waits):
            return None
    return ordered


class _Guess:
    """One way to tell the kernels so far apart, and what speaks against it."""

    __slots__ = ("cost", "done", "kernels", "last", "ready")

    def __init__(self, plan: Plan) -> None:
        self.cost = 0
        self.done = 0  # works matched, as bits
        self.kernels: list[Kernel | None] = [None] * len(plan.works)
        self.ready = [work for work, waits in enumerate(plan.before) if not waits]
        self.last: dict[int, int] = {}  # stream -> the work that ran there last

    def copy(self) -> _Guess:
        other = _Guess.__new__(_Guess)
        other.cost, other.done = self.cost, self.done
        other.kernels, other.ready, other.last = self.kernels.copy(), self.ready.copy(), self.last.copy()
        return other

    def take(self, work: int, kernel: Kernel, plan: Plan) -> None:
        """`kernel` is `work`."""
        waits = [found for n in plan.before[work] if (found := self.kernels[n]) is not None]
        self.cost += 4 * sum(earlier.end > kernel.start + _SLACK_US for earlier in waits)
        self.cost += bool(waits) and all(earlier.stream != kernel.stream for earlier in waits)
        before = self.last.get(kernel.stream)
        if before is not None and before not in plan.before[work]:
            self.cost += plan.works[before].lane != plan.works[work].lane
        self.last[kernel.stream] = work
        self.kernels[work] = kernel
        self.done |= 1 << work
        self.ready.remove(work)
        self.ready += [later for later in plan.behind[work] if all(self.done >> n & 1 for n in plan.before[later])]


def _by_order(plan: Plan, kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """By names, and by what each may have waited for; `kernels` in the order they began."""
    guesses = [_Guess(plan)]
    for kernel in kernels:
        following: list[_Guess] = []
        for guess in guesses:
            fits = sorted(work for work in guess.ready if plan.works[work].kernel == kernel.name)
            for position, work in enumerate(fits):
                own = guess if position == len(fits) - 1 else guess.copy()
                own.take(work, kernel, plan)
                following.append(own)
        if not following:
            raise _forbidden(plan, guesses[0], kernel)
        guesses = _best(following)
    return tuple(kernel for kernel in guesses[0].kernels if kernel is not None)


def _best(guesses: Sequence[_Guess]) -> list[_Guess]:
    """The cheapest, one of each that go on alike."""
    kept: dict[tuple[int, tuple[tuple[int, int], ...]], _Guess] = {}
    for guess in sorted(guesses, key=lambda guess: guess.cost):
        kept.setdefault((guess.done, tuple(sorted(guess.last.items()))), guess)
    return list(kept.values())[:_MOST_GUESSES]


def _forbidden(plan: Plan, guess: _Guess, kernel: Kernel) -> MatchError:
    held = [n for n, work in enumerate(plan.works) if work.kernel == kernel.name and not guess.done >> n & 1]
    awaited = [plan.works[n].kernel for n in plan.before[held[0]] if not guess.done >> n & 1] if held else []
    return MatchError(
        f"kernel {kernel.name[:80]} began where the graph does not let it",
        expected=f"{', '.join(name[:60] for name in awaited) or 'a kernel of another name'} to begin before it",
        came=f"it began first, on stream {kernel.stream}",
        remedy="trace the graph that was captured: this one was changed, or the profiler mixed up its replays",
    )
