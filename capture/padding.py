"""Do padded rows leave a trace? Proved by capture/rows.py, or else checked by numbers.

Enters: a compiled bucket, its example rows, what padded rows hold. Leaves: a `PaddingVerdict`; or a CaptureError that
says what leaks or is written, and the remedy. It is a check on the example's rows, where there is no proof.

Note "three paddings". The first rows are the same in every run; the rows behind them are, in turn: *padded* as in a
call; *other*, the example's where no pad value is given; *example*, all the example's. What belongs to the first rows
must be the same bits in all. Where rows use each other by right (under a mask that is padded) *example* differs; then
*padded* must agree with the model itself on the first rows, to rounding. How many rows there are, whatever they hold,
changes no bits from one padding to another: so in any case *padded* must be recognizable as what the model computes.

Note "scratch". Padded rows may write where a pad value sends them. What they write (that is, what the model itself does
not, on the first rows) must be the same places in *padded* and *other*, and none that *example* writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..runtime.errors import CaptureError
from .compiled import CompiledModel
from .padded_runs import PaddedRuns
from .rows import Mixing
from .trace import TracedGraph, where


@dataclass(frozen=True, slots=True)
class PaddingVerdict:
    """What is known of a bucket's padding."""

    size: int
    fewest: int
    """The smallest call it serves."""
    how: Literal["unpadded", "proved", "checked", "compared", "not checked"]
    """`checked`: the same bits under all paddings; `compared`: with the model itself, to rounding."""
    scratch: tuple[tuple[str, int], ...] = ()
    """What padded rows write, where their pad values send them: tensors, and how many elements in the check."""

    def __str__(self) -> str:
        text = f"bucket {self.size}: {self.fewest} to {self.size} rows, {self.how}"
        if self.scratch:
            text += "; padded rows write " + ", ".join(f"{count} elements of {name}" for name, count in self.scratch)
        return text


def check_padding(
    model: nn.Module,
    bucket: CompiledModel,
    traced: TracedGraph,
    example: Sequence[Any],
    fewest: int,
    mixing: Mixing,
    device: torch.device,
) -> PaddingVerdict:
    """Raises CaptureError where padding would show, or where that cannot be told. See `PaddedRuns` for arguments;
    `mixing` is what is known of the graph's rows."""
    padding = bucket.calls.padding
    assert padding is not None
    verdict = PaddingVerdict(padding.size, fewest, "proved")
    writes = bool(traced.mutated_buffers) or any(padding.inputs[p] is None for p in bucket.calls.written)
    proved = not mixing.unproved and not writes
    if proved and all(value is None for value in padding.values):
        return verdict
    with torch.no_grad():
        runs = PaddedRuns(model, bucket, traced, example, device)
        if mixing.written and not runs.sent:
            raise _writes(runs, mixing.written[0], "writes whose place or value depends on rows")
        try:
            if proved:  # and a pad value may still be one that the model cannot take: an index that nothing has
                runs.replayed("padded", fewest, ())
                return verdict
            return _Check(runs, fewest, mixing).verdict(replace(verdict, how="checked"))
        finally:
            runs.close()


