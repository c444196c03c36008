"""Calls in a CUDA graph, timed by replaying it; and the pace of the device's memory, which bounds them.

Enters: a callable and what it is called with. Leaves: device time per call. Invariant: what a graph reads is kept alive
with it; and where `flush` is given, nothing that a replay reads lies in the chip's cache when it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from .harness import device_time, interleave
from .launches import Launches, launches_of

T = TypeVar("T")
FLUSH: Final = 256 << 20
"""Bytes read before each replay: several times what an L2 cache holds, and nothing to be written back."""


def flusher() -> Tensor:
    """What is read before a replay so that all else leaves the chip's cache."""
    return torch.zeros(FLUSH // 4, device="cuda")


class Captured:
    """A callable in a CUDA graph, and what it returned there: every replay writes it anew."""

    def __init__(self, run: Callable[..., Any], *inputs: Any) -> None:
        self.kept = (run, inputs)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run(*inputs)
            stream.synchronize()
            with torch.cuda.graph(self.graph, stream=stream):
                self.out = run(*inputs)

    def replay(self) -> None:
        self.graph.replay()

    def sample(self) -> float:
        """Microseconds per replay."""
        return device_time(self.graph.replay, 10)

    def launches(self) -> Launches:
        return launches_of(self.graph.replay)


class Chain:
    """Calls one behind the other in a CUDA graph, as the layers of a model are, each with tensors of its own.

    Args:
        run: is called with each of `calls` in turn.
        flush: what `flusher` made, where the calls together would fit into the cache.
        replays: how many are timed as one; with `flush`, 1.
    """

    def __init__(
        self, run: Callable[[T], object], calls: Sequence[T], *, flush: Tensor | None = None, replays: int = 1
    ) -> None:
        assert flush is None or replays == 1, "only the first replay would find the cache cold"

        def all_calls() -> None:
            for call in calls:
                run(call)

        self._captured = Captured(all_calls)
        self._count, self._flush, self._replays = len(calls), flush, replays

    def sample(self) -> float:
        """Microseconds per call. The device is kept busy before, so that it does not wait for the host to launch."""
        if self._flush is not None:
            self._flush.sum()
        else:
            self._captured.replay()
        return device_time(self._captured.graph.replay, self._replays) / self._count

    def launches(self) -> float:
        """Per call."""
        return sum(count for count, _ in self._captured.launches().values()) / self._count


def paces() -> dict[str, float]:
    """TB/s of a copy (read and written) and of a sum over one GiB."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    words = source.view(torch.float32)
    runs = {"copy": lambda: device_time(lambda: target.copy_(source), 5), "read": lambda: device_time(words.sum, 5)}
    figures = interleave(runs, 7, "us")
    copied, read = figures["copy"].median, figures["read"].median
    return {"copy": 2 * source.nbytes / copied / 1e6, "read": source.nbytes / read / 1e6}
