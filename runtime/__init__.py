"""Regions on auxiliary streams: the part of auxstream that eager code runs through. The names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import AuxstreamError, AuxstreamWarning
    from .regions import Region, aux_region, fork, parallel

__all__ = ["AuxstreamError", "AuxstreamWarning", "Region", "aux_region", "fork", "parallel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = ".errors" if name.startswith("Auxstream") else ".regions"
    return getattr(importlib.import_module(home, __name__), name)
