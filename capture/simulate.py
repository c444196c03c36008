"""The simulated machine: executes a recorded program on CPU, at the allocator model's addresses, in any legal order.

Enters: a `Program`, outside memory, the storages the user can still see. Leaves: what a GPU could have left in them.
One arena holds every buffer of the program where the allocator placed it, so an early free or a missing wait gives
wrong numbers here as it does there. `first_violation` finds, with no numbers at all, races that happen to leave equal
values: it follows which step wrote each byte last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..runtime.errors import SimulatedFault
from .allocator import BASE
from .extents import quotient
from .orders import Edges, Orders
from .program import Op, Program, TensorRef

POISON: Final = 0xFF
"""Fills the arena before each replay: NaN as a float, -1 as an integer."""


class Simulation:
    """One program, ready to execute.

    Args:
        program: what was recorded.
        outside: buffer number -> byte view of the memory that came from outside.
        visible: buffer number -> byte view of each storage the user still holds; refreshed by every run.
        edges: what orders the steps; default: the program's own edges.
    """

    def __init__(
        self,
        program: Program,
        outside: Mapping[int, Tensor],
        visible: Mapping[int, Tensor],
        edges: Edges | None = None,
    ) -> None:
        self.program = program
        self.orders = Orders([step.stream for step in program.steps], program.edges() if edges is None else edges)
        self.outside = outside
        self.visible = dict(visible)
        with torch.inference_mode(False):  # replays may come in any mode
            self._arena = torch.empty(max(program.arena_bytes, 1), dtype=torch.uint8)
            self._bound = {index: self._bind(step) for index, step in enumerate(program.steps) if isinstance(step, Op)}
        self._draws = self._random_ops()

    def of(self, program: Program) -> Simulation:
        """The same memory under another program of the same buffers (one with a wait removed)."""
        return Simulation(program, self.outside, self.visible)

    def _tensor(self, ref: TensorRef) -> Tensor:
        item = ref.dtype.itemsize
        if ref.buffer in self.outside:
            storage, start = self.outside[ref.buffer].untyped_storage(), 0
        else:
            storage, start = self._arena.untyped_storage(), self.program.buffers[ref.buffer].address - BASE
        tensor = torch.empty(0, dtype=ref.dtype).set_(storage, start // item + ref.offset, ref.size, ref.stride)
        tensor = tensor.conj() if ref.conj else tensor
        return torch.ops.aten._neg_view.default(tensor) if ref.neg else tensor

    def _bind(self, op: Op) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor | None]]:
        args, kwargs = pytree.tree_map_only(TensorRef, self._tensor, (op.args, dict(op.kwargs)))
        return args, kwargs, [None if ref is None else self._tensor(ref) for ref in op.fresh]

    def run(self, order: Sequence[int]) -> None:
        """Execute the steps in `order`.

        Raises:
            SimulatedFault: an op failed on what it read, as corrupted indices make it fail.
        """
        # As recorded, whatever mode the replay comes in.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            states = self._rehearse()
            ends = {generator: generator.get_state() for generator in self._draws.values()}
            self._arena.fill_(POISON)
            for index in order:
                if index in states:
                    self._draws[index].set_state(states[index])
                if index in self._bound:
                    self._execute(index)
            for generator, state in ends.items():
                generator.set_state(state)
            for buffer, view in self.visible.items():
                start = self.program.buffers[buffer].address - BASE
                view.copy_(self._arena[start : start + view.numel()])

    def _random_ops(self) -> dict[int, torch.Generator]:
        """Random ops and their generators, if several streams hold some. A captured graph fixes which numbers each
        draws, in whatever order they execute; so must a replay here."""
        ops = {
            index: kwargs.get("generator") or torch.default_generator
            for index, (_, kwargs, _) in self._bound.items()
            if torch.Tag.nondeterministic_seeded in cast(Op, self.program.steps[index]).func.tags
        }
        return ops if len({self.program.steps[index].stream for index in ops}) > 1 else {}

    def _rehearse(self) -> dict[int, Tensor]:
        """The generator's state at each of these ops, by a run in program order whose effects are undone."""
        if not self._draws:
            return {}
        written = {ref.buffer for index in self._bound for ref in cast(Op, self.program.steps[index]).writes}
        before = {buffer: view.clone() for buffer, view in self.outside.items() if buffer in written}
        states: dict[int, Tensor] = {}
        self._arena.fill_(POISON)
        for index in self._bound:
            if index in self._draws:
                states[index] = self._draws[index].get_state()
            self._execute(index)
        for buffer, view in reversed(before.items()):
            self.outside[buffer].copy_(view)
        return states

    def _execute(self, index: int) -> None:
        op = self.program.steps[index]
        assert isinstance(op, Op)
        args, kwargs, fresh = self._bound[index]
        try:
            result = op.func(*args, **kwargs)
            for target, value in zip(fresh, pytree.tree_leaves(result), strict=True):
                if target is not None:
                    target.copy_(value)
        except (IndexError, RuntimeError, ValueError) as error:
            raise SimulatedFault(
                f"{op.name} failed while replaying, at {op.line}", came=f"{type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True, slots=True)
class Violation:
    """In some order, `step` met bytes last written by `found` where program order has `expected` (-1: nobody)."""

    step: int
    expected: int
    found: int


def _touched(program: Program) -> list[tuple[tuple[int, bool], ...]]:
    """Per step, the classes of bytes it touches and whether it writes them; see `quotient`."""
    touches = [program.extents(step) for step in program.steps]
    extents = list(dict.fromkeys(extent for step in touches for extent, _ in step if extent.length))
    if not extents:
        return [()] * len(touches)
    sorted_out = quotient(extents, min(e.start for e in extents), max(e.stop for e in extents))
    classes = dict(zip(extents, sorted_out.covered, strict=True))
    return [tuple((one, writes) for extent, writes in step for one in classes.get(extent, ())) for step in touches]


class ShadowMemory:
    """Last-writer ids per class of bytes, in program order and in any other."""

    def __init__(self, program: Program) -> None:
        self._touched = _touched(program)
        self._expected: dict[tuple[int, int], int] = {}
        for step, place, writer in self._walk(range(len(program.steps))):
            self._expected[step, place] = writer

    def _walk(self, order: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        last: dict[int, int] = {}
        for step in order:
            for place, _ in self._touched[step]:
                yield step, place, last.get(place, -1)
            for place, writes in self._touched[step]:
                if writes:
                    last[place] = step

    def first_violation(self, order: Sequence[int]) -> Violation | None:
        """The first step that meets another last writer than in program order, or None. Writes count as meeting what
        they overwrite, so that two swapped writes show even if nobody reads them."""
        for step, place, writer in self._walk(order):
            expected = self._expected[step, place]
            if writer != expected:
                return Violation(step, expected, writer)
        return None
