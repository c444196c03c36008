"""An `nvtx` that a tool listens to: a module of that name whose domains log what is pushed and popped, per thread."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any


class Domain:
    """As nvtx's own. `log`: messages, and None for a pop; `open`: what is not closed yet, by thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[str | None] = []
        self.open: dict[int, list[str]] = {}

    def get_event_attributes(self, *, message: str) -> Any:
        return (message,)

    def push_range(self, attributes: Any) -> None:
        self.log.append(attributes[0])
        self.open.setdefault(threading.get_ident(), []).append(attributes[0])

    def pop_range(self) -> None:
        self.log.append(None)
        self.open[threading.get_ident()].pop()  # IndexError: closed what was never opened

    def tree(self) -> list[Any]:
        """Nested lists: a message and what was within it, of one thread. Empties the log."""
        assert not any(self.open.values()), f"left open: {self.open}"
        stack: list[list[Any]] = [[]]
        for message in self.log:
            if message is None:
                stack.pop()
            else:
                stack[-1].append(made := [message])
                stack.append(made)
        self.log.clear()
        return stack[0]


def install() -> Domain:
    """Take the place of nvtx in this process, before auxstream is imported. Returns the domain it will get."""
    assert "auxstream.runtime.ranges" not in sys.modules
    domain = Domain("auxstream")
    module: Any = ModuleType("nvtx")
    module.get_domain = {domain.name: domain}.__getitem__
    sys.modules["nvtx"] = module
    return domain
