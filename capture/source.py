"""Where the user's code is: the line that reports and errors name, and that warnings are at.

Enters: the call stack. Leaves: text, or a warning. Frames of torch and of auxstream itself are passed over.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Final

import torch

from ..runtime.errors import AuxstreamWarning, HostReadError

_OWN: Final = tuple(Path(__file__).parent.parent / folder for folder in ("runtime", "kernels", "capture"))
_ROOTS: Final = (*(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, *_OWN)), contextlib.__file__)
_GRAPH: Final = "<eval_with_key>"
"""How the names of files begin that FX makes up for graphs."""


def source_line() -> str:
    """`file:line: text` of the innermost frame that belongs neither to torch nor to auxstream."""
    frame = _outside(sys._getframe(1))
    return "?" if frame is None else _shown(frame.f_code.co_filename, frame.f_lineno)


def warn_user(text: str) -> None:
    """Warn at the innermost line of the user's: the one that ran, or the call that had a graph run."""
    frame = _outside(sys._getframe(1))
    while frame is not None and frame.f_code.co_filename.startswith(_GRAPH):
        frame = _outside(frame.f_back)
    if frame is None:
        warnings.warn(text, AuxstreamWarning, stacklevel=2)
        return
    seen = frame.f_globals.setdefault("__warningregistry__", {})
    place = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    warnings.warn_explicit(text, AuxstreamWarning, *place, registry=seen)


def _outside(frame: FrameType | None) -> FrameType | None:
    """The frame, or the next one out, that belongs neither to torch nor to auxstream."""
    while frame is not None and _is_internal(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def line_of(frame: FrameType, number: int) -> str | None:
    """The same of one frame; None for torch's and auxstream's own."""
    return None if _is_internal(frame.f_code.co_filename) else _shown(frame.f_code.co_filename, number)


@functools.cache
def _is_internal(filename: str) -> bool:
    return filename.startswith(_ROOTS)


@functools.lru_cache(maxsize=1 << 16)
def _shown(name: str, number: int) -> str:
    text = linecache.getline(name, number).strip()
    if name.startswith(_GRAPH):  # a line of an FX graph: the node's name says it
        return f"graph: {text.partition(' = ')[0]}"[:160]
    return f"{Path(name).name}:{number}: {text}"[:160]


def host_read(what: str) -> HostReadError:
    """The error for an op that needs values on the host."""
    return HostReadError(
        f"{what} reads a tensor's values on the host while they are only being recorded, at {source_line()}",
        expected="work whose shape and flow do not depend on tensor values",
        came="a host read (item, tolist, numpy, nonzero, a Python `if` on a tensor)",
        remedy="compute it before the capture, or keep it on the device (torch.where, masks, fixed shapes)",
    )
