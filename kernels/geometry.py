"""Where the elements of a kernel's operands lie in memory, in row form.

Enters: a tensor's sizes and strides, and the shape in which its group uses it. Leaves: an `Access`, which decides the
kernel's source, and the numbers the launch passes for it. Invariant: for every row and column of the group,
`offset(row) + column * stride` is the element that broadcasting and flattening would give; broadcast dimensions have
stride 0, so any input of any strides is read where it lies and nothing is made contiguous first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_LEVELS = 4
"""Row dimensions a kernel takes apart, after merging; a tensor that needs more is copied first."""


@dataclass(frozen=True, slots=True)
class Access:
    """How one operand is addressed: `levels` (size, stride) pairs over the rows, and whether columns are adjacent."""

    levels: int
    unit: bool

    def __str__(self) -> str:
        return f"{self.levels}{'u' if self.unit else 's'}"

    def parameters(self, name: str) -> list[str]:
        """The integer parameters of the kernel for the operand `name`."""
        found = [f"{name}_s0"] if self.levels else []
        for level in range(1, self.levels):
            found += [f"{name}_n{level}", f"{name}_s{level}"]
        return found if self.unit else [*found, f"{name}_c"]


@dataclass(frozen=True, slots=True)
class Layout:
    """An operand's access and the values of its parameters, in the order of `Access.parameters`."""

    access: Access
    numbers: tuple[int, ...]


def layout(sizes: Sequence[int], strides: Sequence[int], used: Sequence[int], columns: bool) -> Layout | None:
    """The layout of a tensor of `sizes` and `strides` that its group uses broadcast to the shape `used`.

    With `columns`, the last dimension of `used` runs over columns and the others over rows; without, all are rows.
    Returns None where the rows take more than MOST_LEVELS levels.
    """
    surplus = max(0, len(sizes) - len(used))  # leading dimensions of size 1
    sizes, strides = sizes[surplus:], strides[surplus:]
    missing = len(used) - len(sizes)
    spread = [0] * missing + [
        0 if size == 1 and want != 1 else stride
        for size, stride, want in zip(sizes, strides, used[missing:], strict=True)
    ]
    columns = columns and bool(used)
    rows = list(zip(used[:-1], spread[:-1], strict=True)) if columns else list(zip(used, spread, strict=True))
    merged = _merged(rows)
    if len(merged) > MOST_LEVELS:
        return None
    column = spread[-1] if columns and used[-1] != 1 else 1
    numbers = [merged[0][1]] if merged else []
    for size, stride in merged[1:]:
        numbers += [size, stride]
    if column != 1:
        numbers.append(column)
    return Layout(Access(len(merged), column == 1), tuple(numbers))


def table_layout(strides: Sequence[int]) -> Layout:
    """The layout of a two-dimensional tensor that is indexed by row and column."""
    row, column = strides
    return Layout(Access(1, column == 1), (row,) if column == 1 else (row, column))


def _merged(dims: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Row dimensions, outermost first, with those of size 1 dropped and neighbours that walk on joined."""
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return [] if len(merged) == 1 and merged[0][1] == 0 else merged
