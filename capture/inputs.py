"""The inputs of a captured graph: memory of its own that calls copy into, and back from where the model writes.

Enters: example inputs, then the arguments of each call. Leaves: the same values in the graph's own memory, and results
that share none of it. Invariant: a call is refused, before anything is copied, if copying could tell it apart from a
call of the model: arguments that do not fit, or memory that they share with something the graph writes.

Note "inputs that share memory". The graph works on copies, so a write through one name is not seen through another.
What the model only reads may be shared at will; a shared tensor that is written gets an error, not other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..runtime import ranges
from ..runtime.errors import InputError
from .arguments import Arguments, Dims, example_arguments
from .outputs import Give, Outputs
from .program import TensorRef
from .state import storage_of
from .trace import TracedGraph


class StaticInputs:
    """Memory for inputs, in the model's own structure: `model(*args, **kwargs)`. Holds copies of the example inputs."""

    def __init__(self, example_inputs: Any) -> None:
        given, spec = pytree.tree_flatten(example_arguments(example_inputs))
        with torch.inference_mode(False):  # or calls outside of it could not copy in
            self._hold([_static(leaf) for leaf in given], spec)

    def _hold(self, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        self.leaves = leaves
        self.spec = spec
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self.args, self.kwargs = pytree.tree_unflatten(leaves, spec)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def with_rows(self, dims: Dims, change: Callable[[Tensor, int], Tensor]) -> StaticInputs:
        """The same inputs with `change(leaf, dim)` in place of each leaf that has rows."""
        made = StaticInputs.__new__(StaticInputs)
        pairs = zip(self.leaves, dims, strict=True)
        with torch.inference_mode(False):
            made._hold([leaf if dim is None else change(leaf, dim) for leaf, dim in pairs], self.spec)
        return made

    def written(self, traced: TracedGraph) -> list[Tensor]:
        """Those the graph writes."""
        return [
            leaf for leaf, name in zip(self.leaves, traced.input_names, strict=True) if name in traced.mutated_inputs
        ]


@dataclass(frozen=True, slots=True)
class Padding:
    """How a graph of `size` rows serves calls of fewer.

    Attributes:
        size: rows of the graph's inputs.
        inputs: the rows of each input leaf.
        outputs: the rows of each output leaf.
        values: per input leaf, what padded rows hold; None: the call's last row again.
    """

    size: int
    inputs: Dims
    outputs: Dims
    values: tuple[bool | int | float | None, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that calls of so many rows do besides the replay; settled by the first of them."""

    copied: tuple[tuple[tuple[int, ...], list[Tensor]], ...]
    """Which arguments are copied, and where to: those of one dtype together, by one kernel."""
    repeated: tuple[tuple[int, int, Tensor, Tensor], ...]
    """Which argument is copied, by which rows (dimension and indices), and where to."""
    filled: tuple[tuple[Tensor, bool | int | float], ...]
    back: tuple[tuple[int, Tensor], ...]
    """Which argument is written back, and from where."""
    leaves: list[Any]
    """Of the outputs."""
    lying: tuple[tuple[int, int, Give], ...]
    """Which of them lie in which argument."""


class Calls:
    """What one call copies in before the replay, and hands out after it.

    Args:
        static: the inputs the graph was captured over.
        traced: names its inputs, and says which of them and which of the module's tensors it writes.
        outputs: what the graph returned; every replay updates its tensors.
        padding: of a graph that serves calls of fewer rows.
        copied: hand out copies of what the next replay overwrites.

    Attributes:
        leaves: of `outputs`.
        written: positions of the inputs that the graph writes.
        live_storages: of what outlives a call: the model's own tensors, and the outputs.
    """

    def __init__(
        self,
        static: StaticInputs,
        traced: TracedGraph,
        outputs: Any,
        *,
        padding: Padding | None = None,
        copied: bool = False,
    ) -> None:
        self.static = static
        self.padding = padding
        self._names = traced.input_names
        self._arguments = Arguments(static.leaves, static.spec, self._names)
        self.written = tuple(p for p, name in enumerate(self._names) if name in traced.mutated_inputs)
        self._inputs = frozenset(map(storage_of, static.tensors()))
        self._written_storages = frozenset(storage_of(tensor) for tensor in traced.written_tensors())
        module: nn.Module = traced.graph_module
        models = [*module.parameters(), *module.buffers()]
        self._outputs = Outputs(outputs, static.leaves, models, copied)
        self.leaves = self._outputs.leaves
        self.live_storages = self._outputs.storages.union(map(storage_of, models))
        self._plans: dict[int | None, _Plan] = {}

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Copy a call's arguments in; returns their leaves. Raises InputError, having copied nothing."""
        given = self._arguments.leaves(args, kwargs)
        self._arguments.rows(given)
        self.load(given)
        return given

    @ranges.around("copy in")
    def load(self, given: Sequence[Any], rows: int | None = None) -> None:
        """Copy in leaves that fit, of so many rows, and pad them. Raises InputError, having copied nothing."""
        if self.written or self._written_storages:
            self._refuse_shared(given)
        plan = self._plan(rows)
        for places, values in [*self._to_copy(plan, given)]:  # all are looked at before one is copied
            torch._foreach_copy_(places, values)  # pyright: ignore[reportPrivateImportUsage]
        for position, dim, indices, place in plan.repeated:
            torch.index_select(given[position], dim, indices, out=place)
        for place, value in plan.filled:
            place.fill_(value)

    @ranges.around("hand out")
    def leave(self, given: Sequence[Any], rows: int | None = None) -> Any:
        """After the replay: write back what the model writes, and return its outputs."""
        plan = self._plan(rows)
        for position, place in plan.back:
            given[position].copy_(place)
        return self._outputs.hand_out(plan.leaves, plan.lying, given)

    def _to_copy(self, plan: _Plan, given: Sequence[Any]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Places and values, but for groups that are in their places already."""
        for positions, places in plan.copied:
            values = [given[position] for position in positions]
            moved = [value is not place for value, place in zip(values, places, strict=True)]
            if not any(moved):
                continue
            for position, elsewhere in zip(positions, moved, strict=True):
                if elsewhere:
                    self._refuse_misplaced(position, given)
            yield places, values
        for position, *_ in plan.repeated:
            self._refuse_misplaced(position, given)

    def _refuse_misplaced(self, position: int, given: Sequence[Any]) -> None:
        if storage_of(given[position]) in self._inputs:
            raise InputError(
                f"input {self._names[position]!r} lies in the graph's own inputs, and not in its place there",
                expected="a tensor of `inputs` as that very input, in a call of all its rows; or memory of one's own",
                came="a view of one, or another one: copying in would overwrite what is still to be read",
                remedy="pass a clone()",
            )

    def _plan(self, rows: int | None) -> _Plan:
        plan = self._plans.get(rows)
        if plan is None:
            with torch.inference_mode(False):
                plan = self._plans[rows] = self._settle(rows)
        return plan

    def _settle(self, rows: int | None) -> _Plan:
        leaves, padding = self.static.leaves, self.padding
        places = {position: leaf for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        outputs, dims = self.leaves, None
        repeated: list[tuple[int, int, Tensor, Tensor]] = []
        filled: list[tuple[Tensor, bool | int | float]] = []
        copied = dict(places)
        if padding is not None and rows is not None and rows < padding.size:
            for position, (dim, value) in enumerate(zip(padding.inputs, padding.values, strict=True)):
                if dim is None:
                    continue
                leaf = leaves[position]
                places[position] = leaf.narrow(dim, 0, rows)
                if value is None:
                    del copied[position]
                    repeated.append((position, dim, repeating(rows, padding.size, leaf.device), leaf))
                else:
                    copied[position] = places[position]
                    filled.append((leaf.narrow(dim, rows, padding.size - rows), value))
            dims = padding.outputs
            outputs = self._outputs.of_rows(dims, rows)
        return _Plan(
            copied=_by_dtype(copied),
            repeated=tuple(repeated),
            filled=tuple(filled),
            back=tuple((position, places[position]) for position in self.written),
            leaves=outputs,
            lying=self._outputs.lying(outputs, [places.get(p) for p in range(len(leaves))], dims),
        )

    def _refuse_shared(self, given: Sequence[Any]) -> None:
        """See the note "inputs that share memory"."""
        for position, value in enumerate(given):
            if not isinstance(value, Tensor):
                continue
            if storage_of(value) in self._written_storages:
                raise self._shared(position, "a buffer of the model that the model writes")
            if position not in self.written:
                continue
            if storage_of(value) in self.live_storages:
                raise self._shared(position, "the model's own tensors, or with an output of an earlier call")
            for other, another in enumerate(given):
                if other != position and isinstance(another, Tensor) and _overlap(value, another):
                    raise self._shared(position, f"input {self._names[other]!r}")
            if any(not stride and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
                raise self._shared(position, "itself: it is expanded, and written")

    def _shared(self, position: int, what: str) -> InputError:
        return InputError(
            f"input {self._names[position]!r} shares memory with {what}",
            expected="tensors of their own for what the model writes: the captured graph works on copies",
            came="two names for one memory, of which the graph would update only one in time",
            remedy="pass a clone()",
        )


def _by_dtype(places: Mapping[int, Tensor]) -> tuple[tuple[tuple[int, ...], list[Tensor]], ...]:
    found: dict[torch.dtype, list[int]] = {}
    for position, place in places.items():
        found.setdefault(place.dtype, []).append(position)
    return tuple((tuple(alike), [places[position] for position in alike]) for alike in found.values())


def repeating(rows: int, size: int, device: torch.device) -> Tensor:
    """The indices of `size` rows: `rows` of them, then the last one again."""
    return torch.arange(size, device=device).clamp_(max=rows - 1)


def _overlap(one: Tensor, other: Tensor) -> bool:
    if storage_of(one) != storage_of(other):
        return False
    mine, theirs = _ranges(one), list(_ranges(other))
    return any(a < d and c < b for a, b in mine for c, d in theirs)


def _ranges(tensor: Tensor) -> Iterator[tuple[int, int]]:
    ref = TensorRef(0, int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride(), tensor.dtype)
    yield from ref.ranges(0)


def _static(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.layout is not torch.strided:
        raise InputError(
            "an example input is not plain strided memory",
            expected="dense strided tensors",
            came=f"layout {leaf.layout}, shape {tuple(leaf.shape)}",
            remedy="convert it (to_dense) and let the model take it so",
        )
    return leaf.detach().clone()
