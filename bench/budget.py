"""Time: how long a call takes on this device, and how much is left for the rest of a benchmark.

Enters: a device, and the moment by which all must be done. Leaves: samples; `Out` where a part would take too long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..runtime.errors import AuxstreamError
from .harness import Figure, device_time, figure


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

    def ms(self, run: Callable[[], object], times: int = 10) -> float:
        """Milliseconds per call, calls given back to back."""
        if self.device.type == "cuda":
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
