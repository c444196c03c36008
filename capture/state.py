"""What compiling must put back: tensors the graph mutates, and the RNG.

Enters: the tensors a warm-up and a capture may write. Leaves: the same tensors with the bytes they had. Everything is
enqueued on the current stream; nothing waits on the host.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def preserved(tensors: Sequence[Tensor], device: torch.device) -> Generator[None]:
    """Run the block, then restore `tensors` and the generators of the CPU and of `device`, error or not."""
    saved = [tensor.detach().clone() for tensor in tensors]
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, saved, strict=True):
                tensor.copy_(before)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
