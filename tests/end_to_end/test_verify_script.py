"""`auxstream verify SCRIPT`: what it finds, what it prints, its exit code, and that the script runs as it would alone.

Scripts run in this process where they can. What adopts graphs of torch's own has a stand-in here, and its own tests
under tests/capture; the last tests use the real one, on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from auxstream import verify_script
from auxstream.__main__ import main
from auxstream.capture import Report, graphs
from auxstream.capture.adopt import Adopted
from auxstream.capture.evidence import Node
from auxstream.runtime.errors import RaceError
from auxstream.verify_script import Ending, exit_code

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = DOCS.parent / "examples" / "verify_me.py"
HEAD = """
import sys, torch, auxstream

def step(x, *reads):
    h = x * 2
    region = auxstream.fork("aux", *reads, *([h] if SAFE else []))
    with region:
        s = region.returns(h * 3)
    del h
    z = x + 5
    region.join()
    return z + s

def capture(name, **options):
    with auxstream.graph(name, device="cpu", **options) as g:
        step(torch.ones(256))
    return g
"""
SAFE = "SAFE = True\n" + HEAD
RACY = "SAFE = False\n" + HEAD
CLASH = """
def clash(name, **options):
    x = torch.ones(4)
    with auxstream.graph(name, device="cpu", **options):
        with auxstream.aux_region("racy", x) as region:
            x.mul_(2)
        x.add_(1)
        region.join()
"""
PROVED = Report((), (), ("something",), (Node("add.Tensor", "caller", line="a.py:1: a + b"),), ())
FOREIGN = Report((), ("kernel `k`: no recorded op launched it",), (), (Node("k", "?", kernel="k"),), ())
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_script(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write_script


def verify(*arguments: str | Path) -> int:
    return main(["verify", *map(str, arguments)])


def command(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AUXSTREAM_")}
    line = [sys.executable, "-P", "-m", "auxstream", "verify", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, env={**clean, **environ})


def adopts(monkeypatch: pytest.MonkeyPatch, *reports: Report) -> None:
    """Pretend that the script captures so many graphs with torch alone, before its own."""

    @contextmanager
    def stand_in(found: list[Adopted]) -> Generator[None]:
        found += [Adopted(f"graph {number}", report) for number, report in enumerate(reports)]
        yield

    monkeypatch.setattr(verify_script, "adopting", stand_in)


# --- what it finds ----------------------------------------------------------------------------------------------------


def test_the_example_is_found_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(EXAMPLE) == 1
    shown = capsys.readouterr().out
    lines = EXAMPLE.read_text().splitlines()
    made, read, reused = (
        next(n for n, line in enumerate(lines, 1) if text in line) for text in ("h = x * 2", "h * 3", "z = x + 5")
    )
    assert "graph 1 of 1, 'step': not proved" in shown
    assert (
        f"block of `mul` (made at verify_me.py:{made}), freed after verify_me.py:{read}, reused by `add` at "
        f"verify_me.py:{reused} while `mul` on lane0 may still read it" in shown
    )
    assert "of 100 replays were right" in shown
    assert shown.endswith("auxstream: 1 graph captured by verify_me.py: 1 not proved ('step'), with 1 race\n")


def test_the_example_put_right_is_proved(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    text = EXAMPLE.read_text()
    for old, new in (('region = auxstream.fork("aux")', 'region = auxstream.fork("aux", h)'), (', verify="off"', "")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    script = write(text)
    assert verify(script) == 0
    shown = capsys.readouterr().out
    assert "100 of 100 replays were right" in shown
    assert "graph 1 of 1, 'step': proved" in shown
    assert "proved free of races, under the assumptions above" in shown


def test_the_documents_show_the_example_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The simulated machine's report, so that it is the same everywhere."""
    script = tmp_path / "verify_me.py"
    text = EXAMPLE.read_text()
    assert text.count("torch.cuda.is_available()") == 1
    script.write_text(
        text.replace("torch.cuda.is_available()", "False").replace('("step", ', '("step", device="cpu", ')
    )
    assert verify("--picture", tmp_path / "pictures", script) == 1
    (drawn,) = (tmp_path / "pictures").iterdir()
    assert drawn.read_text() == (DOCS / "verify_me.svg").read_text(), f"cp {drawn} docs/verify_me.svg, and look at it"
    report = capsys.readouterr().out.split("not proved\n")[1].split("assumed:")[0]
    assert " ".join(report.split()) in " ".join((DOCS / "verify.md").read_text().split())
    headline = " ".join(report.split("race on")[1].split("it\n")[0].split())
    assert headline in " ".join((DOCS.parent / "README.md").read_text().split())


