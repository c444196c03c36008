"""The inputs of a captured graph: memory of its own that calls copy into, and back from where the model writes.

Enters: example inputs, then the arguments of each call. Leaves: the same values in the graph's own memory, and results
that share none of it. Invariant: a call is refused, before anything is copied, if copying could tell it apart from a
call of the model: another structure, shape, dtype or device, or memory that it shares with something the graph writes.

Note "inputs that share memory". The graph works on copies, so a write through one name is not seen through another.
What the model only reads may be shared at will; a shared tensor that is written gets an error, not other numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..runtime.errors import InputError
from .program import TensorRef
from .trace import TracedGraph


class StaticInputs:
    """Copies of the example inputs, in the model's own structure: `model(*args, **kwargs)`."""

    def __init__(self, example_inputs: Any) -> None:
        self.given_args, self.given_kwargs = _arguments(example_inputs)
        given, self.spec = pytree.tree_flatten((self.given_args, self.given_kwargs))
        with torch.inference_mode(False):  # or calls outside of it could not copy in
            self.leaves: list[Any] = [_static(leaf) for leaf in given]
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self.args, self.kwargs = pytree.tree_unflatten(self.leaves, self.spec)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def written(self, traced: TracedGraph) -> list[Tensor]:
        """Those the graph writes."""
        return [
            leaf for leaf, name in zip(self.leaves, traced.input_names, strict=True) if name in traced.mutated_inputs
        ]

    def apart(self, outputs: Any) -> Any:
        """`outputs` with views of an input copied, or the next call's inputs would change them. An input itself stays:
        `Calls` hands out the caller's own tensor in its place."""
        own = {tensor.untyped_storage()._cdata for tensor in self.tensors()}
        inputs = set(map(id, self.tensors()))

        def copied(leaf: Tensor) -> Tensor:
            return leaf.clone() if id(leaf) not in inputs and leaf.untyped_storage()._cdata in own else leaf

        return pytree.tree_map_only(Tensor, copied, outputs)


class Calls:
    """What one call copies in before the replay, and hands out after it.

    Args:
        static: the inputs the graph was captured over.
        traced: names its inputs, and says which of them and which of the module's tensors it writes.
        outputs: what the graph returned; every replay updates its tensors.
    """

    def __init__(self, static: StaticInputs, traced: TracedGraph, outputs: Any) -> None:
        self._static = static
        self._names = traced.input_names
        self._outputs = outputs
        leaves, self._out_spec = pytree.tree_flatten(outputs)
        self._written = tuple(p for p, name in enumerate(self._names) if name in traced.mutated_inputs)
        positions = {id(leaf): p for p, leaf in enumerate(static.leaves) if isinstance(leaf, Tensor)}
        self._passed_through = tuple((i, positions[id(leaf)]) for i, leaf in enumerate(leaves) if id(leaf) in positions)
        self._leaves = leaves
        self._written_storages = frozenset(_storage(tensor) for tensor in traced.written_tensors())
        module: nn.Module = traced.graph_module
        self._live_storages = frozenset(
            _storage(leaf)
            for leaf in itertools.chain(leaves, module.parameters(), module.buffers())
            if isinstance(leaf, Tensor) and id(leaf) not in positions
        )

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Copy a call's arguments in; returns their leaves. Raises InputError, having copied nothing."""
        expected = self._static.kwargs
        if kwargs.keys() == expected.keys():
            kwargs = {name: kwargs[name] for name in expected}  # keywords come in any order
        given, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._static.spec:
            raise InputError(
                "the arguments have another structure than the captured ones",
                expected=str(self._static.spec),
                came=str(spec),
                remedy="call it as in the example inputs, or compile for this structure too",
            )
        for name, static, value in zip(self._names, self._static.leaves, given, strict=True):
            _check(name, static, value)
        if self._written or self._written_storages:
            self._refuse_shared(given)
        for static, value in zip(self._static.leaves, given, strict=True):
            if isinstance(static, Tensor):
                static.copy_(value)
        return given

    def leave(self, given: Sequence[Any]) -> Any:
        """After the replay: write back what the model writes, and return its outputs."""
        for position in self._written:
            given[position].copy_(self._static.leaves[position])
        if not self._passed_through:
            return self._outputs
        leaves = list(self._leaves)
        for index, position in self._passed_through:
            leaves[index] = given[position]
        return pytree.tree_unflatten(leaves, self._out_spec)

    def _refuse_shared(self, given: Sequence[Any]) -> None:
        """See the note "inputs that share memory"."""
        for position, value in enumerate(given):
            if not isinstance(value, Tensor):
                continue
            if _storage(value) in self._written_storages:
                raise self._shared(position, "a buffer of the model that the model writes")
            if position not in self._written:
                continue
            if _storage(value) in self._live_storages:
                raise self._shared(position, "the model's own tensors, or with an output of an earlier call")
            for other, another in enumerate(given):
                if other != position and isinstance(another, Tensor) and _overlap(value, another):
                    raise self._shared(position, f"input {self._names[other]!r}")

    def _shared(self, position: int, what: str) -> InputError:
        return InputError(
            f"input {self._names[position]!r} shares memory with {what}",
            expected="tensors of their own for what the model writes: the captured graph works on copies",
            came="two names for one memory, of which the graph would update only one in time",
            remedy="pass a clone()",
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _overlap(one: Tensor, other: Tensor) -> bool:
    if _storage(one) != _storage(other):
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


def _check(name: str, static: Any, value: Any) -> None:
    if not isinstance(static, Tensor):
        if type(static) is not type(value) or not (static is value or static == value):
            raise InputError(
                f"input {name!r} is a constant of the captured graph",
                expected=repr(static),
                came=repr(value),
                remedy="pass a tensor if it must vary, or compile for this value too",
            )
        return
    if isinstance(value, FakeTensor):
        raise InputError(
            "a compiled model is called while another model is traced",
            expected="tensors with values",
            came=f"a traced stand-in for {name!r}",
            remedy="compile the outer model alone: a graph holds no other graph",
        )
    if not isinstance(value, Tensor) or _kind(value) != _kind(static):
        raise InputError(
            f"input {name!r} differs from the captured one",
            expected=_described(static),
            came=_described(value) if isinstance(value, Tensor) else repr(value),
            remedy="pad or move it, or compile for this shape too",
        )


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _described(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{layout} on {tensor.device}"


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    match example_inputs:
        case Tensor():
            return (example_inputs,), {}
        case Mapping():
            return (), dict(example_inputs)
        case tuple() | list():
            return tuple(example_inputs), {}
        case _:
            raise InputError(
                "example_inputs have no form compile() knows",
                expected="a tuple or list (positional), a dict (keyword), or one tensor",
                came=type(example_inputs).__name__,
            )
