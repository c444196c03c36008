"""`auxstream bench`: what it runs where, what it says of what fails or takes too long, and what it writes."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from auxstream.__main__ import main
from auxstream.bench import models
from auxstream.bench.budget import Clock
from auxstream.bench.command import CommandLine
from auxstream.bench.suite import SUITE, Benchmark, run_all, run_bench, run_one
from auxstream.runtime.errors import AuxstreamError, InputError

WRITES = """
import json, sys
path = sys.argv[sys.argv.index("--json") + 1]
results = {"ms": 3, "part": {"left out": ["batch 8"]}, "given": sys.argv[1:]}
json.dump({"benchmark": "fake", "command": "fake", "machine": {"gpu": "a card"}, "results": results}, open(path, "w"))
"""
FAKES = {
    "good": WRITES,
    "bad": WRITES + "sys.exit(3)\n",
    "slow": WRITES + "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
    "open('child', 'w').write(str(child.pid))\nchild.wait()\n",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that stand for benchmarks, and is the current one."""
    for name, source in FAKES.items():
        (tmp_path / f"fake_{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake(name: str, **fields: Any) -> Benchmark:
    return Benchmark(name, **{"full": 60, "module": f"fake_{name}", "no_gpu": "--on cpu", "hf": False, **fields})


def options(*names: str, **given: Any) -> Namespace:
    return Namespace(**{"names": list(names), "quick": False, "list": False, "json": None, "compare": None, **given})


# --- the table --------------------------------------------------------------------------------------------------------


def test_limits_add_up_to_what_is_promised() -> None:
    assert sum(benchmark.full for benchmark in SUITE.values()) <= 25 * 60
    assert sum(benchmark.quick for benchmark in SUITE.values()) <= 5 * 60
    named = {"handoff", "fusion", "overlap", "models", "memory", "verify", "capture"}
    assert named == {name for name, benchmark in SUITE.items() if benchmark.quick}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", [name for name in SUITE if name != "verify"])
def test_every_benchmark_takes_its_arguments(
    name: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets as far as to say that it needs a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = SUITE[name].command(name, quick, True, tmp_path / "figures.json")
    module = importlib.import_module(command[2])
    with pytest.raises(AuxstreamError, match="measures a GPU"):
        module.main(command[3:])


def test_variants_that_the_suite_names_are_there() -> None:
    arguments = shlex.split(SUITE["models"].arguments)
    assert set(arguments[arguments.index("--variants") + 1 :]) <= set(models.OURS)


# --- running it -------------------------------------------------------------------------------------------------------


def test_what_fails_or_takes_too_long_is_named_and_the_rest_goes_on(
    fakes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    suite = {
        "bad": fake("bad"),
        "slow": fake("slow", full=3),
        "gpu only": fake("good", no_gpu=None),
        "good": fake("good"),
    }
    to = fakes / "all.json"
    code = run_bench(options(json=to), suite)
    gpu = torch.cuda.is_available()
    written = json.loads(to.read_text())
    states = {name: outcome["state"] for name, outcome in written["outcomes"].items()}
    assert states == {"bad": "failed", "slow": "failed", "gpu only": "done" if gpu else "skipped", "good": "done"}
    assert code == 1
    outcomes = written["outcomes"]
    assert outcomes["bad"]["why"] == "exit code 3"
    assert outcomes["slow"]["why"] == "took more than 3 s"
    assert outcomes["good"]["left_out"] == ["batch 8"]
    assert written["results"]["slow"]["ms"] == 3  # what it had written stays
    assert written["machine"] == {"gpu": "a card"}
    said = capfd.readouterr().out
    assert "bad           failed" in said
    assert "left out: batch 8" in said
    assert gpu or "gpu only: skipped: needs a GPU" in said


def test_what_a_benchmark_started_ends_with_it(fakes: Path) -> None:
    run_one(fake("slow").command("slow", False, False, fakes / "figures.json"), 3)
    child = int((fakes / "child").read_text())
    for _ in range(100):  # the system takes a moment to reap it
        if not _runs(child):
            break
        time.sleep(0.05)
    assert not _runs(child)


def test_what_a_benchmark_started_ends_with_the_suite(fakes: Path) -> None:
    command = fake("slow").command("slow", False, False, fakes / "figures.json")
    run = f"from auxstream.bench.suite import run_one; run_one({command!r}, 60)"
    suite = subprocess.Popen([sys.executable, "-c", run])
    for _ in range(400):
        if (fakes / "child").is_file() and (fakes / "child").read_text():
            break
        time.sleep(0.05)
    suite.terminate()
    assert suite.wait(20) == 128 + signal.SIGTERM
    child = int((fakes / "child").read_text())
    for _ in range(100):
        if not _runs(child):
            break
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_all_that_ran_was_done_and_each_has_a_file_in_the_folder(fakes: Path) -> None:
    folder = fakes / "results"
    assert run_bench(options("good", quick=True, json=folder), {"good": fake("good"), "bad": fake("bad")}) == 0
    assert {path.name for path in folder.iterdir()} == {"good.json", "suite.json"}
    given = json.loads((folder / "good.json").read_text())["results"]["given"]
    assert "--quick" in given
    assert ("--on" in given) != torch.cuda.is_available()
    assert float(given[given.index("--limit") + 1]) < 60  # it stops by itself before it is stopped


def test_old_results_are_not_taken_for_new_ones(fakes: Path) -> None:
    (fakes / "bad.json").write_text('{"results": {"left out": ["old"]}}')
    (fakes / "fake_bad.py").write_text("raise SystemExit(3)\n")
    outcomes = run_all({"bad": fake("bad")}, False, fakes, None)
    assert outcomes["bad"].left_out == []


def test_nothing_that_could_run_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_bench(options("handoff")) == 1
    with pytest.raises(InputError, match="no such benchmark"):
        run_bench(options("handof"))


def test_the_command_runs_what_it_can_without_a_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    suite = {"verify": replace(SUITE["verify"], no_gpu="--nodes 300", arguments="--nodes 300")}
    to = tmp_path / "figures.json"
    assert run_bench(options("verify", quick=True, json=to), suite) == 0
    figures = json.loads(to.read_text())
    assert figures["results"]["verify"]["decoder, 300 nodes"]["unit"] == "ms"
    assert {"date", "torch", "python", "triton"} <= set(figures["machine"])
    assert main(["bench", "--list"]) == 0
    listed = capfd.readouterr().out
    assert [name for name in SUITE if name not in listed] == []


def test_results_that_could_not_be_written_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "none" / "all.json", tmp_path / "file"):
        with pytest.raises(SystemExit):
            main(["bench", "verify", "--json", str(where)])
        assert "can be made at" in capsys.readouterr().err


# --- the command line and the clock -----------------------------------------------------------------------------------


def test_the_quick_form_gives_way_to_what_is_given() -> None:
    line = CommandLine("doc", rounds=30, limit=100, quick={"rounds": 5, "batch": [1]}, devices=("cpu",))
    line.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    assert (line.options([]).rounds, line.options([]).batch) == (30, [1, 8])
    line = CommandLine("doc", rounds=30, limit=100, quick={"rounds": 5, "batch": [1]}, devices=("cpu",))
    line.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options = line.options(["--quick", "--batch", "4"])
    assert (options.rounds, options.batch) == (5, [4])
    with pytest.raises(SystemExit):
        line.options(["--rounds", "1"])


def test_cases_without_time_are_left_out_by_name() -> None:
    left_out: list[str] = []
    clock = Clock.of(torch.device("cpu"), 2.0)
    ran: list[int] = []
    for case in clock.in_time([1, 8, 32], left_out, "batch {}".format):
        ran.append(case)
        time.sleep(0.8)
    assert ran == [1]
    assert left_out == ["batch 8", "batch 32"]


def test_only_variants_that_are_named_are_compiled_and_what_they_are_compared_with() -> None:
    assert models.compiled_for([models.OWN]) == (models.OWN_SERIAL, models.OWN)
    assert models.compiled_for([models.SERIAL]) == (models.SERIAL,)
    assert models.compiled_for([models.CHOSEN, models.OWN_SERIAL]) == (models.SERIAL, models.CHOSEN, models.OWN_SERIAL)
    assert models.compiled_for([]) == ()
    assert len({*models.alone_of(models.SERIAL), *models.alone_of(models.OWN_SERIAL)}) == 4
