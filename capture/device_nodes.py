"""What one node of a captured CUDA graph says of itself, read back through cuda-python.

Enters: a node's handle. Leaves: a `DeviceNode`: its kind, a kernel's function and arguments, the exact bytes it names.
Invariant: nothing is guessed. What the driver or the bindings do not tell is noted in `NodeReader.unreadable`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ctypes import string_at
from dataclasses import dataclass, replace
from itertools import count, product
from types import ModuleType
from typing import Any, Final, NamedTuple

from ..runtime.errors import AuxstreamError
from .hazards import Access

# The driver's node types, CU_GRAPH_NODE_TYPE_ left off, and what they are called here.
_KINDS: Final = {
    "KERNEL": "kernel",
    "MEMCPY": "memcpy",
    "MEMSET": "memset",
    "HOST": "host",
    "GRAPH": "child graph",
    "EMPTY": "empty",
    "WAIT_EVENT": "event wait",
    "EVENT_RECORD": "event record",
    "EXT_SEMAS_SIGNAL": "semaphore signal",
    "EXT_SEMAS_WAIT": "semaphore wait",
    "MEM_ALLOC": "alloc",
    "MEM_FREE": "free",
    "BATCH_MEM_OP": "batch memop",
    "CONDITIONAL": "conditional",
}
# Per operation of a batch (CUstreamBatchMemOpType): how many bytes it touches at its address, and whether it writes.
_MEMORY_OPS: Final = {
    1: (4, False),  # wait for a 32-bit value
    2: (4, True),  # write one
    4: (8, False),  # wait for a 64-bit value
    5: (8, True),  # write one
}
_NO_BYTES: Final = (3, 6)  # flush remote writes, barrier
_MEMORY_OP: Final = "<I4xQ32x"  # operation, address
_BUFFER_POINTER, _BUFFER_SIZE = 1, 2  # CU_LAUNCH_PARAM_*: the keys of a kernel node's `extra`

# A refusal; a call the bindings lack; one the driver lacks; a value these bindings do not know.
UNTOLD: Final = (AuxstreamError, AttributeError, RuntimeError, ValueError)


def reason(error: BaseException) -> str:
    """Why something was not told, in one line."""
    return error.came if isinstance(error, AuxstreamError) else str(error)


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """One node of a graph.

    `handle` is the CUgraphNode of the top-level node that it comes from. `function` is a kernel's CUfunction, or its
    CUkernel where this context has no CUfunction of it; else 0. `parameters` are a kernel's arguments as bytes.
    `accesses` are the bytes that the node itself names: kernels name none, and host functions and semaphores cannot.
    """

    handle: int
    kind: str
    name: str
    function: int = 0
    parameters: tuple[bytes, ...] = ()
    accesses: tuple[Access, ...] = ()


class _Function(NamedTuple):
    """What all nodes of one kernel share. `sizes`: bytes of each parameter, or why the driver does not tell."""

    handle: int
    name: str
    sizes: tuple[int, ...] | str


class NodeReader:
    """Reads nodes; `unreadable` gathers what was not told, each once, in the order met."""

    def __init__(self, driver: ModuleType) -> None:
        self._driver = driver
        self._cuda: Any = driver.cuda
        self.unreadable: dict[str, None] = {}
        self._functions: dict[int, _Function] = {}
        self._allocated: dict[int, int] = {}  # address -> bytes
        self._bytes_of = {
            "memcpy": self._memcpy,
            "memset": self._memset,
            "alloc": self._alloc,
            "free": self._free,
            "batch memop": self._batch_memop,
        }

    def call(self, name: str, *arguments: Any) -> Any:
        """The answer of the driver's function `name`. Raises one of UNTOLD."""
        return self._driver.call(getattr(self._cuda, name)(*arguments), name)

    def note(self, what: str, why: BaseException | str) -> None:
        self.unreadable[f"{what}: {why if isinstance(why, str) else reason(why)}"] = None

    def kind(self, node: Any) -> str:
        try:
            name = self.call("cuGraphNodeGetType", node).name.removeprefix("CU_GRAPH_NODE_TYPE_")
        except UNTOLD as error:
            self.note("the type of a node", error)
            return "unknown"
        if name not in _KINDS:
            self.note("what a node does", f"its type is {name}")
            return name.lower().replace("_", " ")
        return _KINDS[name]

    def read(self, node: Any, kind: str, handle: int) -> DeviceNode:
        if kind == "kernel":
            return self._kernel(node, handle)
        accesses: tuple[Access, ...] = ()
        if kind in self._bytes_of:
            try:
                accesses = tuple(self._bytes_of[kind](node))
            except UNTOLD as error:
                self.note(f"bytes of a {kind} node", error)
        return DeviceNode(handle, kind, kind, accesses=accesses)

    def with_frees(self, nodes: Iterable[DeviceNode]) -> Iterator[DeviceNode]:
        """The nodes, once all are read: freeing writes to the whole allocation, whose size its alloc node has told."""
        for node in nodes:
            if node.kind == "free" and node.accesses:
                address = node.accesses[0].start
                if address in self._allocated:
                    node = replace(node, accesses=(Access(address, address + self._allocated[address], True),))
                else:
                    self.note("bytes of a free node", "they were not allocated in this graph")
            yield node

    # --- kernels ------------------------------------------------------------------------------------------------------

    def _kernel(self, node: Any, handle: int) -> DeviceNode:
        function, parameters = _Function(0, "kernel", ()), ()
        try:
            launch = self.call("cuGraphKernelNodeGetParams", node)
            function = self._function(launch)
            parameters = _parameters(launch.kernelParams, launch.extra, function.sizes)
        except UNTOLD as error:
            self.note(f"parameters of kernel {function.name}", error)
        return DeviceNode(handle, "kernel", function.name, function.handle, parameters)

    def _function(self, launch: Any) -> _Function:
        key = int(launch.func) or int(launch.kern)
        if key not in self._functions:
            self._functions[key] = self._describe(launch)
        return self._functions[key]

    def _describe(self, launch: Any) -> _Function:
        of, function = ("cuFunc", launch.func) if int(launch.func) else ("cuKernel", launch.kern)
        handle, name = int(function), "kernel"
        try:
            name = self.call(f"{of}GetName", function).decode()
            sizes = tuple(self._sizes(f"{of}GetParamInfo", function))
        except UNTOLD as error:
            sizes = reason(error)
        if of == "cuKernel":
            code, *found = self._cuda.cuKernelGetFunction(function)
            handle = handle if code else int(found[0])
        return _Function(handle, name, sizes)

    def _sizes(self, ask: str, function: Any) -> Iterator[int]:
        for index in count():
            answer = getattr(self._cuda, ask)(function, index)
            if answer[0] == self._cuda.CUresult.CUDA_ERROR_INVALID_VALUE:
                return  # past the last one: the function itself is valid, for it has a name
            _, size = self._driver.call(answer, ask)
            yield size

    # --- nodes that name their bytes ----------------------------------------------------------------------------------

    def _memset(self, node: Any) -> Iterator[Access]:
        p = self.call("cuGraphMemsetNodeGetParams", node)
        return _box(int(p.dst), p.width * p.elementSize, p.height, 1, p.pitch, 0, writes=True)

    def _memcpy(self, node: Any) -> Iterator[Access]:
        p = self.call("cuGraphMemcpyNodeGetParams", node)
        for end, writes in (("src", False), ("dst", True)):
            x, y, z, pitch, height, memory, host, device = (
                getattr(p, end + field)
                for field in ("XInBytes", "Y", "Z", "Pitch", "Height", "MemoryType", "Host", "Device")
            )
            if memory == self._cuda.CUmemorytype.CU_MEMORYTYPE_ARRAY:
                self.note("bytes of a memcpy node", "a CUDA array has no addresses")
                continue
            base = int(host if memory == self._cuda.CUmemorytype.CU_MEMORYTYPE_HOST else device)
            start = base + x + y * pitch + z * pitch * height
            yield from _box(start, p.WidthInBytes, p.Height, p.Depth, pitch, pitch * height, writes=writes)

    def _alloc(self, node: Any) -> tuple[Access, ...]:
        p = self.call("cuGraphMemAllocNodeGetParams", node)
        address = int(p.dptr)
        # Two allocations that do not live at once may share an address.
        self._allocated[address] = max(p.bytesize, self._allocated.get(address, 0))
        return ()

    def _free(self, node: Any) -> tuple[Access, ...]:
        address = int(self.call("cuGraphMemFreeNodeGetParams", node))
        return (Access(address, address, True),)  # `with_frees` knows how far

    def _batch_memop(self, node: Any) -> Iterator[Access]:
        batch = self.call("cuGraphBatchMemOpNodeGetParams", node)
        # The bindings' own `paramArray` is empty on a node that is read back. It lies behind context (8) and count (8).
        (array,) = struct.unpack("P", string_at(batch.getPtr() + 16, 8))
        for operation, address in struct.iter_unpack(_MEMORY_OP, string_at(array, 48 * batch.count)):
            if operation in _MEMORY_OPS:
                size, writes = _MEMORY_OPS[operation]
                yield Access(address, address + size, writes)
            elif operation not in _NO_BYTES:
                self.note("bytes of a batch memop node", f"its operation is {operation}")


