"""docs/migrating.md: every piece of code runs, what replaces another gives its numbers, and the proof says of the code
before what the page says it does.

Torch's streams and events are played by regions to which nothing is declared: they keep order as events do, and no
more. On a GPU the proof is asked about torch's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture import Report, mark_multi_stream_moe_shared_experts, verify
from auxstream.capture.adopt import adopting
from auxstream.capture.trace import trace
from auxstream.runtime.machine import INLINE, using_machine
from auxstream.runtime.regions import Region, open_region

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
TOKENS, HIDDEN = 4, 64


@dataclass(frozen=True, slots=True)
class Snippet:
    """Code of one section; `claim` is what stands behind `# before:`."""

    section: str
    when: str
    claim: str
    code: str


def snippets() -> dict[str, dict[str, Snippet]]:
    """By section, then "before" and "after"."""
    found: dict[str, dict[str, Snippet]] = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        section = part.partition("\n")[0].replace("`", "")
        for code in re.findall(r"```python\n(.*?)```", part, re.DOTALL):
            head = re.match(r"# (before|after)(?:: (\w+))?\n", code)
            assert head is not None, f"{section}: code that says neither before nor after"
            found.setdefault(section, {})[head[1]] = Snippet(section, head[1], head[2] or "", code)
    return found


SECTIONS = snippets()
BLOCKS = [section for section, code in SECTIONS.items() if not any(each.claim == "graph" for each in code.values())]


class Played:
    """What the snippets use of torch.cuda: one side stream, and a region for each use of it."""

    def __init__(self) -> None:
        self.region: Region | None = None
        self.recorded: list[Tensor] = []
        side = SimpleNamespace(wait_stream=lambda other: self.fork())
        caller = SimpleNamespace(wait_stream=lambda other: self.join())
        self.cuda = SimpleNamespace(
            stream=self.stream, current_stream=lambda: caller, synchronize=lambda: self.region and self.join()
        )
        self.side = side
        self.forked = SimpleNamespace(record=self.fork, wait=lambda: None)
        self.done = SimpleNamespace(record=lambda: None, wait=self.join)

    def fork(self) -> None:
        self.region = open_region("side", recorded=self.recorded)

    @contextmanager
    def stream(self, side: Any) -> Iterator[None]:
        if self.region is None:
            self.fork()
        assert self.region is not None
        with self.region:
            yield

    def join(self) -> None:
        assert self.region is not None
        self.region.join()
        self.region = None

    def in_parallel(self, fn0: Callable[[], Any], fn1: Callable[[], Any], *_: Any) -> tuple[Any, Any]:
        self.fork()
        first = fn0()
        with self.stream(self.side):
            second = fn1()
        self.join()
        return first, second


@pytest.fixture
def names() -> dict[str, Any]:
    """What all snippets use."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = [nn.Sequential(nn.Linear(HIDDEN, 96), nn.SiLU(), nn.Linear(96, HIDDEN)).to(device) for _ in range(2)]
    x = torch.randn(TOKENS, HIDDEN, device=device)
    return {
        "auxstream": auxstream,
        "norm": nn.LayerNorm(HIDDEN).to(device),
        "experts": wide[0],
        "mlp": wide[1],
        "scale": torch.full((), 1.5, device=device),
        "x": x,
    }


SIDES = ("side", "stream", "alt_stream", "aux_stream", "event0", "event1")


