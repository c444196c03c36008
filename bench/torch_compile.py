"""torch.compile of a module, and what compiling takes: the rival.

Enters: a module, its inputs, a mode. Leaves: a callable, and the seconds of its first call, with empty caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .budget import limit


def compiled_by_torch(
    module: nn.Module, inputs: Sequence[Tensor], mode: str, seconds: float
) -> tuple[Callable[[], object], float]:
    """The module compiled for these inputs, warmed up, and the seconds that took.

    On a CPU without Inductor, to try the rest. Raises TimeoutError if `seconds` are not enough.
    """
    from torch._inductor.utils import fresh_cache

    gpu = inputs[0].is_cuda
    how: dict[str, Any] = {"mode": mode} if gpu else {"backend": "aot_eager"}
    compiled: Any = None

    def run() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return compiled(*inputs)

    with limit(seconds), fresh_cache():
        compiled = torch.compile(module, fullgraph=True, dynamic=False, **how)
        start = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        for _ in range(3):  # with graphs, the second call records
            run()
    return run, took
