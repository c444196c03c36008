"""What calls of a captured graph hand out.

Enters: what the graph returned, the memory of its inputs, the model's tensors. Leaves: for each call, results in the
model's own structure. Invariant: what a call hands out is the caller's to change, but for the numbers in it: the next
call gets containers and tensor objects anew.

Note "outputs that lie in an input". The graph returns a view of its copy of the input; the caller gets the same view of
his own tensor, as from the model: what is written through one is seen through the other. Where that cannot be (his
tensor is laid out otherwise, the view is of another dtype, or of a padded input and not row by row), he gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from .arguments import Dims
from .state import storage_of

Give = Callable[[Tensor], Tensor]
"""From a call's input to the output that lies in it."""


class Outputs:
    """
    Args:
        outputs: what the graph returned; every replay updates its tensors.
        inputs: the leaves of the graph's own inputs.
        models: the model's own tensors: handed out as they are.
        copied: hand out copies of what the next replay overwrites. Of outputs that share memory, so do the copies.

    Attributes:
        leaves: of `outputs`.
        storages: of those that are neither an input nor in one.
    """

    def __init__(self, outputs: Any, inputs: Sequence[Any], models: Sequence[Tensor], copied: bool) -> None:
        self.leaves: list[Any]
        self.leaves, self._spec = pytree.tree_flatten(outputs)
        self._alone = len(self.leaves) == 1 and self.leaves[0] is outputs
        tensors = {i: leaf for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)}
        given = {position: leaf for position, leaf in enumerate(inputs) if isinstance(leaf, Tensor)}
        whole = {id(leaf): position for position, leaf in given.items()}
        within = {storage_of(leaf): position for position, leaf in given.items()}
        lasting = set(map(storage_of, models))
        self._passed = tuple((i, whole[id(leaf)]) for i, leaf in tensors.items() if id(leaf) in whole)
        self._views = tuple(
            (i, within[storage_of(leaf)])
            for i, leaf in tensors.items()
            if id(leaf) not in whole and storage_of(leaf) in within
        )
        own = {i: storage_of(leaf) for i, leaf in tensors.items() if storage_of(leaf) not in within}
        self.storages = frozenset(own.values())
        groups: dict[int, list[int]] = {}
        for i, storage in own.items():
            if copied and storage not in lasting:
                groups.setdefault(storage, []).append(i)
        self._copied = tuple(map(tuple, groups.values()))
        models_own = set(map(id, models))
        copied_ones = {i for group in self._copied for i in group}
        self._renamed = tuple(i for i in own if i not in copied_ones and id(self.leaves[i]) not in models_own)
        self._plain = self._alone and self._renamed == (0,)

    def of_rows(self, dims: Dims, rows: int) -> list[Any]:
        """The leaves, cut to so many rows."""
        pairs = zip(self.leaves, dims, strict=True)
        return [leaf if dim is None else leaf.narrow(dim, 0, rows) for leaf, dim in pairs]

    def lying(
        self, leaves: Sequence[Any], places: Sequence[Any], dims: Dims | None
    ) -> tuple[tuple[int, int, Give], ...]:
        """Which outputs lie in which inputs, and how they are found in the caller's own: see the note. `places`: the
        graph's inputs; `dims`: of a padded call, the rows of each output."""
        return tuple(
            (i, position, _giving(leaves[i], places[position], dims is None or dims[i] is not None))
            for i, position in self._views
        )

    def hand_out(self, leaves: Sequence[Any], lying: Sequence[tuple[int, int, Give]], given: Sequence[Any]) -> Any:
        """The outputs of one call: `leaves` and `lying` as of its number of rows, `given` its inputs."""
        if self._plain:  # one tensor of the graph's own: the usual step
            return leaves[0].detach()
        made = list(leaves)
        for i in self._renamed:
            made[i] = made[i].detach()
        for i, position in self._passed:
            made[i] = given[position]
        for i, position, give in lying:
            made[i] = give(given[position])
        for together in self._copied:
            for i, copy in zip(together, _copies([made[i] for i in together]), strict=True):
                made[i] = copy
        return made[0] if self._alone else pytree.tree_unflatten(made, self._spec)


def _giving(leaf: Tensor, place: Tensor, by_rows: bool) -> Give:
    """How the view `leaf` of `place` is made of a tensor of the size of `place`."""
    laid = [(dim, stride) for dim, stride in enumerate(place.stride()) if place.shape[dim] > 1]
    size, stride = tuple(leaf.size()), leaf.stride()
    offset = int(leaf.storage_offset()) - int(place.storage_offset())
    numbers = (leaf.dtype, leaf.is_conj(), leaf.is_neg()) == (place.dtype, place.is_conj(), place.is_neg())

    def give(given: Tensor) -> Tensor:
        theirs = given.stride()
        if not by_rows or not numbers or any(theirs[dim] != mine for dim, mine in laid):
            return leaf.clone()
        return given.detach().as_strided(size, stride, int(given.storage_offset()) + offset)

    return give


def _copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Copies that share memory as these do."""
    if len(leaves) == 1 or any(leaf.is_conj() or leaf.is_neg() for leaf in leaves):
        return [leaf.clone() for leaf in leaves]
    storage: Any = leaves[0].untyped_storage().clone()
    return [leaf.new_empty(0).set_(storage, leaf.storage_offset(), leaf.size(), leaf.stride()) for leaf in leaves]
