"""A CUDA that only keeps order: streams, events, contexts and two devices, with no GPU.

`FakeCuda` stands in for the parts of torch and of the driver that runtime/ calls. It logs every call that took effect,
and keeps a vector clock per stream and event, so that tests can ask the one question that matters: is this work behind
that work? It knows the traps of the real thing: the null stream is that of the thread's context, a thread has no
context before its first use of CUDA, and to set a stream sets the device too.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real
from torch import Tensor

from auxstream import runtime
from auxstream.runtime import driver
from auxstream.runtime.machine import thread_state

Ids = tuple[int, int, int]
OK = real.CUresult.CUDA_SUCCESS
NO_CONTEXT = real.CUresult.CUDA_ERROR_INVALID_CONTEXT
CUDA_DEVICE_TYPE = 1


class Stream(torch.Stream):
    """A torch.cuda.Stream: ids, and a native handle. A default stream has the handle 0."""

    def __new__(cls, stream_id: int, device_index: int, device_type: int) -> Stream:
        return super().__new__(cls, stream_id=stream_id, device_index=device_index, device_type=device_type)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id


class CudaTensor(Tensor):
    """A tensor that says it is on a GPU, has a version, and logs `record_stream`."""

    fake: FakeCuda

    @staticmethod
    def __new__(cls, fake: FakeCuda, device: int = 0) -> CudaTensor:
        tensor = Tensor._make_wrapper_subclass(cls, (2,), dtype=torch.float32, device=f"cuda:{device}")
        tensor.fake = fake
        return tensor

    def record_stream(self, stream: Stream) -> None:
        self.fake.log.append(f"record_stream {stream.cuda_stream:#x}")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]


class _Thread(threading.local):
    """What CUDA and torch keep per thread."""

    def __init__(self) -> None:
        self.device = 0
        self.context: int | None = None
        self.current: dict[int, int] = {}  # device -> stream id


class FakeCuda:
    """The calls of runtime/ in place of torch's and the driver's. `failing` calls answer with an error code."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failing: dict[str, Any] = {}
        self.thread = _Thread()
        self.devices: dict[int, int] = {}  # stream or event handle -> device
        self.clocks: dict[Any, Counter[Any]] = {}
        self._next = 0x100

    # --- for tests ----------------------------------------------------------------------------------------------------

    def tensor(self, device: int = 0) -> CudaTensor:
        return CudaTensor(self, device)

    def current(self) -> tuple[int, int]:
        """This thread's device, and the stream that is current on it."""
        return self.thread.device, self.get_stream(-1)[0]

    def work(self, device: int | None = None) -> tuple[Any, int]:
        """Enqueue work on the current stream, of the current device or of another; names it."""
        stream = self._key(self.get_stream(-1 if device is None else device))
        self.clocks.setdefault(stream, Counter())[stream] += 1
        return stream, self.clocks[stream][stream]

    def waits_for(self, work: tuple[Any, int], device: int | None = None) -> bool:
        """Whether what is enqueued next, on the current stream of this device or of another, is behind `work`."""
        stream = self._key(self.get_stream(-1 if device is None else device))
        return self.clocks.get(stream, Counter())[work[0]] >= work[1]

    @contextmanager
    def stream(self, handle: int, device: int = 0) -> Iterator[None]:
        """torch.cuda.stream, for a stream of the test's own."""
        self.devices[handle] = device
        before = self.thread.device, self.get_stream(device)
        self.set_stream(handle, device, CUDA_DEVICE_TYPE)
        yield
        self.set_stream(*before[1])
        self.thread.device = before[0]

    # --- torch --------------------------------------------------------------------------------------------------------

    def get_stream(self, device: int) -> Ids:
        device = self.thread.device if device == -1 else device
        return self.thread.current.get(device, 0), device, CUDA_DEVICE_TYPE

    def get_raw_stream(self, device: int) -> int:
        return self.get_stream(device)[0]

    def set_stream(self, stream_id: int, device_index: int, device_type: int) -> None:
        self.thread.device = device_index
        self.thread.current[device_index] = stream_id
        self.log.append(f"set_stream {stream_id:#x} of cuda:{device_index}")

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.thread.device = self.thread.device, index
        yield
        self.thread.device = before

    # --- the driver ---------------------------------------------------------------------------------------------------

    def _key(self, ids: Ids) -> Any:
        return ids[0] or ("default", ids[1])

    def _stream(self, stream: Any) -> Any:
        """The stream that a handle means: 0 is the default stream of the device."""
        return int(stream) or ("default", self.thread.device)

    def _refused(self, name: str, *streams: Any) -> Any:
        if name in self.failing:
            return self.failing[name]
        return NO_CONTEXT if self.thread.context is None and 0 in map(int, streams) else None

    def event_record(self, event: Any, stream: Any) -> tuple[Any]:
        if refused := self._refused("record", stream):
            return (refused,)
        key = self._stream(stream)
        assert self.devices[int(event)] == self.devices.get(key, self.thread.device), "an event of another device"
        self.clocks[int(event)] = Counter(self.clocks.get(key, Counter()))
        self.log.append(f"record {int(event):#x} on {key}")
        return (OK,)

    def wait_event(self, stream: Any, event: Any, flags: int) -> tuple[Any]:
        if refused := self._refused("wait", stream):
            return (refused,)
        key = self._stream(stream)
        self.clocks.setdefault(key, Counter())
        self.clocks[key] |= self.clocks[int(event)]
        self.log.append(f"wait of {key} for {int(event):#x}")
        return (OK,)

    def _make(self, kind: Any) -> tuple[Any, Any]:
        if self.thread.context is None:
            return NO_CONTEXT, None
        self._next += 0x10
        self.devices[self._next] = self.thread.device
        return OK, kind(self._next)

    def _set_context(self, context: int) -> tuple[Any]:
        self.thread.context = context
        return (OK,)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch._C, "_cuda_getCurrentStream", self.get_stream, raising=False)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", self.get_raw_stream, raising=False)
        patch.setattr(torch._C, "_cuda_setStream", self.set_stream, raising=False)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: Stream(pointer, device, CUDA_DEVICE_TYPE))
        patch.setattr(torch.cuda, "device", self.device)
        patch.setattr(torch.cuda, "init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(driver, "event_record", self.event_record)
        patch.setattr(driver, "stream_wait_event", self.wait_event)
        calls = SimpleNamespace(
            CUstream=real.CUstream,
            CUstream_flags=real.CUstream_flags,
            CUevent_flags=real.CUevent_flags,
            cuEventCreate=lambda flags: self._make(real.CUevent),
            cuStreamCreateWithPriority=lambda flags, priority: self._make(real.CUstream),
            cuCtxGetStreamPriorityRange=lambda: (OK, 0, -5) if self.thread.context is not None else (NO_CONTEXT, 0, 0),
            cuCtxGetCurrent=lambda: (OK, self.thread.context or 0),
            cuDevicePrimaryCtxRetain=lambda device: (OK, 0x9000 + device),
            cuCtxSetCurrent=self._set_context,
            cuGetErrorName=lambda code: (OK, code.name.encode()),
            cuGetErrorString=lambda code: (OK, b"as the test wanted"),
        )
        patch.setattr(driver, "cuda", calls)


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A fake CUDA for the block. The modules that bind CUDA's calls are imported anew for it, and dropped after it."""
    bound = ("auxstream.runtime.cuda", "auxstream.runtime.quick")
    fake = FakeCuda()
    saved = dict(vars(thread_state))
    assert not any(name in sys.modules for name in bound), "they cannot be imported where torch has no CUDA"
    with patch.context() as context:
        fake.install(context)
        vars(thread_state).clear()
        try:
            yield fake
        finally:
            vars(thread_state).clear()
            vars(thread_state).update(saved)
            for name in bound:
                sys.modules.pop(name, None)
                vars(runtime).pop(name.rpartition(".")[2], None)
