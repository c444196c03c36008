"""Runs a script as `python` would, and checks every graph that it captures.

    auxstream verify [--json FILE] [--picture FOLDER] SCRIPT [ARGS...]

Enters: a script that knows nothing of this. Leaves: a report per graph, captured with `torch.cuda.graph` or with
`auxstream.graph`, and an exit code. Invariant: the code is 0 only if the script ended well, captured something, and all
of that was proved.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import torch

from .capture import graphs
from .capture.adopt import Adopted, adopting
from .capture.proof import verify
from .capture.report import SCHEMA, Report
from .runtime.errors import RaceError
from .runtime.settings import SETTINGS

PROVED: Final = 0
NOT_PROVED: Final = 1
FAILED: Final = 2


@dataclass(frozen=True, slots=True)
class Ending:
    """How the script ended: its own exit code, or the error that ended it."""

    code: int
    error: BaseException | None = None


def verify_script(script: Path, arguments: Sequence[str], *, to: Path | None, pictures: Path | None) -> int:
    """Run `script` and print what was proved about its graphs; returns the exit code.

    Args:
        script: the file.
        arguments: its own.
        to: JSON goes here.
        pictures: a folder, made if need be, for one SVG per graph.
    """
    out, here = sys.stdout, Path.cwd()  # whatever the script does to them
    found: list[Adopted] = []
    with adopting(found), observing(found):
        ending = run_as_main(script, arguments)
    sys.stdout.flush()
    code = exit_code(ending, [adopted.report for adopted in found])
    for number, adopted in enumerate(found, 1):
        verdict = "proved" if adopted.report.ok else "not proved"
        print(f"graph {number} of {len(found)}, {adopted.name!r}: {verdict}", file=out)
        print("\n".join(f"  {line}" for line in str(adopted.report).splitlines()), file=out)
    for line in _summary(script, ending, found):
        print(f"auxstream: {line}", file=out)
    if to is not None:
        (here / to).write_text(_as_json(script, arguments, ending, found, code) + "\n")
    if pictures is not None:
        folder = here / pictures
        folder.mkdir(exist_ok=True)
        for number, adopted in enumerate(found, 1):
            name = re.sub(r"[^\w.-]+", "_", adopted.name)[:80]
            (folder / f"{number:03d}-{name}.svg").write_text(adopted.report.picture(adopted.name))
    return code


def exit_code(ending: Ending, reports: Sequence[Report]) -> int:
    """0: all is proved; 1: not so; 2: the script failed. Where all is proved, the script's own exit code passes."""
    if ending.error is not None and not isinstance(ending.error, RaceError):
        return FAILED
    if ending.error is not None or not reports or not all(report.ok for report in reports):
        return NOT_PROVED
    return ending.code


def run_as_main(script: Path, arguments: Sequence[str]) -> Ending:
    """Run a script as `python SCRIPT ARGS...` would: `__main__`, its arguments, its folder first on the path. What it
    raises is shown as `python` would show it."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return Ending(stop.code or 0)
        print(stop.code, file=sys.stderr)
        return Ending(1)
    except BaseException as error:
        error = error.with_traceback(_from_script(error.__traceback__, script))
        sys.excepthook(type(error), error, error.__traceback__)
        return Ending(1, error)
    finally:
        sys.argv, sys.path[:] = argv, path
    return Ending(0)


def _from_script(frames: TracebackType | None, script: Path) -> TracebackType | None:
    """A traceback without what called the script."""
    while frames is not None and frames.tb_frame.f_code.co_filename != str(script):
        frames = frames.tb_next
    return frames


@contextmanager
def observing(found: list[Adopted]) -> Generator[None]:
    """Append a report for each `auxstream.graph`, those of compiled models included."""

    def observe(graph: graphs.CapturedGraph) -> None:
        found.append(Adopted(graph.name, _report(graph)))

    graphs.OBSERVERS.append(observe)
    try:
        yield
    finally:
        graphs.OBSERVERS.remove(observe)


def _report(graph: graphs.CapturedGraph) -> Report:
    """Its own; but what only the code left unchecked is checked here."""
    own = graph.report
    if own.ok or own.races or SETTINGS.verify == "off":
        return own
    checked = verify(graph)
    # Of a CUDA graph not read back, torch's ops are known and nothing else: enough for a race, not for a proof.
    whole = isinstance(graph, graphs.SimulatedGraph) or any(node.kernel for node in checked.nodes)
    return checked if checked.races or whole else own


def _summary(script: Path, ending: Ending, found: Sequence[Adopted]) -> list[str]:
    lines: list[str] = []
    if isinstance(ending.error, RaceError):
        lines.append("the script ended at the race; AUXSTREAM_VERIFY=warn lets it go on")
    elif ending.error is not None:
        lines.append(
            f"the script failed with {type(ending.error).__name__}; what it would have captured is not checked"
        )
        if _met_no_gpu(ending.error):
            lines.append(
                "there is no CUDA device here, and torch.cuda cannot capture without one; run it on a GPU, or capture "
                "with auxstream.graph, which is checked on the simulated machine too"
            )
    elif ending.code:
        lines.append(f"the script exited with code {ending.code}")
    if SETTINGS.disable and found:
        lines.append("AUXSTREAM_DISABLE=1: regions ran on the caller's stream, and only that was checked")
    if not found:
        return [*lines, f"{script.name} captured no graph: nothing was proved"]
    failed = [adopted for adopted in found if not adopted.report.ok]
    races = sum(len(adopted.report.races) for adopted in failed)
    graphs_found = f"{len(found)} graph{'s' * (len(found) != 1)} captured by {script.name}"
    if not failed:
        return [*lines, f"{graphs_found}: proved free of races, under the assumptions above"]
    names = ", ".join(repr(adopted.name) for adopted in failed[:8]) + (", ..." if len(failed) > 8 else "")
    return [*lines, f"{graphs_found}: {len(failed)} not proved ({names}), with {races} race{'s' * (races != 1)}"]


def _met_no_gpu(error: BaseException) -> bool:
    home = str(Path(torch.cuda.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    return not torch.cuda.is_available() and any(frame.filename.startswith(home) for frame in frames)


def _as_json(script: Path, arguments: Sequence[str], ending: Ending, found: Sequence[Adopted], code: int) -> str:
    error = ending.error
    return json.dumps(
        {
            "schema": SCHEMA,
            "ok": code == PROVED,
            "script": str(script),
            "arguments": list(arguments),
            "exit": None if error is not None else ending.code,
            "error": None if error is None else "".join(traceback.format_exception_only(error)).strip(),
            "graphs": [{"name": adopted.name, **adopted.report.as_dict()} for adopted in found],
        },
        indent=1,
    )
