"""Fusion: FX -> MLIR -> fused row kernels in Triton -> FX.

The names load on first use. Run from the repository's top level, Python finds this folder as a package `kernels` too,
and Hugging Face transformers looks for one of that name (its kernel hub): importing it must work, and do nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fuse import FusionError, FusionReport, fuse_elementwise

__all__ = ["FusionError", "FusionReport", "fuse_elementwise"]


def __getattr__(name: str) -> Any:
    if name not in __all__ or __name__ == "kernels":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".fuse", __name__), name)
