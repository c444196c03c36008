"""The order of replays: what makes a CUDA graph safe to replay on any stream, from any thread.

Enters: `with order:` around a launch and what belongs to it, on whatever stream is current. Leaves: that stream waits,
on the GPU, for all the launch could collide with. On the stream of the launch before there is nothing to wait for, and
one event record is all it costs. Invariant: wait, launch and record are one step, whatever other threads do.

Note "what replays share". Graphs of one pool share its memory, and streams that read outputs or write inputs touch
it too: a launch is behind everything such a stream was given before. Graphs of other pools still share the workspace
that cuBLAS keeps per thread and stream of the capture, and (before torch 2.13) the seed and offset that torch writes
before a replay draws random numbers: so a launch is behind the last launch of any graph of its device.

Note "streams that may be gone". torch's own streams live as long as the process, so what they were given can be waited
for later. Any other stream may be destroyed, and its handle given to a new one: of such a stream only the event counts
that was recorded behind the launch itself, while the stream was current.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable
from typing import Any, Final
from weakref import WeakValueDictionary

import torch

from ..runtime import driver
from ..runtime.cuda import get_stream
from ..runtime.errors import CaptureError

Ids = tuple[int, int, int]
"""torch's name for a stream: id, device, device type."""

_is_capturing: Final = torch._C._cuda_isCurrentStreamCapturing
_making: Final = threading.Lock()


class _Device:
    """What all graphs of a device share."""

    __slots__ = ("depth", "index", "last", "launched", "lock", "passing", "pools", "stream")

    def __init__(self, index: int) -> None:
        self.index = index
        self.lock = threading.RLock()
        self.depth = 0  # of `with order:` on the thread that holds the lock
        self.last: Ids | None = None  # the stream of the last launch, if it is one of torch's own
        self.stream: Any = None  # the same, or any other, as an object
        self.launched = torch.cuda.Event()  # behind the last launch
        self.passing = torch.cuda.Event()  # recorded and waited for at once, so it can be used again at once
        self.pools: WeakValueDictionary[Hashable, ReplayOrder] = WeakValueDictionary()


class ReplayOrder:
    """The order of one pool's replays. Launch inside `with order:`; it may be entered again inside itself."""

    __slots__ = ("__weakref__", "_device", "_only_user", "_users")

    def __init__(self, device: _Device) -> None:
        self._device = device
        self._users: dict[Ids, Any] = {}  # torch's own streams that may touch the pool, and their objects
        self._only_user: Ids | None = None

    def __enter__(self) -> ReplayOrder:
        device = self._device
        device.lock.acquire()
        try:
            ids = get_stream(device.index)
            _refuse_capture()
            if ids != device.last or ids != self._only_user:
                self._follow(ids)
        except BaseException:
            device.lock.release()
            raise
        device.depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        device = self._device
        device.depth -= 1
        try:
            if not device.depth:
                device.launched.record(device.stream)
        finally:
            device.lock.release()

    @property
    def stream(self) -> int:
        """The handle of the stream that the launch under way goes to."""
        return self._device.stream.cuda_stream

    def wait(self) -> None:
        """The current stream waits for the last replay; the next one will wait for what it is given until then."""
        device = self._device
        with device.lock:
            ids = get_stream(device.index)
            _refuse_capture()
            if ids in self._users:
                return
            stream = torch.cuda.current_stream(device.index)
            device.launched.wait(stream)
            if _lasts(ids):
                self._users[ids] = stream
                self._only_user = None

    def _follow(self, ids: Ids) -> None:
        """The launch goes to another stream than the last one, or others have used the pool since."""
        device = self._device
        stream = torch.cuda.current_stream(device.index)
        if ids != device.last:
            device.launched.wait(stream)
        for other, user in self._users.items():
            if other != ids:
                _refuse_captured(user)
                device.passing.record(user)
                device.passing.wait(stream)
        lasts = _lasts(ids)
        self._users = {ids: stream} if lasts else {}
        self._only_user = device.last = ids if lasts else None
        device.stream = stream


def replay_order(device: int, pool: Hashable) -> ReplayOrder:
    """The order that graphs of this memory pool share."""
    shared = _device(device)
    with shared.lock:
        order = shared.pools.get(pool)
        if order is None:
            order = shared.pools[pool] = ReplayOrder(shared)
        return order


def _device(index: int) -> _Device:
    with _making:  # the cache alone could make two
        return _make_device(index)


@functools.cache
def _make_device(index: int) -> _Device:
    return _Device(index)


def _lasts(ids: Ids) -> bool:
    """Whether a stream is torch's own: the default one, or one with an odd id. Elsewhere an id is a pointer."""
    return ids[0] == 0 or ids[0] & 1 == 1


def _refuse_capture() -> None:
    if _is_capturing():
        raise CaptureError(
            "a graph is replayed, or waited for, inside a capture",
            expected="replays between captures: what a capture records must not depend on work outside of it",
            came="one while the current stream is capturing",
            remedy="run the work itself in the outer block, or replay one graph after the other",
        )


def _refuse_captured(user: Any) -> None:
    """A record on a capturing stream would become part of its capture, and draw the launch in too."""
    if not user.cuda_stream:
        return
    handle = driver.cuda.CUstream(user.cuda_stream)
    status = driver.call(driver.cuda.cuStreamIsCapturing(handle), "asking whether a stream is capturing")
    if status != driver.cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
        raise CaptureError(
            "a graph is replayed while another stream that may use its memory is capturing",
            expected="streams that replayed the graph, or waited for it, and are not capturing now",
            came=f"a capture on the stream with handle {user.cuda_stream:#x}",
            remedy="capture on a stream of its own, or replay when the capture has ended",
        )
