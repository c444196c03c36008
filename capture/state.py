"""What compiling must put back: tensors the graph mutates, and the RNG; and what a run did to them meanwhile.

Enters: the tensors a warm-up, a capture or a check may write. Leaves: the same tensors with the bytes they had.
Everything is enqueued on the current stream; only `written` waits, for it answers on the host.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

_BITS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checkpoint:
    """The bytes of tensors, and the states of the generators of the CPU and of `device`, as they are now."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._saved = [tensor.detach().clone() for tensor in tensors]
        self._device = device
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self, *, flipped: bool = False) -> None:
        """Put all back. `flipped`: with the last bit of every number inverted, except of wider integers and booleans,
        which may be indices and flags."""
        with torch.no_grad():
            for tensor, before in zip(self._tensors, self._saved, strict=True):
                if flipped:
                    bits(tensor).copy_(_start(before, flipped))
                else:
                    tensor.copy_(before)
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu, self._device)

    def written(self, *, flipped: bool) -> list[Tensor]:
        """Per tensor, the elements (numbered in row-major order) whose bits `restore` did not leave there."""
        return [
            (bits(tensor) != _start(before, flipped)).reshape(-1).nonzero().reshape(-1)
            for tensor, before in zip(self._tensors, self._saved, strict=True)
        ]


@contextmanager
def preserved(tensors: Sequence[Tensor], device: torch.device) -> Generator[None]:
    """Run the block, then restore `tensors` and the generators of the CPU and of `device`, error or not."""
    before = Checkpoint(tensors, device)
    try:
        yield
    finally:
        before.restore()


def bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers of the same width: NaN equals itself, and -0 is not 0."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_BITS[tensor.element_size()])


def storage_of(tensor: Tensor) -> int:
    """What tells one storage from another, while both are alive."""
    return tensor.untyped_storage()._cdata


def _start(before: Tensor, flipped: bool) -> Tensor:
    plain = bits(before)
    narrow = before.element_size() == 1 and before.dtype is not torch.bool
    return plain ^ 1 if flipped and (narrow or before.is_floating_point() or before.is_complex()) else plain
