"""Where a graph's time goes: its kernels by time, each against the bytes it must move.

Enters: a proved CUDA graph. Leaves: `Costly` kernels, the most expensive first. A kernel's bytes are those that the
proof says it touches, each once. Of a stack of experts only as many slices count as tokens were sent to any: a bound,
for two tokens may share one. Invariant: kernels that touch the same weights are one op's, and share its bytes as they
share its time.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..capture.evidence import Evidence, Touch
from ..capture.graphs import CudaGraph
from ..capture.program import Buffer, TensorRef
from .launches import Launches, launches_of
from .replays import paces


@dataclass(frozen=True, slots=True)
class Costly:
    """All launches of one kernel in a replay. `nbytes` is None where the proof does not know the kernel by its name."""

    name: str
    calls: float
    us: float
    nbytes: int | None
    floor_us: float | None

    @property
    def ratio(self) -> float | None:
        """How many times its floor it takes."""
        return self.us / self.floor_us if self.floor_us else None

    def __str__(self) -> str:
        moved = "?" if self.nbytes is None else f"{self.nbytes / 2**20:,.2f}"
        floor, ratio = ("?" if value is None else f"{value:,.1f}" for value in (self.floor_us, self.ratio))
        return f"{self.us:9.1f} {self.calls:6.0f} {moved:>10} {floor:>8} {ratio:>6}  {self.name[:90]}"


HEADING = f"{'us a step':>9} {'calls':>6} {'MiB':>10} {'floor us':>8} {'times':>6}  kernel"


def costliest(graph: CudaGraph, most: int = 10, replays: int = 3) -> list[Costly]:
    """The kernels that take most of a replay's time."""
    launches = launches_of(graph.cuda_graph.replay, replays)
    moved = bytes_by_kernel(graph.evidence, launches)
    per_us = paces()["copy"] * 1e6
    found: list[Costly] = []
    for name, (calls, us) in sorted(launches.items(), key=lambda item: -item[1][1])[:most]:
        nbytes = moved.get(name)
        found.append(Costly(name, calls, us, nbytes, None if nbytes is None else nbytes / per_us))
    return found


def bytes_by_kernel(evidence: Evidence, launches: Launches) -> dict[str, int]:
    """The bytes that all launches of each kernel must move, by the kernel's readable name."""
    kernels = [(readable(node.kernel), node.touches) for node in evidence.nodes if node.kernel]
    together: dict[frozenset[Touch] | int, list[tuple[str, Sequence[Touch]]]] = {}
    for number, (kernel, touches) in enumerate(kernels):
        weights = frozenset(touch for touch in touches if evidence.buffers[touch[0].buffer].stream is None)
        together.setdefault(weights or number, []).append((kernel, touches))
    found = {kernel: 0.0 for kernel, _ in kernels}
    for alike in together.values():
        nbytes = sum(_moved(evidence.buffers, list({touch for _, touches in alike for touch in touches})))
        times = [_each(launches, kernel) for kernel, _ in alike]
        for (kernel, _), us in zip(alike, times, strict=True):
            found[kernel] += nbytes * (us / sum(times) if sum(times) else 1 / len(times))
    return {kernel: round(nbytes) for kernel, nbytes in found.items()}


def _each(launches: Launches, kernel: str) -> float:
    calls, us = launches.get(kernel, (0.0, 0.0))
    return us / calls if calls else 0.0


def _moved(buffers: Sequence[Buffer], touches: Sequence[Touch]) -> list[int]:
    """Per tensor touched, its bytes; of experts, those of the slices that can be chosen."""
    refs = [ref for ref, _ in touches]
    inside = [ref for ref in refs if buffers[ref.buffer].stream is not None]
    rows = [math.prod(ref.size[:-1]) for ref in inside if ref.dtype.is_floating_point and ref.size]
    picks = [math.prod(ref.size) for ref in inside if ref.dtype in (torch.int32, torch.int64)]
    moved: list[int] = []
    for ref in refs:
        nbytes = _bytes(ref)
        if len(ref.size) == 3 and buffers[ref.buffer].stream is None and ref.dtype.is_floating_point:
            experts = max(1, ref.size[0])
            uses = max([*rows, *(n for n in picks if n != experts)], default=experts)
            nbytes = nbytes // experts * min(uses, experts)
        moved.append(nbytes)
    return moved


def _bytes(ref: TensorRef) -> int:
    """Of the memory behind a tensor: what it repeats (a stride of 0) counts once."""
    sizes = (1 if stride == 0 and size else size for size, stride in zip(ref.size, ref.stride, strict=True))
    return math.prod(sizes) * ref.dtype.itemsize


@functools.cache
def readable(kernel: str) -> str:
    """A kernel's name as profilers show it: the driver keeps C++ names encoded."""
    if not kernel.startswith("_Z"):
        return kernel
    library = ctypes.CDLL("libstdc++.so.6")
    decode = library["__cxa_demangle"]
    decode.restype, status = ctypes.c_void_p, ctypes.c_int(0)
    text = decode(kernel.encode(), None, None, ctypes.byref(status))
    if status.value or not text:
        return kernel
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None)["free"](ctypes.c_void_p(text))
    return name
