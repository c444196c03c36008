"""Triton kernels made ready side by side, before any of them is launched.

Enters: calls of kernels' `warmup`. Leaves: nothing; the kernels are compiled and loaded, with their launchers, which
Triton 3.6 and older compile as C code, half a second each. What does not compile is not reported here: its launch will
say so, in the caller's own thread.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

_WORKERS: Final = 16


def make_ready(warmups: Iterable[Callable[[], Any]], device: torch.device) -> None:
    """`warmups`: each compiles one kernel and returns it as `JITFunction.warmup` does."""

    def ready(warmup: Callable[[], Any]) -> None:
        with torch.cuda.device(device):
            _ = warmup().run

    with concurrent.futures.ThreadPoolExecutor(max_workers=_WORKERS) as pool:
        concurrent.futures.wait([pool.submit(ready, warmup) for warmup in warmups])
