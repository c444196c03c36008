"""Around the captures of one compiled model: the garbage collector held still, a progress bar, a summary.

Enters: how many graphs there are to be, then each before it is captured, then what came of it. Leaves: a line on the
logger "auxstream", at INFO, and a bar on stderr for those who look at one. Invariant: the collector is as before,
however it ends.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from tqdm import tqdm

from .uncaptured import UncapturedGraph

if TYPE_CHECKING:
    from .compiled import CompiledModel

LOGGER: Final = logging.getLogger("auxstream")
_GIB: Final = 1 << 30
_PYTHONS_OWN: Final = 1000
"""Python 3.12 freezes a few hundred objects when it starts."""


class Progress:
    """Of one compilation. `shown`: True, False, or None for a bar on a terminal alone."""

    def __init__(self, name: str, device: torch.device, shown: bool | None) -> None:
        self._name = name
        self._device = device
        self._bar: tqdm[Any] | None = None
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._started = time.perf_counter()

    def expect(self, graphs: int) -> None:
        """So many graphs will be captured; if nothing is said, one."""
        if self._shown:
            self._bar = tqdm(total=graphs, desc=f"capturing {self._name}", unit="graph", file=sys.stderr, leave=False)

    @contextmanager
    def capturing(self, what: str = "") -> Generator[None]:
        """The capture of one of them."""
        if self._bar is None and self._shown:
            self.expect(1)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (what, free_memory(self._device)))))
        yield
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def summary(self, compiled: CompiledModel) -> str:
        """What came of it, in one line, which is logged too."""
        seconds = time.perf_counter() - self._started
        graphs = [graph for graph in compiled.graphs if not isinstance(graph, UncapturedGraph)]
        parts = [f"{seconds:.1f} s"]
        if graphs:
            parts.append(f"{compiled.memory.total / _GIB:.3f} GiB")
        parts += [_counted(len(graphs), "graph"), _counted(len(compiled.regions), "region")]
        if graphs:
            proved = sum(graph.report.ok for graph in graphs)
            parts.append("proved" if proved == len(graphs) else f"{proved} of {len(graphs)} proved")
        line = f"{self._name}: {', '.join(parts)}"
        LOGGER.info(line)
        return line


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def free_memory(device: torch.device) -> str:
    """What the device has left, in words; nothing on the simulated machine."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / _GIB:.2f} of {total / _GIB:.2f} GiB free"


@contextmanager
def captures(name: str, device: torch.device, shown: bool | None) -> Generator[Progress]:
    """Compile in the block. What was there before is out of the collector's sight meanwhile, so collections are short;
    what the block leaves in cycles (tracers do), and would keep memory of the model, is collected at its end."""
    progress = Progress(name, device, shown)
    with _held_still():
        try:
            yield progress
        finally:
            progress.close()


@contextmanager
def _held_still() -> Generator[None]:
    ours = gc.get_freeze_count() <= _PYTHONS_OWN  # else it is somebody's doing, which `unfreeze` would undo
    if ours:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if ours:
            gc.unfreeze()
