"""A model of the caching allocator: where a recorded program's tensors would lie on a GPU.

Enters: allocations, frees and `record_stream` uses, in program order. Leaves: byte addresses. The model keeps what
decides about races: one free list per stream, immediate reuse of a freed block by the same stream, best fit with
splitting and merging, and `record_stream` deferring reuse to the end of the recording (torch's behaviour during
capture, unless `graph_capture_record_stream_reuse` is set). It is more eager to reuse than the real one, which
rounds large blocks up and keeps small and large ones apart: a race the real allocator can freeze, this one can too.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch

GRANULE: Final = 512
BASE: Final = 1 << 60
"""First address of the arena, above any host or device pointer."""


@dataclass(slots=True)
class _Block:
    address: int
    size: int
    stream: int
    users: set[int] = field(default_factory=set[int])


class AllocatorModel:
    """Addresses for one recording, or for several, one after the other, that share a pool. `limit`: bytes the device
    has, if any."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._free: dict[int, list[tuple[int, int]]] = {}  # stream -> [(address, size)], sorted by address
        self._live: dict[int, _Block] = {}
        self._deferred: list[_Block] = []  # freed, but recorded for other streams
        self._top = BASE

    @property
    def reserved(self) -> int:
        """Bytes of arena handed out so far."""
        return self._top - BASE

    def allocate(self, stream: int, nbytes: int) -> int:
        """The address of a block of `nbytes`, from `stream`'s free list if one fits, else fresh."""
        size = max(GRANULE, -(-nbytes // GRANULE) * GRANULE)
        free = self._free.setdefault(stream, [])
        fit = min((entry for entry in free if entry[1] >= size), key=lambda entry: (entry[1], entry[0]), default=None)
        if fit is None:
            if self._limit is not None and self.reserved + size > self._limit:
                raise torch.OutOfMemoryError(
                    f"{nbytes} bytes were asked for; {self.reserved} of {self._limit} are reserved"
                )
            address, self._top = self._top, self._top + size
        else:
            free.remove(fit)
            address = fit[0]
            if fit[1] > size:
                bisect.insort(free, (address + size, fit[1] - size))
        self._live[address] = _Block(address, size, stream)
        return address

    def record_use(self, address: int, stream: int) -> None:
        """`record_stream`: another stream uses the block."""
        block = self._live[address]
        if stream != block.stream:
            block.users.add(stream)

    def free(self, address: int) -> None:
        """The storage died: back to its stream's free list at once, unless other streams were recorded."""
        block = self._live.pop(address)
        if block.users:
            self._deferred.append(block)
        else:
            self._give_back(block)

    def end_recording(self) -> None:
        """What `record_stream` held back may be reused by the next recording."""
        for block in self._deferred:
            self._give_back(block)
        self._deferred.clear()

    @contextmanager
    def undone_by_errors(self) -> Generator[None]:
        """A recording, which leaves no block behind if it fails."""
        before = copy.deepcopy((self._free, self._live, self._deferred, self._top))
        try:
            yield
        except BaseException:
            self._free, self._live, self._deferred, self._top = before
            raise

    def _give_back(self, block: _Block) -> None:
        free = self._free.setdefault(block.stream, [])
        start, stop = block.address, block.address + block.size
        position = bisect.bisect(free, (start, 0))
        if position < len(free) and free[position][0] == stop:
            stop += free.pop(position)[1]
        if position and sum(free[position - 1]) == start:
            position -= 1
            start = free.pop(position)[0]
        free.insert(position, (start, stop - start))
