"""What a single ATen op does to the memory of its arguments, read off its schema and its traced values.

Enters: a node that calls an op with a schema. Leaves: which arguments it writes, which ones each returned tensor may be
a view of, and whether it draws random numbers. Invariant: doubt counts as an access; an op is taken to return memory of
its own only where its schema and the trace say so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils import _pytree as pytree

_HIDE_RUNNING_STATISTICS: Final = frozenset(
    f"aten::{name}"
    for name in (
        "batch_norm",
        "_batch_norm_impl_index",
        "cudnn_batch_norm",
        "instance_norm",
        "miopen_batch_norm",
        "native_batch_norm",
    )
)
_RUNNING_STATISTICS: Final = (3, 4)
_TRAINING: Final = 5


@dataclass(frozen=True, slots=True)
class Alias:
    """A schema's word on an argument or a return: the sets of memory it may be of, and whether it is written."""

    sets: frozenset[str]
    is_write: bool


Given = list[tuple[Alias | None, tuple[Node, ...]]]
"""Per argument of an op: its alias annotation, or None, and the nodes it was given."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What an op says of itself, read once: asking a schema makes new objects every time."""

    arguments: Mapping[str, Alias | None]
    returns: tuple[Alias | None, ...]
    defaults: Mapping[str, Any]
    composite: bool
    """Whether it is a composition of other ops."""
    random: bool
    """Whether it may draw random numbers."""


@functools.cache
def _facts(target: OpOverload) -> _Facts:
    schema = target._schema
    return _Facts(
        arguments={argument.name: _alias(argument.alias_info) for argument in schema.arguments},
        returns=tuple(_alias(value.alias_info) for value in schema.returns),
        defaults={a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"),
        random=torch.Tag.nondeterministic_seeded in target.tags,
    )


def _alias(info: Any) -> Alias | None:
    return None if info is None else Alias(frozenset(info.before_set | info.after_set), info.is_write)


def tensors(node: Node) -> list[Tensor]:
    """The tensors of a node's value, flattened."""
    return _leaves(node.meta.get("val"))


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def arguments(node: Node, target: OpOverload) -> Given:
    """Every argument's annotation with the nodes in it, nested lists and keyword arguments included."""
    declared = _facts(target).arguments
    given: Given = [(info, _nodes(value)) for info, value in zip(declared.values(), node.args, strict=False)]
    given += [(declared[name], _nodes(value)) for name, value in node.kwargs.items()]
    return given


def written(node: Node, target: OpOverload, given: Given) -> list[Node]:
    """The arguments the op writes in place."""
    hidden = hidden_writes(target, node.args)
    return [
        argument
        for position, (info, nodes) in enumerate(given)
        if position in hidden or (info is not None and info.is_write)
        for argument in nodes
    ]


def hidden_writes(target: OpOverload, args: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the arguments an op writes though its schema says nothing of it."""
    if target._schema.name not in _HIDE_RUNNING_STATISTICS:
        return ()
    trains = len(args) <= _TRAINING or bool(args[_TRAINING])
    return _RUNNING_STATISTICS if trains else ()


def returned(node: Node, target: OpOverload) -> Iterator[tuple[Alias | None, Tensor]]:
    """Every tensor the op returns, with the annotation of the return it belongs to."""
    value, returns = node.meta.get("val"), _facts(target).returns
    parts = [value] if len(returns) == 1 else list(value or ())
    for declared, part in zip(returns, parts, strict=False):
        for leaf in _leaves(part):
            yield declared, leaf


def aliased(node: Node, target: OpOverload, info: Alias | None, leaf: Tensor, given: Given) -> list[Node]:
    """The arguments whose memory the returned `leaf` may be.

    Ops that are compositions of others may return an argument whether or not their schema says so (`type_as`,
    `reshape`). There the tracer's storages decide; where they are unknown, it may be any argument. The tracer itself is
    wrong about random ops that draw nothing: a dropout in eval returns its input, but not under fake tensors.
    """
    facts = _facts(target)
    inert = facts.random and not draws_random_numbers(node, target)
    found: list[Node] = []
    for declared, nodes in given:
        certain = _says_alias(info, declared) and (not facts.composite or (info is not None and info.is_write))
        for argument in nodes:
            possible = facts.composite and any(
                _same_storage(leaf, other) is not False or (inert and leaf.shape == other.shape)
                for other in tensors(argument)
            )
            if certain or possible:
                found.append(argument)
    return found


def surely_aliased(target: OpOverload, info: Alias | None, leaf: Tensor, given: Given) -> bool:
    """Whether `leaf` is an argument's memory for certain, so that the op allocates none for it."""
    if info is not None and (info.is_write or not _facts(target).composite):
        return True
    return any(_same_storage(leaf, other) for _, nodes in given for node in nodes for other in tensors(node))


def draws_random_numbers(node: Node, target: OpOverload) -> bool:
    """Random ops stay in order, for their numbers come from one stream. A dropout of nothing draws none."""
    facts = _facts(target)
    if not facts.random:
        return False
    values = {**facts.defaults, **dict(zip(facts.arguments, node.args, strict=False)), **node.kwargs}
    return not (values.get("train") is False or values.get("dropout_p") == 0.0 or values.get("p") == 0.0)


def _nodes(value: Any) -> tuple[Node, ...]:
    if isinstance(value, Node):
        return (value,)
    if not isinstance(value, list | tuple | dict) or not value:
        return ()
    if isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
        return ()  # sizes, mostly
    leaves = pytree.tree_leaves(value, is_leaf=lambda item: isinstance(item, Node))
    return tuple(leaf for leaf in leaves if isinstance(leaf, Node))


def _says_alias(info: Alias | None, declared: Alias | None) -> bool:
    if info is None or declared is None:
        return False
    return bool(info.sets & declared.sets) or any("*" in name for name in info.sets | declared.sets)


def _same_storage(one: Tensor, other: Tensor) -> bool | None:
    """Whether two traced values share a storage; None where the trace does not tell."""
    if not (isinstance(one, FakeTensor) and isinstance(other, FakeTensor)):
        return None
    if one.layout != torch.strided or other.layout != torch.strided:
        return None  # sparse: several tensors, and no storage of its own
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
