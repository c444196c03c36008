"""`auxstream trace`: which replays it profiles, what it writes, its exit code; on a GPU, that its figures are true.

Without a GPU scripts run with a stand-in for torch's graphs and for the profiler: what is replayed "takes" what the
stand-in says.
"""

from __future__ import annotations

import json
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import auxstream
from auxstream import trace_command, trace_script
from auxstream.__main__ import main
from auxstream.bench.trace_match import Kernel, match, trace_of
from auxstream.bench.trace_plan import plan_of
from auxstream.bench.trace_profile import Launch, launches_of_replays
from auxstream.bench.trace_regions import figures_of
from auxstream.capture import graphs, race
from auxstream.capture.evidence import Node
from auxstream.capture.report import Report
from auxstream.trace_demo import Demo, trace_demo
from auxstream.trace_output import Entry, write_all
from auxstream.trace_script import Sampler, entries_of, following

NODES = (
    Node("norm", "caller", None, "x.py:1: norm", (), "norm"),
    Node("mm", "caller", None, "x.py:2: mm", (), "mm"),
    Node("mm", "lane0", "aux", "x.py:3: mm", (), "mm_small"),
    Node("add", "caller", None, "x.py:4: add", (), "add"),
)
REPORT = Report((), (), (), NODES, ((0, 1), (0, 2), (1, 3), (2, 3)))


def kernels(start: float = 0.0) -> tuple[Kernel, ...]:
    times = (("norm", 0, 2, 7), ("mm", 3, 9, 7), ("mm_small", 3, 7, 9), ("add", 10, 11, 7))
    return tuple(Kernel(name, start + a, start + b, stream) for name, a, b, stream in times)


class FakeSession:
    """A profiler whose launches are those that `replays` counts while it runs."""

    made: list[FakeSession]
    running: FakeSession | None

    def __init__(self) -> None:
        self.seen = 0
        type(self).made.append(self)

    def start(self) -> None:
        assert type(self).running is None
        type(self).running = self

    def stop(self) -> Sequence[Launch]:
        assert type(self).running is self
        type(self).running = None
        return [Launch(n, kernels(100.0 * n)) for n in range(self.seen)]


