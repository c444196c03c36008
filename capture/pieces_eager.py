"""Ops that run eagerly between captured pieces: the call, its results' places, and what the proof is told of it.

Enters: a split op, its arguments in the pool, what a rehearsal returned. Leaves: an `EagerCall`, which a replay makes
with nothing to look up; and a `Program` of one op. Invariant: the call reads and writes static memory alone.

Note "what an eager op reads". Its arguments and the place of its result are memory of the pool that later pieces use
again: they are named by address, and own nothing. Ops allocate what they return in the ordinary pool, on the stream
they run on; it is copied to its place, and goes back there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from .program import Buffer, Op, Program, TensorRef
from .signatures import arguments, tensors_in
from .splitting import Part
from .state import storage_of


@dataclass(frozen=True, slots=True)
class EagerCall:
    """A call between launches.

    Attributes:
        results: which leaves of what it returns go where: None for all there is.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[tuple[int | None, Tensor], ...]

    def launcher(self) -> Callable[[], object]:
        """The call as a function of nothing."""
        func, args, kwargs, results = self.func, self.args, dict(self.kwargs), self.results
        if len(results) == 1 and results[0][0] is None:
            place = results[0][1]
            return (lambda: place.copy_(func(*args, **kwargs))) if kwargs else (lambda: place.copy_(func(*args)))

        def launch() -> None:
            returned = func(*args, **kwargs)
            for position, place in results:
                place.copy_(returned if position is None else returned[position])

        return launch


@dataclass(frozen=True, slots=True)
class Result:
    """A tensor that an eager op returns, as the rehearsal saw it.

    Attributes:
        position: in what the op returns; None: it is all there is.
        shared: the argument whose storage it lies in, if it has none of its own.
    """

    node: Node
    position: int | None
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    shared: int | None

    def place(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)

    def within(self, argument: Tensor) -> Tensor:
        whole: Any = argument.untyped_storage()
        return torch.empty(0, dtype=self.dtype, device=self.device).set_(whole, self.offset, self.size, self.stride)


class Layouts:
    """What eager ops returned in the rehearsal.

    Attributes:
        results: per part, the tensors that others use.
        leaves: per part, how many leaves there were.
        plain: values that are no tensors.
    """

    def __init__(self) -> None:
        self.results: dict[int, tuple[Result, ...]] = {}
        self.leaves: dict[int, int] = {}
        self.plain: dict[Node, Any] = {}

    def note(self, number: int, part: Part, given: Any, returned: Any) -> dict[Node, Any]:
        """Returns the values of the part's nodes that others use."""
        owners = {storage_of(tensor): position for position, tensor in enumerate(tensors_in(given))}
        values: dict[Node, Any] = {}
        found: list[Result] = []
        for node in part.gives:
            position: Any = None if node is part.nodes[0] else node.args[1]
            values[node] = leaf = returned if position is None else returned[position]
            if isinstance(leaf, Tensor):
                lies = tuple(leaf.size()), tuple(leaf.stride()), int(leaf.storage_offset())
                shared = owners.get(storage_of(leaf))
                found.append(Result(node, position, *lies, leaf.dtype, leaf.device, shared))
            else:
                self.plain[node] = leaf
        self.results[number] = tuple(found)
        self.leaves[number] = len(pytree.tree_leaves(returned))
        return values


def declared_program(call: EagerCall, leaves: int, line: str, region: str | None) -> tuple[Program, dict[int, Tensor]]:
    """An eager op as a recording, by its schema's word: one op that reads and writes what it says, and writes its
    results where they are copied. What has no schema reads and writes all it is given. Also the memory of each buffer,
    as bytes."""
    buffers: list[Buffer] = []
    outside: dict[int, Tensor] = {}
    known: dict[int, int] = {}

    def ref(tensor: Tensor) -> TensorRef:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = number = len(buffers)
            label = f"outside tensor {tuple(tensor.shape)}"
            buffers.append(Buffer(storage.data_ptr(), storage.nbytes(), None, label))
            outside[number] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # pyright: ignore
        lies = int(tensor.storage_offset()), tuple(tensor.size()), tuple(tensor.stride())
        return TensorRef(known[storage._cdata], *lies, tensor.dtype, tensor.is_conj(), tensor.is_neg())

    reads: list[TensorRef] = []
    writes: list[TensorRef] = []
    if hasattr(call.func, "_schema"):
        for argument in arguments(call.func):
            found = [ref(tensor) for tensor in tensors_in(argument.of(call.args, call.kwargs))]
            reads += found if argument.reads else []
            writes += found if argument.writes else []
    else:
        reads = writes = [ref(tensor) for tensor in tensors_in((call.args, call.kwargs))]
    fresh: list[TensorRef | None] = [None] * leaves
    for position, place in call.results:
        fresh[position or 0] = ref(place)
    args, kwargs = pytree.tree_map_only(Tensor, ref, (call.args, dict(call.kwargs)))
    touched = (*(made for made in fresh if made is not None), *writes)
    op = Op(0, call.func, args, kwargs, tuple(fresh), tuple(reads), touched, line, region)
    return Program((op,), tuple(buffers), {0: "caller"}, 0), outside


def address_of(tensor: Tensor) -> Tensor:
    """The same memory under another tensor, which owns nothing: see the note "what an eager op reads"."""
    storage = tensor.untyped_storage()
    make: Any = torch._C._construct_storage_from_data_pointer
    named = make(storage.data_ptr(), tensor.device, storage.nbytes())
    with torch.inference_mode(False):
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        plain.set_(named, int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride())
    plain = plain.conj() if tensor.is_conj() else plain
    return torch.ops.aten._neg_view.default(plain) if tensor.is_neg() else plain
