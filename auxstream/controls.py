"""Negative controls: a recorded program with one safety taken out, which every gate must catch."""

from __future__ import annotations

from typing import Final, Literal

from .capture.program import Program, Wait

Fault = Literal["fork wait", "join wait"]
_WAITS_FOR: Final = {"fork wait": "fork of ", "join wait": "end of "}


def without_waits(program: Program, fault: Fault) -> Program:
    """The program with every wait of one kind removed."""
    for index, step in enumerate(program.steps):
        if isinstance(step, Wait) and step.what.startswith(_WAITS_FOR[fault]):
            program = program.without(index)
    return program
