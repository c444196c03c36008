"""What a call must look like: the structure, shapes, dtypes, devices and constants of the example inputs.

Enters: the memory a graph was captured over, then the arguments of each call. Leaves: their leaves, and how many rows
they have, if they may have fewer or more. Invariant: what differs in anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..runtime.errors import InputError

Dims = tuple[int | None, ...]
"""Per leaf, the dimension of its rows, one per token; None for a leaf that has none."""

Kind = tuple[torch.Size, torch.dtype, torch.device, torch.layout]


class Arguments:
    """The arguments that fit.

    Args:
        leaves: the memory to compare with.
        spec: the structure of `(args, kwargs)`.
        names: of the leaves.
        dims: the dimensions in which calls may differ, all together.
    """

    def __init__(
        self, leaves: Sequence[Any], spec: pytree.TreeSpec, names: Sequence[str], dims: Dims | None = None
    ) -> None:
        self._leaves = leaves
        self._spec = spec
        self._names = names
        self._dims: Dims = dims or (None,) * len(leaves)
        args, keywords = pytree.tree_unflatten(list(leaves), spec)
        self._args: tuple[Any, ...] = args
        self._positional = len(args)
        self._keywords: dict[str, Any] = keywords
        self._flat = all(_is_leaf(value) for value in (*args, *keywords.values()))
        self._counted = next((position for position, dim in enumerate(self._dims) if dim is not None), None)
        self._kinds: dict[int | None, list[Kind | None]] = {}

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call's arguments. Raises InputError for another structure."""
        if kwargs.keys() == self._keywords.keys():
            if self._flat and len(args) == self._positional:  # the usual call: nothing to take apart
                return [*args, *(kwargs[name] for name in self._keywords)]
            kwargs = {name: kwargs[name] for name in self._keywords}  # keywords come in any order
        given, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec:
            raise self._other_structure(args, kwargs)
        return given

    def _other_structure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InputError:
        expected, came = _counted(self._args, self._keywords), _counted(args, kwargs)
        if expected == came:  # then one of them is another nest
            examples: dict[int | str, Any] = {**dict(enumerate(self._args)), **self._keywords}
            given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
            which = next(key for key, value in given.items() if not _alike(value, examples[key]))
            where = f"argument {which}" if isinstance(which, int) else f"{which}="
            expected, came = (f"{where} as {_form(values[which])}" for values in (examples, given))
        return InputError(
            "the arguments have another structure than the captured ones",
            expected=expected,
            came=came,
            remedy="call it as in the example inputs, or compile for this structure too",
        )

    def rows(self, given: Sequence[Any]) -> int | None:
        """The rows of these leaves; None where every size is fixed. Raises InputError for leaves that do not fit."""
        rows = None if self._counted is None else self._count(given[self._counted], self._counted)
        kinds = self._kinds.get(rows)
        if kinds is None:
            kinds = self._kinds[rows] = [self._kind(position, rows) for position in range(len(given))]
        for position, kind in enumerate(kinds):
            value = given[position]
            if kind is None:
                self._check_constant(position, value)
            elif not isinstance(value, Tensor) or isinstance(value, FakeTensor) or kind_of(value) != kind:
                raise self._differs(position, kind, value)
        return rows

    def _count(self, value: Any, position: int) -> int:
        dim = self._dims[position]
        assert dim is not None
        if not isinstance(value, Tensor) or value.dim() != self._leaves[position].dim():
            raise self._differs(position, kind_of(self._leaves[position]), value)
        return value.shape[dim]

    def _kind(self, position: int, rows: int | None) -> Kind | None:
        """What this leaf of a call with so many rows must be; None for a constant."""
        leaf, dim = self._leaves[position], self._dims[position]
        if not isinstance(leaf, Tensor):
            return None
        shape = leaf.shape
        if dim is not None:
            assert rows is not None
            shape = torch.Size((*shape[:dim], rows, *shape[dim + 1 :]))
        return shape, leaf.dtype, leaf.device, leaf.layout

    def _check_constant(self, position: int, value: Any) -> None:
        static = self._leaves[position]
        same = static is value or exact(static) == exact(value)
        if type(static) is not type(value) or not same:
            raise InputError(
                f"input {self._names[position]!r} is a constant of the captured graph",
                expected=repr(static),
                came=_said(value),
                remedy="pass a tensor if it must vary, or compile for this value too",
            )

    def _differs(self, position: int, kind: Kind, value: Any) -> InputError:
        name = self._names[position]
        if isinstance(value, FakeTensor):
            return InputError(
                "a compiled model is called while another model is traced",
                expected="tensors with values",
                came=f"a traced stand-in for {name!r}",
                remedy="compile the outer model alone: a graph holds no other graph",
            )
        others = "" if self._counted in (None, position) else f", as {self._names[self._counted or 0]!r} has these rows"
        return InputError(
            f"input {name!r} differs from the captured one",
            expected=_described(kind) + others,
            came=_said(value),
            remedy=self._remedy(position, kind, value),
        )

    def _remedy(self, position: int, kind: Kind, value: Any) -> str:
        if not isinstance(value, Tensor):
            return "pass a tensor"
        shape, dtype, device, layout = kind
        remedies: list[str] = []
        if value.layout is not layout:
            remedies.append("make it dense with .to_dense()")
        if value.dtype != dtype:
            remedies.append(f"cast it with .to({dtype})")
        if value.device != device:
            remedies.append(f"move it with .to({str(device)!r})")
        if value.dim() != len(shape):
            remedies.append(f"give it {len(shape)} dimensions, or compile for this shape too")
        else:
            remedies += [
                f"pad or cut its dimension {dim} to {size}"
                if dim == self._dims[position]
                else f"dimension {dim} must be {size}: compile for this shape too"
                for dim, size in enumerate(shape)
                if value.shape[dim] != size
            ]
        return "; ".join(remedies)


def _is_leaf(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return len(leaves) == 1 and leaves[0] is value


def _alike(value: Any, example: Any) -> bool:
    return pytree.tree_structure(value) == pytree.tree_structure(example)


def _counted(args: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    """The arguments of a call, in words."""
    named = f"keywords {', '.join(sorted(keywords))}" if keywords else "no keywords"
    return f"{len(args)} positional argument{'' if len(args) == 1 else 's'} and {named}"


def _form(value: Any) -> str:
    """What nest a value is."""
    match value:
        case Tensor():
            return "a tensor"
        case tuple() | list():
            return f"{type(value).__name__} of ({', '.join(map(_form, cast('Sequence[Any]', value)))})"
        case Mapping():
            entries = cast("Mapping[Any, Any]", value).items()
            return f"{type(value).__name__} of ({', '.join(f'{key!r}: {_form(entry)}' for key, entry in entries)})"
        case _:
            return type(value).__name__


def exact(number: Any) -> Any:
    """What is equal for constants that are the same: NaN is NaN, and zero has a sign."""
    return number.hex() if isinstance(number, float) else number


def kind_of(tensor: Tensor) -> Kind:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _said(value: Any) -> str:
    return _described(kind_of(value)) if isinstance(value, Tensor) else repr(value)


def _described(kind: Kind) -> str:
    shape, dtype, device, layout = kind
    return f"{tuple(shape)} {dtype}{'' if layout is torch.strided else f' {layout}'} on {device}"


def example_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments. Raises InputError for what is neither."""
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
