"""auxstream: branches of a model on auxiliary CUDA streams, safe in eager and inside CUDA graphs.

The names below load on first use, so `import auxstream` pulls in neither triton nor MLIR nor transformers. Errors to
catch by name are in `auxstream.errors`; all of them are `AuxstreamError`s.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from .capture import CapturedGraph, CompiledModel, Options, Report, compile, graph
    from .runtime import AuxstreamError, AuxstreamWarning, Region, aux_region, fork, parallel

_HOMES = {
    "AuxstreamError": "runtime",
    "AuxstreamWarning": "runtime",
    "CapturedGraph": "capture",
    "CompiledModel": "capture",
    "Options": "capture",
    "Region": "runtime",
    "Report": "capture",
    "aux_region": "runtime",
    "compile": "capture",
    "fork": "runtime",
    "graph": "capture",
    "parallel": "runtime",
}

__all__ = [
    "AuxstreamError",
    "AuxstreamWarning",
    "CapturedGraph",
    "CompiledModel",
    "Options",
    "Region",
    "Report",
    "aux_region",
    "capture",
    "compile",
    "errors",
    "fork",
    "graph",
    "parallel",
]


def __getattr__(name: str) -> Any:
    if name in ("runtime", "capture", "kernels", "errors"):
        return importlib.import_module(f"auxstream.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'auxstream' has no attribute {name!r}")
    return getattr(importlib.import_module(f"auxstream.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
