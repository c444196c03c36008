"""The command `trace`: what overlapped in a graph's replays, as a picture, a Perfetto trace, and a table per region.

    auxstream trace [--to FOLDER] [--replays N] demo [ARGS...]
    auxstream trace [--to FOLDER] [--replays N] SCRIPT [ARGS...]

Enters: `demo`, or a script. Leaves: files in a folder, a table, and an exit code: 0 if something was traced, 1 if
nothing was, 2 if the script failed; where all is well, the script's own. Needs a GPU: the simulated machine has no
times, and none are made up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from .runtime.errors import InputError

DEMO: Final = "demo"
NOTHING: Final = 1
FAILED: Final = 2


def trace_command(what: str, arguments: Sequence[str], *, to: Path, replays: int) -> int:
    """Trace `what`, write everything, print the table; returns the exit code.

    Args:
        what: `demo`, or the path of a script.
        arguments: the demo's, or the script's own.
        to: a folder, made if need be.
        replays: of each graph, profiled.

    Raises:
        InputError: there is no GPU, or no such script.
    """
    from .trace_demo import parse, trace_demo
    from .trace_output import write_all
    from .trace_script import trace_script

    folder = Path.cwd() / to  # whatever the script does to it, and to standard output
    console = Console(file=sys.stdout, markup=False, highlight=False)
    demo = parse(arguments) if what == DEMO else None
    if demo is None and not Path(what).is_file():
        raise InputError(f"there is no script {what}", expected="`demo`, or a Python file", remedy="check its path")
    if not torch.cuda.is_available():
        raise InputError(
            "trace shows when kernels ran, and there is no GPU here",
            expected="a CUDA device: the simulated machine runs ops in legal orders, and has no times",
            came="none",
            remedy="run it on a GPU; auxstream verify --picture FOLDER SCRIPT draws without one what waits for what",
        )
    if demo is not None:
        write_all(folder, [trace_demo(demo, replays)], console)
        return 0
    entries, notes, ending = trace_script(Path(what), arguments, replays)
    sys.stdout.flush()
    if entries:
        write_all(folder, entries, console)
    for note in notes:
        console.print(f"auxstream: {note}")
    if ending.error is not None:
        console.print(f"auxstream: the script failed with {type(ending.error).__name__}")
        return FAILED
    if not entries:
        console.print(f"auxstream: nothing was traced: {Path(what).name} replayed no CUDA graph that could be shown")
        return NOTHING
    return ending.code
