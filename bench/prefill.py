"""A prompt, written into the caches: `compile`'s pieces against torch.compile without graphs.

Enters: a model on its device, a number of tokens, the time that is left. Leaves: figures by name, as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from ..capture.compiler import compile
from ..capture.huggingface import DecodeStep, PrefillStep
from ..capture.options import Options
from .budget import Clock
from .harness import interleave
from .torch_compile import rival

ONE, SHARED, CHOSEN = "pieces, one stream", "pieces, shared experts on a lane", "pieces, as compile chooses"
TORCH = "torch.compile, no graphs"
OURS: Final = {
    ONE: Options(mode="piecewise", multi_stream_moe=False),
    SHARED: Options(mode="piecewise", overlap="*=off,layers.*.shared=on", fusion_safe="*=1"),
    CHOSEN: Options(mode="piecewise", fusion_safe="*=1"),
}


def prefill(model: nn.Module, tokens: int, clock: Clock, rounds: int, results: dict[str, Any]) -> None:
    """Fill in the figures of `tokens` at once, one sequence, over caches that hold no more."""
    step = PrefillStep(DecodeStep(model, 1, tokens))
    device = clock.device
    inputs = (
        torch.randint(128, (1, tokens), device=device),
        torch.arange(tokens, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.full((1,), tokens - 1, dtype=torch.int64, device=device),
    )
    print(f"prefill, {tokens} tokens", flush=True)
    runs: dict[str, Callable[[], object]] = {}
    for name, options in OURS.items():
        start = time.perf_counter()
        compiled = compile(step, inputs, options, name=f"prefill-{tokens}-tokens")
        runs[name] = partial(compiled, *inputs)
        results[f"compile, s: {name}"] = time.perf_counter() - start
        results |= {f"memory, bytes: {name}": compiled.memory.total, f"choice: {name}": str(compiled.choice)}
        print(f"  {name}: {results[f'compile, s: {name}']:.1f} s, {len(compiled.regions)} regions, "
              f"{compiled.memory.total / 2**20:.1f} MiB; {compiled.choice}", flush=True)  # fmt: skip
    found = rival(step, inputs, "default", clock, needs=10)
    if isinstance(found, str):
        results["left out"] = f"{TORCH}: {found}"
        print(f"  {results['left out'][:300]}", flush=True)
    else:
        runs[TORCH], results[f"compile, s: {TORCH}"] = found
    figures = interleave({name: partial(clock.ms, run, 3) for name, run in runs.items()}, rounds, "ms")
    for name, timed in figures.items():
        results[f"ms: {name}"] = timed
        said = f"  {name:34} {timed}"
        if TORCH in figures:
            ratio = results[f"torch.compile over {name}"] = figures[TORCH].median / timed.median
            said += f"   torch.compile takes {ratio:5.3f} of it"
        print(said, flush=True)
