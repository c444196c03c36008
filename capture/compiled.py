"""`CompiledModel`: a graph, and what a call does around its replay.

Enters: a captured graph of one shape, its regions, the memory of its inputs and outputs. Leaves: a callable. Invariant:
a call is one step, whatever other threads and streams do: copy in, replay, copy back.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.fuse import FusionReport
from .graphs import CapturedGraph
from .inputs import Calls
from .ledger import Ledger, ledger
from .policy import Choice
from .proof import Report
from .schedule import RegionPlan


class CompiledModel:
    """A captured model. Call it like the model; no gradients are recorded.

    Outputs live in the graph's own memory: the next call overwrites them, so clone what must last longer, or compile
    with `copy_outputs`. They may be inputs of that next call. A buffer or parameter that the model returns is the
    model's own, as in eager; an input it returns is the caller's own tensor; a view of an input becomes a copy. Inputs
    the model mutates are copied back.

    Calls may come from any stream and any thread. They run one at a time, and each waits, on the GPU, for what was
    given to the stream of the last one. Another stream that reads outputs, or makes inputs, calls `wait` first; another
    thread's call overwrites outputs, so threads hold a lock of their own around a call and their use of its outputs.

    Raises:
        InputError: arguments of another structure, shape, dtype or device than the captured ones, or which share memory
            with something the model writes. Nothing was copied and nothing ran.

    Attributes:
        regions: the regions that were inserted, in graph order.
        fusion: what was fused; None with fusion off.
        choice: which branches run on lanes, and what that was measured against.
        graph: the captured graph, with its `report` and `memory`; of several buckets, the largest's.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        regions: tuple[RegionPlan, ...],
        fusion: FusionReport | None,
        calls: Calls,
        choice: Choice,
    ) -> None:
        self.regions = regions
        self.fusion = fusion
        self.choice = choice
        self.graph = captured
        self._calls = calls

    @property
    def calls(self) -> Calls:
        """The memory of its inputs and outputs."""
        return self._calls

    @property
    def report(self) -> Report:
        """What was proved about the graph."""
        return self.graph.report

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        """All that may be replayed."""
        return (self.graph,)

    @property
    def memory(self) -> Ledger:
        """What it keeps, in bytes, per bucket, pool and stream; `str` makes it a table."""
        return ledger({None: self.graph}, self._calls.static.tensors())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self.graph.order:
            given = self._calls.enter(args, kwargs)
            self.graph.replay()
            return self._calls.leave(given)

    def wait(self) -> None:
        """The current stream waits, on the GPU, for the last call: now it may read its outputs. The next call waits for
        what that stream does with them, and for inputs it makes."""
        self.graph.wait()
