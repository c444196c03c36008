"""The CUDA driver, through NVIDIA's cuda-python: events, streams and what their error codes mean here.

Enters: raw handles. Leaves: raw handles, or `RegionError` / `CaptureError` with the driver's own words and a remedy.
The calls on the hot path return the driver's tuple unwrapped; `failed(...)` is reached only on an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from .errors import AuxstreamError, CaptureError, MissingDependencyError, RegionError

try:
    from cuda.bindings import driver as cuda  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    raise MissingDependencyError(
        "cuda-python is not installed", came=str(error), remedy="pip install 'cuda-bindings>=12.9'"
    ) from error

event_record: Final = cuda.cuEventRecord
stream_wait_event: Final = cuda.cuStreamWaitEvent

_CAPTURE_REMEDIES: Final = {
    "CUDA_ERROR_STREAM_CAPTURE_ISOLATION": "fork and join a region inside one capture, or wholly outside of it",
    "CUDA_ERROR_STREAM_CAPTURE_UNJOINED": "join every region before the capture ends",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "an earlier call in this capture was illegal: look at the first error",
    "CUDA_ERROR_CAPTURED_EVENT": "join a region inside the capture that forked it",
    "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD": "end a capture on the thread that began it",
}


def failed(code: Any, doing: str) -> AuxstreamError:
    """The exception for a driver call that returned `code` while `doing` something."""
    name = cuda.cuGetErrorName(code)[1].decode()
    text = cuda.cuGetErrorString(code)[1].decode()
    kind = CaptureError if "CAPTURE" in name else RegionError
    return kind(f"CUDA refused while {doing}", came=f"{name}: {text}", remedy=_CAPTURE_REMEDIES.get(name, ""))


def call(result: tuple[Any, ...], doing: str) -> Any:
    """Unwrap a driver call's tuple, off the hot path."""
    if result[0]:
        raise failed(result[0], doing)
    return result[1] if len(result) == 2 else result[1:]


def attach(device: int) -> bool:
    """Give this thread the device's primary context, as its first CUDA op would, and say whether it had none. Without
    one a thread can neither make streams nor use the default stream."""
    if int(call(cuda.cuCtxGetCurrent(), "reading the thread's context")):
        return False
    context = call(cuda.cuDevicePrimaryCtxRetain(device), f"opening cuda:{device}")
    call(cuda.cuCtxSetCurrent(context), f"making cuda:{device} the thread's device")
    return True


def insist(code: Any, device: int, doing: str, step: Callable[..., tuple[Any]], *arguments: Any) -> None:
    """`step` has failed with `code`: take it again if this thread was new to CUDA, or raise what it means."""
    if attach(device):
        code = step(*arguments)[0]
    if code:
        raise failed(code, doing)


def make_event() -> Any:
    """An event without timing, on the current context."""
    return call(cuda.cuEventCreate(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING), "creating an event")


def make_stream(priority: int) -> Any:
    """A non-blocking stream of the current context; `priority` is clamped to what the device offers."""
    least, greatest = call(cuda.cuCtxGetStreamPriorityRange(), "reading the stream priorities")
    clamped = max(greatest, min(least, priority))
    flags = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
    return call(cuda.cuStreamCreateWithPriority(flags, clamped), "creating a lane")
