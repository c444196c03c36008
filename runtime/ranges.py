"""NVTX ranges in the domain `auxstream`: there if `AUXSTREAM_NVTX=1` and a tool listens, otherwise nothing at all.

Enters: messages (docs/profiling.md lists them). Leaves: a range around a `with` block (`span`), around each call of a
function (`around`), or from a push to a pop (regions, whose enter and leave are separate calls). Invariants: a block's
range closes what was left open inside, as by an op that fails inside a graph module's region. Where nobody listens,
`span` is a constant and `around` gives functions back as they came. Tools are there before the process starts, or not.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, ParamSpec, TypeVar

from .errors import AuxstreamWarning
from .settings import SETTINGS

P = ParamSpec("P")
R = TypeVar("R")

_SILENT: Final = nullcontext()


def heard() -> Any:
    """The domain, if a tool listens to it, else None. Raises ImportError where nvtx is not installed."""
    import nvtx

    domain: Any = nvtx.get_domain("auxstream")
    # Where no tool is attached, nvtx hands out a domain that makes no attributes.
    make = getattr(domain, "get_event_attributes", None)
    return None if make is None or make(message="auxstream") is None else domain


def _load() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    if not SETTINGS.nvtx:
        return None
    try:
        domain = heard()
    except ImportError:
        warnings.warn(
            "AUXSTREAM_NVTX=1 and nvtx is not installed, so there are no ranges: pip install nvtx",
            AuxstreamWarning,
            stacklevel=2,
        )
        return None
    if domain is None:
        return None

    @functools.cache  # nvtx keeps the strings for good too
    def attributes(message: str) -> Any:
        return domain.get_event_attributes(message=message)

    return (lambda message: domain.push_range(attributes(message))), domain.pop_range


class _Thread(threading.local):
    open = 0  # ranges of this thread


_CALLS: Final = _load()
_thread: Final = _Thread()
ENABLED: Final = _CALLS is not None


class _Range(AbstractContextManager[None]):
    __slots__ = ("_message", "_outer")

    def __init__(self, message: str) -> None:
        self._message = message

    def __enter__(self) -> None:
        self._outer = _thread.open
        push(self._message)

    def __exit__(self, *_: object) -> None:
        while _thread.open > self._outer:
            pop()


def push(message: str) -> None:
    """Open a range on this thread."""
    if _CALLS is not None:
        _CALLS[0](message)
        _thread.open += 1


def pop() -> None:
    """Close this thread's innermost range."""
    if _CALLS is not None and _thread.open:
        _thread.open -= 1
        _CALLS[1]()


def span(message: str) -> AbstractContextManager[None]:
    """A range around a `with` block."""
    return _Range(message) if ENABLED else _SILENT


def around(message: str | Callable[[Any], str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: a range around each call. A method's message may be made from its object."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if not ENABLED:
            return function

        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with _Range(message if isinstance(message, str) else message(args[0])):
                return function(*args, **kwargs)

        return within

    return decorate
