"""The MLIR Python bindings: the one place that imports them.

Enters: MLIR as text. Leaves: verified modules. The bindings are upstream's, shipped by `iree-base-compiler`; only
upstream dialects and passes are used. Invariant: every pass of `PIPELINE` leaves a module that verifies.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from ..runtime.errors import AuxstreamError, MissingDependencyError

PIPELINE: Final = (
    "canonicalize",
    "cse",
    "linalg-fuse-elementwise-ops",
    "resolve-ranked-shaped-type-result-dims",
    "cse",
)
"""What a fused group goes through, in order, each pass on every function. Nothing is canonicalised once producers have
fused into reductions: a sum of negated elements would become a chain of subtractions, no sum to whoever reads it."""


class LoweringError(AuxstreamError):
    """A graph or a group that MLIR refuses: a bug of ours, or metadata that contradicts itself."""


@functools.cache
def bindings() -> Any:
    """The bindings' `ir` and `passmanager`, with the dialects loaded.

    Raises MissingDependencyError where they are not installed.
    """
    try:
        from iree.compiler import ir, passmanager
        from iree.compiler.dialects import arith, func, linalg, math, tensor
    except ImportError as error:
        raise MissingDependencyError(
            "fusion needs the MLIR Python bindings",
            came=str(error),
            remedy="pip install 'iree-base-compiler>=3.13', or turn fusion off: AUXSTREAM_FUSION=off",
        ) from error
    del arith, func, linalg, math, tensor  # importing a dialect registers its Python classes
    return ir, passmanager


def available() -> bool:
    """Whether the bindings can be imported here."""
    try:
        bindings()
    except MissingDependencyError:
        return False
    return True


@functools.cache
def context() -> Any:
    """One context for the process: making one costs more than a group's whole way through MLIR."""
    ir, _ = bindings()
    return ir.Context()


def parse(text: str) -> Any:
    """A verified module. Raises LoweringError with MLIR's own words."""
    ir, _ = bindings()
    try:
        return ir.Module.parse(text, context())
    except ir.MLIRError as error:
        raise LoweringError("MLIR refused a module", came=f"{error}\n{text}") from error


def run_passes(module: Any, passes: tuple[str, ...] = PIPELINE) -> Any:
    """Run upstream passes one by one, verifying after each; returns the module, changed in place."""
    ir, _ = bindings()
    for name in passes:
        try:
            _manager(name).run(module.operation)
            module.operation.verify()
        except ir.MLIRError as error:
            raise LoweringError(f"pass {name} left a module that does not verify", came=str(error)) from error
    return module


@functools.cache
def _manager(name: str) -> Any:
    _, passmanager = bindings()
    return passmanager.PassManager.parse(f"builtin.module(func.func({name}))", context())
