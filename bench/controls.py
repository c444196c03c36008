"""Negative controls on the simulated machine: a recorded program without one safety, which every gate must catch.

Enters: a recording. Leaves: it without one kind of wait, and replays that make its races hurt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from ..capture.conflicts import hazards_of
from ..capture.graphs import SimulatedGraph
from ..capture.program import Program, Wait
from ..runtime.errors import SimulatedFault

Fault = Literal["fork wait", "join wait"]
_WAITS_FOR: Final = {"fork wait": "fork of ", "join wait": "end of "}


def without_waits(program: Program, fault: Fault) -> Program:
    """The program with every wait of one kind removed."""
    for index, step in enumerate(program.steps):
        if isinstance(step, Wait) and step.what.startswith(_WAITS_FOR[fault]):
            program = program.without(index)
    return program


def directed_replays(graph: SimulatedGraph, program: Program) -> Callable[[], None]:
    """Replays of a faulty `program` over the memory of `graph`, each in an order that turns one of its races around."""
    simulation = graph.simulation.of(program)
    hazards = hazards_of(program).hazards
    count = 0

    def replay() -> None:
        nonlocal count
        order = simulation.orders.adversarial(count, hazards)
        count += 1
        try:
            simulation.run(order)
        except SimulatedFault:
            return  # corrupted indices: the outputs keep their poison, which compares unequal

    return replay