def test_the_example_as_a_command() -> None:
    done = command(EXAMPLE)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "may still read it" in done.stdout
    assert not done.stderr


def test_several_graphs_one_of_them_bad(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    script = write(RACY + "capture('good')\ncapture('bad', verify='off')\nSAFE = True\ncapture('off', verify='off')\n")
    with pytest.warns(UserWarning, match="reads an undeclared tensor"):
        assert verify(script) == 1
    shown = capsys.readouterr().out
    heads = [line for line in shown.splitlines() if line.startswith("graph ")]
    assert heads == [
        "graph 1 of 3, 'good': proved",
        "graph 2 of 3, 'bad': not proved",
        "graph 3 of 3, 'off': proved",
    ]
    assert "3 graphs captured by script.py: 1 not proved ('bad'), with 1 race" in shown


def test_graphs_of_torch_s_own_count(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adopts(monkeypatch, PROVED)
    assert verify(write(SAFE + "capture('ours')\n")) == 0
    assert "graph 1 of 2, 'graph 0': proved" in capsys.readouterr().out
    adopts(monkeypatch, PROVED, FOREIGN)
    assert verify(write("")) == 1
    shown = capsys.readouterr().out
    assert "graph 2 of 2, 'graph 1': not proved" in shown
    assert "unattributed: kernel `k`: no recorded op launched it" in shown
    assert "2 graphs captured by script.py: 1 not proved ('graph 1'), with 0 races" in shown


@pytest.mark.parametrize(("safe", "races"), [(True, 0), (False, 1)])
def test_a_graph_whose_kernels_nobody_read_back(safe: bool, races: int) -> None:
    """What torch's ops are known to do suffices for a race, and not for a proof: other kernels may be in it."""
    known: dict[str, Any] = {}
    exec((SAFE if safe else RACY) + "g = capture('g', verify='off')\n", known)
    unread = graphs.CapturedGraph("unread")
    unread.attach(known["g"].program, (), {})
    unread.prove(checked=False)

    def observed() -> Report:
        found: list[Adopted] = []
        with verify_script.observing(found):
            for observe in graphs.OBSERVERS:
                observe(unread)
        return found[0].report

    assert not observed().ok
    assert len(observed().races) == races


def test_nothing_captured_is_nothing_proved(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(write("print('hello')")) == 1
    assert capsys.readouterr().out == "hello\nauxstream: script.py captured no graph: nothing was proved\n"


def test_switched_off_by_the_environment_is_not_proved(write: Write) -> None:
    done = command(write(SAFE + "capture('unchecked')\n"), AUXSTREAM_VERIFY="off")
    assert done.returncode == 1, done.stderr
    assert "'unchecked': not proved" in done.stdout
    assert "captured with verify='off'" in done.stdout
    assert "no race" not in done.stdout


def test_regions_switched_off_are_said_to_be(write: Write) -> None:
    done = command(write(SAFE + "capture('serial')\n"), AUXSTREAM_DISABLE="1")
    assert done.returncode == 0, done.stderr
    assert "AUXSTREAM_DISABLE=1: regions ran on the caller's stream, and only that was checked" in done.stdout


# --- the script runs as it would alone --------------------------------------------------------------------------------


def test_the_script_is_main_and_has_its_arguments(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adopts(monkeypatch, PROVED)
    (tmp_path / "a_neighbour_of_the_script.py").write_text("WORD = 'found'\n")
    script = write(
        "import sys, a_neighbour_of_the_script as n\n"
        "assert sys.modules['__main__'].__dict__ is globals()\n"
        "print(__name__, __file__, sys.argv, n.WORD)\n"
    )
    argv, path, main_module = list(sys.argv), list(sys.path), sys.modules["__main__"]
    assert verify(script, "--json", "x", "--help", "--", "-k") == 0
    arguments = [str(script), "--json", "x", "--help", "--", "-k"]
    said = capsys.readouterr()
    assert said.out.startswith(f"__main__ {script} {arguments} found\n")
    assert said.err.startswith("auxstream: --json stands behind the script, so the script gets it")
    assert verify(script, "--help", "json") == 0
    assert not capsys.readouterr().err
    assert (sys.argv, sys.path, sys.modules["__main__"]) == (argv, path, main_module)
    assert not graphs.OBSERVERS


def test_reports_come_whatever_the_script_does_to_its_surroundings(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = write(
        SAFE + f"import os\ncapture('moved')\nos.chdir({str(elsewhere)!r})\nsys.stdout = open(os.devnull, 'w')"
    )
    before = sys.stdout
    try:
        assert verify("--json", "reports.json", "--picture", "pictures", script) == 0
    finally:
        sys.stdout = before
    assert "'moved': proved" in capsys.readouterr().out
    assert (tmp_path / "reports.json").is_file()
    assert (tmp_path / "pictures" / "001-moved.svg").is_file()


@pytest.mark.parametrize(
    ("stop", "code", "message"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("raise SystemExit(False)", 0, ""),
        ("sys.exit('why')", 1, "why\n"),
    ],
)
def test_exit_codes_of_its_own(
    write: Write, capsys: pytest.CaptureFixture[str], stop: str, code: int, message: str
) -> None:
    assert verify(write(SAFE + f"capture('one')\n{stop}\n")) == code
    shown = capsys.readouterr()
    assert shown.err == message
    assert "'one': proved" in shown.out
    assert (f"the script exited with code {code}" in shown.out) == bool(code)


def test_a_script_that_fails_shows_what_python_shows(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    script = write(SAFE + "capture('before')\ndef f():\n    return 1 / 0\nf()\ncapture('after')\n")
    assert verify(script) == 2
    shown = capsys.readouterr()
    plain = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert shown.err == plain.stderr
    assert "'before': proved" in shown.out
    assert "'after'" not in shown.out
    assert "the script failed with ZeroDivisionError" in shown.out


def test_a_script_that_is_no_python(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    script = write("x = = 1\n")
    assert verify(script) == 2
    shown = capsys.readouterr()
    plain = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert shown.err == plain.stderr
    assert "captured no graph: nothing was proved" in shown.out


def test_a_race_that_ends_the_script(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(write(SAFE + CLASH + "clash('bad')\n")) == 1
    shown = capsys.readouterr()
    assert "RaceError" in shown.err
    assert "verify_script.py" not in shown.err
    assert "runpy" not in shown.err
    assert "'bad': not proved" in shown.out
    assert "the script ended at the race; AUXSTREAM_VERIFY=warn lets it go on" in shown.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_torch_s_own_graphs_need_a_gpu(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(write("import torch\nwith torch.cuda.graph(torch.cuda.CUDAGraph()):\n    pass\n")) == 2
    shown = capsys.readouterr()
    assert "RuntimeError" in shown.err
    assert "there is no CUDA device here" in shown.out
    assert verify(write("raise RuntimeError('something else')\n")) == 2
    assert "CUDA" not in capsys.readouterr().out


# --- exit codes, files, usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "reports", "code"),
    [
        (Ending(0), [PROVED], 0),
        (Ending(0), [PROVED, FOREIGN], 1),
        (Ending(0), [], 1),
        (Ending(7), [PROVED], 7),
        (Ending(7), [FOREIGN], 1),
        (Ending(1, ValueError()), [PROVED], 2),
        (Ending(1, ValueError()), [], 2),
        (Ending(1, RaceError("race", FOREIGN)), [FOREIGN], 1),
        (Ending(1, RaceError("race", FOREIGN)), [PROVED], 1),
    ],
)
def test_the_exit_code(ending: Ending, reports: list[Report], code: int) -> None:
    assert exit_code(ending, reports) == code


def test_reports_as_files(write: Write, tmp_path: Path) -> None:
    to, pictures = tmp_path / "reports.json", tmp_path / "pictures"
    script = write(RACY + "capture('a/b: c', verify='off')\nSAFE = True\ncapture('..')\nsys.exit(5)\n")
    assert verify("--json", to, "--picture", pictures, script, "an argument") == 1
    written: dict[str, Any] = json.loads(to.read_text())
    assert {key: written[key] for key in ("schema", "ok", "script", "arguments", "exit", "error")} == {
        "schema": 1,
        "ok": False,
        "script": str(script),
        "arguments": ["an argument"],
        "exit": 5,
        "error": None,
    }
    assert [(graph["name"], graph["ok"], len(graph["races"])) for graph in written["graphs"]] == [
        ("a/b: c", False, 1),
        ("..", True, 0),
    ]
    drawn = sorted(pictures.iterdir())
    assert [path.name for path in drawn] == ["001-a_b_c.svg", "002-...svg"]
    shown = ["".join(ET.parse(path).getroot().itertext()) for path in drawn]
    assert "a/b: c" in shown[0]
    assert "race 1" in shown[0]
    assert "race" not in shown[1].replace("no race", "")


def test_an_error_in_the_json(write: Write, tmp_path: Path) -> None:
    to = tmp_path / "reports.json"
    assert verify("--json", to, write("raise ValueError('no')\n")) == 2
    written = json.loads(to.read_text())
    assert (written["ok"], written["exit"], written["error"], written["graphs"]) == (False, None, "ValueError: no", [])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "required: SCRIPT\n"),
        (("{tmp}/nowhere.py",), "there is no file"),
        (("{tmp}",), "is a folder; expected a Python script"),
        (("--json", "{tmp}", "{script}"), "no file can be made"),
        (("--json", "{tmp}/no/folder/x.json", "{script}"), "no file can be made"),
        (("--picture", "{script}", "{script}"), "no folder can be made"),
        (("--picture", "{tmp}/no/folder", "{script}"), "no folder can be made"),
        (("--loud", "{script}"), "unrecognized arguments: --loud"),
    ],
)
def test_usage(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    script = write("raise SystemError('must not run')\n")
    with pytest.raises(SystemExit) as stop:
        verify(*(argument.format(tmp=tmp_path, script=script) for argument in arguments))
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_the_help_shows_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "demo" in shown
    assert "verify" in shown


# --- on a GPU ---------------------------------------------------------------------------------------------------------

PLAIN = """
import torch

x = torch.ones(1 << 20, device="cuda"); y = x * 2 + 5 + x  # loads what a capture may not
side = torch.cuda.Stream()
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    h = x * 2
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        s = h * 3
    {handoff}
    del h
    z = x + 5
    torch.cuda.current_stream().wait_stream(side)
    y = z + s
"""


@pytest.mark.gpu
def test_a_plain_script_on_a_gpu(write: Write) -> None:
    done = command(write(PLAIN.format(handoff="")))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "reused by `add` at script.py:13" in done.stdout
    assert "may still read it" in done.stdout


@pytest.mark.gpu
def test_a_plain_script_put_right_on_a_gpu(write: Write) -> None:
    done = command(write(PLAIN.format(handoff="h.record_stream(side)")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proved free of races" in done.stdout
