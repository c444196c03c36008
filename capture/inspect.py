"""A captured CUDA graph as plain data, read back through cuda-python.

Enters: a graph that its capture kept, as `CUDAGraph(keep_graph=True)` or as a raw handle. Leaves: a `DeviceGraph`: the
nodes, and which edges order memory. Child graphs are inlined, and the bodies of conditional nodes where the driver
shows them. Invariant: what is not told stands in `unreadable`, and such a graph is not to be called safe.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from ctypes import CFUNCTYPE, addressof, c_int, c_size_t, c_uint64, c_void_p, string_at
from dataclasses import dataclass
from itertools import pairwise, product
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..runtime.errors import CaptureError
from .device_nodes import UNTOLD, DeviceNode, NodeReader, reason

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceGraph", "DeviceNode", "inspect"]

_EDGES_WITH_DATA: Final = 12030  # the CUDA version since which `cuGraphGetEdges` tells what an edge orders
_GET_EDGES: Final = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)


@dataclass(frozen=True, slots=True)
class DeviceGraph:
    """Nodes after inlining, in the driver's order, and edges as (from, to) positions in it.

    `edges` order memory. `unordered` edges do not: programmatic ones, and those that leave a kernel before its end.
    The consumer may wait inside its kernel, which nobody can see from here.
    """

    nodes: tuple[DeviceNode, ...]
    edges: tuple[tuple[int, int], ...]
    unordered: tuple[tuple[int, int], ...]
    unreadable: tuple[str, ...]


def inspect(graph: int | torch.cuda.CUDAGraph) -> DeviceGraph:
    """Read `graph`: a CUDAGraph made with `keep_graph=True` and captured, or the handle of a CUgraph.

    Raises:
        CaptureError: the graph was not kept or not captured, or its nodes and edges cannot be listed.
    """
    from ..runtime import driver

    inliner = _Inliner(driver)
    inliner.inline(_handle(graph), None)
    nodes = tuple(inliner.reader.with_frees(inliner.nodes))
    return DeviceGraph(nodes, tuple(inliner.edges), tuple(inliner.unordered), tuple(inliner.reader.unreadable))


def _handle(graph: int | torch.cuda.CUDAGraph) -> int:
    try:
        handle = graph if isinstance(graph, int) else graph.raw_cuda_graph()
    except RuntimeError as error:
        raise _no_graph(str(error).partition("\n")[0]) from error
    if not handle:
        raise _no_graph("a null handle")
    return handle


def _no_graph(came: str) -> CaptureError:
    return CaptureError(
        "this CUDA graph cannot be read",
        expected="a graph that its capture kept",
        came=came,
        remedy="make it with torch.cuda.CUDAGraph(keep_graph=True), and read it after its capture has ended",
    )


class _Part(NamedTuple):
    """What one node of the driver's became: the positions that nothing within precedes, and that nothing follows."""

    first: Sequence[int]
    last: Sequence[int]


class _Inliner:
    """Appends the nodes and edges of one graph, and of those inside it."""

    def __init__(self, driver: ModuleType) -> None:
        self.reader = NodeReader(driver)
        self.nodes: list[DeviceNode] = []
        self.edges: list[tuple[int, int]] = []
        self.unordered: list[tuple[int, int]] = []
        self._driver = driver

    def inline(self, graph: int, handle: int | None) -> _Part:
        """Append `graph`. `handle`: the top-level node that it is inside of, None for the top level itself."""
        parts: dict[int, _Part] = {}
        for node in self._list_nodes(graph):
            own = int(node)
            parts[own] = self._part(node, own if handle is None else handle)
        if not parts and handle is not None:  # what is around it stays ordered
            return self._append(DeviceNode(handle, "empty", "empty"))
        # A graph begins and ends as a whole: only an edge that orders memory makes one of its nodes an inner one.
        preceded: set[int] = set()
        followed: set[int] = set()
        for source, target, orders in self._list_edges(graph):
            pairs = product(parts[source].last, parts[target].first)
            if orders:
                self.edges.extend(pairs)
                preceded.add(target)
                followed.add(source)
            else:
                self.unordered.extend(pairs)
        return _Part(
            [position for node, part in parts.items() if node not in preceded for position in part.first],
            [position for node, part in parts.items() if node not in followed for position in part.last],
        )

    def _part(self, node: Any, handle: int) -> _Part:
        kind = self.reader.kind(node)
        graphs = self._graphs_inside(node, kind)
        if not graphs:
            return self._append(self.reader.read(node, kind, handle))
        # Bodies exclude one another and so cannot race: one after another is as good an order as any.
        parts = [self.inline(graph, handle) for graph in graphs]
        for before, after in pairwise(parts):
            self.edges.extend(product(before.last, after.first))
        return _Part(parts[0].first, parts[-1].last)

    def _append(self, node: DeviceNode) -> _Part:
        at = (len(self.nodes),)
        self.nodes.append(node)
        return _Part(at, at)

    def _graphs_inside(self, node: Any, kind: str) -> tuple[int, ...]:
        """The graphs that a node holds, as handles; none if it shows none."""
        try:
            if kind == "child graph":
                return (int(self.reader.call("cuGraphChildGraphNodeGetGraph", node)),)
            if kind == "conditional":
                return self._bodies(node)
        except UNTOLD as error:
            self.reader.note("nodes of a child graph" if kind == "child graph" else "conditional bodies", error)
        return ()

    def _bodies(self, node: Any) -> tuple[int, ...]:
        params = self.reader.call("cuGraphNodeGetParams", node)  # since CUDA 13.2
        conditional = params.conditional
        # The bindings' own `phGraph_out` follows a null pointer. It lies behind handle (8), type (4) and size (4).
        (bodies,) = struct.unpack("P", string_at(conditional.getPtr() + 16, 8))
        if not bodies:
            raise ValueError("the driver does not show them")
        return struct.unpack(f"{conditional.size}P", string_at(bodies, 8 * conditional.size))

    def _list_nodes(self, graph: int) -> list[Any]:
        try:
            _, number = self.reader.call("cuGraphGetNodes", graph)
            return self.reader.call("cuGraphGetNodes", graph, number)[0] if number else []
        except UNTOLD as error:
            raise _no_list("nodes", reason(error)) from error

    def _list_edges(self, graph: int) -> Iterator[tuple[int, int, bool]]:
        """From, to, and whether the edge orders memory: all 8 bytes of its data are zero then.

        The driver's function is called by its address. Up to 12.9.5 and 13.2.0 the bindings free the edges' data
        before they hand it out, and in 12.9 the form without data refuses graphs that have any.
        """
        try:
            address, _ = self.reader.call("cuGetProcAddress", b"cuGraphGetEdges", _EDGES_WITH_DATA, 0)
        except UNTOLD as error:
            raise _no_list("edges", reason(error)) from error
        get_edges, number = _GET_EDGES(address), c_size_t()
        code = get_edges(graph, None, None, None, addressof(number))
        sources, targets, data = ((c_uint64 * number.value)() for _ in range(3))
        if not code and number:
            code = get_edges(graph, *map(addressof, (sources, targets, data)), addressof(number))
        if code:
            raise _no_list("edges", self._driver.failed(self._driver.cuda.CUresult(code), "listing edges").came)
        return zip(sources, targets, (not told for told in data), strict=True)


def _no_list(what: str, came: str) -> CaptureError:
    return CaptureError(
        f"the {what} of a CUDA graph cannot be listed",
        expected="a live graph, and an NVIDIA driver for CUDA 12.3 or newer",
        came=came,
        remedy="update the driver",
    )
