"""The command `doctor`: what is here, what of auxstream works here, and what to do about the rest.

Enters: the machine and its environment, in whatever state. Leaves: rows, and an exit code: 0 if what auxstream needs
here works, 1 if not. Works with no GPU, with packages missing, and with malformed `AUXSTREAM_*` variables: those are
reported, and left out. Invariant: importing this module imports neither torch nor anything that reads the settings.
"""

from __future__ import annotations

import json
from pathlib import Path

from . import doctor_facts as facts
from .doctor_probes import PROBES, Here, tried
from .doctor_rows import Row, as_json, failed, show
from .runtime import settings


def doctor(to: Path | None = None) -> int:
    """Look at everything, print it, and write it to the file `to` as JSON; returns the exit code."""
    rows = examined()
    show(rows)
    if to is not None:
        to.write_text(json.dumps(as_json(rows), indent=2) + "\n")
    return 1 if failed(rows) else 0


def examined() -> list[Row]:
    """Everything there is to say."""
    found = settings.every_setting()
    faulty = [setting for setting in found if setting.fault is not None]
    if faulty:
        settings.leave_out(faulty)
    here = Here(facts.has_gpu(), settings.SETTINGS)
    return [
        *facts.packages(here.gpu, here.settings),
        *facts.device(),
        *(tried(probe, here) for probe in PROBES),
        *facts.settings_in_force(found),
        *facts.environment(here.gpu),
    ]
