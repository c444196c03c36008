"""What the caching allocator did during a capture: memory that ops took and freed inside themselves, and all the rest.

Enters: a capture, and a stamp before each op. Leaves: `Memory`: every block handed out, with the steps it lived from
and to. Invariant: torch's own memory history is as it was before, on or off.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

_MOST_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Block:
    """Memory handed out at step `born`, and given back at step `freed` (None: it outlived the capture)."""

    address: int
    nbytes: int
    born: int
    freed: int | None

    def holds(self, address: int, step: int) -> bool:
        """Whether `address` lies in it while `step` runs."""
        inside = self.address <= address < self.address + self.nbytes
        return inside and self.born <= step and (self.freed is None or step <= self.freed)


@dataclass(frozen=True)
class Memory:
    """`blocks`: handed out during the capture, in that order. `before`: (address, bytes) of blocks in use that are
    older. `segments`: (address, bytes) of all memory the allocator holds. Each of the two sorted."""

    blocks: tuple[Block, ...] = ()
    before: tuple[tuple[int, int], ...] = ()
    segments: tuple[tuple[int, int], ...] = ()
    by_step: dict[int, list[Block]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for block in self.blocks:
            self.by_step.setdefault(block.born, []).append(block)

    @cached_property
    def _by_address(self) -> tuple[list[int], list[Block], int]:
        blocks = sorted(self.blocks, key=lambda block: block.address)
        return [block.address for block in blocks], blocks, max((block.nbytes for block in blocks), default=0)

    def at(self, address: int, step: int) -> Block | None:
        """The block of the capture that holds `address` while `step` runs."""
        starts, blocks, longest = self._by_address
        index = bisect_right(starts, address) - 1
        while index >= 0 and starts[index] + longest > address:
            if blocks[index].holds(address, step):
                return blocks[index]
            index -= 1
        return None

    def older(self, address: int) -> tuple[int, int] | None:
        """The block from before the capture that holds `address`."""
        index = bisect_right(self.before, (address, 1 << 62)) - 1
        if index >= 0 and address < sum(self.before[index]):
            return self.before[index]
        return None


class AllocatorHistory:
    """torch's memory history, on in a `with` block around a capture."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._was_on = False
        self._start = 0

    def __enter__(self) -> AllocatorHistory:
        self._was_on = bool(torch._C._cuda_isHistoryEnabled())
        if self._was_on:
            self._start = len(self._snapshot()["device_traces"][self._device])
        else:
            torch.cuda.memory._record_memory_history("all", context=None, max_entries=_MOST_EVENTS)
        self.stamp(-1)
        return self

    def __exit__(self, *_: object) -> None:
        torch._C._cuda_setMemoryMetadata("")
        if not self._was_on:
            torch.cuda.memory._record_memory_history(None)

    def stamp(self, step: int) -> None:
        """What is handed out from now on is step `step`'s."""
        torch._C._cuda_setMemoryMetadata(str(step))

    def read(self) -> Memory:
        """What happened so far."""
        return memory_of(self._snapshot(), self._device, self._start)

    def _snapshot(self) -> dict[str, Any]:
        return torch.cuda.memory._snapshot(self._device)


def memory_of(snapshot: dict[str, Any], device: int, start: int = 0) -> Memory:
    """The blocks of a `torch.cuda.memory._snapshot`, from event `start` on, whose events bear step numbers."""
    open_blocks: dict[int, int] = {}
    blocks: list[Block] = []
    for event in snapshot["device_traces"][device][start:]:
        if event["action"] == "alloc":
            open_blocks[event["addr"]] = len(blocks)
            blocks.append(Block(event["addr"], event["size"], _step(event), None))
        elif event["action"] == "free_requested" and event["addr"] in open_blocks:
            index = open_blocks.pop(event["addr"])
            old = blocks[index]
            blocks[index] = Block(old.address, old.nbytes, old.born, max(old.born, _step(event)))
    fresh = {block.address for block in blocks if block.freed is None}
    segments = [segment for segment in snapshot["segments"] if segment["device"] == device]
    before = sorted(
        (block["address"], block["size"])
        for segment in segments
        for block in segment["blocks"]
        if block["state"] == "active_allocated" and block["address"] not in fresh
    )
    spans = sorted((segment["address"], segment["total_size"]) for segment in segments)
    return Memory(tuple(blocks), tuple(before), tuple(spans))


def _step(event: dict[str, Any]) -> int:
    text = event.get("user_metadata", "")
    return int(text) if text.lstrip("-").isdigit() else -1
