"""Which parameters a compiled Triton kernel reads and writes through, and which kernels were launched meanwhile.

Enters: a kernel's TTIR; the launches of this process. Leaves: a `TritonAccesses` per kernel, found by its CUfunction.
Invariant: doubt counts as an access, and `assumed` says where there was some.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final, Self

from ..runtime.errors import CaptureError
from .triton_flow import effects_of, is_address, operations_of
from .triton_ir import read_module


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter through which a kernel may touch memory.

    `position` is among the launch's own parameters: constants are dropped, tuples and descriptors are taken apart.
    `name` is for reports: Triton's name of it, which is that of a variable if the source gave it to one.
    """

    name: str
    position: int
    reads: bool
    writes: bool


@dataclass(frozen=True, slots=True)
class TritonAccesses:
    """A kernel's pointer parameters, and what had to be assumed about them, as text.

    Parameters are pointers, tensor descriptors, integers that the kernel takes for addresses, and the launcher's
    scratch memory if the kernel makes tensor descriptors.
    """

    kernel: str
    parameters: tuple[Parameter, ...]
    assumed: tuple[str, ...]


@functools.cache
def analyse(ttir: str) -> TritonAccesses:
    """What the kernel in this TTIR reads and writes.

    Raises:
        CaptureError: the installed Triton cannot parse the text.
    """
    module = read_module(ttir)
    kernel = module.functions[module.kernel]
    arguments, effects = kernel.body[0].arguments, effects_of(module)
    parameters, assumed = list[Parameter](), [effect.text(kernel.names) for effect in effects]
    for position, (name, argument) in enumerate(zip(kernel.names, arguments, strict=True)):
        mine = [effect for effect in effects if effect.argument == position and not effect.loaded]
        if mine or is_address(argument):
            reads, writes = any(effect.reads for effect in mine), any(effect.writes for effect in mine)
            parameters.append(Parameter(name, position, reads, writes))
        if mine and "!tt.tensordesc" in argument.type:
            assumed.append(f"{name}: its bytes are those of a tensor descriptor, which holds the address")
        elif mine and not is_address(argument):
            assumed.append(f"{name}: an integer, taken for an address")
    if any(operation.name == "tt.make_tensor_descriptor" for operation in operations_of(module)):
        parameters.append(Parameter("global scratch", len(arguments), True, True))
        assumed.append("global scratch: the launcher's, read and written: tensor descriptors made here are kept there")
    return TritonAccesses(kernel.name, tuple(parameters), tuple(sorted(set(assumed) - {""})))


class _Noting:
    """Stands in for `CompiledKernel.launch_metadata`, which every launch calls first, whether hooks are set or not.

    It sits on Triton's class while anyone listens, and whoever listens, on any thread, shares it: so they may leave in
    any order, and the last one puts back what was there. A stand-in that others have since wrapped stays, and is idle.
    """

    _changing: Final = threading.Lock()

    def __init__(self, before: Any) -> None:
        self._before = before
        self._listeners: tuple[dict[int, Any], ...] = ()

    def __get__(self, kernel: Any, owner: type) -> Any:
        return self if kernel is None else MethodType(self, kernel)

    def __call__(self, kernel: Any, *arguments: Any) -> Any:
        for launched in self._listeners:
            launched[id(kernel)] = kernel
        return self._before(kernel, *arguments)

    @staticmethod
    def begin(kernels: Any, launched: dict[int, Any]) -> _Noting:
        """Note launches of the class `kernels` in `launched`, by the kernel's identity."""
        with _Noting._changing:
            noting = vars(kernels)["launch_metadata"]
            if not isinstance(noting, _Noting):
                noting = kernels.launch_metadata = _Noting(noting)
            noting._listeners += (launched,)
            return noting

    def end(self, kernels: Any, launched: dict[int, Any]) -> None:
        with _Noting._changing:
            self._listeners = tuple(other for other in self._listeners if other is not launched)
            if not self._listeners and vars(kernels)["launch_metadata"] is self:
                kernels.launch_metadata = self._before


class TritonLaunches:
    """Notes the Triton kernels launched in this process while it is entered, and tells them apart by CUfunction.

    Costs a fraction of a microsecond per launch. Kernels stay loaded as long as this object lives: else the CUfunction
    of one that was unloaded could come again as another's.

    Note "a kernel that comes late": Triton is not imported for this. If it was not there at entry and is at exit, the
    kernels alive by then are looked up instead, so that `of` knows them from then on.
    """

    def __init__(self) -> None:
        self._launched: dict[int, Any] = {}  # by identity: the CUfunction comes with a kernel's first launch
        self._kernels: dict[int, Any] = {}  # by CUfunction
        self._noting: _Noting | None = None

    def __enter__(self) -> Self:
        if (kernels := _compiled_kernels()) is not None:
            self._noting = _Noting.begin(kernels, self._launched)
        return self

    def __exit__(self, *exception: object) -> None:
        kernels = _compiled_kernels()
        if self._noting is not None:
            self._noting.end(kernels, self._launched)
        elif kernels is not None:  # see the note "a kernel that comes late"
            self._launched |= {id(kernel): kernel for kernel in gc.get_objects() if type(kernel) is kernels}

    def of(self, function: int) -> TritonAccesses | None:
        """The accesses of the kernel with this CUfunction; None if no such launch was noted, or its TTIR is not kept.

        Inductor's static launcher keeps none and goes past Triton.
        """
        for identity, kernel in list(self._launched.items()):
            if kernel.function is not None:
                self._kernels[kernel.function] = self._launched.pop(identity)
        kernel = self._kernels.get(function)
        ttir = kernel.asm.get("ttir") if kernel is not None else None
        try:
            return analyse(ttir) if ttir else None
        except CaptureError:  # one that cannot be parsed says as much as none
            return None


def _compiled_kernels() -> Any:
    """Triton's class of compiled kernels, if Triton was imported."""
    return getattr(sys.modules.get("triton.compiler.compiler"), "CompiledKernel", None)
