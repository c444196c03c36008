"""Two files of results side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from auxstream.__main__ import main
from auxstream.bench.compare import compare
from auxstream.runtime.errors import InputError


def figure(median: float, spread: float) -> dict[str, Any]:
    return {"median": median, "low": median - spread, "high": median + spread, "samples": 9, "unit": "us"}


def results(path: Path, values: Any, name: str = "overlap", gpu: str = "a card") -> Path:
    machine = {"gpu": gpu, "date": "2026-11-25", "torch": "2.11"}
    path.write_text(json.dumps({"benchmark": name, "command": "c", "machine": machine, "results": values}))
    return path


def line_of(table: str, name: str) -> str:
    (found,) = (line for line in table.splitlines() if line.strip().startswith(name))
    return found


def test_ratios_and_whether_they_are_more_than_the_spread(tmp_path: Path) -> None:
    a = results(tmp_path / "a.json", {
        "batch 1": {"serial": figure(100, 5), "lane": figure(80, 5), "kernels": [1, 2], "equal": True},
        "bytes": 200, "gone": 1,
    })  # fmt: skip
    b = results(tmp_path / "b.json", {
        "batch 1": {"serial": figure(106, 5), "lane": figure(60, 5), "kernels": [3, 4], "equal": False}, "bytes": 100,
    })  # fmt: skip
    table = compare(a, b)
    assert "1.060  within" in line_of(table, "batch 1 / serial")
    assert "0.750  outside the spread" in line_of(table, "batch 1 / lane")
    assert "0.500  no spread" in line_of(table, "bytes")
    assert "only in A: overlap / gone" in table
    assert "kernels" not in table
    assert "equal" not in table
    assert "same card" not in table


def test_cards_that_differ_are_said(tmp_path: Path) -> None:
    a = results(tmp_path / "a.json", {"us": 1})
    assert "not the same card" in compare(a, results(tmp_path / "b.json", {"us": 1}, gpu="another"))


def test_a_folder_a_file_of_all_and_a_file_of_one_say_the_same(tmp_path: Path) -> None:
    one = results(tmp_path / "overlap.json", {"us": figure(10, 1)})
    alone = results(tmp_path / "alone.json", {"us": figure(10, 1)})
    outcomes = {"overlap": {"state": "done"}, "fusion": {"state": "failed"}}
    suite = json.loads(one.read_text()) | {"benchmark": "suite", "outcomes": outcomes}
    every = tmp_path / "every.json"
    every.write_text(json.dumps(suite | {"results": {"overlap": {"us": figure(10, 1)}}}))
    (tmp_path / "suite.json").write_text(json.dumps({key: suite[key] for key in ("benchmark", "machine", "outcomes")}))
    (tmp_path / "demo.json").write_text("{}")  # not the suite's
    results(one, {"us": figure(10, 1)}, name="a module of the suite's entry")
    rows = [compare(every, other).splitlines()[2:] for other in (alone, every, tmp_path)]
    assert rows[0] == rows[1] == rows[2]
    assert "1.000  within" in rows[0][-1]


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = results(tmp_path / "a.json", {"us": 1})
    b = results(tmp_path / "b.json", {"us": 1}, name="fusion")
    with pytest.raises(InputError, match="nothing in common"):
        compare(a, b)
    (tmp_path / "c.json").write_text("[]")
    for path in (tmp_path / "c.json", tmp_path / "none.json"):
        with pytest.raises(InputError, match="holds no results"):
            compare(a, path)
    assert main(["bench", "--compare", str(a), str(b)]) == 2
    assert main(["bench", "--compare", str(a), str(a)]) == 0
    assert "1.000" in capsys.readouterr().out
