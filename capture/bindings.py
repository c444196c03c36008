"""The model's tensors that captured graphs read: still where they were?

Enters: a module, and the storages its graphs read and write. Leaves: nothing, or, before a call, a `CaptureError` that
names a tensor which lies elsewhere by now: the graphs would go on with the old one. Values written in place need no
check: graphs read them as they are. A tensor that is a plain attribute of a module counts too, if graphs read it.

Note "when a replaced tensor is noticed". Whatever goes through the module's own interface (an attribute set,
`register_*`, `load_state_dict(assign=True)`, a submodule replaced) is noticed at the next call: torch tells of each
registration, and then all tensors are looked at. What goes past it (`weight.data = other`, `.to(...)`, a write to
`module._parameters`, an attribute that is no parameter or buffer) leaves no trace that could be asked for at once, so
each call looks at the addresses of `AT_ONCE` tensors, in turn: all of them in a model that has no more, else all within
a few calls. `check` looks at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..runtime.errors import CaptureError

AT_ONCE: Final = 16
"""Tensors whose addresses one call compares."""

_every: Final[WeakSet[Bindings]] = WeakSet()
_address: Final = Tensor.data_ptr
_get: Final[Callable[[dict[str, Any], str], Any]] = dict[str, Any].get


class Bindings:
    """Where the tensors of `model` lie whose storages are among `storages`; None: all of them."""

    def __init__(self, model: nn.Module, storages: Collection[int] | None) -> None:
        self._model = model
        self._modules = frozenset(id(module) for module in model.modules())
        self._found: dict[str, tuple[dict[str, Any], str]] = {}
        self._addresses: dict[str, int] = {}
        for name, table, key, tensor in _tensors(model, plain=storages is not None):
            if storages is None or tensor.untyped_storage()._cdata in storages:
                self._found[name] = table, key
                self._addresses[name] = _address(tensor)
        self._slices = [self._slice(first) for first in range(0, len(self._found), AT_ONCE)]
        self._turn = 0
        self._in_doubt = False
        _follow_registrations()
        _every.add(self)

    def _slice(self, first: int) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...], list[int]]:
        names = list(self._found)[first : first + AT_ONCE]
        places = [self._found[name] for name in names]
        addresses = [self._addresses[name] for name in names]
        return tuple(table for table, _ in places), tuple(key for _, key in places), addresses

    def glance(self) -> None:
        """What each call does; see the note. Raises CaptureError."""
        if self._in_doubt:
            self.check()
        if not self._slices:
            return
        turn = self._turn
        self._turn = (turn + 1) % len(self._slices)
        tables, keys, addresses = self._slices[turn]
        try:
            if [*map(_address, map(_get, tables, keys))] == addresses:
                return
        except TypeError:  # one is gone
            pass
        self.check()

    def check(self) -> None:
        """Compare all. Raises CaptureError, naming what was replaced."""
        now = {name: tensor for name, _, _, tensor in _tensors(self._model)}
        moved = [name for name, address in self._addresses.items() if name not in now or _address(now[name]) != address]
        if moved:
            raise _replaced(moved, now)
        # The same tensors may have come into other tables, in modules that are new.
        found = {name: (table, key) for name, table, key, _ in _tensors(self._model) if name in self._addresses}
        self._found = {name: found[name] for name in self._addresses}
        self._modules = frozenset(id(module) for module in self._model.modules())
        self._slices = [self._slice(first) for first in range(0, len(self._found), AT_ONCE)]
        self._in_doubt = False

    def registered(self, module: nn.Module) -> None:
        """Something was put into a module, maybe one of this model's."""
        if id(module) in self._modules:
            self._in_doubt = True


def _tensors(model: nn.Module, plain: bool = True) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Parameters, buffers and, if so told, `plain` attributes, under each of their names: the name, the table that has
    it, its key there, the tensor."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers, *((vars(module),) if plain else ())):
            for key, tensor in table.items():
                if isinstance(tensor, Tensor) and _is_plain(tensor):
                    yield f"{prefix}.{key}" if prefix else key, table, key, tensor


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has an address of its own. A wrapper's parts are not the model's by name."""
    return tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)


def _replaced(names: list[str], now: Mapping[str, Tensor]) -> CaptureError:
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    tensor = now.get(names[0])
    return CaptureError(
        f"replaced since the capture: {shown}. The captured graphs go on reading what was there before",
        expected="the tensors of the capture; their values may change",
        came="no tensor of that name"
        if tensor is None
        else f"other memory: {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}",
        remedy="call recapture(), or copy new values into the old tensors (copy_, load_state_dict without assign)",
    )


def _registered(module: nn.Module, name: str, value: Any) -> None:
    for bindings in list(_every):
        bindings.registered(module)


_hooks: Final[list[Any]] = []


def _follow_registrations() -> None:
    """Be told of what is put into modules; once per process."""
    if not _hooks:
        _hooks.append(torch_modules.register_module_parameter_registration_hook(_registered))
        _hooks.append(torch_modules.register_module_buffer_registration_hook(_registered))
        _hooks.append(torch_modules.register_module_module_registration_hook(_registered))
