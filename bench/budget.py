"""Time: how long a call takes on this device, and how much is left for the rest of a benchmark.

Enters: a device, and the moment by which all must be done. Leaves: samples; `Out` where a part would take too long, and
the names of cases for which nothing was left.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..runtime.errors import AuxstreamError
from .harness import Figure, device_time, figure

T = TypeVar("T")


class Out(AuxstreamError):
    """No time is left for a part."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Times calls on `device`: on a GPU by events, else by the host's clock. `end` is a moment of `time.monotonic`."""

    device: torch.device
    end: float

    @staticmethod
    def of(device: torch.device, seconds: float) -> Clock:
        return Clock(device, time.monotonic() + seconds)

    def left(self) -> float:
        return self.end - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Raise if so many seconds, which `what` is expected to take, are not left."""
        if self.left() < seconds:
            raise Out(f"{what} was left out", expected=f"{seconds:.0f} s for it", came=f"{self.left():.0f} s left")

    def in_time(self, cases: Iterable[T], left_out: list[str], said: Callable[[T], str] = str) -> Iterator[T]:
        """Those cases for which time is left if each takes half as long again as the longest before it; the others are
        named in `left_out`."""
        longest = 0.0
        for case in cases:
            if self.left() < 1.5 * longest + 1:
                left_out.append(said(case))
                print(f"left out, {self.left():.0f} s left: {left_out[-1]}", flush=True)
                continue
            start = time.monotonic()
            yield case
            longest = max(longest, time.monotonic() - start)

    def ms(self, run: Callable[[], object], times: int = 10) -> float:
        """Milliseconds per call, calls given back to back; on a GPU behind another, so that it need not wait for the
        host to launch the first."""
        if self.device.type == "cuda":
            run()
            return device_time(run, times) / 1000
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1000

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def host(self, call: Callable[[], object]) -> Figure:
        """The host's time of a call that finds the device idle: nothing it enqueues waits for room."""
        calls, warm_ups = (200, 20) if self.device.type == "cuda" else (2, 0)
        samples: list[float] = []
        for turn in range(calls + warm_ups):
            self.settle()
            start = time.perf_counter_ns()
            call()
            if turn >= warm_ups:
                samples.append((time.perf_counter_ns() - start) / 1000)
        self.settle()
        return figure(samples, "us")


@contextmanager
def limit(seconds: float) -> Generator[None]:
    """Raise TimeoutError in the block once it has taken that long, and again if that was caught; in the main thread."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
