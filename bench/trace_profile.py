"""What a profiler saw of graph launches: each one's kernels, copies and fills, as plain data.

Enters: the events of a Chrome trace, as torch.profiler writes it. Leaves: `Launch`es in the order the host made them.
Invariant: a launch holds all that came of it and nothing else: kernels of a replay carry the correlation number of the
call that launched the graph, and only such calls count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile

from .costliest import readable
from .launches import ON_DEVICE
from .trace_match import Kernel

_NAMES: Final = {"gpu_memcpy": "memcpy", "gpu_memset": "memset"}
_LAUNCH: Final = "graphlaunch"
_NODE: Final = "graph node id"


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a graph; its kernels in the order they began."""

    correlation: int
    kernels: tuple[Kernel, ...]


class Session:
    """A profiler that runs from `start` to `stop`; both wait for the device."""

    def __init__(self) -> None:
        self._profiler = profile(activities=[ProfilerActivity.CUDA])

    def start(self) -> None:
        """What is launched from now on is seen."""
        torch.cuda.synchronize()
        self._profiler.start()

    def stop(self) -> list[Launch]:
        """The graphs launched since `start`."""
        torch.cuda.synchronize()
        self._profiler.stop()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            return launches_in(json.loads(path.read_text(errors="replace"), strict=False)["traceEvents"])


def profiled_already() -> bool:
    """Whether a profiler runs on this thread: two at once there cannot be."""
    internals: Any = torch._C
    return internals._autograd._profiler_enabled()


def launches_of_replays(replay: Callable[[], object], times: int) -> list[Launch]:
    """Of so many replays; one more goes before them, unseen, and one that is seen and left out."""
    replay()
    session = Session()
    session.start()
    for _ in range(times + 1):
        replay()
    return session.stop()[1:]


def launches_in(events: Iterable[Mapping[str, Any]]) -> list[Launch]:
    """The graph launches of a trace."""
    calls: set[int] = set()
    kernels: dict[int, list[Kernel]] = {}
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if correlation is None:
            continue
        if event.get("cat") in ON_DEVICE:
            kernels.setdefault(correlation, []).append(_kernel(event))
        elif event.get("cat") in ("cuda_runtime", "cuda_driver") and _LAUNCH in event["name"].lower():
            calls.add(correlation)
    return [  # a runtime's call and the driver's inside it may both be there: the kernels name one of them
        Launch(call, tuple(sorted(kernels[call], key=lambda kernel: (kernel.start, kernel.end))))
        for call in sorted(calls & kernels.keys())
    ]


def _kernel(event: Mapping[str, Any]) -> Kernel:
    args = event["args"]
    start = float(event["ts"])
    name = _NAMES.get(event["cat"]) or readable(event["name"])
    node = args.get(_NODE)
    return Kernel(name, start, start + float(event["dur"]), int(args["stream"]), None if node is None else int(node))
