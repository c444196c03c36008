"""`python -m auxstream demo`: its table, its exit code, its controls, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from auxstream.demo import Row


def demo(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AUXSTREAM_")}
    command = [sys.executable, "-P", "-m", "auxstream", "demo", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**clean, **environ})


@pytest.mark.parametrize("arguments", [("--layers", "2"), ("--layers", "1", "--batch", "3", "--seed", "1")], ids=str)
def test_safe_rows_are_equal_and_controls_corrupt(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    figures = tmp_path / "figures.json"
    done = demo("--replays", "6", "--json", str(figures), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"regions found: {arguments[1]} in {arguments[1]} layers" in done.stdout
    assert "n/a" in done.stdout
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
    ("arguments", "environ", "says"),
    [
        (("--replays", "0"), {}, "less than 1"),
        (("--batch", "-1"), {}, "less than 1"),
        (("--json", "/no/such/folder/figures.json"), {}, "no file can be made"),
        ((), {"AUXSTREAM_DISABLE": "1"}, "unset AUXSTREAM_DISABLE"),
        ((), {"AUXSTREAM_VERIFY": "error"}, "unset AUXSTREAM_VERIFY"),
    ],
)
def test_what_it_refuses(arguments: tuple[str, ...], environ: dict[str, str], says: str) -> None:
    done = demo(*arguments, **environ)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    done = demo("--device", "cuda")
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr
    assert "Traceback" not in done.stderr