@dataclass(frozen=True, slots=True)
class _Check:
    runs: PaddedRuns
    fewest: int
    mixing: Mixing

    def verdict(self, verdict: PaddingVerdict) -> PaddingVerdict:
        """See the notes "three paddings" and "scratch"."""
        runs, fewest = self.runs, self.fewest
        if (self.mixing.unproved or self.mixing.written) and (alike := runs.alike(fewest)):
            raise self._alike(alike[0])
        own = runs.eager(fewest).written if runs.states else ()
        padded = runs.replayed("padded", fewest, own)
        other = runs.replayed("other", fewest, own) if runs.sent else padded
        example = runs.replayed("example", fewest, own)
        for what, flipped in padded.unlike(other):
            raise self._leaks(what, flipped, own)
        scratch = self._scratch(padded.written, other.written, example.written, own)

        most = min(2, fewest)  # the fewer rows, the more show padded ones; of one alone a model may make something else
        own_of_most = own if most == fewest else runs.eager(most).written if runs.states else ()
        served = padded if most == fewest else runs.replayed("padded", most, own_of_most)
        itself = runs.eager(most, own_of_most)
        for what, flipped in padded.unlike(example):
            if not runs.sent or not served.is_close_to(itself):
                raise self._leaks(what, flipped, own)
            verdict = replace(verdict, how="compared")
            break
        for what, _ in served.unrecognizable(itself):
            raise self._another(what)
        return replace(verdict, scratch=scratch)

    def _scratch(
        self,
        padded: Sequence[Tensor],
        other: Sequence[Tensor],
        example: Sequence[Tensor],
        own: Sequence[Tensor],
    ) -> tuple[tuple[str, int], ...]:
        """What padded rows write, if it is where pad values lead."""
        found: list[tuple[str, int]] = []
        for name, mine, theirs, rows, elements in zip(self.runs.states, padded, other, example, own, strict=True):
            stray = _without(mine, elements)
            if len(stray) and not self.runs.sent:
                raise _writes(self.runs, name, f"{len(stray)} elements that {self.fewest} rows alone do not write")
            if not torch.equal(stray, _without(theirs, elements)):
                raise _writes(self.runs, name, "places that depend on inputs whose pad value is not given")
            if len(_without(stray, rows)) < len(stray):
                raise _writes(self.runs, name, "places where rows write whatever their pad value, or example rows too")
            if len(stray):
                found.append((name, len(stray)))
        return tuple(found)

    def _alike(self, name: str) -> CaptureError:
        size = self.runs.padding.size
        return CaptureError(
            f"padding of {name!r} cannot be checked in bucket {size}",
            expected="example rows that differ from each other, and from the pad value",
            came=f"rows {self.fewest} to {size - 1} of the example hold what padding holds",
            remedy="give example inputs with different rows, such as torch.arange for positions and slots",
        )

    def _another(self, what: str) -> CaptureError:
        return CaptureError(
            f"bucket {self.runs.padding.size} gives another {what} than the model",
            expected="what the model computes of the first rows alone, but for rounding",
            came="no row that is near; the number of rows may reach it",
            remedy="pass the number of rows in as a tensor, or give every size a bucket of its own",
        )

    def _leaks(self, what: str, flipped: bool, own: Sequence[Tensor]) -> CaptureError:
        runs, size = self.runs, self.runs.padding.size
        once, again = (runs.replayed("padded", self.fewest, own) for _ in range(2))
        if (what, flipped) in once.unlike(again):
            return CaptureError(
                f"bucket {size} does not give the same bits twice, so its padding cannot be checked",
                expected="one result for one input",
                came=f"two, in {what}",
                remedy="use deterministic kernels (torch.use_deterministic_algorithms finds the others), or give every "
                "size a bucket of its own",
            )
        blame = self.mixing.blame
        place = "" if blame is None else f"; rows may first mix in {blame.target}, at {where(blame)}"
        return CaptureError(
            f"padding leaks into {what} of bucket {size}",
            expected=f"the same bits for the first {self.fewest} rows, whatever the padded rows behind them hold",
            came=f"other bits{place}",
            remedy="mask what padded rows add, by an input whose pad value says so (Options.pad); or give every size a "
            "bucket of its own",
        )


def _writes(runs: PaddedRuns, name: str, came: str) -> CaptureError:
    rows = ", ".join(runs.names[p] for p in runs.rows)
    likely = next((runs.names[p] for p in reversed(runs.rows) if p not in runs.sent), "input")
    return CaptureError(
        f"padded rows of bucket {runs.padding.size} would write {name!r}",
        expected="memory that a call of fewer rows leaves alone, unless a pad value leads there",
        came=came,
        remedy="send padded rows to scratch memory that no row uses, by the input that says where: "
        f"Options(pad={{{likely!r}: ...}}), or another of {rows}; or give every size a bucket of its own",
    )


def _without(elements: Tensor, others: Tensor) -> Tensor:
    return elements[~torch.isin(elements, others)]
