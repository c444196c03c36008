"""What a compiled model knows beyond its graphs: the model itself, and how to make the graphs again.

Enters: a module, how its graphs are made, and once they are, which storages they read. Leaves: calls of the module,
refusals of calls whose graphs read tensors the module has no more, new graphs. Invariant: it holds the module and never
the compiled model, so nothing keeps a compiled model alive but its user.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import Tensor, nn

from ..runtime.errors import CaptureError
from .bindings import Bindings
from .graphs import CapturedGraph

if TYPE_CHECKING:
    from .compiled import CompiledModel


_one_at_a_time: Final = threading.RLock()
"""A tracer patches `nn.Module` for the whole process, so threads compile in turn."""


class Life:
    """Of one compiled model. `make`: its graphs anew, in a pool of their own or the one given, and a line about them.
    `example`: the inputs whose values `make` needs as they were."""

    def __init__(
        self, model: nn.Module, make: Callable[[Any], tuple[CompiledModel, str]], example: Sequence[Tensor] = ()
    ) -> None:
        self.model = model
        self._make = make
        self._example = [(leaf, leaf.clone()) for leaf in example]
        self._bindings: Bindings | None = None

    def made(self, pool: Any = None) -> CompiledModel:
        """The model compiled. What had been made before is gone."""
        with _one_at_a_time:
            with torch.no_grad():
                for leaf, value in self._example:
                    leaf.copy_(value)
            compiled, summary = self._make(pool)
        compiled.begin(self, summary)
        return compiled

    def follow(self, graphs: Iterable[CapturedGraph]) -> None:
        """The graphs are there."""
        outside = [graph._outside for graph in graphs]
        whole = not all(outside)  # one that runs ops, on whatever they name
        storages = {view.untyped_storage()._cdata for views in outside for view in views.values()}
        self._bindings = Bindings(self.model, None if whole else storages)

    def glance(self) -> None:
        """Before a call. Raises CaptureError for replaced tensors, as far as it sees them; see `Bindings`."""
        self.known().glance()

    def check(self) -> None:
        """Look at every tensor. Raises CaptureError."""
        self.known().check()

    def known(self) -> Bindings:
        """The tensors that the graphs read. Raises CaptureError if there are no graphs."""
        if self._bindings is None:
            raise CaptureError(
                "this compiled model has no graphs",
                expected="a recapture() that ended well",
                came="one that failed, after the old graphs were given back",
                remedy="call recapture() again, or the model itself",
            )
        return self._bindings

    def end(self) -> None:
        """The graphs are given back."""
        self._bindings = None


def refuse_copies(what: str) -> NoReturn:
    """Graphs are of this process, and of their own memory."""
    raise CaptureError(
        f"{what} cannot be pickled or copied",
        expected="one compiled model per process and memory",
        came="pickle, copy, or a deepcopy of something that holds it",
        remedy="pickle or copy the model itself, and compile the copy",
    )
