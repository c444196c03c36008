"""NVTX ranges in the domain `auxstream`: present when `AUXSTREAM_NVTX=1`, otherwise a constant that does nothing.

Enters: a message. Leaves: a range around a `with` block (captures, replays), or a push and a pop (regions, whose
enter and leave are separate calls).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from .settings import SETTINGS

_SILENT: Final = nullcontext()


def _load() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    if not SETTINGS.nvtx:
        return None
    import nvtx

    domain = nvtx.get_domain("auxstream")
    if not hasattr(domain, "get_event_attributes"):  # nvtx was disabled by its own NVTX_DISABLE
        return None
    return (lambda message: domain.push_range(domain.get_event_attributes(message=message))), domain.pop_range


_CALLS: Final = _load()
ENABLED: Final = _CALLS is not None


class _Range(AbstractContextManager[None]):
    __slots__ = ("_message",)

    def __init__(self, message: str) -> None:
        self._message = message

    def __enter__(self) -> None:
        push(self._message)

    def __exit__(self, *_: object) -> None:
        pop()


def push(message: str) -> None:
    """Open a range on this thread."""
    if _CALLS is not None:
        _CALLS[0](message)


def pop() -> None:
    """Close this thread's innermost range."""
    if _CALLS is not None:
        _CALLS[1]()


def span(message: str) -> AbstractContextManager[None]:
    """A range around a `with` block."""
    return _Range(message) if ENABLED else _SILENT