def _parameters(array: int, extra: int, sizes: tuple[int, ...] | str) -> tuple[bytes, ...]:
    """A kernel's arguments, from an array of pointers or from one packed buffer, whichever the node holds."""
    if extra:
        return (_buffer(extra),)
    if isinstance(sizes, str):
        raise ValueError(sizes)
    if not sizes:
        return ()
    pointers = struct.unpack(f"{len(sizes)}P", string_at(array, 8 * len(sizes))) if array else (0,)
    if not all(pointers):
        raise ValueError("the node holds none")
    return tuple(map(string_at, pointers, sizes))


def _buffer(extra: int) -> bytes:
    """The packed arguments that `extra` leads to: pairs of a key and a pointer, up to a null key."""
    found: dict[int, int] = {}
    for at in count(extra, 16):
        (key,) = struct.unpack("P", string_at(at, 8))
        if not key:
            break
        (found[key],) = struct.unpack("P", string_at(at + 8, 8))
    if not (found.get(_BUFFER_POINTER) and found.get(_BUFFER_SIZE)):
        raise ValueError("the node holds no buffer")
    (size,) = struct.unpack("N", string_at(found[_BUFFER_SIZE], 8))
    return string_at(found[_BUFFER_POINTER], size)


def _box(start: int, width: int, height: int, depth: int, pitch: int, plane: int, *, writes: bool) -> Iterator[Access]:
    """`depth` planes of `height` rows of `width` bytes; rows without a gap between them are one access."""
    if height == 1 or pitch == width:
        width, height = width * height, 1
    if height == 1 and plane == width:
        width, depth = width * depth, 1
    for z, y in product(range(depth), range(height)):
        row = start + z * plane + y * pitch
        yield Access(row, row + width, writes)
