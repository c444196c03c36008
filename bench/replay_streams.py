"""On which streams a graph's replay ran, as the profiler saw it.

Enters: a callable that enqueues a replay. Leaves: the ids of the device's streams that its kernels, copies and fills
ran on. CUDA lays a graph out on streams of its own when it instantiates it, by rules it does not publish: a join goes
on with its first-recorded parent, and a capture that records the auxiliary branch first has been seen to take one more
stream per region. So the count is measured, and nothing is read off the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..runtime.errors import AuxstreamError
from .launches import ON_DEVICE, profiled


def streams_used(run: Callable[[], object]) -> frozenset[int]:
    """Profile `run` and say which streams its work ran on.

    Raises:
        AuxstreamError: the profiler saw no work on the device, so there is nothing to count.
    """
    streams = streams_in(profiled(run))
    if not streams:
        raise AuxstreamError(
            "the profiler saw no work on the device",
            expected="kernels, each with its stream",
            remedy="see that torch.profiler can use CUPTI here (another profiler attached, or no permission?)",
        )
    return streams


def streams_in(events: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """The streams of the device's work among the events of a Chrome trace that torch.profiler exported."""
    return frozenset(
        int(event["args"]["stream"])
        for event in events
        if str(event.get("cat", "")).lower() in ON_DEVICE and "stream" in event.get("args", {})
    )
