"""Launching fused kernels, and the `torch.library` ops that do.

Enters: a `KernelSpec` and the group's ATen ops as a reference. Leaves: an op `auxstream_fused::<name>(Tensor[] inputs,
SymInt[] sizes) -> Tensor[]`. It reads its inputs and returns new tensors, as its schema says, and touches nothing else.
Invariant: what a launch needs (source, variant, numbers) is settled once per layout of the inputs, before any capture.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ..runtime.errors import CaptureError
from . import mlir, store
from .ahead import make_ready
from .geometry import Access, Layout
from .on_device import on_its_device
from .reference import evaluate
from .spec import KernelSpec, Operand
from .triton_source import Form, columns, has_reductions, triton_source
from .tune import choose
from .variants import Variant, variants

if TYPE_CHECKING:
    from .emit import Fusion

NAMESPACE = "auxstream_fused"


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")


def interpreting() -> bool:
    """Whether Triton runs in its interpreter here (TRITON_INTERPRET=1 when triton was imported), on CPU tensors."""
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)


@functools.cache
def kernel_of(spec: KernelSpec) -> FusedKernel:
    """The kernel of this spec, with whatever launches it has settled."""
    return FusedKernel(spec)


def compile_ahead(fusions: Iterable[Fusion]) -> None:
    """Compile, side by side, all that the kernels of a graph on a GPU will choose from; shapes must be static.

    What is compiled here need not be compiled at the first launch, one kernel after the other.
    """
    todo: dict[Any, tuple[_Launch, list[torch.dtype]]] = {}
    alike: set[Any] = set()
    device = torch.device("cuda")
    for fusion in fusions:
        inputs = [node.meta["val"] for node in fusion.inputs]
        key = (fusion.spec, *((tensor.shape, tensor.stride()) for tensor in inputs))
        if fusion.sizes or not inputs[0].is_cuda or key in alike:
            continue
        alike.add(key)
        kernel, device = kernel_of(fusion.spec), inputs[0].device
        outputs = kernel.fake(inputs, ())
        dtypes = [tensor.dtype for tensor in (*inputs, *outputs)]
        for variant, launch in kernel.candidates(inputs, outputs, ()).items():
            todo[fusion.spec, variant, launch.numbers] = (launch, dtypes)
    if todo:
        make_ready((functools.partial(launch.compile, dtypes) for launch, dtypes in todo.values()), device)


@functools.cache
def device_name(device: torch.device) -> str:
    """The device as choices are remembered by."""
    return torch.cuda.get_device_name(device).replace(" ", "_")


_REGISTERING: Final = threading.Lock()


def operator(spec: KernelSpec) -> Any:
    """The op of this spec, registered once per process, whichever thread asks first."""
    with _REGISTERING:
        return _registered(spec)


@functools.cache
def _registered(spec: KernelSpec) -> Any:
    library, kernel = _library(), kernel_of(spec)
    library.define(f"{spec.name}(Tensor[] inputs, SymInt[] sizes) -> Tensor[]")
    library.impl(spec.name, on_its_device(kernel), "CUDA")
    library.impl(spec.name, kernel.on_cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{spec.name}", kernel.fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), spec.name).default


@dataclass(frozen=True, slots=True)
class _Launch:
    """One launch, ready but for its pointers."""

    kernel: Any
    grid: tuple[int]
    numbers: tuple[int, ...]
    options: dict[str, Any]
    copied: tuple[int, ...]
    """Inputs whose rows no kernel takes apart: laid out first."""

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        self.kernel[self.grid](*tensors, *self.numbers, **self.options)

    def compile(self, dtypes: Sequence[torch.dtype]) -> Any:
        """Compile without launching, for operands of these dtypes at aligned addresses; Triton's compiled kernel."""
        return self.kernel.warmup(*dtypes, *self.numbers, grid=self.grid, **self.options)


