"""Mode `none`: the steps of a graph run op by op, in the place of a captured one.

Enters: a function that runs them. Leaves: an `UncapturedGraph`, whose `replay` runs it and leaves the results where the
first run put them. Invariant: calls, outputs and order are those of a captured graph; nothing is captured or proved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..runtime import ranges
from ..runtime.errors import CaptureError
from .graphs import CapturedGraph
from .program import Program
from .proof import Report
from .state import preserved, storage_of

if TYPE_CHECKING:
    from .replay_order import ReplayOrder


class Turns:
    """The order of runs on the host alone: one at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Turns:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self) -> None:
        """A run is over when it returns."""


def order_of_runs(device: torch.device) -> Turns | ReplayOrder:
    """The order that the graphs of one model share."""
    if device.type != "cuda":
        return Turns()
    from .replay_order import replay_order

    index = torch.cuda.current_device() if device == torch.device("cuda") else device.index
    return replay_order(index, object())


class UncapturedGraph(CapturedGraph):
    """What stands in for a graph where nothing is captured."""

    def __init__(self, name: str, run: Callable[[], Any], outputs: Any, order: Turns | ReplayOrder) -> None:
        super().__init__(name)
        self._run = run
        self._outputs = pytree.tree_leaves(outputs)
        self._turns = order

    @property
    def order(self) -> Turns | ReplayOrder:
        return self._turns

    @property
    def programs(self) -> tuple[Program, ...]:
        return ()

    @property
    def report(self) -> Report:
        raise CaptureError(
            f"{self.name!r} was not captured, so there is nothing to prove",
            expected="a captured graph",
            came="mode 'none'",
            remedy="compile with mode='full'",
        )

    @ranges.around(lambda graph: f"replay {graph.name}")
    def replay(self) -> None:
        with self.order:
            for place, result in zip(self._outputs, pytree.tree_leaves(self._run()), strict=True):
                if isinstance(place, Tensor) and storage_of(place) != storage_of(result):
                    _fill(place, result)

    def wait(self) -> None:
        self.order.wait()


def _fill(place: Tensor, result: Tensor) -> None:
    """Copy a result to where the first one lies; what was expanded is there once."""
    for dim, stride in enumerate(place.stride()):
        if not stride and place.shape[dim] > 1:
            place, result = place.narrow(dim, 0, 1), result.narrow(dim, 0, 1)
    place.copy_(result)


def run_once(
    run: Callable[[], Any], mutated: Sequence[Tensor], device: torch.device, *, name: str, order: Turns | ReplayOrder
) -> tuple[UncapturedGraph, Any]:
    """Run, put `mutated` and the RNG back, and keep the results: later ones go to the same place."""
    with ranges.span(f"rehearse {name}"), torch.inference_mode(False), torch.no_grad(), preserved(mutated, device):
        outputs = run()
    return UncapturedGraph(name, run, outputs, order), outputs
