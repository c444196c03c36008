"""What benchmarks keep when a part of one fails or is stopped, and what they say of it."""

from __future__ import annotations

import argparse
import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from auxstream.bench import harness, models, overlap, torch_compile
from auxstream.bench.budget import Clock, Out
from auxstream.bench.harness import Figure, figure, write
from auxstream.runtime.errors import CaptureError

CPU = torch.device("cpu")


def test_a_figure_says_nothing_that_was_not_seen() -> None:
    assert figure([3.0, 1.0], "us") == Figure(2.0, 1.0, 3.0, 2, "us")
    assert figure([float(value) for value in range(1, 8)], "us") == Figure(4.0, 2.0, 6.0, 7, "us")


def test_what_was_written_stays_whole_until_the_new_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = tmp_path / "figures.json"
    write(str(to), "fake", {"us": 1})
    with monkeypatch.context() as patch:
        patch.setattr(harness.os, "replace", lambda *_: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            write(str(to), "fake", {"us": 2})
    assert json.loads(to.read_text())["results"] == {"us": 1}
    write(str(to), "fake", {"us": 3})
    assert json.loads(to.read_text())["results"] == {"us": 3}
    assert list(tmp_path.iterdir()) == [to]


def test_a_driver_that_does_not_answer_loses_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(harness.shutil, "which", lambda name: name)
    monkeypatch.setattr(harness.subprocess, "run", hangs)
    harness._driver.cache_clear()
    assert "does not answer" in harness._driver()
    harness._driver.cache_clear()


def test_a_rival_that_fails_or_has_no_time_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("its own trouble")

    model, inputs = nn.Linear(2, 2), (torch.ones(1, 2),)
    assert str(torch_compile.rival(model, inputs, "default", Clock.of(CPU, 20), needs=10)).startswith("Out: ")
    monkeypatch.setattr(torch_compile, "compiled_by_torch", fails)
    assert torch_compile.rival(model, inputs, "default", Clock.of(CPU, 99), needs=10) == "RuntimeError: its own trouble"


def test_before_a_rival_compiles_all_else_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not let itself be stopped but by the end of the process."""
    to = tmp_path / "figures.json"
    found: list[dict[str, Any]] = []

    def rival(model: nn.Module, inputs: Any, mode: str, *_: Any, **__: Any) -> Any:
        found.append(json.loads(to.read_text())["results"])
        return "too slow" if mode == "max-autotune" else (partial(model, *inputs), 1.0)

    monkeypatch.setattr(overlap, "rival", rival)
    given = ["--device", "cpu", "--size", "tiny", "--layers", "1", "--kernels", "own", "--rounds", "2", "--json"]
    results = overlap.main([*given, str(to)])
    assert not found[0]["all passed"], "it is not over"
    assert "compile, own kernels, one stream" in found[0]["batch 1"]["us per layer"]
    assert results["all passed"]
    batch = json.loads(to.read_text())["results"]["batch 1"]
    assert batch["left out"] == {"torch.compile, max-autotune": "too slow"}
    assert {"torch.compile, reduce-overhead", "eager, one stream"} <= set(batch["us per layer"])


@pytest.mark.parametrize(
    ("error", "key"), [(CaptureError("no graph"), "failed"), (Out("batch 1 was left out"), "left out")]
)
def test_a_part_of_models_that_fails_is_not_one_without_time(
    error: Exception, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    to = tmp_path / "figures.json"
    monkeypatch.setattr(models, "decode", fails)
    monkeypatch.setattr(models, "build", lambda *_, **__: argparse.Namespace(set_experts_implementation=str))
    given = ["--device", "cpu", "--size", "tiny", "--parts", "decode", "--batch", "1", "--json", str(to)]
    (part,) = models.main(given).values()
    assert set(part) == {key}
    assert json.loads(to.read_text())["results"] == {"decode, batch 1": part}
