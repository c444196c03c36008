"""The ways a kernel may be launched, from which `tune` picks.

Enters: what a group's function looks like and how much there is of it. Leaves: `Variant`s, the likeliest first.
Invariant: every variant computes the same values in the same order per element; reductions may add up differently.
"""

from __future__ import annotations

from dataclasses import dataclass

from .triton_source import Form

MOST_RESIDENT = 32768
"""Columns a program may hold at once."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A form of the kernel, its tile, and the warps of a program."""

    form: Form
    rows: int
    block: int
    warps: int

    def __str__(self) -> str:
        return f"{self.form} {self.rows} x {self.block}, {self.warps} warps"


def variants(width: int, rows: int, *, reduces: bool, flat: bool) -> list[Variant]:
    """Candidates for `rows` x `width`, in the order of expectation.

    `reduces`: the group reduces over columns. `flat`: every operand is dense or a single element.
    """
    if flat:
        return _flat(rows * width)
    whole = next_power_of_two(width)
    if not reduces:
        return _blocks(width, rows, whole)
    if whole > MOST_RESIDENT:
        return [Variant("tiled", 1, block, block // 256) for block in (4096, 8192, 2048)]
    return _resident(rows, whole)


_FEW = 256 * 132
"""Elements that leave a large GPU idle in tiles of the usual size: there latency counts, and small tiles win."""


def _flat(elements: int) -> list[Variant]:
    few, many = ((128, 4), (256, 4)), ((1024, 4), (2048, 4), (4096, 8), (512, 4))
    return [Variant("flat", 1, block, warps) for block, warps in (few if elements <= _FEW else many)]


def _blocks(width: int, rows: int, whole: int) -> list[Variant]:
    few = rows * width <= _FEW
    most = 256 if few else 1024
    block = min(whole, most)
    together = max(1, min(next_power_of_two(rows), most // block))
    found = [Variant("blocks", together, block, 4)]
    if whole > most:
        found += [Variant("blocks", 1, most // 2, 4)]
        found += [] if few else [Variant("blocks", 1, 2 * most, 4)]
    elif rows > together:
        found += [Variant("blocks", together * 2, block, 4)]
    return found


def _resident(rows: int, whole: int) -> list[Variant]:
    """Where each multiprocessor has one row at most, nothing hides a wait for memory: what is read is read ahead."""
    few = rows <= 132
    if few and whole <= 4096:  # no other number of warps was ever the fastest of such rows
        usual = max(1, whole // 512)
        found = (usual, usual // 2 if usual >= 4 else 4)
        return [Variant("ahead", 1, whole, warps) for warps in found if warps == 1 or warps * 32 <= whole]
    together = 1 if few else max(1, min(next_power_of_two(rows), 2048 // whole))
    tile = together * whole
    warps = max(1, min(16, tile // 512))
    found = [Variant("ahead" if few else "resident", together, whole, warps)]
    for other in (warps * 2, warps // 2, warps * 4):
        if 1 <= other <= 32 and tile // (other * 32) >= 1:
            found.append(Variant(found[0].form, together, whole, other))
    if few and whole >= 8192:  # for which there may be too few registers
        found.append(Variant("resident", together, whole, min(32, warps * 2)))
    if whole >= 4096:
        found.append(Variant("tiled", 1, 2048, 8))
    return found


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`, and 1 for zero."""
    return 1 << max(0, n - 1).bit_length()
