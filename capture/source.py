"""Where the user's code is: the line that reports and errors name.

Enters: the call stack. Leaves: text. Frames of torch and of auxstream itself are passed over.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Final

import torch

from ..runtime.errors import HostReadError

_ROOTS: Final = tuple(
    f"{folder}{os.sep}"
    for folder in (Path(torch.__file__).parent, *(Path(__file__).parent.parent / p for p in ("runtime", "capture")))
)


def source_line() -> str:
    """`file:line: text` of the innermost frame that belongs neither to torch nor to auxstream."""
    frame = sys._getframe(1)
    while frame is not None and _is_internal(frame.f_code.co_filename):
        frame = frame.f_back
    return "?" if frame is None else _shown(frame.f_code.co_filename, frame.f_lineno)


def line_of(frame: FrameType, number: int) -> str | None:
    """The same of one frame; None for torch's and auxstream's own."""
    return None if _is_internal(frame.f_code.co_filename) else _shown(frame.f_code.co_filename, number)


@functools.cache
def _is_internal(filename: str) -> bool:
    return filename.startswith(_ROOTS)


@functools.lru_cache(maxsize=1 << 16)
def _shown(name: str, number: int) -> str:
    text = linecache.getline(name, number).strip()
    if name.startswith("<eval_with_key>"):  # a line of an FX graph: the node's name says it
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
