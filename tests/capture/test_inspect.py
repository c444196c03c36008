"""Captured graphs read back: every kind of node, what is inlined and how, and what a reader must not claim to know."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterable
from itertools import combinations, pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_driver import ARRAY, DEVICE, FULL, HOST, LAUNCH_ORDER, NOT_SUPPORTED, PROGRAMMATIC, FakeDriver, fake

from auxstream.capture.clocks import Order
from auxstream.capture.hazards import Access, Graph, find_hazards
from auxstream.capture.inspect import DeviceGraph, DeviceNode, inspect
from auxstream.runtime import driver
from auxstream.runtime.errors import CaptureError

__all__ = ["fake"]  # the fixture


def word(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def only(graph: DeviceGraph) -> DeviceNode:
    (node,) = graph.nodes
    return node


def words(node: DeviceNode) -> tuple[int, ...]:
    """Every aligned 8-byte word of the parameters that is not zero: candidate pointers."""
    found: list[int] = []
    for parameter in node.parameters:
        found += struct.unpack_from(f"<{len(parameter) // 8}Q", parameter)
    return tuple(filter(None, found))


def kinds(graph: DeviceGraph) -> list[str]:
    return [node.kind for node in graph.nodes]


def hazards(graph: DeviceGraph, *more: tuple[int, int]) -> int:
    edges = (*graph.edges, *more)
    return len(find_hazards(Graph(tuple(node.accesses for node in graph.nodes), edges)))


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_a_kernels_name_arguments_and_words(fake: FakeDriver) -> None:
    graph = fake.graph()
    function = fake.function("_Z3addPfS_i", 8, 24, 4)
    handle = fake.kernel(graph, function, word(0xA000), word(0, 0xB000, 0xA000), b"\x07\0\0\0")
    assert inspect(graph) == DeviceGraph(
        (
            DeviceNode(
                handle,
                "kernel",
                "_Z3addPfS_i",
                function,
                (word(0xA000), word(0, 0xB000, 0xA000), b"\x07\0\0\0"),
                (),
            ),
        ),
        (),
        (),
        (),
    )
    assert words(only(inspect(graph))) == (0xA000, 0xB000, 0xA000)


def test_a_kernel_that_the_node_holds_as_a_cukernel(fake: FakeDriver) -> None:
    graph = fake.graph()
    kernel = fake.function("k", 8)
    fake.kernel(graph, 0, word(0xA000), kern=kernel)
    read = inspect(graph)
    assert (only(read).function, only(read).name, words(only(read))) == (kernel + 1, "k", (0xA000,))
    fake.failing["cuKernelGetFunction"] = NOT_SUPPORTED  # no such function in this context
    assert only(inspect(graph)).function == kernel
    assert inspect(graph).unreadable == ()


def test_arguments_in_one_packed_buffer(fake: FakeDriver) -> None:
    graph = fake.graph()
    content = word(*range(215))
    function = fake.function("nvjet", 1720)
    fake.kernel(graph, function, extra=fake.extra(content))
    assert only(inspect(graph)).parameters == (content,)
    fake.failing["cuFuncGetParamInfo"] = NOT_SUPPORTED  # the buffer tells its own size
    read = inspect(graph)
    assert (only(read).name, only(read).parameters, read.unreadable) == ("nvjet", (content,), ())


def test_a_kernel_without_arguments(fake: FakeDriver) -> None:
    graph = fake.graph()
    fake.kernel(graph, fake.function("k"))
    read = inspect(graph)
    assert (only(read).parameters, words(only(read)), read.unreadable) == ((), (), ())


def test_functions_are_described_once(fake: FakeDriver) -> None:
    graph = fake.graph()
    functions = [fake.function("a", 8, 8), fake.function("b", 8)]
    for index in range(100):
        function = functions[index % 2]
        fake.kernel(graph, function, *(word(index) for _ in fake.functions[function].sizes))
    assert len(inspect(graph).nodes) == 100
    assert fake.asked["cuGraphKernelNodeGetParams"] == 100
    assert fake.asked["cuFuncGetName"] == 2
    assert fake.asked["cuFuncGetParamInfo"] == 3 + 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda fake: fake.failing.update(cuFuncGetParamInfo=NOT_SUPPORTED), "parameters of kernel k: CUDA_ERROR_NOT"),
        (lambda fake: fake.missing_in_driver.add("cuFuncGetParamInfo"), "parameters of kernel k: Function"),
        (lambda fake: fake.missing_in_bindings.add("cuFuncGetParamInfo"), "parameters of kernel k: module"),
        (lambda fake: fake.failing.update(cuFuncGetName=NOT_SUPPORTED), "parameters of kernel kernel: CUDA_ERROR_NOT"),
        (lambda fake: fake.failing.update(cuGraphKernelNodeGetParams=NOT_SUPPORTED), "parameters of kernel kernel: "),
    ],
)
def test_arguments_that_are_not_told(fake: FakeDriver, spoil: Callable[[FakeDriver], None], says: str) -> None:
    graph = fake.graph()
    function = fake.function("k", 8)
    nodes = [fake.kernel(graph, function, word(0xA000)) for _ in range(2)]
    assert inspect(graph).unreadable == ()
    spoil(fake)
    read = inspect(graph)
    assert [(node.handle, node.kind, node.parameters) for node in read.nodes] == [(n, "kernel", ()) for n in nodes]
    (unreadable,) = read.unreadable
    assert unreadable.startswith(says)


@pytest.mark.parametrize("held", ["no array", "a null pointer", "a buffer without a size"])
def test_a_node_that_holds_no_arguments(fake: FakeDriver, held: str) -> None:
    graph = fake.graph()
    fields = {
        "no array": {"kernelParams": 0},
        "a null pointer": {"kernelParams": fake.memory(word(fake.memory(word(1)), 0))},
        "a buffer without a size": {"extra": fake.memory(struct.pack("3P", 1, fake.memory(word(1)), 0))},
    }[held]
    fake.kernel(graph, fake.function("k", 8, 8), **fields)
    read = inspect(graph)
    assert only(read).parameters == ()
    (unreadable,) = read.unreadable
    assert unreadable.startswith("parameters of kernel k: the node holds no")


# --- nodes that name their bytes --------------------------------------------------------------------------------------


def covered(accesses: Iterable[Access], writes: bool) -> set[int]:
    return {byte for a in accesses if a.writes == writes for byte in range(a.start, a.stop)}


@pytest.mark.parametrize(
    ("element", "width", "height", "pitch", "spans"),
    [
        (1, 100, 1, 0, 1),
        (4, 25, 1, 7, 1),  # the pitch of a single row means nothing
        (4, 4, 3, 16, 1),  # no gap between the rows
        (2, 4, 3, 32, 3),
        (1, 0, 1, 0, 1),
    ],
)
def test_the_bytes_of_a_memset(fake: FakeDriver, element: int, width: int, height: int, pitch: int, spans: int) -> None:
    graph = fake.graph()
    shape = SimpleNamespace(dst=0xA000, elementSize=element, width=width, height=height, pitch=pitch)
    fake.node(graph, "MEMSET", shape)
    node = only(inspect(graph))
    expected = {0xA000 + row * pitch + byte for row in range(height) for byte in range(width * element)}
    assert covered(node.accesses, writes=True) == expected
    assert (node.kind, node.name, len(node.accesses)) == ("memset", "memset", spans)
    assert not covered(node.accesses, writes=False)


def copy(width: int, height: int, depth: int, src: dict[str, Any], dst: dict[str, Any]) -> SimpleNamespace:
    none = {"XInBytes": 0, "Y": 0, "Z": 0, "Pitch": 0, "Height": 0, "Host": 0, "Device": 0, "MemoryType": DEVICE}
    ends = {end + name: value for end, given in (("src", src), ("dst", dst)) for name, value in (none | given).items()}
    return SimpleNamespace(WidthInBytes=width, Height=height, Depth=depth, **ends)


def test_a_copy_reads_its_source_and_writes_its_destination(fake: FakeDriver) -> None:
    graph = fake.graph()
    pinned = {"MemoryType": HOST, "Host": 0xC000, "Device": 0xBAD}
    fake.node(graph, "MEMCPY", copy(64, 1, 1, pinned, {"Device": 0xA000, "Host": 0xBAD}))
    fake.node(graph, "MEMCPY", copy(64, 1, 1, {"Device": 0xA000}, pinned))
    up, down = inspect(graph).nodes
    assert up.accesses == (Access(0xC000, 0xC040, False), Access(0xA000, 0xA040, True))
    assert down.accesses == (Access(0xA000, 0xA040, False), Access(0xC000, 0xC040, True))


@pytest.mark.parametrize("seed", range(20))
def test_a_pitched_copy_byte_by_byte(fake: FakeDriver, seed: int) -> None:
    dice = random.Random(seed)
    width, height, depth = dice.randint(1, 9), dice.randint(1, 4), dice.randint(1, 3)
    expected: list[set[int]] = []
    ends: list[dict[str, Any]] = []
    for base in (0x10000, 0x20000):
        x, y, z = (dice.randint(0, 2) for _ in range(3))
        pitch, rows = x + width + dice.choice([0, 5]), y + height + dice.choice([0, 2])
        ends.append({"Device": base, "XInBytes": x, "Y": y, "Z": z, "Pitch": pitch, "Height": rows})
        box = product(range(depth), range(height), range(width))
        expected.append({base + ((z + k) * rows + y + j) * pitch + x + i for k, j, i in box})
    graph = fake.graph()
    fake.node(graph, "MEMCPY", copy(width, height, depth, *ends))
    accesses = only(inspect(graph)).accesses
    assert covered(accesses, writes=False) == expected[0]
    assert covered(accesses, writes=True) == expected[1]


def test_a_whole_matrix_is_one_access(fake: FakeDriver) -> None:
    graph = fake.graph()
    fake.node(graph, "MEMCPY", copy(64, 32, 4, *({"Device": d, "Pitch": 64, "Height": 32} for d in (0x10000, 0x90000))))
    size = 64 * 32 * 4
    assert only(inspect(graph)).accesses == (
        Access(0x10000, 0x10000 + size, False),
        Access(0x90000, 0x90000 + size, True),
    )


def test_rows_that_interleave_do_not_race_and_rows_that_meet_do(fake: FakeDriver) -> None:
    def pair(offset: int) -> int:
        graph = fake.graph()
        for start in (0xA000, 0xA000 + offset):
            shape = SimpleNamespace(dst=start, elementSize=1, width=16, height=8, pitch=32)
            fake.node(graph, "MEMSET", shape)
        return hazards(inspect(graph))

    assert pair(16) == 0
    assert pair(15) > 0


def test_a_cuda_array_has_no_addresses(fake: FakeDriver) -> None:
    graph = fake.graph()
    fake.node(graph, "MEMCPY", copy(64, 1, 1, {"MemoryType": ARRAY}, {"Device": 0xA000}))
    read = inspect(graph)
    assert only(read).accesses == (Access(0xA000, 0xA040, True),)
    assert read.unreadable == ("bytes of a memcpy node: a CUDA array has no addresses",)


def test_freeing_writes_to_all_that_was_allocated(fake: FakeDriver) -> None:
    graph = fake.graph()
    fake.node(graph, "MEM_FREE", 0xA000)  # the driver may list a node before those it depends on
    fake.node(graph, "MEM_ALLOC", SimpleNamespace(dptr=0xA000, bytesize=256))
    free, alloc = inspect(graph).nodes
    assert (free.kind, free.accesses) == ("free", (Access(0xA000, 0xA100, True),))
    assert (alloc.kind, alloc.accesses) == ("alloc", ())


def test_use_after_free_is_a_race_unless_ordered(fake: FakeDriver) -> None:
    graph = fake.graph()
    alloc = fake.node(graph, "MEM_ALLOC", SimpleNamespace(dptr=0xA000, bytesize=256))
    fake.memset(graph, 0xA0F8, 8, after=(alloc,))
    fake.node(graph, "MEM_FREE", 0xA000, after=(alloc,))
    read = inspect(graph)
    assert hazards(read) == 1
    assert hazards(read, (1, 2)) == 0


def test_an_address_allocated_twice_counts_at_its_largest(fake: FakeDriver) -> None:
    graph = fake.graph()
    for size in (64, 256, 128):
        fake.node(graph, "MEM_ALLOC", SimpleNamespace(dptr=0xA000, bytesize=size))
    fake.node(graph, "MEM_FREE", 0xA000)
    assert inspect(graph).nodes[-1].accesses == (Access(0xA000, 0xA100, True),)


def test_a_free_of_memory_from_elsewhere(fake: FakeDriver) -> None:
    graph = fake.graph()
    fake.node(graph, "MEM_FREE", 0xA000)
    assert inspect(graph).unreadable == ("bytes of a free node: they were not allocated in this graph",)


def test_the_words_of_a_batch_of_memory_operations(fake: FakeDriver) -> None:
    graph = fake.graph()
    fake.batch_memop(graph, (1, 0xA000), (2, 0xA010), (4, 0xA020), (5, 0xA030), (3, 0xBAD), (6, 0xBAD))
    read = inspect(graph)
    assert only(read).kind == "batch memop"
    assert only(read).accesses == (
        Access(0xA000, 0xA004, False),
        Access(0xA010, 0xA014, True),
        Access(0xA020, 0xA028, False),
        Access(0xA030, 0xA038, True),
    )
    assert read.unreadable == ()
    fake.batch_memop(graph, (8, 0xA000))
    assert inspect(graph).unreadable == ("bytes of a batch memop node: its operation is 8",)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("HOST", "host"),
        ("EMPTY", "empty"),
        ("EVENT_RECORD", "event record"),
        ("WAIT_EVENT", "event wait"),
        ("EXT_SEMAS_SIGNAL", "semaphore signal"),
        ("EXT_SEMAS_WAIT", "semaphore wait"),
    ],
)
def test_kinds_that_only_have_a_place_in_the_order(fake: FakeDriver, kind: str, expected: str) -> None:
    graph = fake.graph()
    before = fake.memset(graph, 0xA000, 8)
    handle = fake.node(graph, kind, after=(before,))
    fake.memset(graph, 0xA000, 8, after=(handle,))
    read = inspect(graph)
    assert read.nodes[1] == DeviceNode(handle, expected, expected, 0, (), ())
    assert (read.edges, read.unordered, read.unreadable) == (((0, 1), (1, 2)), (), ())
    assert hazards(read) == 0


def test_an_external_event_orders_nothing_beyond_its_edges(fake: FakeDriver) -> None:
    graph = fake.graph()
    record = fake.node(graph, "EVENT_RECORD", after=(fake.memset(graph, 0xA000, 8),))
    wait = fake.node(graph, "WAIT_EVENT")  # of the same event, which nobody can order here
    fake.memset(graph, 0xA000, 8, after=(wait,))
    assert hazards(inspect(graph)) == 1
    fake.edge(graph, record, wait)
    assert hazards(inspect(graph)) == 0


@pytest.mark.parametrize(
    ("kind", "expected", "says"),
    [
        ("UNHEARD OF", "unknown", "the type of a node: 99 is not a valid CUgraphNodeType"),
        ("MEMCPY_BATCH", "memcpy batch", "what a node does: its type is MEMCPY_BATCH"),
    ],
)
def test_kinds_of_a_newer_driver(fake: FakeDriver, kind: str, expected: str, says: str) -> None:
    graph = fake.graph()
    fake.node(graph, kind)
    read = inspect(graph)
    assert (only(read).kind, only(read).accesses, read.unreadable) == (expected, (), (says,))


@pytest.mark.parametrize(
    ("kind", "name", "call"),
    [
        ("memcpy", "MEMCPY", "cuGraphMemcpyNodeGetParams"),
        ("memset", "MEMSET", "cuGraphMemsetNodeGetParams"),
        ("alloc", "MEM_ALLOC", "cuGraphMemAllocNodeGetParams"),
        ("free", "MEM_FREE", "cuGraphMemFreeNodeGetParams"),
        ("batch memop", "BATCH_MEM_OP", "cuGraphBatchMemOpNodeGetParams"),
    ],
)
def test_bytes_that_are_not_told(fake: FakeDriver, kind: str, name: str, call: str) -> None:
    graph = fake.graph()
    fake.node(graph, name)
    fake.failing[call] = NOT_SUPPORTED
    read = inspect(graph)
    assert (only(read).kind, only(read).accesses) == (kind, ())
    assert read.unreadable == (f"bytes of a {kind} node: CUDA_ERROR_NOT_SUPPORTED: as the test wanted",)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [PROGRAMMATIC, LAUNCH_ORDER, (0, 0, 1)])
def test_an_edge_that_does_not_wait_for_the_end_orders_nothing(fake: FakeDriver, data: tuple[int, int, int]) -> None:
    def pair(data: tuple[int, int, int]) -> DeviceGraph:
        graph = fake.graph()
        fake.edge(graph, fake.memset(graph, 0xA000, 8), fake.memset(graph, 0xA000, 8), data)
        return inspect(graph)

    early, full = pair(data), pair(FULL)
    assert (early.edges, early.unordered, hazards(early)) == ((), ((0, 1),), 1)
    assert (full.edges, full.unordered, hazards(full)) == (((0, 1),), (), 0)
    assert early.unreadable == ()  # known not to order: that is no gap in what is known


def test_edges_keep_their_own_data(fake: FakeDriver) -> None:
    graph = fake.graph()
    nodes = [fake.memset(graph, 0xA000, 8) for _ in range(20)]
    data = [random.Random(1).choice([FULL, PROGRAMMATIC]) for _ in range(19)]
    for (source, target), of in zip(pairwise(nodes), data, strict=True):
        fake.edge(graph, source, target, of)
    read = inspect(graph)
    pairs = [(n, n + 1) for n in range(19)]
    assert read.edges == tuple(pair for pair, of in zip(pairs, data, strict=True) if of == FULL)
    assert read.unordered == tuple(pair for pair, of in zip(pairs, data, strict=True) if of != FULL)


# --- graphs inside nodes ----------------------------------------------------------------------------------------------


def test_a_child_graph_is_inlined_between_its_neighbours(fake: FakeDriver) -> None:
    inner = fake.graph()
    a, b = (fake.memset(inner, 0x100 * n, 8) for n in (1, 2))
    fake.memset(inner, 0x300, 8, after=(a, b))
    outer = fake.graph()
    before = fake.memset(outer, 0x400, 8)
    child = fake.child(outer, inner, after=(before,))
    after = fake.memset(outer, 0x500, 8, after=(child,))
    read = inspect(outer)
    assert [node.handle for node in read.nodes] == [before, child, child, child, after]
    assert set(read.edges) == {(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)}
    assert (read.unordered, read.unreadable) == ((), ())


def test_an_empty_child_keeps_order(fake: FakeDriver) -> None:
    outer = fake.graph()
    middle = fake.graph()
    fake.child(middle, fake.graph())
    before = fake.memset(outer, 0xA000, 8)
    child = fake.child(outer, middle, after=(before,))
    fake.memset(outer, 0xA000, 8, after=(child,))
    read = inspect(outer)
    assert [(node.handle, node.kind) for node in read.nodes][1] == (child, "empty")
    assert (read.edges, hazards(read)) == (((0, 1), (1, 2)), 0)
    assert inspect(fake.graph()) == DeviceGraph((), (), (), ())


def test_a_child_ends_only_when_all_of_it_has(fake: FakeDriver) -> None:
    """An early edge inside a child does not make its source an inner node: the child still waits for its end."""
    inner = fake.graph()
    fake.edge(inner, fake.memset(inner, 0xA000, 8), fake.memset(inner, 0xB000, 8), PROGRAMMATIC)
    outer = fake.graph()
    before = fake.memset(outer, 0xB000, 8)
    child = fake.child(outer, inner, after=(before,))
    fake.memset(outer, 0xA000, 8, after=(child,))
    read = inspect(outer)
    assert set(read.edges) == {(0, 1), (0, 2), (1, 3), (2, 3)}
    assert read.unordered == ((1, 2),)
    assert hazards(read) == 0


def test_a_child_that_cannot_be_read_stays_a_node(fake: FakeDriver) -> None:
    outer = fake.graph()
    fake.child(outer, fake.graph())
    fake.failing["cuGraphChildGraphNodeGetGraph"] = NOT_SUPPORTED
    read = inspect(outer)
    assert only(read).kind == "child graph"
    assert read.unreadable == ("nodes of a child graph: CUDA_ERROR_NOT_SUPPORTED: as the test wanted",)


def with_conditional(fake: FakeDriver, *, shown: bool = True) -> int:
    """A write before, two bodies that write, a write after: all of the same bytes."""
    bodies = [fake.graph(), fake.graph()]
    for body in bodies:
        fake.memset(body, 0xA000, 8)
    outer = fake.graph()
    before = fake.memset(outer, 0xA000, 8)
    node = fake.conditional(outer, *bodies, after=(before,), shown=shown)
    fake.memset(outer, 0xA000, 8, after=(node,))
    return outer


def test_exclusive_bodies_do_not_race(fake: FakeDriver) -> None:
    read = inspect(with_conditional(fake))
    assert kinds(read) == ["memset"] * 4
    assert read.edges == ((1, 2), (0, 1), (2, 3))
    assert (read.nodes[1].handle, read.unreadable) == (read.nodes[2].handle, ())
    assert hazards(read) == 0
    dropped = DeviceGraph(read.nodes, read.edges[1:], (), ())  # the order between the bodies matters
    assert hazards(dropped) == 1


def test_nodes_within_one_body_do_race(fake: FakeDriver) -> None:
    body = fake.graph()
    for _ in range(2):
        fake.memset(body, 0xA000, 8)
    outer = fake.graph()
    fake.conditional(outer, body)
    assert hazards(inspect(outer)) == 1


@pytest.mark.parametrize("lacking", ["bindings", "driver", "neither: a null array"])
def test_bodies_that_cannot_be_read(fake: FakeDriver, lacking: str) -> None:
    graph = with_conditional(fake, shown=lacking != "neither: a null array")
    if lacking == "bindings":
        fake.missing_in_bindings.add("cuGraphNodeGetParams")
    if lacking == "driver":
        fake.missing_in_driver.add("cuGraphNodeGetParams")
    read = inspect(graph)
    assert kinds(read) == ["memset", "conditional", "memset"]
    assert read.edges == ((0, 1), (1, 2))
    (unreadable,) = read.unreadable
    assert unreadable.startswith("conditional bodies: ")


class Nested:
    """Random graphs in graphs, and the truth about their order: two leaves are ordered where, in the innermost graph
    around both, a path of full edges leads from the node of one to the node of the other; bodies by their number."""

    def __init__(self, fake: FakeDriver, seed: int) -> None:
        self.fake = fake
        self.dice = random.Random(seed)
        self.leaves: list[tuple[int, ...]] = []  # the way to each: graph-level steps (node index, body index, ...)
        self.before: set[tuple[tuple[int, ...], int, int]] = set()  # (way to a graph, node index, node index)
        self.graph = self.build((), depth=0)

    def build(self, way: tuple[int, ...], depth: int) -> int:
        graph, number = self.fake.graph(), self.dice.randint(1 if depth == 0 else 0, 5)
        nodes: list[int] = []
        for index in range(number):
            at = (*way, index)
            kind = self.dice.choice(["leaf", "leaf", "child", "bodies"]) if depth < 3 else "leaf"
            if kind == "leaf":
                self.leaves.append(at)
                nodes.append(self.fake.memset(graph, 8 * len(self.leaves), 8))
            elif kind == "child":
                nodes.append(self.fake.child(graph, self.build((*at, 0), depth + 1)))
            else:
                bodies = [self.build((*at, body), depth + 1) for body in range(self.dice.randint(1, 3))]
                nodes.append(self.fake.conditional(graph, *bodies))
        reach: list[set[int]] = [set() for _ in range(number)]
        for target in range(number):
            for source in range(target):
                if (draw := self.dice.random()) < 0.5:
                    data = FULL if draw < 0.35 else PROGRAMMATIC
                    self.fake.edge(graph, nodes[source], nodes[target], data)
                    if data == FULL:
                        reach[target] |= {source, *reach[source]}
        self.before |= {(way, source, target) for target in range(number) for source in reach[target]}
        return graph

    def ordered(self, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        shared = next(n for n, (left, right) in enumerate(zip(a, b, strict=False)) if left != right)
        if shared % 2:  # two bodies of one node
            return a[shared] < b[shared]
        return (a[:shared], a[shared], b[shared]) in self.before


def test_nested_graphs_keep_exactly_the_order_they_have(fake: FakeDriver) -> None:
    compared = 0
    for seed in range(300):
        nested = Nested(fake, seed)
        read = inspect(nested.graph)
        order = Order(len(read.nodes), read.edges)
        place = {node.accesses[0].start // 8 - 1: n for n, node in enumerate(read.nodes) if node.kind == "memset"}
        assert len(place) == len(nested.leaves)
        assert read.unreadable == ()
        for a, b in combinations(range(len(nested.leaves)), 2):
            for x, y in ((a, b), (b, a)):
                assert order.before(place[x], place[y]) == nested.ordered(nested.leaves[x], nested.leaves[y]), seed
                compared += 1
    assert compared > 10_000


# --- what cannot be read at all ---------------------------------------------------------------------------------------


class Refusing:
    def raw_cuda_graph(self) -> int:
        raise RuntimeError("You cannot access the raw cudaGraph_t instance unless keep_graph was true\nfrom C++")


@pytest.mark.parametrize("graph", [Refusing(), 0])
def test_no_graph_to_read(fake: FakeDriver, graph: Any) -> None:
    with pytest.raises(CaptureError, match=r"keep_graph=True") as caught:
        inspect(graph)
    assert "from C++" not in str(caught.value)


def test_a_torch_graph_is_read_through_its_handle(fake: FakeDriver) -> None:
    graph = fake.graph()
    node = fake.memset(graph, 0xA000, 8)
    kept: Any = SimpleNamespace(raw_cuda_graph=lambda: graph)
    assert only(inspect(kept)).handle == node


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda fake: fake.failing.update(cuGraphGetNodes=NOT_SUPPORTED), "the nodes of a CUDA graph"),
        (lambda fake: fake.failing.update(cuGetProcAddress=NOT_SUPPORTED), "the edges of a CUDA graph"),
        (lambda fake: setattr(fake, "edge_error", int(NOT_SUPPORTED)), "the edges of a CUDA graph"),
    ],
)
def test_a_graph_whose_order_is_not_told_is_refused(
    fake: FakeDriver, spoil: Callable[[FakeDriver], None], says: str
) -> None:
    graph = fake.graph()
    fake.memset(graph, 0xA000, 8)
    assert kinds(inspect(graph)) == ["memset"]
    spoil(fake)
    with pytest.raises(CaptureError, match=says) as caught:
        inspect(graph)
    assert "CUDA_ERROR_NOT_SUPPORTED" in str(caught.value)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
N = 1 << 12


@pytest.fixture
def cuda() -> Any:
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the context
    return driver.cuda


def handle_of(call: str, *arguments: Any) -> Any:
    return driver.call(getattr(driver.cuda, call)(*arguments), call)


def depend(cuda: Any, graph: Any, source: Any, target: Any, data: tuple[int, int, int] = FULL) -> None:
    edge = cuda.CUgraphEdgeData()
    edge.type, edge.from_port, edge.to_port = data
    name = "cuGraphAddDependencies_v2" if hasattr(cuda, "cuGraphAddDependencies_v2") else "cuGraphAddDependencies"
    handle_of(name, graph, [source], [target], [edge], 1)


def add_memset(
    cuda: Any, graph: Any, start: int, nbytes: int, after: list[Any], height: int = 1, pitch: int = 0
) -> Any:
    params = cuda.CUDA_MEMSET_NODE_PARAMS()
    params.dst, params.elementSize, params.width = cuda.CUdeviceptr(start), 1, nbytes
    params.height, params.pitch, params.value = height, pitch, 7
    return handle_of("cuGraphAddMemsetNode", graph, after, len(after), params, handle_of("cuCtxGetCurrent"))


@gpu
def test_a_torch_capture_on_two_streams(cuda: Any) -> None:
    weight, x = torch.randn(64, 64, device="cuda"), torch.randn(64, 64, device="cuda")
    pinned = torch.randn(N).pin_memory()
    copied, filled, landed = (torch.zeros(N, device="cuda") for _ in range(3))
    stream, aux = torch.cuda.Stream(), torch.cuda.Stream()

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        aux.wait_stream(stream)
        multiplied = x @ weight
        with torch.cuda.stream(aux):
            copied.copy_(landed)
            handle_of("cuMemsetD8Async", cuda.CUdeviceptr(filled.data_ptr()), 0, filled.nbytes, aux.cuda_stream)
            landed.copy_(pinned, non_blocking=True)
            doubled = landed * 2
        stream.wait_stream(aux)
        return multiplied, doubled

    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=stream):
        multiplied, doubled = work()
        total = multiplied.flatten() + doubled
    read = inspect(graph)

    assert read.unreadable == ()
    raw = handle_of("cuGraphGetNodes", graph.raw_cuda_graph(), len(read.nodes))
    assert ([node.handle for node in read.nodes], len(read.nodes)) == ([int(node) for node in raw[0]], raw[1])
    kernels = [n for n, node in enumerate(read.nodes) if node.kind == "kernel"]
    assert all(read.nodes[n].name != "kernel" and read.nodes[n].function for n in kernels)
    assert all(read.nodes[n].parameters for n in kernels)

    def holders(*tensors: torch.Tensor) -> list[int]:
        return [n for n in kernels if {t.data_ptr() for t in tensors} <= set(words(read.nodes[n]))]

    multiply = holders(weight)
    assert holders(x) == multiply
    assert holders(multiplied)
    (double,) = holders(landed, doubled)
    (add,) = holders(multiplied, doubled, total)

    def span(tensor: torch.Tensor, writes: bool) -> Access:
        return Access(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, writes)

    exact = {node.accesses: (n, node.kind) for n, node in enumerate(read.nodes) if node.accesses}
    (inside, up, fill) = (
        exact.pop((span(landed, False), span(copied, True))),
        exact.pop((span(pinned, False), span(landed, True))),
        exact.pop((span(filled, True),)),
    )
    assert (inside[1], up[1], fill[1]) == ("memcpy", "memcpy", "memset")

    order = Order(len(read.nodes), (*read.edges, *read.unordered))
    side = [inside[0], fill[0], up[0], double, add]
    assert all(order.before(a, b) for a, b in pairwise(side))
    for first in multiply:
        assert order.before(first, add)
        assert not any(order.before(first, other) or order.before(other, first) for other in side[:-1])
    assert hazards(read, *read.unordered) == 0


@gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_torch_graph_that_was_not_kept(captured: bool) -> None:
    graph = torch.cuda.CUDAGraph(keep_graph=not captured)
    if captured:
        with torch.cuda.graph(graph):
            torch.zeros(8, device="cuda")
    with pytest.raises(CaptureError, match="keep_graph=True"):
        inspect(graph)


@gpu
def test_a_graph_made_by_hand(cuda: Any) -> None:
    """A child in a child, pitched memory, an event."""
    buffer = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    base = buffer.data_ptr()
    inner, middle, outer = (handle_of("cuGraphCreate", 0) for _ in range(3))
    try:
        a, b = (add_memset(cuda, inner, base + 256 * n, 8, []) for n in (0, 1))
        add_memset(cuda, inner, base + 512, 16, [a, b], height=3, pitch=64)
        handle_of("cuGraphAddChildGraphNode", middle, [], 0, inner)
        before = add_memset(cuda, outer, base + 1024, 8, [])
        child = handle_of("cuGraphAddChildGraphNode", outer, [before], 1, middle)
        event = handle_of("cuEventCreate", 0)
        record = handle_of("cuGraphAddEventRecordNode", outer, [child], 1, event)
        copied = cuda.CUDA_MEMCPY3D()
        copied.srcMemoryType = copied.dstMemoryType = cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copied.srcDevice, copied.dstDevice = cuda.CUdeviceptr(base), cuda.CUdeviceptr(base + 0x8000)
        copied.srcPitch, copied.dstPitch, copied.dstXInBytes, copied.dstY = 64, 128, 4, 1
        copied.WidthInBytes, copied.Height, copied.Depth = 32, 4, 1
        context = handle_of("cuCtxGetCurrent")
        move = handle_of("cuGraphAddMemcpyNode", outer, [record], 1, copied, context)
        read = inspect(int(outer))
    finally:
        for graph in (outer, middle, inner):
            cuda.cuGraphDestroy(graph)
    assert read.unreadable == ()
    by_handle = {int(before): "before", int(child): "child", int(record): "record", int(move): "move"}
    names = [by_handle[node.handle] for node in read.nodes]
    assert sorted(names) == ["before", "child", "child", "child", "move", "record"]
    assert read.nodes[names.index("record")].kind == "event record"
    pitched = next(n for n, node in enumerate(read.nodes) if len(node.accesses) == 3)
    assert [a.start - base for a in read.nodes[pitched].accesses] == [512, 576, 640]
    reads = covered(read.nodes[names.index("move")].accesses, writes=False)
    writes = covered(read.nodes[names.index("move")].accesses, writes=True)
    assert reads == {base + 64 * row + byte for row in range(4) for byte in range(32)}
    assert writes == {base + 0x8000 + 128 * (row + 1) + 4 + byte for row in range(4) for byte in range(32)}
    roots = [n for n, name in enumerate(names) if name == "child" and n != pitched]
    expected = {(names.index("before"), root) for root in roots} | {(root, pitched) for root in roots}
    expected |= {(pitched, names.index("record")), (names.index("record"), names.index("move"))}
    assert set(read.edges) == expected
    assert read.unordered == ()


@gpu
def test_early_edges_between_kernels(cuda: Any) -> None:
    """The first two are early: cuda-bindings up to 12.9.5 and 13.2.0 would tell those wrong."""
    x = torch.zeros(N, device="cuda")
    kept = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(kept):
        x += 1
    (source,) = handle_of("cuGraphGetNodes", kept.raw_cuda_graph(), 1)[0]
    params = handle_of("cuGraphKernelNodeGetParams", source)
    graph = handle_of("cuGraphCreate", 0)
    try:
        nodes = [handle_of("cuGraphAddKernelNode", graph, [], 0, params) for _ in range(600)]
        early = [n for n in range(599) if n < 2 or n % 3 == 0]
        for n in range(599):
            depend(cuda, graph, nodes[n], nodes[n + 1], PROGRAMMATIC if n in early else FULL)
        read = inspect(int(graph))
    finally:
        cuda.cuGraphDestroy(graph)
    place = {node.handle: n for n, node in enumerate(read.nodes)}
    at = [place[int(node)] for node in nodes]
    assert set(read.unordered) == {(at[n], at[n + 1]) for n in early}
    assert set(read.edges) == {(at[n], at[n + 1]) for n in range(599) if n not in early}
    assert read.unreadable == ()
    assert all(x.data_ptr() in words(node) for node in read.nodes)


@gpu
def test_conditional_bodies_are_inlined_or_reported(cuda: Any) -> None:
    buffer = torch.zeros(1 << 10, dtype=torch.uint8, device="cuda")
    graph = handle_of("cuGraphCreate", 0)
    try:
        context = handle_of("cuCtxGetCurrent")
        before = add_memset(cuda, graph, buffer.data_ptr(), 8, [])
        params = cuda.CUgraphNodeParams()
        params.type = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = handle_of("cuGraphConditionalHandleCreate", graph, context, 1, 1)
        params.conditional.type = cuda.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_IF
        params.conditional.size = 1
        params.conditional.ctx = context
        plain = hasattr(cuda, "cuGraphAddNode_v2")  # bindings before 13: the plain call takes no edge data
        node = handle_of("cuGraphAddNode", graph, [before], *(() if plain else (None,)), 1, params)
        (body,) = params.conditional.phGraph_out
        add_memset(cuda, body, buffer.data_ptr(), 8, [])
        add_memset(cuda, graph, buffer.data_ptr(), 8, [node])
        read = inspect(int(graph))
    finally:
        cuda.cuGraphDestroy(graph)
    inner = next(n for n in read.nodes if n.handle == int(node))
    if read.unreadable:
        assert read.unreadable[0].startswith("conditional bodies: ")
        assert inner == DeviceNode(int(node), "conditional", "conditional", 0, (), ())
    else:
        assert kinds(read) == ["memset"] * 3
        assert inner.accesses == (Access(buffer.data_ptr(), buffer.data_ptr() + 8, True),)
    assert len(read.nodes) == 3
    assert hazards(read) == 0
    assert hazards(DeviceGraph(read.nodes, read.edges[1:], (), ())) > 0


@gpu
def test_reading_is_fast() -> None:
    x = torch.zeros(N, device="cuda")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(2000):
            x = x * 2 + 1
    nodes = len(inspect(graph).nodes)
    assert nodes >= 4000
    took = []
    for _ in range(3):
        start = time.perf_counter()
        inspect(graph)
        took.append((time.perf_counter() - start) / nodes)
    assert min(took) < 60e-6, f"{min(took) * 1e6:.1f} us a node"
