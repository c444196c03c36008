"""CUDA graphs with no CUDA: a little model of what the driver tells about a graph, for reading graphs back.

`FakeDriver` stands in for `runtime.driver.cuda`. Tests build graphs in it, node by node; arguments lie in real memory,
as they are read through their addresses. `failing` functions answer with an error code, those in `missing_in_driver`
raise as the bindings do over an older driver, and those in `missing_in_bindings` do not exist.
"""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import driver as real

from auxstream.runtime import driver

OK = real.CUresult.CUDA_SUCCESS
INVALID = real.CUresult.CUDA_ERROR_INVALID_VALUE
NOT_SUPPORTED = real.CUresult.CUDA_ERROR_NOT_SUPPORTED
HOST, DEVICE, ARRAY = (real.CUmemorytype(value) for value in (1, 2, 3))

FULL = (0, 0, 0)  # an edge's type, its outgoing and its incoming port
PROGRAMMATIC = (1, 1, 0)
LAUNCH_ORDER = (0, 2, 0)


@dataclass
class FakeGraph:
    nodes: list[int] = field(default_factory=list)
    edges: list[tuple[int, int, tuple[int, int, int]]] = field(default_factory=list)


@dataclass
class FakeFunction:
    name: bytes
    sizes: tuple[int, ...]


