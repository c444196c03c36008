"""What an op does with its arguments, read off its schema once; and walks over the tensors it was given.

Enters: ops, and the arguments of a call. Leaves: which arguments it reads and writes. Walking is written out for what
ops take (tensors, and lists of them): torch's pytree costs as much as the op itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# In-place ops that overwrite without reading; every other written argument counts as read too.
_OVERWRITES: Final = frozenset(
    {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "exponential_", "bernoulli_"}
)
_IMPLICIT: Final = torch._C.DispatchKey.CompositeImplicitAutograd


class Argument(NamedTuple):
    """One argument of an op: where it is found, and what the schema says of it."""

    position: int | None
    name: str
    reads: bool
    writes: bool

    def of(self, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Its value in a call."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name)


@functools.cache
def arguments(func: Any) -> tuple[Argument, ...]:
    """The arguments of an op; ones that hold no tensor have no part in it, but they cost little."""
    schema = func._schema
    overwrites = schema.name.rpartition("::")[2] in _OVERWRITES
    found: list[Argument] = []
    for position, argument in enumerate(schema.arguments):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not writes or not (argument.is_out or overwrites)
        found.append(Argument(None if argument.kwarg_only else position, argument.name, reads, writes))
    return tuple(found)


@functools.cache
def _is_composite(func: Any) -> bool:
    implicit = "CompositeImplicitAutograd"
    return _IMPLICIT in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), implicit)


def in_parts(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call an op that is made of others, so that those come to `mode`: in inference mode it arrives whole.
    NotImplemented for any other op."""
    if not _is_composite(func):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


@functools.cache
def is_view(func: Any) -> bool:
    """Whether the op looks at metadata alone."""
    return func.is_view or torch.Tag.inplace_view in func.tags


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument, or of a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def replaced(value: Any, replace: Callable[[Tensor], Any]) -> Any:
    """The same arguments with something else in place of each tensor."""
    if isinstance(value, Tensor):
        return replace(value)
    if type(value) is list or type(value) is tuple:
        return type(value)(replaced(item, replace) for item in value)
    if type(value) is dict:
        return {key: replaced(item, replace) for key, item in value.items()}
    return value
