"""`python -m auxstream demo`: its table, its exit code, its controls, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from auxstream import demo as demo_module
from auxstream.__main__ import main
from auxstream.demo import Row
from auxstream.kernels import launch


def demo(*arguments: str) -> int:
    """In this process: torch takes longer to import than a refusal takes."""
    return main(["demo", "--device", "cpu", *arguments])


def test_as_a_command_safe_rows_are_equal_and_controls_corrupt(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AUXSTREAM_")}
    command = [sys.executable, "-P", "-m", "auxstream", "demo", "--device", "cpu"]
    command += ["--replays", "6", "--layers", "2", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    check(done.stdout, tmp_path / "figures.json", layers=2)


def test_of_a_batch_safe_rows_are_equal_and_controls_corrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "interpreting", lambda: False)  # kernels run as torch ops, as they would by themselves
    figures = ("--replays", "6", "--json", str(tmp_path / "figures.json"))
    assert demo("--layers", "1", "--batch", "3", "--seed", "1", *figures) == 0
    check(capsys.readouterr().out, tmp_path / "figures.json", layers=1)


def check(shown: str, figures: Path, layers: int) -> None:
    assert f"regions found: {layers} in {layers} layers" in shown
    assert "n/a" in shown
    written: dict[str, Any] = json.loads(figures.read_text())
    for fusion in {row["fusion"]: None for row in written["rows"]}:
        check_rows([row for row in written["rows"] if row["fusion"] == fusion])


def check_rows(listed: list[dict[str, Any]]) -> None:
    rows = {(row["mode"], row["streams"], row["control"]): row for row in listed}
    safe = [(mode, streams, None) for streams in ("one", "aux") for mode in ("eager", "graph")]
    controls = [("graph", "aux", control) for control in ("fork wait", "join wait", "lifetime")]
    assert list(rows) == safe + controls
    assert all(rows[key]["equal"] == rows[key]["runs"] == 6 for key in safe)
    assert all(2 * rows[key]["equal"] < rows[key]["runs"] for key in controls)
    assert all(rows[key]["checker"] == "no race" for key in safe if key[0] == "graph")
    for key in controls:
        found = re.fullmatch(r"(\d+) races(?: \((\d+) reuse\))?", rows[key]["checker"])
        assert found, rows[key]["checker"]
        races, reused = map(int, found.groups("0"))
        # Without its wait a branch races on the tensors themselves; without the lifetime handoff on reuse alone.
        assert reused == races if key[2] == "lifetime" else reused < races


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (Row("graph", "aux", runs=4, equal=4), True),
        (Row("graph", "aux", runs=4, equal=3), False),
        (Row("graph", "aux"), False),
        (Row("graph", "aux", control="fork wait", runs=4, equal=1, checker="1 races"), True),
        (Row("graph", "aux", control="fork wait", runs=4, equal=2, checker="1 races"), False),
        (Row("graph", "aux", control="fork wait", runs=4, equal=0, checker="no race"), False),
    ],
)
def test_when_a_row_passes(row: Row, passed: bool) -> None:
    assert row.passed == passed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--replays", "0"), "less than 1"),
        (("--batch", "-1"), "less than 1"),
        (("--json", "/no/such/folder/figures.json"), "no file can be made"),
    ],
)
def test_arguments_that_are_refused(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo(*arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("disable", True), ("verify", "error")])
def test_settings_that_would_falsify_it_are_refused(
    name: str, value: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "SETTINGS", replace(demo_module.SETTINGS, **{name: value}))
    assert demo("--layers", "1", "--replays", "1") == 2
    assert f"unset AUXSTREAM_{name.upper()}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--device", "cuda") == 2
    assert "needs a GPU" in capsys.readouterr().err