class FakeDriver:
    """Graphs, nodes and kernels as numbers. `asked` counts the calls."""

    CUresult = real.CUresult
    CUmemorytype = real.CUmemorytype

    def __init__(self) -> None:
        self.failing: dict[str, Any] = {}
        self.missing_in_driver: set[str] = set()
        self.missing_in_bindings: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.functions: dict[int, FakeFunction] = {}
        self._graphs: dict[int, FakeGraph] = {}
        self._types: dict[int, str] = {}
        self._params: dict[int, Any] = {}
        self._memory: list[Any] = []
        self._next = 0x1000
        signature = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 5)
        self._edges = signature(self._get_edges)
        self.edge_error = 0

    # --- building -----------------------------------------------------------------------------------------------------

    def graph(self) -> int:
        handle = self._number()
        self._graphs[handle] = FakeGraph()
        return handle

    def node(self, graph: int, kind: str, params: Any = None, after: tuple[int, ...] = ()) -> int:
        """`kind` is the driver's word for the type; `params`: what its get-params call returns."""
        handle = self._number()
        self._graphs[graph].nodes.append(handle)
        self._types[handle] = kind
        self._params[handle] = params
        for before in after:
            self.edge(graph, before, handle)
        return handle

    def edge(self, graph: int, source: int, target: int, data: tuple[int, int, int] = FULL) -> None:
        self._graphs[graph].edges.append((source, target, data))

    def function(self, name: str, *sizes: int) -> int:
        """A CUfunction and a CUkernel at once: `launch` says which of them a node holds."""
        handle = self._number()
        self.functions[handle] = FakeFunction(name.encode(), sizes)
        return handle

    def kernel(self, graph: int, function: int, *arguments: bytes, after: tuple[int, ...] = (), **held: Any) -> int:
        """A node that launches `function`. `held`: fields that the node holds in place of the usual ones."""
        launch = {"func": function, "kern": 0, "kernelParams": self.pointers(*arguments), "extra": 0}
        return self.node(graph, "KERNEL", SimpleNamespace(**launch | held), after)

    def memset(self, graph: int, start: int, nbytes: int, after: tuple[int, ...] = ()) -> int:
        params = SimpleNamespace(dst=start, pitch=0, elementSize=1, width=nbytes, height=1)
        return self.node(graph, "MEMSET", params, after)

    def child(self, graph: int, inner: int, after: tuple[int, ...] = ()) -> int:
        return self.node(graph, "GRAPH", inner, after)

    def conditional(self, graph: int, *bodies: int, after: tuple[int, ...] = (), shown: bool = True) -> int:
        array = self.memory(struct.pack(f"{len(bodies)}P", *bodies)) if shown else 0
        held = self.memory(struct.pack("QIIPP", 7, 0, len(bodies), array, 0))
        params = SimpleNamespace(conditional=SimpleNamespace(size=len(bodies), getPtr=lambda: held))
        return self.node(graph, "CONDITIONAL", params, after)

    def batch_memop(self, graph: int, *ops: tuple[int, int]) -> int:
        array = self.memory(b"".join(struct.pack("<I4xQ32x", *op) for op in ops))
        held = self.memory(struct.pack("PI4xPI4x", 0, len(ops), array, 0))
        return self.node(graph, "BATCH_MEM_OP", SimpleNamespace(count=len(ops), getPtr=lambda: held))

    def memory(self, content: bytes) -> int:
        """The address of a copy of `content`."""
        held = ctypes.create_string_buffer(content, max(len(content), 1))
        self._memory.append(held)
        return ctypes.addressof(held)

    def pointers(self, *contents: bytes) -> int:
        """The address of an array of pointers to copies of `contents`; null if there are none."""
        if not contents:
            return 0
        return self.memory(struct.pack(f"{len(contents)}P", *map(self.memory, contents)))

    def extra(self, content: bytes) -> int:
        """`content` as the packed buffer of a launch."""
        size = self.memory(struct.pack("N", len(content)))
        return self.memory(struct.pack("5P", 1, self.memory(content), 2, size, 0))

    def _number(self) -> int:
        self._next += 0x10
        return self._next

    # --- what the bindings offer --------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """A function of the driver: `_<name>` here, behind what goes wrong."""
        if not name.startswith("cu") or name in self.missing_in_bindings:
            raise AttributeError(f"module 'cuda.bindings.driver' has no attribute '{name}'")

        def function(*arguments: Any) -> Any:
            self.asked[name] += 1
            if name in self.missing_in_driver:
                raise RuntimeError(f'Function "{name}" not found')
            if name in self.failing:
                return self.failing[name], None
            return object.__getattribute__(self, f"_{name}")(*arguments)

        return function

    def _cuGetErrorName(self, code: Any) -> tuple[Any, bytes]:
        return OK, code.name.encode()

    def _cuGetErrorString(self, code: Any) -> tuple[Any, bytes]:
        return OK, b"as the test wanted"

    def _cuGraphGetNodes(self, graph: int, number: int = 0) -> tuple[Any, list[int], int]:
        nodes = self._graphs[graph].nodes
        return OK, nodes[:number], len(nodes)

    def _cuGetProcAddress(self, symbol: bytes, version: int, flags: int) -> tuple[Any, int, int]:
        assert (symbol, version, flags) == (b"cuGraphGetEdges", 12030, 0)
        address = ctypes.cast(self._edges, ctypes.c_void_p).value
        assert address is not None
        return OK, address, 0

    def _get_edges(self, graph: int, sources: int, targets: int, data: int, number: int) -> int:
        edges = self._graphs[graph].edges
        count = ctypes.c_size_t.from_address(number)
        if sources:
            assert count.value == len(edges)
            for index, (source, target, (kind, from_port, to_port)) in enumerate(edges):
                ctypes.c_uint64.from_address(sources + 8 * index).value = source
                ctypes.c_uint64.from_address(targets + 8 * index).value = target
                ctypes.memmove(data + 8 * index, bytes([from_port, to_port, kind, *[0] * 5]), 8)
        count.value = len(edges)
        return self.edge_error

    def _cuGraphNodeGetType(self, node: int) -> tuple[Any, Any]:
        if self._types[node] == "UNHEARD OF":
            raise ValueError("99 is not a valid CUgraphNodeType")
        return OK, SimpleNamespace(name=f"CU_GRAPH_NODE_TYPE_{self._types[node]}")

    def _of(self, node: int) -> tuple[Any, Any]:
        return OK, self._params[node]

    _cuGraphKernelNodeGetParams = _cuGraphMemsetNodeGetParams = _cuGraphMemcpyNodeGetParams = _of
    _cuGraphMemAllocNodeGetParams = _cuGraphMemFreeNodeGetParams = _cuGraphBatchMemOpNodeGetParams = _of
    _cuGraphChildGraphNodeGetGraph = _cuGraphNodeGetParams = _of

    def _name_of(self, function: int) -> tuple[Any, bytes]:
        return OK, self.functions[function].name

    _cuFuncGetName = _cuKernelGetName = _name_of

    def _parameter(self, function: int, index: int) -> tuple[Any, int, int]:
        sizes = self.functions[function].sizes
        return (OK, sum(sizes[:index]), sizes[index]) if index < len(sizes) else (INVALID, 0, 0)

    _cuFuncGetParamInfo = _cuKernelGetParamInfo = _parameter

    def _cuKernelGetFunction(self, kernel: int) -> tuple[Any, int]:
        return OK, kernel + 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    monkeypatch.setattr(driver, "cuda", made)
    return made
