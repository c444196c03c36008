"""Which of two plans is faster: their graphs' replays timed in turn, on the device.

Enters: how a plan is captured, and pairs of plans. Leaves: a `Result` each, or why one cannot run. Nothing else may run
on the device meanwhile. Invariant: a draw is not a win: the second one wins if it is faster in the median by more than
the measure of noise, and in nearly every round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from ..runtime.errors import AuxstreamError
from .graphs import CapturedGraph
from .policy import Plan, Result
from .state import preserved

_ROUNDS: Final = 12
_LOSSES: Final = 2
"""Rounds that a winner may lose: by chance alone, ten or more of twelve come in one case of fifty."""
_ROUND_MS: Final = 4.0
_MOST_CALLS: Final = 50
_MARGIN: Final = 0.003


class Racing:
    """Races plans of one graph. `build` captures a plan; what `mutated` holds is put back after each race. `starved`:
    memory did not suffice for one, which says nothing of another day."""

    def __init__(self, build: Callable[[Plan], CapturedGraph], mutated: Sequence[Tensor], device: torch.device) -> None:
        self._build = build
        self._mutated = mutated
        self._device = device
        self.starved = False
        self._best: tuple[Plan, CapturedGraph] | None = None

    def __call__(self, best: Plan, plan: Plan) -> Result | str:
        if self._best is None or self._best[0] != best:
            self._best = best, self._build(best)
        try:
            graph = self._build(plan)
        except (AuxstreamError, torch.OutOfMemoryError) as error:
            self.starved |= isinstance(error, torch.OutOfMemoryError)
            return str(error).partition("\n")[0]
        with preserved(self._mutated, self._device):
            result = race(self._best[1].replay, graph.replay)
        if result.won:
            self._best = plan, graph
        return result


def race(one: Callable[[], object], other: Callable[[], object]) -> Result:
    """Time both; on the current stream."""
    for run in (one, other):
        _timed(run, 2)
    calls = max(1, min(_MOST_CALLS, int(_ROUND_MS / max(_timed(one, 3), 1e-3))))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(_ROUNDS):
        for which in (0, 1) if turn % 2 else (1, 0):  # neither is always the one that finds the caches cold
            times[which].append(_timed((one, other)[which], calls))
    return judged(*times)


def judged(before: list[float], after: list[float]) -> Result:
    """Milliseconds of each round -> who won."""
    medians = statistics.median(before), statistics.median(after)
    lost = sum(b <= a for b, a in zip(before, after, strict=True))
    return Result(medians[0] * 1e3, medians[1] * 1e3, medians[1] < medians[0] * (1 - _MARGIN) and lost <= _LOSSES)


def _timed(run: Callable[[], object], calls: int) -> float:
    """Milliseconds per call. The host watches the last event: this is compiling, not serving."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    while not end.query():
        time.sleep(1e-4)
    return start.elapsed_time(end) / calls