class FusedKernel:
    """A kernel spec with its launches by input layout."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self._launches: dict[Any, _Launch] = {}

    @functools.cached_property
    def function(self) -> Any:
        """The group's MLIR function."""
        self._module = mlir.parse(self.spec.mlir)  # the function lives as long as its module
        return next(iter(self._module.body.operations)).operation

    def fake(self, inputs: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        return [result.allocate(inputs[0], sizes) for result in self.spec.outputs]

    def on_cpu(self, inputs: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        return self(inputs, sizes) if interpreting() else self.reference(inputs, sizes)

    def reference(self, inputs: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """What the kernel computes, by torch: what runs on a CPU."""
        rows = self.spec.row_count(sizes)
        given = [operand.in_rows(tensor, sizes) for operand, tensor in zip(self.spec.inputs, inputs, strict=True)]
        outputs = self.fake(inputs, sizes)
        for tensor, value in zip(outputs, evaluate(self.function, rows, given) if rows else (), strict=False):
            tensor.copy_(value.reshape(tensor.shape))
        return outputs

    def __call__(self, inputs: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        outputs = [result.allocate(inputs[0], sizes) for result in self.spec.outputs]
        if not self.spec.row_count(sizes):
            return outputs
        key = (*((tensor.shape, tensor.stride()) for tensor in inputs), *sizes)
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._settle(inputs, outputs, sizes)
        if launch.copied:
            inputs = self.laid_out(inputs, launch.copied, sizes)
        launch([*inputs, *outputs])
        return outputs

    def laid_out(self, inputs: Sequence[Tensor], copied: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
        """The inputs, those in `copied` as the kernel can walk them."""
        return [
            operand.laid_out(tensor, sizes) if number in copied else tensor
            for number, (operand, tensor) in enumerate(zip(self.spec.inputs, inputs, strict=True))
        ]

    def _settle(self, inputs: list[Tensor], outputs: list[Tensor], sizes: Sequence[int]) -> _Launch:
        if inputs[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                f"fused kernel {self.spec.name} meets a new input layout inside a capture",
                expected="a layout it was launched with before: compiling inside a capture is not safe",
                came=", ".join(f"{tuple(t.shape)} strides {t.stride()}" for t in inputs),
                remedy="run the graph once with these shapes before capturing it (auxstream.compile does)",
            )
        launches = self.candidates(inputs, outputs, sizes)
        first = next(iter(launches.values()))
        if not inputs[0].is_cuda or len(launches) == 1:
            return first
        if first.copied:
            inputs = self.laid_out(inputs, first.copied, sizes)
        key = self.choice_key(first.numbers, device_name(inputs[0].device))
        return choose(key, launches, [*inputs, *outputs])

    def choice_key(self, numbers: Sequence[int], device: str) -> str:
        """A file name for the choice among launches with these numbers, of which forty operands have hundreds."""
        return f"{self.spec.name}-{hashlib.sha256(repr(tuple(numbers)).encode()).hexdigest()[:12]}-{device}"

    def candidates(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: Sequence[int]
    ) -> dict[Variant, _Launch]:
        """The launches to choose from for operands that lie like these (their values are not touched)."""
        layouts = self.spec.layouts(inputs, outputs, sizes)
        copied = tuple(i for i, found in enumerate(layouts) if found is None)
        if copied:
            inputs = self.laid_out(inputs, copied, sizes)
            layouts = self.spec.layouts(inputs, outputs, sizes)
        known = [found for found in layouts if found is not None]
        assert len(known) == len(layouts), f"{self.spec.name}: a contiguous operand in too many levels"
        rows, width = self.spec.row_count(sizes), columns(self.function)
        flat = self._is_flat(known, rows, width)
        found = variants(width, rows, reduces=has_reductions(self.function), flat=flat)
        return {variant: self._launch(variant, known, rows, width, copied) for variant in found}

    def _is_flat(self, layouts: Sequence[Layout], rows: int, width: int) -> bool:
        """Whether every operand is dense over all rows and columns, or an input of one element."""
        text = self.spec.mlir
        if any(word in text for word in ("reduction", "extract", "concat", "linalg.index")):
            return False
        operands = [*self.spec.inputs, *self.spec.outputs]
        for number, (operand, found) in enumerate(zip(operands, layouts, strict=True)):
            shape = operand.used if isinstance(operand, Operand) else operand.shape
            if not shape and number < len(self.spec.inputs):
                continue
            dense = found.access.unit and (found.numbers == (width,) or (rows == 1 and not found.access.levels))
            if operand.role != "columns" or not shape or shape[-1] != width or not dense:
                return False
        return True

    def _launch(
        self, variant: Variant, layouts: Sequence[Layout], rows: int, width: int, copied: tuple[int, ...]
    ) -> _Launch:
        count = len(self.spec.inputs)
        accesses = tuple(found.access for found in layouts)
        kernel = self._kernel(variant.form, accesses[:count], accesses[count:])
        options: dict[str, Any] = {"BLOCK": variant.block, "num_warps": variant.warps, **self._semantics}
        if variant.form == "flat":
            programs, numbers = -(-rows * width // variant.block), (rows * width,)
        else:
            options["ROWS"] = variant.rows
            programs = -(-rows // variant.rows)
            programs *= -(-width // variant.block) if variant.form == "blocks" else 1
            numbers = (rows, *(number for found in layouts for number in found.numbers))
        return _Launch(kernel, (programs,), numbers, options, copied)

    @property
    def _semantics(self) -> dict[str, Any]:
        """Options that decide what a kernel computes: eager's arithmetic, and its check of indices."""
        arithmetic = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
        checks = {"debug": True, "sanitize_overflow": False}
        return arithmetic | checks if "tensor.extract " in self.spec.mlir else arithmetic

    def _kernel(self, form: Form, inputs: tuple[Access, ...], outputs: tuple[Access, ...]) -> Any:
        name = f"{self.spec.name}_{form}_{'_'.join(map(str, inputs))}__{'_'.join(map(str, outputs))}"
        return getattr(store.load(name, self.source(form, inputs, outputs)), self.spec.title)

    def source(self, form: Form, inputs: tuple[Access, ...], outputs: tuple[Access, ...]) -> str:
        """The generated file."""
        kernel = triton_source(self.function, inputs, outputs, form, self.spec.title)
        header = f'"""Generated by auxstream from this MLIR; do not edit.\n\n{self.spec}\n\n{self.spec.mlir}"""\n\n'
        imports = "import triton\nimport triton.language as tl\n\nfrom auxstream.kernels import device_math as dm\n\n\n"
        return header + imports + kernel
