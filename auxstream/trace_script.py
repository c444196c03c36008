"""`auxstream trace SCRIPT`: a script runs as `python` would run it, and replays of its graphs are profiled.

Enters: a script that knows nothing of this. Leaves: an `Entry` per graph that it replayed, captured with
`auxstream.graph` (compiled models' included) or with `torch.cuda.graph`; and how the script ended. Invariant: of each
graph the first replays are profiled, but not those by which a compiled model chooses its branches; behind them the
script runs as it would alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from .bench.trace_match import Kernel, MatchError, trace_of
from .bench.trace_plan import plan_of
from .bench.trace_profile import Launch, Session, profiled_already
from .capture import graphs, race
from .capture.adopt import Adopted, adopting
from .capture.report import Report
from .trace_output import Entry
from .verify_script import Ending, run_as_main


class Profiling(Protocol):
    """A profiler's session."""

    def start(self) -> None: ...

    def stop(self) -> Sequence[Launch]: ...


@dataclass(slots=True)
class Watched:
    """A graph, and the launches of it that were profiled."""

    name: str
    report: Report
    launches: list[Sequence[Kernel]] = field(default_factory=list[Sequence[Kernel]])


class Sampler:
    """Decides, replay by replay, when the profiler runs: it begins with a graph that has been seen too seldom, and ends
    before one that has been seen enough, or that nobody knows.

    Args:
        most: replays of each graph that are profiled.
        session: makes a profiler's session.
    """

    def __init__(self, most: int, session: Callable[[], Profiling] = Session) -> None:
        self.watched: list[Watched] = []
        self.notes: dict[str, None] = {}
        self._most = most
        self._make = session
        self._session: Profiling | None = None
        self._log: list[Watched | None] = []  # the replays of this session, whoever makes them
        self._graphs: WeakKeyDictionary[Any, Watched] = WeakKeyDictionary()
        self._paused = 0
        self._lock = threading.RLock()
        self._thread = threading.get_ident()  # profilers end on the thread they began on

    def add(self, graph: Any, name: str, report: Report) -> None:
        """`graph` was captured."""
        self._graphs[graph] = watched = Watched(name, report)
        self.watched.append(watched)

    def replay(self, graph: Any, launch: Callable[[], object]) -> None:
        """Launch a graph, profiled or not."""
        with self._lock:
            watched = self._graphs.get(graph)
            if threading.get_ident() == self._thread:
                if watched is None or self._paused or self._seen(watched) >= self._most:
                    self.end()
                elif self._session is None and not profiled_already():
                    self._session = self._make()
                    self._session.start()
            if self._session is not None:
                self._log.append(watched)
            launch()

    def end(self) -> None:
        """Stop the profiler, if it runs, and take what it saw."""
        session, log = self._session, self._log
        self._session, self._log = None, []
        if session is None:
            return
        launches = session.stop()
        if len(launches) != len(log):
            self.notes[f"{len(log)} replays were made, and the profiler saw {len(launches)}: left out"] = None
            return
        for watched, launch in zip(log, launches, strict=True):
            if watched is not None:
                watched.launches.append(launch.kernels)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Nothing is profiled in the block."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _seen(self, watched: Watched) -> int:
        return len(watched.launches) + sum(other is watched for other in self._log)


def trace_script(script: Path, arguments: Sequence[str], replays: int) -> tuple[list[Entry], list[str], Ending]:
    """Run a script, and trace the graphs that it replays.

    Args:
        script: the file.
        arguments: its own.
        replays: of each graph, profiled.

    Returns:
        what was traced; why other graphs were not, in words; how the script ended.
    """
    sampler = Sampler(replays)
    found: list[Adopted] = []
    with adopting(found), following(sampler, found):
        ending = run_as_main(script, arguments)
        sampler.end()
    entries, notes = entries_of(sampler.watched)
    return entries, [*sampler.notes, *notes], ending


def entries_of(watched: Sequence[Watched]) -> tuple[list[Entry], list[str]]:
    """What can be shown, and why the rest cannot."""
    entries: list[Entry] = []
    notes: list[str] = []
    idle = sum(not graph.launches for graph in watched)
    if idle:
        notes.append(f"{idle} graph{'s were' if idle > 1 else ' was'} captured and no replay of it profiled")
    for graph in watched:
        if not graph.launches:
            continue
        try:
            plan = plan_of(graph.report.nodes, graph.report.edges)
            entries.append(Entry(graph.name, trace_of(plan, graph.launches)))
        except MatchError as error:
            notes.append(f"graph {graph.name!r} is not shown: {error}")
    return entries, notes


@contextmanager
def following(sampler: Sampler, found: list[Adopted]) -> Generator[None]:
    """Tell `sampler` of every graph captured and replayed in the block. `found` is what `adopting` appends to."""
    kind: Any = torch.cuda.CUDAGraph
    replay, capture_end, racing = kind.replay, kind.capture_end, race.race

    def observe(graph: graphs.CapturedGraph) -> None:
        if isinstance(graph, graphs.CudaGraph):
            sampler.add(graph.cuda_graph, graph.name, graph.report)

    def ended(graph: Any) -> None:
        known = len(found)
        capture_end(graph)
        for adopted in found[known:]:
            sampler.add(graph, adopted.name, adopted.report)

    def replayed(graph: Any) -> None:
        sampler.replay(graph, lambda: replay(graph))

    def raced(one: Callable[[], object], other: Callable[[], object]) -> Any:
        with sampler.paused():
            return racing(one, other)

    graphs.OBSERVERS.append(observe)
    kind.replay, kind.capture_end, race.race = replayed, ended, raced
    try:
        yield
    finally:
        kind.replay, kind.capture_end, race.race = replay, capture_end, racing
        graphs.OBSERVERS.remove(observe)
