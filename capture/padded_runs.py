"""Runs of one bucket with different rows behind the same first ones, and of the model itself on these alone.

Enters: a compiled bucket and its example rows. Leaves: an `Outcome` per run: outputs and writes of the first rows, and
which elements of the model's state were written. Invariant: every run starts from the same state and the same RNG, and
`close` puts both back.

Note "what is written". An element was written if its bits changed. A value that was there before would hide that, so
each run is made twice, from states that differ in the last bit of every number: no value is both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..runtime.errors import CaptureError, SimulatedFault
from .compiled import CompiledModel
from .inputs import Padding
from .state import Checkpoint, bits, storage_of
from .trace import TracedGraph

Kind = Literal["padded", "other", "example"]
"""What the rows behind the first ones hold: padding; the example's where padding has no value; the example's."""


Key = tuple[str, bool]
"""What it is, and which of the two runs it is from."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left.

    Attributes:
        kept: what belongs to the first rows; where each has its own part, rows come first.
        by_row: of which that is so.
        written: per state, the elements that changed.
    """

    kept: Mapping[Key, Tensor]
    by_row: frozenset[Key]
    written: tuple[Tensor, ...]

    def unlike(self, other: Outcome) -> Iterator[Key]:
        """What has other bits there."""
        for what, tensor in self.kept.items():
            if not torch.equal(bits(tensor), bits(other.kept[what])):
                yield what

    def is_close_to(self, other: Outcome) -> bool:
        """Whether all is the same but for rounding: to half of the digits."""
        return all(_distance(self.kept[what], expected) <= _half(expected) for what, expected in other.kept.items())

    def unrecognizable(self, other: Outcome) -> Iterator[Key]:
        """What is not the same thing at all: not one row is near, as some are whatever rounding does to a router."""
        for what, expected in other.kept.items():
            sides = self.kept[what], expected
            rows = zip(*(side.unbind() for side in sides), strict=True) if what in self.by_row else (sides,)
            if expected.numel() and min(_distance(found, row) for found, row in rows) > _ANOTHER:
                yield what


_ANOTHER: Final = 0.3
"""A distance that rounding does not make. As many padded rows as others, if they count, change a mean or a sum more."""


def _distance(found: Tensor, expected: Tensor) -> float:
    """Numbers: the length of the difference, against that of `expected`. Whatever else: how much of it differs."""
    differs = (found != expected) & ~((found != found) & (expected != expected))
    if not expected.is_floating_point() and not expected.is_complex():
        return differs.double().mean().item() if expected.numel() else 0.0
    if not differs.any():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    difference = torch.where(differs, found.to(wide) - expected.to(wide), 0)
    ratio = (difference.abs().norm() / expected.to(wide).abs().norm()).item()
    return ratio if ratio == ratio else float("inf")


def _half(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps ** 0.5 if tensor.is_floating_point() or tensor.is_complex() else 0.0


class PaddedRuns:
    """The runs.

    Args:
        model: the model itself.
        bucket: its compiled form.
        traced: the graph that was captured.
        example: the leaves of the example inputs, at the bucket's size.
        device: where they lie.

    Attributes:
        names: of the inputs.
        states: what outlives a call and is written: the model's own tensors, and inputs without rows.
        rows: positions of the inputs with rows.
        sent: of these, those whose padded rows have a value of their own.
    """

    def __init__(
        self, model: nn.Module, bucket: CompiledModel, traced: TracedGraph, example: Sequence[Any], device: torch.device
    ) -> None:
        assert bucket.calls.padding is not None
        self.padding: Padding = bucket.calls.padding
        self.names = traced.input_names
        self.rows = [p for p, dim in enumerate(self.padding.inputs) if dim is not None]
        self.sent = [p for p in self.rows if self.padding.values[p] is not None]
        self._model = model
        self._bucket = bucket
        self._example = example
        self._leaves = bucket.calls.static.leaves
        self.states = dict(zip(traced.mutated_buffers, traced.written_tensors(), strict=True)) | {
            self.names[p]: self._leaves[p] for p in bucket.calls.written if p not in self.rows
        }
        self._before = Checkpoint(list(self.states.values()), device)

    def close(self) -> None:
        """Put the state and the RNG back."""
        self._before.restore()

    def replayed(self, kind: Kind, first: int, own: Sequence[Tensor]) -> Outcome:
        """The bucket. `first`: how many rows are the same in all runs; `own`: per state, the elements of theirs."""

        def run() -> tuple[Sequence[Any], Sequence[Any]]:
            self.load(kind, first)
            try:
                self._bucket.graph.replay()
            except SimulatedFault as fault:
                raise self._failed(fault) from fault
            outputs = _cut(self._bucket.calls.leaves, self.padding.outputs, first)
            return outputs, _cut(self._leaves, self.padding.inputs, first)

        return self._outcome(run, own)

    def _failed(self, fault: SimulatedFault) -> CaptureError:
        values = zip(self.names, self.padding.values, strict=True)
        said = ", ".join(f"{name}={value}" for name, value in values if value is not None) or "the last row again"
        return CaptureError(
            f"the model fails on padded rows of bucket {self.padding.size}",
            expected=f"pad values that it can take as it takes those of a call; they are {said}",
            came=f"{fault.what}: {fault.came}",
            remedy="correct Options.pad, or give every size a bucket of its own",
        )

    def eager(self, first: int, own: Sequence[Tensor] = ()) -> Outcome:
        """The model, on the first rows alone."""

        def run() -> tuple[Sequence[Any], Sequence[Any]]:
            leaves = [leaf.clone() if p in self.rows else leaf for p, leaf in enumerate(self._first(first))]
            args, kwargs = pytree.tree_unflatten(leaves, self._bucket.calls.static.spec)
            return pytree.tree_leaves(self._model(*args, **kwargs)), leaves

        return self._outcome(run, own)

    def alike(self, first: int) -> list[str]:
        """Inputs whose example rows behind the first ones hold what padding holds."""
        self.load("padded", first)
        found: list[str] = []
        for position in self.rows:
            dim = self.padding.inputs[position]
            assert dim is not None
            sides = (bits(side[position]) for side in (self._leaves, self._example))
            mine, theirs = (side.narrow(dim, first, self.padding.size - first) for side in sides)
            if mine.numel() and torch.equal(mine, theirs):
                found.append(self.names[position])
        return found

    def load(self, kind: Kind, first: int) -> None:
        """Fill the bucket's inputs."""
        self._bucket.calls.load(self._first(first), first)
        for position in self.rows:
            if kind == "example" or (kind == "other" and position not in self.sent):
                self._leaves[position].copy_(self._example[position])

    def _first(self, first: int) -> list[Any]:
        """The arguments of a call of the first rows; an input without rows is the graph's own memory."""
        rows = _cut(self._example, self.padding.inputs, first)
        return [rows[p] if p in self.rows else leaf for p, leaf in enumerate(self._leaves)]

    def _outcome(self, run: Callable[[], tuple[Sequence[Any], Sequence[Any]]], own: Sequence[Tensor]) -> Outcome:
        """See the note "what is written". `run` returns outputs and inputs, of the first rows."""
        kept: dict[Key, Tensor] = {}
        by_row: set[Key] = set()
        written: list[list[Tensor]] = [[] for _ in self.states]
        for flipped in (False, True) if self.states else (False,):
            self._before.restore(flipped=flipped)
            for what, tensor, dim in self._kept(*run()):
                kept[what, flipped] = tensor.clone() if dim is None else tensor.movedim(dim, 0).clone()
                if dim is not None:
                    by_row.add((what, flipped))
            for (name, tensor), elements in zip(self.states.items(), own, strict=False):
                kept[f"what the first rows write to {name!r}", flipped] = tensor.reshape(-1)[elements]
            for found, now in zip(written, self._before.written(flipped=flipped), strict=True):
                found.append(now)
        return Outcome(kept, frozenset(by_row), tuple(torch.cat(found).unique() for found in written))

    def _kept(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> Iterator[tuple[str, Tensor, int | None]]:
        """Outputs, but for state that is returned, and inputs with rows that are written; and where their rows are."""
        states = {storage_of(tensor) for tensor in self.states.values()}
        for number, (leaf, dim) in enumerate(zip(outputs, self.padding.outputs, strict=True)):
            if isinstance(leaf, Tensor) and storage_of(leaf) not in states:
                yield f"output {number}", leaf, dim
        for position in self._bucket.calls.written:
            if position in self.rows:
                yield f"input {self.names[position]!r}", inputs[position], self.padding.inputs[position]


def _cut(leaves: Sequence[Any], dims: Sequence[int | None], first: int) -> list[Any]:
    return [leaf if dim is None else leaf.narrow(dim, 0, first) for leaf, dim in zip(leaves, dims, strict=True)]
