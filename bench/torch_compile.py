"""torch.compile of a module, and what compiling takes: the rival.

Enters: a module, its inputs, a mode. Leaves: a callable, and the seconds of its first call, with empty caches; or why
there is none: it may fail or take too long, and then the rest of a benchmark stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Clock, limit


def rival(
    module: nn.Module, inputs: Sequence[Tensor], mode: str, clock: Clock, *, needs: float, for_others: float = 20
) -> tuple[Callable[[], object], float] | str:
    """The module compiled within what is left of the time, or why not.

    Args:
        needs: seconds without which it is not tried.
        for_others: seconds of what is left that it may not take.
    """
    try:
        clock.need(needs + for_others, f"torch.compile, {mode}")
        return compiled_by_torch(module, inputs, mode, clock.left() - for_others)
    except Exception as error:  # whatever it is that another's compiler raises
        return f"{type(error).__name__}: {error}"[:2000]


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
