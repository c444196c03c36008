"""How attention at one query per row is cut into programs.

Enters: sizes. Leaves: a `Plan`. Invariant: it depends on nothing else, so that the same shapes give the same bits on
every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .variants import next_power_of_two

MOST_SPLITS: Final = 64
"""Of one row and head of keys: what puts more parts together takes longer than they save."""
_PROGRAMS: Final = 264
"""What runs at once on the largest cards, two to a multiprocessor: a few programs more would run alone, behind them."""
_TILE: Final = 16384
"""Bytes of keys and values that a program takes at a time, but for 16 keys at least: small loads, three in flight."""
_FEW: Final = 16
"""Parts that two warps put together."""
_SCANS: Final = (256, 2048)
"""Sizes of what a program looks at at a time to find the keys it sees: few, for each is another kernel."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the cut depends on. `size`: bytes of a number in the caches."""

    batch: int
    kv_heads: int
    group: int
    keys: int
    d: int
    dv: int
    size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`splits` programs per row and head of keys, each taking every `splits`-th block of `block` keys."""

    block: int
    splits: int
    warps: int
    stages: int
    cols: int = 128
    whole_warps: int = 4

    def turns(self, keys: int) -> int:
        """Blocks that a program takes at most."""
        return -(-keys // (self.block * self.splits))

    def scan(self, keys: int) -> int:
        span = max(self.block, self.turns(keys) * self.block)
        return max(self.block, next((size for size in _SCANS if size >= span), _SCANS[-1]))

    def __str__(self) -> str:
        return f"{self.splits} x {self.block} keys, {self.warps} warps, {self.stages} stages"


def plan(sizes: Sizes) -> Plan:
    """The plan for these sizes."""
    key = (next_power_of_two(sizes.d) + next_power_of_two(sizes.dv)) * sizes.size
    block = min(64, max(16, next_power_of_two(_TILE // key)))
    splits = splits_for(sizes, block, _PROGRAMS)
    stages = 1 if splits * block >= sizes.keys else 3 if block * key <= 2 * _TILE else 2
    cols, whole_warps = (128, 2) if splits <= _FEW else (64, 4)
    return Plan(block, splits, 4, stages, cols, whole_warps)


def splits_for(sizes: Sizes, block: int, programs: int) -> int:
    """So many that there are no more programs than that, and none without a block."""
    wanted = programs // (sizes.batch * sizes.kv_heads)
    return max(1, min(wanted, -(-sizes.keys // block), MOST_SPLITS))