def played(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names, and streams that are played."""
    play = Played()
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: play.recorded.append(tensor))
    streams = {"torch": play, "forked": play.forked, "done": play.done}
    return {**names, **dict.fromkeys(SIDES, play.side), **streams, "maybe_execute_in_parallel": play.in_parallel}


def real(names: dict[str, Any]) -> dict[str, Any]:
    """The names, and streams of torch."""
    side = torch.cuda.Stream()

    def in_parallel(fn0: Callable[[], Any], fn1: Callable[[], Any], *_: Any) -> tuple[Any, Any]:
        side.wait_stream(torch.cuda.current_stream())
        first = fn0()
        with torch.cuda.stream(side):
            second = fn1()
        torch.cuda.current_stream().wait_stream(side)
        return first, second

    streams = {"torch": torch, "forked": torch.cuda.Event(), "done": torch.cuda.Event()}
    return {**names, **dict.fromkeys(SIDES, side), **streams, "maybe_execute_in_parallel": in_parallel}


def value(code: str, names: dict[str, Any]) -> Tensor:
    names = dict(names)
    with torch.no_grad():
        exec(code, names)
    return names["y"]


def serial_value(code: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """On one stream, so that a race of the code's own does not matter."""
    with monkeypatch.context() as patch, using_machine(INLINE):
        return value(code, played(names, patch))


def report(code: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Report:
    """What the proof says of a capture of the code."""
    if not torch.cuda.is_available():
        with auxstream.graph("before", verify="off", device="cpu") as g:
            value(code, played(names, monkeypatch))
        return verify(g)
    names = real(names)
    value(code, names)  # what a capture may not load
    torch.cuda.synchronize()
    found: list[Any] = []
    with adopting(found), torch.cuda.graph(torch.cuda.CUDAGraph()):
        value(code, names)
    return found[0].report


def test_the_page_has_code_for_each_section() -> None:
    assert len(BLOCKS) == 5
    for section in BLOCKS:
        assert set(SECTIONS[section]) == {"before", "after"}
    assert {code["before"].claim for code in map(SECTIONS.__getitem__, BLOCKS)} == {"", "RACE", "proved"}


@pytest.mark.parametrize("section", BLOCKS)
def test_after_gives_the_numbers_of_before_and_is_proved(
    section: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = SECTIONS[section]["before"].code, SECTIONS[section]["after"].code
    expected = serial_value(before, names, monkeypatch)
    torch.testing.assert_close(value(after, names), expected, rtol=0, atol=0)
    with torch.no_grad(), auxstream.graph(section) as g:
        y = value(after, names)
    assert g.report.ok
    assert len(g.regions) == 1
    for _ in range(3):
        names["x"].normal_()
        g.replay()
        torch.testing.assert_close(y, serial_value(before, names, monkeypatch), rtol=0, atol=0)


@pytest.mark.parametrize("section", [section for section in BLOCKS if SECTIONS[section]["before"].claim])
def test_before_is_as_safe_as_the_page_says(
    section: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SECTIONS[section]["before"]
    found = report(before.code, names, monkeypatch)
    assert found.ok == (before.claim == "proved"), str(found)
    assert any(race.reuse for race in found.races) == (before.claim == "RACE")


@pytest.mark.gpu
def test_synchronize_cannot_be_captured(names: dict[str, Any]) -> None:
    code = SECTIONS["torch.cuda.stream and synchronize()"]["before"].code
    with pytest.raises(auxstream.AuxstreamError, match="captur"), auxstream.graph("before", verify="off"):
        value(code, real(names))


# --- graphs -----------------------------------------------------------------------------------------------------------


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(HIDDEN, 4), nn.Linear(HIDDEN, HIDDEN)
        self.up = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).topk(2)
        routed = torch.einsum("th,tkhi->tki", x, self.up[chosen]) * share[..., None]
        return routed.sum(1) + self.shared(x)


def begin_aux_stream_passthrough(x: Tensor) -> Tensor:
    return x


def end_aux_stream_passthrough(x: Tensor) -> Tensor:
    return x


def wait_aux_stream_passthrough(x: Tensor) -> Tensor:
    return x


def test_a_graph_of_autodeploy_s_becomes_regions(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, x = Moe(), torch.randn(TOKENS, HIDDEN)
    gm = trace(model, (x,)).graph_module
    (shared,) = mark_multi_stream_moe_shared_experts(gm)
    for node in shared.nodes:
        node.meta.pop("auxstream")
        node.meta.pop("skip_mlir_fusion")
    gm.meta.clear()
    first, last = shared.nodes[0], shared.nodes[-1]
    source = next(node for node in first.all_input_nodes if node.op != "get_attr")
    routed = next(node for node in shared.join.all_input_nodes if node is not last)
    for place, function, passed, user in (
        (first, begin_aux_stream_passthrough, source, first),
        (last.next, end_aux_stream_passthrough, last, shared.join),
        (shared.join, wait_aux_stream_passthrough, routed, shared.join),
    ):
        with gm.graph.inserting_before(place):
            switch = gm.graph.call_function(function, (passed,))
        user.replace_input_with(passed, switch)
    gm.recompile()

    found: dict[str, Any] = {"gm": gm}
    exec(SECTIONS["TensorRT-LLM's AutoDeploy"]["after"].code, found)
    assert "adopted" in capsys.readouterr().out
    assert len(found["regions"]) == 1
    with torch.no_grad(), auxstream.graph("adopted", device="cpu") as g:
        y = gm(x)
    assert g.report.ok
    g.replay()
    with torch.no_grad():
        torch.testing.assert_close(y[0] if isinstance(y, tuple | list) else y, model(x))


@pytest.mark.parametrize("when", ["after", pytest.param("before", marks=pytest.mark.gpu)])
def test_a_captured_block(when: str, names: dict[str, Any]) -> None:
    x = names["x"]
    block = names["mlp"]
    with torch.no_grad():
        block(x)
        found = {"torch": torch, "auxstream": auxstream, "block": block, "x": x}
        exec(SECTIONS["torch.cuda.graph"][when].code, found)
        torch.testing.assert_close(found["y"], block(x), rtol=0, atol=0)
