"""What a capture cannot record, refused at once with the line that did it.

Enters: an op about to run inside a capture, and its tensors. Leaves: nothing, or a `CaptureError`; in a capture that is
somebody else's, a note of it, and the op runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from ..runtime.errors import CaptureError
from .signatures import tensors_in
from .source import host_read, line_of, source_line

_aten: Final = torch.ops.aten
_HOST_READS: Final = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__})
_FROM_VALUES: Final = frozenset({torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor})
_COPIES: Final = (_aten.copy_.default, _aten._to_copy.default)

# Writing through a mask counts its elements on the host, unless one value goes everywhere.
_MASKED_WRITES: Final = frozenset({_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default})


class Refusals:
    """What becomes of what cannot be recorded. `noted`: of a capture that is only looked at, what that was; None: it is
    refused."""

    def __init__(self, noted: dict[str, None] | None) -> None:
        self._noted = noted

    def meets(self, refuse: Callable[..., None], *given: Any) -> bool:
        """Whether `refuse(*given)` refuses, if that is not an error."""
        try:
            refuse(*given)
        except CaptureError as error:
            if self._noted is None:
                raise
            self._noted[str(error).partition("\n")[0]] = None
            return True
        return False


def capturing_device(name: str, device: torch.device | str | None) -> torch.device:
    """Where graph `name` is captured: None is the current CUDA device, or the simulated machine where there is none."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = torch.device(device if device is not None else "cuda" if devices else "cpu")
    if chosen.type != "cpu" and not (chosen.type == "cuda" and (chosen.index or 0) < devices):
        raise CaptureError(
            f"graph {name!r} cannot capture on device {str(chosen)!r}",
            expected="a CUDA device of this machine, or 'cpu' for the simulated machine",
            came=f"{str(chosen)!r}, on a machine with {devices} usable CUDA device(s)",
            remedy="leave `device` out: the GPU if there is one, else the simulated machine",
        )
    return chosen


def refuse_functions(func: HigherOrderOperator) -> None:
    """What it will do cannot be told from its arguments."""
    raise CaptureError(
        f"{func} takes functions as arguments, and cannot be recorded, at {source_line()}",
        expected="ops on tensors",
        came="an op whose work is known when it runs",
        remedy="call the function it would call; torch.where in place of torch.cond",
    )


def refuse_layouts(func: Any, tensors: Sequence[Tensor]) -> None:
    """Only dense strided tensors have bytes the program can name."""
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CaptureError(
                f"{func} takes or makes a tensor that is not plain strided memory, at {source_line()}",
                expected="dense strided tensors",
                came=f"layout {tensor.layout}, dtype {tensor.dtype}",
                remedy="convert it before the capture (to_dense, dequantize)",
            )


def refuse_resizing(func: Any, before: int, after: int) -> None:
    """Memory has one size in a program."""
    if before != after:
        raise CaptureError(
            f"{func} resizes a tensor's memory inside a capture, at {source_line()}",
            expected="tensors that keep the size they were made with",
            came=f"{before} bytes that became {after}",
            remedy="make it at its final size, or use the op's result in place of out=",
        )


def refuse_host_traffic(
    device_type: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
) -> None:
    """A capture runs nothing: values are not there to be read, and pageable host memory is read at the wrong time."""
    if _reads_values(func, args) and any(tensor.device.type == device_type for tensor in tensors):
        raise host_read(str(func))
    device = kwargs.get("device")
    target = None if device is None else torch.device(device).type
    on_gpu = any(tensor.is_cuda for tensor in tensors)
    if device_type == "cpu":
        if on_gpu or target == "cuda":
            raise CaptureError(
                f"{func} works on the GPU inside a capture of the simulated machine, at {source_line()}",
                expected="CPU tensors",
                came="CUDA tensors, whose work would not be replayed",
                remedy="capture with device='cuda', or move them to the CPU",
            )
        return
    if on_gpu and target == "cpu":
        raise host_read(str(func))
    if not (on_gpu or target == "cuda"):
        return
    copies = func in _COPIES
    for tensor in tensors:
        if tensor.device.type != "cpu" or (tensor.dim() == 0 and not copies):  # a number is read at the call
            continue
        if not tensor.is_pinned() or (copies and not (kwargs.get("non_blocking") or args[2:3] == (True,))):
            raise CaptureError(
                f"{func} uses a CPU tensor of shape {tuple(tensor.shape)} inside a GPU capture, at {source_line()}",
                expected="tensors on the GPU, or pinned host memory, copied with non_blocking=True",
                came="pinned memory, and the host would wait" if tensor.is_pinned() else "pageable host memory",
                remedy="move it to the GPU before the capture, and copy new values into it between replays",
            )


def _reads_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host must know values to launch `func`. Indexing is tagged so for the sake of masks alone."""
    if func is _aten.index.Tensor or func in _MASKED_WRITES:
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masked and (func is _aten.index.Tensor or args[2].numel() != 1)
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


_BY_CUDA: Final = (
    (
        ("CUBLAS_STATUS", "CUDNN_STATUS", "cusolver", "cusparse"),
        "a library sets itself up at its first use, which allocates: run the block once before, on the capture's "
        "stream (compile's `warmup` does), or leave the op out",
    ),
    (
        ("captur",),
        "nothing in a capture may wait for the GPU or allocate past torch: no synchronize(), no event or stream query, "
        "no copy from or to pageable memory, no cudaMalloc of a library's own. Do it before the capture, or between "
        "replays",
    ),
)


def refused_by_cuda(error: BaseException | None) -> CaptureError | None:
    """What CUDA would not capture, with the op that was under way, its line, and what to do; None for another error."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return None
    text = str(error)
    remedy = next((remedy for signs, remedy in _BY_CUDA if any(sign in text for sign in signs)), None)
    if remedy is None:
        return None
    op, line = None, None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "__torch_dispatch__":
            op = trace.tb_frame.f_locals.get("func")
        line = line_of(trace.tb_frame, trace.tb_lineno) or line
        trace = trace.tb_next
    return CaptureError(
        f"CUDA cannot capture {'what runs' if op is None else op}, at {line or 'an unknown line'}",
        expected="work that is only enqueued",
        came=text.strip().partition("\n")[0],
        remedy=remedy,
    )


class NoHostReads(TorchFunctionMode):
    """Some reads of values dispatch no op: `numpy()` and `tolist()` on CPU, and `torch.tensor([a, b])` of tensors."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read: Any = ()
        if func in _HOST_READS:
            read = args[0]
        elif func in _FROM_VALUES:  # a tensor on its own is copied on the device
            read = [given for given in (*args, *kwargs.values()) if isinstance(given, list | tuple)]
        if any(leaf.device.type == self._device_type for leaf in tensors_in(read)):
            raise host_read(func.__qualname__.rpartition(".")[2])
        return func(*args, **kwargs)