class FakeGraph:
    """A stand-in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        if FakeSession.running is not None:
            FakeSession.running.seen += 1

    def capture_end(self) -> None: ...


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    FakeSession.made, FakeSession.running = [], None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    yield
    assert FakeSession.running is None
    assert not graphs.OBSERVERS


def sampled(plays: str, most: int = 2, **known: bool) -> tuple[dict[str, int], int]:
    """Replay graphs by their letters; capitals are told of. Returns how often each was seen, and sessions."""
    sampler = Sampler(most, FakeSession)
    made = {letter: FakeGraph() for letter in dict.fromkeys(plays)}
    with following(sampler, []):
        for letter, graph in made.items():
            if letter.isupper():
                sampler.add(graph, letter, REPORT)
        for letter in plays:
            made[letter].replay()
        sampler.end()
    assert {letter: graph.replays for letter, graph in made.items()} == {
        letter: plays.count(letter) for letter in made
    }, "the script's own replays are all made"
    assert not sampler.notes
    return {graph.name: len(graph.launches) for graph in sampler.watched}, len(FakeSession.made)


@pytest.mark.usefixtures("stage")
@pytest.mark.parametrize(
    ("plays", "seen", "sessions"),
    [
        ("A", {"A": 1}, 1),
        ("AAAAAA", {"A": 2}, 1),
        ("ABABABAB", {"A": 2, "B": 2}, 1),
        ("AAAABBBB", {"A": 2, "B": 2}, 2),
        ("PDDDDDPDDDDP", {"P": 2, "D": 2}, 2),
        ("xxx", {}, 0),
        ("AxAxA", {"A": 2}, 2),
    ],
)
def test_the_first_replays_of_each_graph_are_profiled(plays: str, seen: dict[str, int], sessions: int) -> None:
    assert sampled(plays) == (seen, sessions)


@pytest.mark.usefixtures("stage")
def test_replays_by_which_a_model_chooses_its_branches_are_not_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, graph = Sampler(3, FakeSession), FakeGraph()

    def fake_race(one: Callable[[], object], other: Callable[[], object]) -> None:
        one(), other(), one()

    monkeypatch.setattr(race, "race", fake_race)
    with following(sampler, []):
        sampler.add(graph, "g", REPORT)
        race.race(graph.replay, graph.replay)
        assert not FakeSession.made
        graph.replay()
        sampler.end()
    assert race.race is fake_race
    assert graph.replays == 4
    assert len(sampler.watched[0].launches) == 1


@pytest.mark.usefixtures("stage")
def test_replays_of_other_threads_neither_begin_nor_end_a_session() -> None:
    sampler, graph, other = Sampler(5, FakeSession), FakeGraph(), FakeGraph()

    def elsewhere() -> None:
        thread = threading.Thread(target=other.replay)
        thread.start()
        thread.join()

    with following(sampler, []):
        sampler.add(graph, "g", REPORT)
        elsewhere()
        assert not FakeSession.made
        graph.replay()
        elsewhere()
        graph.replay()
        sampler.end()
    assert len(FakeSession.made) == 1
    assert len(sampler.watched[0].launches) == 2


@pytest.mark.usefixtures("stage")
def test_launches_that_nobody_made_here_are_not_taken_for_ours() -> None:
    sampler, graph = Sampler(5, FakeSession), FakeGraph()
    with following(sampler, []):
        sampler.add(graph, "g", REPORT)
        graph.replay()
        assert FakeSession.running is not None
        FakeSession.running.seen += 1
        sampler.end()
    assert not sampler.watched[0].launches
    assert "1 replays were made, and the profiler saw 2" in next(iter(sampler.notes))
    assert entries_of(sampler.watched) == ([], ["1 graph was captured and no replay of it profiled"])


@pytest.mark.usefixtures("stage")
def test_a_graph_whose_kernels_are_others_is_named_and_not_drawn() -> None:
    watched = trace_script.Watched("ours", REPORT, [kernels()])
    changed = trace_script.Watched("changed", REPORT, [kernels()[1:]])
    entries, notes = entries_of([watched, changed])
    assert [entry.name for entry in entries] == ["ours"]
    assert notes[0].startswith("graph 'changed' is not shown: a replay did not show the kernels of its graph")


# --- what is written --------------------------------------------------------------------------------------------------


def entry(name: str = "a graph [of] mine/1") -> Entry:
    plan = plan_of(REPORT.nodes, REPORT.edges)
    return Entry(name, trace_of(plan, [kernels(100.0 * n) for n in range(4)] + [kernels()[1:]]))


def test_files_and_table_say_the_same(tmp_path: Path) -> None:
    console = Console(record=True, width=160, markup=False, highlight=False)
    write_all(tmp_path / "new" / "folder", [entry(), entry("second")], console)
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "001-a_graph_of_mine_1.svg",
        "002-second.svg",
        "perfetto.json",
        "regions.json",
    ]
    ET.parse(folder / "001-a_graph_of_mine_1.svg")
    document = json.loads((folder / "regions.json").read_text())
    (aux,) = document["graphs"][0]["regions"]
    assert (aux["name"], aux["hidden"]["median"], aux["overlap share"], aux["streams"]) == ("aux", 4.0, 1.0, [9])
    assert (aux["alone"], aux["saved"], aux["paid"]) == (None, None, "unknown")
    assert document["graphs"][0]["span"]["median"] == 11.0
    assert document["graphs"][0]["matched by"] == ["names and the graph's own order"]
    assert len(document["graphs"][0]["replays lost"]) == 1
    said = console.export_text()
    assert "a graph [of] mine/1: 4 kernels, 11.0 us a replay" in said
    assert "two lanes or more at once for 4.0 us (36%)" in said
    assert "1 replays could not be matched" in said
    assert "aux" in said
    assert "100%" in said


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch, entries: list[Entry]) -> Generator[None]:
    """A GPU, and a script whose graphs were traced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(trace_script, "trace_script", lambda *_: (entries, ["a note"], ENDING["now"]))
    monkeypatch.setattr("auxstream.trace_output.machine", dict)
    yield


ENDING: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("ending", "traced", "code"),
    [
        (trace_script.Ending(0), True, 0),
        (trace_script.Ending(5), True, 5),
        (trace_script.Ending(0), False, 1),
        (trace_script.Ending(1, ValueError("x")), True, 2),
    ],
)
def test_exit_codes(
    ending: Any, traced: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script = tmp_path / "script.py"
    script.write_text("")
    ENDING["now"] = ending
    with pretended(monkeypatch, [entry()] if traced else []):
        assert main(["trace", "--to", str(tmp_path / "out"), str(script), "--its", "own"]) == code
    said = capsys.readouterr().out
    assert "a note" in said
    assert (tmp_path / "out").exists() == traced
    assert ("nothing was traced" in said) == (code == 1)


@pytest.mark.parametrize("what", ["demo", __file__])
def test_without_a_gpu_it_says_so_and_what_to_do(what: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["trace", what]) == 2
    said = capsys.readouterr().err
    assert "there is no GPU here" in said
    assert "verify --picture" in said


def test_a_script_that_is_not_there(capsys: Any) -> None:
    assert main(["trace", "nowhere.py"]) == 2
    assert "there is no script nowhere.py" in capsys.readouterr().err
    assert trace_command.DEMO == "demo"


def test_what_is_missing_is_the_script_alone(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trace"])
    assert stop.value.code == 2
    assert "required: demo|SCRIPT\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--layers", "0"], ["--fusion", "some"]])
