"""What the caching allocator did during a capture: memory that ops took and freed inside themselves, and all the rest.

Enters: a capture, and a stamp before and after each op. Leaves: `Memory`: every block handed out, and the moments it
lived from and to. Invariant: torch's own memory history is as it was before, on or off; one that does not reach back to
the beginning of the capture is not taken for whole.

Note "moments". A moment is a number: 2n while step n of the program runs, 2n + 1 from its end to the next step. What is
handed out then is no op's own.

Note "whose events". All threads share torch's history, and each event bears the stamp that its thread set last. Those
of other captures and of threads without one count by their place among ours.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import torch

_MOST_EVENTS: Final = 1_000_000
_BEGIN: Final = "begin"
_numbers: Final = itertools.count()


def during(step: int) -> int:
    """The moment at which a step runs."""
    return 2 * step


def after(step: int) -> int:
    """The moment between a step and the next; of step -1: before the first one."""
    return 2 * step + 1


@dataclass(frozen=True, slots=True)
class Block:
    """Memory handed out at moment `born`, and given back at moment `freed` (None: it outlived the capture)."""

    address: int
    nbytes: int
    born: int
    freed: int | None

    def holds(self, address: int, moment: int) -> bool:
        """Whether `address` lies in it at that moment."""
        inside = self.address <= address < self.address + self.nbytes
        return inside and self.born <= moment and (self.freed is None or moment <= self.freed)


@dataclass(frozen=True)
class Memory:
    """`blocks`: handed out during the capture, in that order. `before`: (address, bytes) of older blocks, in use at
    some time. `segments`: (address, bytes) of all memory the allocator holds. Both sorted. `whole`: nothing that was
    handed out is missing."""

    blocks: tuple[Block, ...] = ()
    before: tuple[tuple[int, int], ...] = ()
    segments: tuple[tuple[int, int], ...] = ()
    whole: bool = True
    born_at: dict[int, list[Block]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for block in self.blocks:
            self.born_at.setdefault(block.born, []).append(block)

    @cached_property
    def _by_address(self) -> tuple[list[int], list[Block], list[int]]:
        """Their starts, themselves, and how far those up to each reach."""
        blocks = sorted(self.blocks, key=lambda block: block.address)
        reach = list(itertools.accumulate((block.address + block.nbytes for block in blocks), max))
        return [block.address for block in blocks], blocks, reach

    def at(self, address: int, moment: int) -> Block | None:
        """The block of the capture that holds `address` then; of several in one moment, the largest."""
        starts, blocks, reach = self._by_address
        found: Block | None = None
        index = bisect_right(starts, address) - 1
        while index >= 0 and reach[index] > address:
            block = blocks[index]
            if block.holds(address, moment) and (found is None or block.nbytes > found.nbytes):
                found = block
            index -= 1
        return found

    def older(self, address: int) -> tuple[int, int] | None:
        """The block from before the capture that holds `address`."""
        index = bisect_right(self.before, (address, 1 << 62)) - 1
        if index >= 0 and address < sum(self.before[index]):
            return self.before[index]
        return None


class _Switch:
    """torch's memory history, on while any capture listens. The last one to leave puts it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners = 0
        self._was_on = False

    def on(self) -> None:
        with self._lock:
            if not self._listeners:
                self._was_on = bool(torch._C._cuda_isHistoryEnabled())
                if not self._was_on:
                    torch.cuda.memory._record_memory_history("all", context=None, max_entries=_MOST_EVENTS)
            self._listeners += 1

    def off(self) -> None:
        with self._lock:
            self._listeners -= 1
            if not self._listeners and not self._was_on:
                torch.cuda.memory._record_memory_history(None)


_switch: Final = _Switch()


class AllocatorHistory:
    """torch's memory history of one capture, in a `with` block around it on the capturing thread."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._prefix = f"auxstream {next(_numbers)}: "
        self._outer_stamp = ""

    def __enter__(self) -> AllocatorHistory:
        _switch.on()
        try:
            with torch.cuda.device(self._device):
                self._outer_stamp = torch._C._cuda_getMemoryMetadata()
                torch._C._cuda_setMemoryMetadata(f"{self._prefix}{_BEGIN}")
                # A block of its own is the first event: while that is there, so is all that came after it.
                torch.cuda.caching_allocator_delete(torch.cuda.caching_allocator_alloc(1))
                self.stamp(after(-1))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with torch.cuda.device(self._device):
            torch._C._cuda_setMemoryMetadata(self._outer_stamp)
        _switch.off()

    def stamp(self, moment: int) -> None:
        """What this thread is handed from now on, it is handed then."""
        torch._C._cuda_setMemoryMetadata(f"{self._prefix}{moment}")

    def read(self) -> Memory:
        """What happened so far."""
        snapshot: Any = torch.cuda.memory._snapshot(self._device)
        return memory_of(snapshot, self._device, self._prefix)


def memory_of(snapshot: dict[str, Any], device: int, prefix: str) -> Memory:
    """The blocks of a `torch.cuda.memory._snapshot`, by events whose stamps are `prefix` and a moment."""
    events = snapshot["device_traces"][device]
    begin = f"{prefix}{_BEGIN}"
    first = next((n for n, event in enumerate(events) if event.get("user_metadata") == begin), None)
    now = after(-1)
    open_blocks: dict[int, int] = {}
    blocks: list[Block] = []
    freed_before: set[tuple[int, int]] = set()
    for event in events[0 if first is None else first :]:
        told = _moment(event.get("user_metadata", ""), prefix)
        now = now if told is None else max(now, told)
        if event["action"] == "alloc":
            open_blocks[event["addr"]] = len(blocks)
            blocks.append(Block(event["addr"], event["size"], now if told == now else now | 1, None))
        elif event["action"] == "free_requested" and event["addr"] in open_blocks:
            index = open_blocks.pop(event["addr"])
            old = blocks[index]
            blocks[index] = Block(old.address, old.nbytes, old.born, max(old.born, now))
        elif event["action"] == "free_requested":
            freed_before.add((event["addr"], event["size"]))
    fresh = {block.address for block in blocks if block.freed is None}
    segments = [segment for segment in snapshot["segments"] if segment["device"] == device]
    before = sorted(
        freed_before.union(
            (block["address"], block["size"])
            for segment in segments
            for block in segment["blocks"]
            if block["state"] == "active_allocated" and block["address"] not in fresh
        )
    )
    spans = sorted((segment["address"], segment["total_size"]) for segment in segments)
    return Memory(tuple(blocks), tuple(before), tuple(spans), first is not None)


def _moment(stamp: str, prefix: str) -> int | None:
    """None for the stamps of others."""
    text = stamp.removeprefix(prefix)
    return int(text) if text != stamp and text.lstrip("-").isdigit() else None
