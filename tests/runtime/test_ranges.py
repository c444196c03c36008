"""NVTX ranges: which there are, that each is closed, and that nothing is left of them where nobody listens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from auxstream.capture.compiled import CompiledModel
from auxstream.capture.graphs import CudaGraph
from auxstream.runtime import ranges
from auxstream.runtime.errors import AuxstreamWarning

HERE = Path(__file__).parent
CALL = [["copy in"], ["replay model"], ["hand out"]]

# Scenario of ranges_worker.py -> its ranges: a message, and what was within it.
EXPECTED: dict[str, list[Any]] = {
    "captured": [["capture g", ["pair [lane0]"], ["prove g"]], ["replay g"]],
    "verify off": [["capture off", ["prove off"]]],
    "left open": [["capture h", ["open [lane0]"]]],
    "fails in a region": [["capture f", ["outer [lane0]", ["inner [lane1]"]]]],
    "eager region fails": [["r"]],
    "graph module fails": [["rehearse m", ["left behind"]]],
    "compiled": [["capture model", ["prove model"]]],
    "compiled in buckets": [[f"capture model[{n}]", [f"prove model[{n}]"]] for n in (4, 2)],
    "calls": [["call model", *CALL]],
    "calls of buckets": [["call model", ["copy in"], [f"replay model[{n}]"], ["hand out"]] for n in (2, 4)],
    "a call of no bucket": [["call model", ["eager model"]]],
    "a call refused": [["call model"]],
    "eager": [["eager model"]],
    "mode none": [["rehearse plain"], ["call plain", ["copy in"], ["replay plain"], ["hand out"]]],
    "piecewise": [
        ["rehearse step"],
        ["capture step/0", ["prove step/0"]],
        ["prove step/1 paged_attention"],
        ["capture step/2", ["prove step/2"]],
        ["prove step"],
    ],
    "calls of pieces": [["call step", ["copy in"], ["replay step"], ["hand out"]]],
    "calls of phases": [
        ["call lm decode", ["copy in"], ["replay lm decode"], ["hand out"]],
        ["eager lm prefill"],
    ],
    "a CUDA graph": [["replay decode[8]"]],
    "pieces as CUDA graphs": [["piece m/0"], ["eager m/1 attention"], ["piece m/2 shared [launch lane0]"]],
}


def run(arguments: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AUXSTREAM_", "NVTX_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": str(HERE.parent), **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the worker saw; it fails if a range was left open, or one closed that was not open."""
    return json.loads(run([str(HERE / "ranges_worker.py")], AUXSTREAM_NVTX="1").stdout)


def test_every_scenario_is_looked_at(found: dict[str, Any]) -> None:
    assert set(found) == set(EXPECTED)


@pytest.mark.parametrize("scenario", EXPECTED)
def test_ranges_have_names_and_are_closed(found: dict[str, Any], scenario: str) -> None:
    assert found[scenario] == EXPECTED[scenario]


SCRIPT = """
import sys, torch, auxstream
x = torch.ones(2)
with auxstream.graph("g", device="cpu") as g:
    auxstream.parallel(lambda: x + 1, lambda: x + 2, reads=x, name="pair")
g.replay()
from auxstream.runtime import ranges
print(ranges.ENABLED, "nvtx" in sys.modules)
"""


def settings(monkeypatch: pytest.MonkeyPatch, **set_to: Any) -> None:
    monkeypatch.setattr(ranges, "SETTINGS", replace(ranges.SETTINGS, **set_to))


def test_on_with_no_tool_there_is_as_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvtx", reason="nvtx is not installed")
    settings(monkeypatch, nvtx=True)
    assert ranges._load() is None


def test_on_without_nvtx_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    settings(monkeypatch, nvtx=True)
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.warns(AuxstreamWarning, match="pip install nvtx"):
        assert ranges._load() is None
    settings(monkeypatch, nvtx=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ranges._load() is None


def test_off_there_is_nothing() -> None:
    assert not ranges.ENABLED, "off by default"

    def function() -> None: ...

    assert ranges.around("name")(function) is function
    assert ranges.span("one") is ranges.span("another")
    for method in (CudaGraph.replay, CompiledModel.__call__):
        assert not hasattr(method, "__wrapped__")


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tool that writes down what it hears."""
    pytest.importorskip("nvtx", reason="nvtx is not installed")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler, and nothing listens without one")
    library = tmp_path_factory.mktemp("listener") / "listener.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "nvtx_listener.c"], check=True)
    return library


def heard(listener: Path, script: str, **environ: str) -> tuple[list[str], list[str]]:
    """What a tool hears of our domain, through NVTX itself, and what the script prints."""
    log = listener.with_suffix(".log")
    log.write_text("")
    printed = run(["-c", script], NVTX_INJECTION64_PATH=str(listener), NVTX_LISTENER_LOG=str(log), **environ).stdout
    return [line for line in log.read_text().splitlines() if "auxstream" in line], printed.split()


def test_a_tool_hears_them(listener: Path) -> None:
    lines, printed = heard(listener, SCRIPT, AUXSTREAM_NVTX="1")
    assert printed == ["True", "True"]
    assert lines == [
        "domain auxstream",
        "push auxstream capture g",
        "push auxstream pair [lane0]",
        "pop auxstream",
        "push auxstream prove g",
        "pop auxstream",
        "pop auxstream",
        "push auxstream replay g",
        "pop auxstream",
    ]


def test_off_a_tool_hears_nothing_and_nothing_is_imported(listener: Path) -> None:
    assert heard(listener, SCRIPT) == ([], ["False", "False"])


GPU = """
import torch, auxstream
x = torch.ones(2, device="cuda")
region = auxstream.fork("eager", x)
with region:
    y = region.returns(x + 1)
region.join()
with auxstream.graph("g") as g:
    auxstream.parallel(lambda: x + 1, lambda: x + 2, reads=x, name="pair")
g.replay()
"""


@pytest.mark.gpu
def test_a_tool_hears_them_on_a_gpu(listener: Path) -> None:
    lines, _ = heard(listener, GPU, AUXSTREAM_NVTX="1")
    assert [line.removeprefix("push auxstream ") for line in lines if line.startswith("push")] == [
        "eager [lane0]",
        "capture g",
        "pair [lane0]",
        "prove g",
        "replay g",
    ]
    assert lines.count("pop auxstream") == 5