def test_the_demos_own_arguments_are_checked(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trace", "demo", *arguments])
    assert stop.value.code == 2
    assert "auxstream trace demo" in capsys.readouterr().err


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def feed_forward() -> Entry:
    return trace_demo(Demo(layers=2), replays=20)


@pytest.mark.gpu
def test_every_kernel_of_every_replay_is_attributed(feed_forward: Entry) -> None:
    for traced in (feed_forward.traced, feed_forward.serial):
        assert traced is not None
        assert not traced.lost
        assert len(traced.replays) == 20
        for replay in traced.replays:
            assert [kernel.name for kernel in replay.kernels] == [work.kernel for work in traced.plan.works]
    plan = feed_forward.traced.plan
    assert plan.lanes == ("caller", "lane0")
    assert len(plan.regions) == 2
    assert all(work.line for work in plan.works)


@pytest.mark.gpu
def test_time_saved_agrees_with_serial_less_overlapped(feed_forward: Entry) -> None:
    """Without a profiler, and added up region by region, within a tenth of the replay on one stream."""
    figures = figures_of(feed_forward.traced, feed_forward.serial)
    alone, here = (feed_forward.unprofiled[name].median for name in ("one stream", "on lanes"))
    assert figures.saved == pytest.approx(alone - here, abs=0.1 * alone)
    assert sum(region.saved or 0 for region in figures.regions) == pytest.approx(figures.saved, abs=0.05 * alone)
    for region in figures.regions:
        assert region.alone is not None
        assert region.busy.median >= 0.9 * region.alone.median
        assert region.share > 0.5, "the dense branch runs beside the routed one"
        assert region.saved is not None
        assert region.saved <= region.hidden.median + 2.0 * region.kernels, "its gaps are hidden too"


@pytest.mark.gpu
def test_on_one_stream_nothing_is_hidden(feed_forward: Entry) -> None:
    """The control: the same kernels in line."""
    assert feed_forward.serial is not None
    figures = figures_of(feed_forward.serial)
    assert figures.overlapped.median == 0
    assert all(region.hidden.median == 0 for region in figures.regions)


@pytest.mark.gpu
def test_alike_kernels_on_two_lanes_are_told_apart_by_their_lengths() -> None:
    """The same kernel on both lanes, a thousand times the work on one: matched wrongly, lengths would be mixed."""
    small, large = torch.ones(1 << 12, device="cuda"), torch.ones(1 << 26, device="cuda")

    def step() -> None:
        region = auxstream.fork("large", large)
        for _ in range(6):
            small.mul_(1.0)
        with region:
            for _ in range(4):
                large.mul_(1.0)
        region.join()
        small.add_(large[: 1 << 12])

    step()
    torch.cuda.synchronize()
    with auxstream.graph("alike") as graph:
        step()
    plan = plan_of(graph.report.nodes, graph.report.edges)
    assert len({work.kernel for work in plan.works[:10]}) == 1
    traced = trace_of(plan, [launch.kernels for launch in launches_of_replays(graph.replay, 5)])
    for replay in traced.replays:
        lengths = [kernel.end - kernel.start for kernel in replay.kernels]
        assert max(lengths[:6]) < min(lengths[6:10])
    unnumbered = tuple(replace(kernel, node=None) for kernel in traced.replays[0].kernels)
    assert match(plan, unnumbered).kernels == unnumbered, "by order as by number"


SCRIPT = """
import sys, torch, auxstream
x = torch.ones(1 << 22, device="cuda")
side = torch.cuda.Stream()
with auxstream.graph("ours") as ours:
    with auxstream.aux_region("branch", x) as region:
        y = region.returns(x * 2 + 1)
    z = x * 3 + 1
    region.join()
    w = y + z
raw = torch.cuda.CUDAGraph()
with torch.cuda.graph(raw):
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        a = x * 2
    b = x * 3
    torch.cuda.current_stream().wait_stream(side)
    c = a + b
for _ in range(int(sys.argv[1])):
    ours.replay()
    raw.replay()
torch.cuda.synchronize()
assert torch.equal(w, x * 5 + 2) and torch.equal(c, x * 5)
"""


@pytest.mark.gpu
def test_a_script_is_traced_without_knowing_it(tmp_path: Path, capsys: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert main(["trace", "--to", str(tmp_path / "out"), "--replays", "4", str(script), "9"]) == 0, capsys.readouterr()
    document = json.loads((tmp_path / "out" / "regions.json").read_text())
    ours, raw = document["graphs"]
    assert (ours["name"], ours["replays"], ours["lanes"]) == ("ours", 4, ["caller", "lane0"])
    assert [region["name"] for region in ours["regions"]] == ["branch"]
    assert (raw["replays"], len(raw["lanes"]), len(raw["regions"])) == (4, 2, 1)
    assert raw["kernels"] == 3
    assert len(list((tmp_path / "out").glob("*.svg"))) == 2
