"""Graphs that are not ready: a context manager taken for its graph, a capture that has not ended, one that failed.

Enters: a generator that captures a block. Leaves: `Capture`, what `auxstream.graph(...)` returns, and errors that say
how far a graph is. Invariant: one capture, one `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from ..runtime.errors import CaptureError

if TYPE_CHECKING:
    from .graphs import CapturedGraph

P = ParamSpec("P")

_REMEDY: Final = "with auxstream.graph(...) as g: out = model(x); then g.replay()"


class Capture:
    """A capture to be made: `with` begins it and gives the graph, once."""

    def __init__(self, name: object, block: AbstractContextManager[CapturedGraph]) -> None:
        self._name = name
        self._block = block
        self._entered = False
        self._graph: CapturedGraph | None = None

    def __enter__(self) -> CapturedGraph:
        if self._entered:
            raise CaptureError(
                f"graph {self._name!r} is entered twice",
                expected="one `with` block for each auxstream.graph(...)",
                came="a second one",
                remedy="call auxstream.graph(...) again for another capture",
            )
        self._entered = True
        self._graph = self._block.__enter__()
        return self._graph

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._graph is not None
        self._graph.block_ended = True
        return self._block.__exit__(kind, error, traceback)

    if not TYPE_CHECKING:  # a type checker knows that there is nothing else here

        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith("_"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")
            state = "is not what auxstream.graph(...) returns" if self._entered else "was not entered"
            raise CaptureError(
                f"graph {self._name!r} {state}",
                expected=f".{attribute} of the graph that the `with` block gives",
                came=f".{attribute} of its context manager",
                remedy=_REMEDY,
            )


def entered_once(capture: Callable[P, Generator[CapturedGraph]]) -> Callable[P, Capture]:
    """`contextlib.contextmanager`, for `graph`."""
    block = contextmanager(capture)

    @wraps(capture)
    def begin(*args: P.args, **kwargs: P.kwargs) -> Capture:
        return Capture(kwargs.get("name", args[0] if args else "graph"), block(*args, **kwargs))

    return begin


def unfinished(name: str, block_ended: bool, use: str) -> CaptureError:
    """Somebody would `use` a graph that is not ready: still running if its block has not ended, else failed."""
    return CaptureError(
        f"graph {name!r}: its capture has {'failed' if block_ended else 'not ended'}",
        expected="a capture that ended without error",
        came=f"an attempt to {use} {'without one' if block_ended else 'inside the block'}",
        remedy=f"capture it again, then {use}" if block_ended else f"{use} after the `with auxstream.graph(...)` block",
    )
