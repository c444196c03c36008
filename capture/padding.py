"""Do padded rows leave a trace? A bucket is run with different rows behind the same first ones, where no proof tells.

Enters: a compiled bucket, its example rows, what padded rows hold. Leaves: a `PaddingVerdict`, or a CaptureError that
says what leaks, or what is written, and the remedy. Invariant: all the runs touched is as before. It is a check of
numbers, on the example's rows; capture/rows.py proves, where it can.

Note "three paddings". The first `fewest` rows are the example's in each run. *Padded*: the rows behind are what a call
would pad with. *Other*: those without a value of their own are the example's. *Example*: all are. Outputs of the first
rows, and what they write, must be the same bits in all three.

Note "scratch". Padded rows may write where the user sends them, by a value in `Options.pad`. So what they write (what
the eager model, on the first rows alone, does not) must be the same places in *padded* and in *other*, and none that
*example* writes. Writes are seen as bits that changed, from two states of which no bit pattern is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..runtime.errors import CaptureError
from .compiled import CompiledModel
from .inputs import storage_of
from .rows import Mixing
from .state import Checkpoint, bits
from .trace import TracedGraph, where

_Kind = Literal["padded", "other", "example"]


@dataclass(frozen=True, slots=True)
class PaddingVerdict:
    """What is known of a bucket's padding: whether there is any, and if it was `proved` or `checked` to be harmless."""

    size: int
    fewest: int
    """The smallest call it serves."""
    how: Literal["unpadded", "proved", "checked", "not checked"]
    scratch: tuple[tuple[str, int], ...] = ()
    """What padded rows write, where their pad values send them: tensors, and how many elements in the check."""

    def __str__(self) -> str:
        text = f"bucket {self.size}: {self.fewest} to {self.size} rows, {self.how}"
        if self.scratch:
            text += "; padded rows write " + ", ".join(f"{count} elements of {name}" for name, count in self.scratch)
        return text


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a run left: the bits that must not depend on padding, by what they are; and the elements of each state that
    it wrote, by number, from the one and from the other beginning."""

    kept: dict[str, Tensor]
    written: tuple[Tensor, ...]


class PaddingCheck:
    """One bucket's check.

    Args:
        model: the model itself.
        bucket: its compiled form.
        traced: the graph that was captured.
        example: the leaves of the example inputs, at the bucket's size.
        fewest: the smallest call that the bucket serves.
        mixing: what is known of the graph's rows.
    """

    def __init__(
        self,
        model: nn.Module,
        bucket: CompiledModel,
        traced: TracedGraph,
        example: Sequence[Any],
        fewest: int,
        mixing: Mixing,
    ) -> None:
        padding = bucket.calls.padding
        assert padding is not None
        self._model = model
        self._bucket = bucket
        self._names = traced.input_names
        self._mixing = mixing
        self._padding = padding
        self._fewest = fewest
        self._example = example
        self._leaves = bucket.calls.static.leaves
        self._states = dict(zip(traced.mutated_buffers, traced.written_tensors(), strict=True)) | {
            self._names[p]: self._leaves[p] for p in bucket.calls.written if padding.inputs[p] is None
        }
        self._rows = [p for p, dim in enumerate(padding.inputs) if dim is not None]
        self._sent = [p for p in self._rows if padding.values[p] is not None]

    def verdict(self, device: torch.device) -> PaddingVerdict:
        """Raises CaptureError where padding would show, or where that cannot be told."""
        verdict = PaddingVerdict(self._padding.size, self._fewest, "proved")
        if self._fewest == self._padding.size:
            return replace(verdict, how="unpadded")
        if not self._mixing.unproved and not self._states:
            return verdict
        if self._mixing.written and not self._sent:
            raise self._writes(self._mixing.written[0], "writes whose place or value depends on rows")
        before = Checkpoint(list(self._states.values()), device)
        try:
            with torch.no_grad():
                return replace(verdict, how="checked", scratch=self._checked(before))
        finally:
            before.restore()

    def _checked(self, before: Checkpoint) -> tuple[tuple[str, int], ...]:
        """See the notes "three paddings" and "scratch". Returns what padded rows write."""
        own = self._outcome(before, self._run_eagerly, ()).written if self._states else ()
        self._load("padded")
        self._refuse_alike()
        padded = self._outcome(before, lambda: self._run("padded"), own)
        other = self._outcome(before, lambda: self._run("other"), own) if self._sent else padded
        example = self._outcome(before, lambda: self._run("example"), own)
        for outcome in (other, example):
            for what, expected in padded.kept.items():
                if not torch.equal(outcome.kept[what], expected):
                    again = self._outcome(before, lambda: self._run("padded"), own).kept[what]
                    raise self._leaks(what) if torch.equal(again, expected) else self._unsteady(what)
        scratch: list[tuple[str, int]] = []
        for number, name in enumerate(self._states):
            stray = _without(padded.written[number], own[number])
            if len(stray) and not self._sent:
                raise self._writes(name, f"{len(stray)} elements that calls of {self._fewest} rows do not write")
            if not torch.equal(stray, _without(other.written[number], own[number])):
                raise self._writes(name, "places that depend on inputs whose pad is not said")
            if len(_without(stray, example.written[number])) < len(stray):
                raise self._writes(name, "places that rows write whatever their pad, or that example rows use too")
            if len(stray):
                scratch.append((name, len(stray)))
        return tuple(scratch)

    # -- runs ------------------------------------------------------------------------------------------------------

    def _outcome(self, before: Checkpoint, run: Callable[[], None], own: Sequence[Tensor]) -> _Outcome:
        """Runs from two beginnings if there is state. `own`: per state, the elements to compare too."""
        kept: dict[str, Tensor] = {}
        written: list[list[Tensor]] = [[] for _ in self._states]
        for flipped in (False, True) if self._states else (False,):
            before.restore(flipped=flipped)
            run()
            for what, tensor in (*self._outputs(), *self._written(own)):
                kept[f"{what}{' ' if flipped else ''}"] = bits(tensor).clone()
            for found, now in zip(written, before.written(flipped=flipped), strict=True):
                found.append(now)
        return _Outcome(kept, tuple(torch.cat(found).unique() for found in written))

    def _outputs(self) -> Iterator[tuple[str, Tensor]]:
        """The rows of the first `fewest` in outputs, and in inputs that are written."""
        states = {storage_of(tensor) for tensor in self._states.values()}
        for number, (leaf, dim) in enumerate(zip(self._bucket.calls.leaves, self._padding.outputs, strict=True)):
            if isinstance(leaf, Tensor) and storage_of(leaf) not in states:
                yield f"output {number}", leaf if dim is None else leaf.narrow(dim, 0, self._fewest)
        for position in self._bucket.calls.written:
            dim = self._padding.inputs[position]
            if dim is not None:
                yield f"input {self._names[position]!r}", self._leaves[position].narrow(dim, 0, self._fewest)

    def _written(self, own: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        for (name, tensor), elements in zip(self._states.items(), own, strict=False):
            yield f"what the first rows write to {name!r}", tensor.reshape(-1)[elements]

    def _run(self, kind: _Kind) -> None:
        self._load(kind)
        self._bucket.graph.replay()

    def _load(self, kind: _Kind) -> None:
        self._bucket.calls.load(self._first(), self._fewest)
        for position in self._rows:
            if kind == "example" or (kind == "other" and position not in self._sent):
                self._leaves[position].copy_(self._example[position])

    def _run_eagerly(self) -> None:
        leaves = [leaf.clone() if p in self._rows else leaf for p, leaf in enumerate(self._first())]
        args, kwargs = pytree.tree_unflatten(leaves, self._bucket.calls.static.spec)
        self._model(*args, **kwargs)

    def _first(self) -> list[Any]:
        """The arguments of a call of the first rows; an input without rows is the graph's own memory."""
        return [
            leaf if dim is None else self._example[position].narrow(dim, 0, self._fewest)
            for position, (leaf, dim) in enumerate(zip(self._leaves, self._padding.inputs, strict=True))
        ]

    # -- refusals --------------------------------------------------------------------------------------------------

    def _refuse_alike(self) -> None:
        """Padding is loaded. Where it holds what the example has there, a leak would not show."""
        for position in self._rows:
            dim = self._padding.inputs[position]
            assert dim is not None
            behind = self._fewest, self._padding.size - self._fewest
            mine, theirs = (bits(side[position]).narrow(dim, *behind) for side in (self._leaves, self._example))
            if mine.numel() and torch.equal(mine, theirs):
                raise CaptureError(
                    f"padding of {self._names[position]!r} cannot be checked in bucket {self._padding.size}",
                    expected="example rows that differ from each other, and from the pad value",
                    came=f"rows {self._fewest} to {self._padding.size - 1} of the example hold what padding holds",
                    remedy="give example inputs with different rows, such as torch.arange for positions and slots",
                )

    def _leaks(self, what: str) -> CaptureError:
        blame = self._mixing.blame
        place = "" if blame is None else f"; rows may first mix in {blame.target}, at {where(blame)}"
        return CaptureError(
            f"padding leaks into {what.strip()} of bucket {self._padding.size}",
            expected=f"the same bits in the first {self._fewest} rows, whatever the padded rows behind them hold",
            came=f"other bits{place}",
            remedy="mask what padded rows add, or give every size a bucket of its own; a `pad` value may keep their "
            "writes away from what other rows use",
        )

    def _unsteady(self, what: str) -> CaptureError:
        return CaptureError(
            f"bucket {self._padding.size} does not give the same bits twice, so padding cannot be checked",
            expected="one result for one input",
            came=f"two, in {what.strip()}",
            remedy="use deterministic kernels (torch.use_deterministic_algorithms names the others), or give every "
            "size a bucket of its own",
        )

    def _writes(self, name: str, came: str) -> CaptureError:
        unsent = [self._names[p] for p in self._rows if p not in self._sent]
        return CaptureError(
            f"padded rows of bucket {self._padding.size} would write {name!r}",
            expected="memory that a call of fewer rows leaves alone, unless a pad value leads there",
            came=came,
            remedy="send padded rows to scratch memory that no row uses, by the value of the input that says where: "
            f"Options(pad={{{(unsent or ['input'])[-1]!r}: ...}}), among {', '.join(unsent) or 'the inputs'}; or give "
            "every size a bucket of its own",
        )


def _without(elements: Tensor, others: Tensor) -> Tensor:
    return elements[~torch.isin(elements, others)]
