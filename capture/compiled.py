"""`CompiledModel`: a graph, and what a call does around its replay.

Enters: a captured graph of one shape, its regions, the memory of its inputs and outputs. Leaves: a callable. Invariant:
a call is one step, whatever other threads and streams do: copy in, replay, copy back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Node

from ..kernels.fuse import FusionReport
from ..runtime import ranges
from ..runtime.errors import CaptureError
from .graphs import CapturedGraph
from .inputs import Calls
from .ledger import Ledger, ledger
from .life import Life, refuse_copies
from .policy import Choice
from .proof import Report
from .schedule import RegionPlan


class CompiledModel:
    """A captured model. Call it like the model; no gradients are recorded.

    Outputs live in the graph's own memory: the next call overwrites them, so clone what must last longer, or compile
    with `copy_outputs`. They may be inputs of that next call. A buffer or parameter that the model returns is the
    model's own, as in eager; an input it returns is the caller's own tensor, and a view of an input is one of his; a
    copy where his is laid out otherwise than the example. Inputs the model mutates are copied back.

    Calls may come from any stream and any thread. They run one at a time, and each waits, on the GPU, for what was
    given to the stream of the last one. Another stream that reads outputs, or makes inputs, calls `wait` first; another
    thread's call overwrites outputs, so threads hold a lock of their own around a call and their use of its outputs.

    Values of weights and buffers may be changed in place at any time. One that is replaced is noticed by a later call:
    see capture/bindings.py for when; `recapture` goes over to it.

    Raises:
        InputError: arguments of another structure, shape, dtype or device than the captured ones, or which share memory
            with something the model writes. Nothing was copied and nothing ran.
        CaptureError: a tensor that the graph reads is no longer the model's. Likewise.

    Attributes:
        regions: the regions that were inserted, in graph order.
        fusion: what was fused; None with fusion off.
        choice: which branches run on lanes, and what that was measured against.
        graph: the captured graph, with its `report` and `memory`; of several buckets, the largest's.
        summary: what compiling it took and gave, in a line.
    """

    summary: str = "a graph of a compiled model"
    _life: Life | None = None

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
        for node in _nodes(regions, fusion):  # a module and its graph hold one another: weights would wait for `gc`
            node.graph._owning_module = None

    @property
    def name(self) -> str:
        """As given, with its phase and bucket."""
        return self.graph.name

    @property
    def calls(self) -> Calls:
        """The memory of its inputs and outputs."""
        return self._calls

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The graph's own memory for inputs, as `(args, kwargs)`; of several buckets or phases, the largest's decode
        step. A call that is passed these very tensors copies nothing in: write to them in place (on the stream of the
        calls, or behind `wait`), then call `model(*args, **kwargs)`."""
        static = self._calls.static
        return static.args, dict(static.kwargs)

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

    @ranges.around(lambda model: f"call {model.name}")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step: inputs are copied in, the graph is replayed.

        Args:
            args: as the model's own `forward`, of the captured structure, shapes, dtypes and device.
            kwargs: likewise.

        Returns:
            what the model returns, in the graph's memory: see above for how long.
        """
        if self._life is not None:
            self._life.glance()
        with torch.no_grad(), self.graph.order:
            given = self._calls.enter(args, kwargs)
            self.graph.replay()
            return self._calls.leave(given)

    def wait(self) -> None:
        """The current stream waits, on the GPU, for the last call: now it may read its outputs. The next call waits for
        what that stream does with them, and for inputs it makes."""
        self.graph.wait()

    @ranges.around(lambda model: f"eager {model.name}")
    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, op by op, with the tensors it has now; in the same order among calls.

        Args:
            args: as the model's own `forward`, of any shapes.
            kwargs: likewise.

        Returns:
            what the model returns.
        """
        with torch.no_grad(), self.graph.order if "graph" in vars(self) else nullcontext():
            return self._lives().model(*args, **kwargs)

    def check(self) -> None:
        """Look at all of the model's tensors now.

        Raises:
            CaptureError: one that the graphs read was replaced.
        """
        self._lives().check()

    def recapture(self, pool: Any = None) -> None:
        """Give the graphs back and make them anew, of the tensors that the model has now.

        Outputs of earlier calls are no longer updated. No other thread may call meanwhile. If it fails, there are no
        graphs: calls say so, and `recapture` may be tried again.

        Args:
            pool: memory to capture into, as `torch.cuda.graph_pool_handle()` gives it; default: a pool of its own.
        """
        life = self._lives()
        self.__dict__.clear()
        self._life = life
        life.end()
        self.__dict__.update(life.made(pool).__dict__)

    def begin(self, life: Life, summary: str) -> None:
        """It is whole: from now on it follows the model."""
        life.follow(self.graphs)
        self._life = life
        self.summary = summary

    def _lives(self) -> Life:
        if self._life is None:
            raise CaptureError(
                "a bucket has no life of its own",
                expected="the model that `compile` returned",
                came="one of its buckets",
                remedy="ask the whole model",
            )
        return self._life

    def __getattr__(self, name: str) -> Any:
        """What a recapture that failed left nothing of. Raises CaptureError."""
        if self._life is not None and not name.startswith("__"):
            self._life.known()
        raise AttributeError(f"a {type(self).__name__} has no {name!r}")

    def __str__(self) -> str:
        return self.summary

    def __reduce__(self) -> Any:
        refuse_copies(f"a {type(self).__name__}")


def _nodes(regions: tuple[RegionPlan, ...], fusion: FusionReport | None) -> Iterator[Node]:
    """One of each graph that plans and reports speak of."""
    for region in regions[:1]:
        yield region.fork
    for found in fusion.fusions[:1] if fusion is not None else ():
        yield found.group.nodes[0]
