"""Traced graphs as a trace that Perfetto and chrome://tracing open.

Enters: graphs with their matched replays. Leaves: the JSON of a Chrome trace: a graph is a process, a lane a track,
regions are slices with their kernels inside, named by op; a counter says how many lanes are busy. Invariant: slices of
one track nest or follow one another, as the format asks: a kernel launched early is shown up to the start of the next,
and its `us` says how long it took.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from .trace_layout import label_of
from .trace_match import Replay, Traced
from .trace_regions import by_lane

_COUNTER: Final = "lanes busy"


def perfetto(graphs: Mapping[str, Traced]) -> dict[str, Any]:
    """The trace of all graphs; each one's clock starts with its own first kernel."""
    events: list[dict[str, Any]] = []
    for process, (name, traced) in enumerate(graphs.items(), 1):
        events.append(_meta("process_name", process, 0, name=name))
        for track, lane in enumerate(traced.plan.lanes, 1):
            events.append(_meta("thread_name", process, track, name=lane))
            events.append(_meta("thread_sort_index", process, track, sort_index=track))
        zero = traced.replays[0].start
        for number, replay in enumerate(traced.replays):
            events += _replay(traced, replay, process, number, zero)
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _meta(kind: str, process: int, track: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": args}


def _slice(name: str, kind: str, process: int, track: int, start: float, end: float, **args: Any) -> dict[str, Any]:
    first, last = round(start, 3), round(end, 3)  # both ends, so that what lies inside still does
    where = {"pid": process, "tid": track, "ts": first, "dur": round(last - first, 3)}
    return {"ph": "X", "name": name, "cat": kind, **where, "args": args}


def _replay(traced: Traced, replay: Replay, process: int, number: int, zero: float) -> Iterator[dict[str, Any]]:
    plan = traced.plan
    tracks = {lane: track for track, lane in enumerate(plan.lanes, 1)}
    for region, works in plan.regions.items():
        times = replay.times(works)
        start, end = min(start for start, _ in times) - zero, max(end for _, end in times) - zero
        yield _slice(region, "region", process, tracks[plan.works[works[0]].lane], start, end, replay=number)
    for lane in plan.lanes:
        own = sorted(
            (n for n, work in enumerate(plan.works) if work.lane == lane), key=lambda n: replay.kernels[n].start
        )
        following = [*own[1:], None]
        for n, after in zip(own, following, strict=True):
            work, kernel = plan.works[n], replay.kernels[n]
            end = kernel.end if after is None else min(kernel.end, replay.kernels[after].start)
            yield _slice(
                label_of(work), "kernel", process, tracks[lane], kernel.start - zero, end - zero,
                op=work.op, kernel=work.kernel, region=work.region or "", line=work.line, replay=number,
                stream=kernel.stream, us=round(kernel.end - kernel.start, 3),
            )  # fmt: skip
    steps: dict[float, int] = {}
    for times in by_lane(plan, replay).values():
        for start, end in times:
            steps[start] = steps.get(start, 0) + 1
            steps[end] = steps.get(end, 0) - 1
    busy = 0
    for now in sorted(steps):
        busy += steps[now]
        yield {"ph": "C", "name": _COUNTER, "pid": process, "ts": round(now - zero, 3), "args": {"lanes": busy}}
