"""What the nodes of a captured graph touch: each source of knowledge, and what happens without it.

The graphs here are written by hand as the driver would show them; on a GPU, tests/capture/test_planted.py and
tests/end_to_end/test_gpu_proof.py capture real ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auxstream.capture.device_evidence import from_capture
from auxstream.capture.hazards import Access
from auxstream.capture.history import Block, Memory, memory_of
from auxstream.capture.inspect import DeviceGraph, DeviceNode
from auxstream.capture.program import Buffer, Op, Program, TensorRef
from auxstream.capture.proof import verify
from auxstream.capture.record import HOST
from auxstream.kernels.triton_accesses import Parameter, TritonAccesses

aten = torch.ops.aten
MAIN, AUX = 1, 2
SIZE = 512
OUTSIDE, A, B, SCRATCH, WORKSPACE, POOL = 0x10000, 0x20000, 0x21000, 0x22000, 0x30000, 0x20000
SEGMENTS = ((OUTSIDE, 0x1000), (POOL, 0x10000), (WORKSPACE, 0x1000))


class NoTriton:
    def of(self, function: int) -> TritonAccesses | None:
        return None


class OneTriton:
    """Every kernel with a function handle is this one."""

    def __init__(self, *parameters: Parameter, assumed: tuple[str, ...] = ()) -> None:
        self.accesses = TritonAccesses("kernel", parameters, assumed)

    def of(self, function: int) -> TritonAccesses | None:
        return self.accesses if function else None


BUFFERS = (Buffer(OUTSIDE, SIZE, None, "x"), Buffer(A, SIZE, MAIN, "mul"), Buffer(B, SIZE, AUX, "add"))


def ref(buffer: int) -> TensorRef:
    return TensorRef(buffer, 0, (SIZE,), (1,), torch.uint8)


def op(stream: int, func: Any, reads: tuple[int, ...], made: tuple[int, ...], written: tuple[int, ...] = ()) -> Op:
    fresh = tuple(map(ref, made))
    writes = (*fresh, *map(ref, written))
    return Op(stream, func, (), {}, fresh, tuple(map(ref, reads)), writes, "model.py:1: line", None)


def kernel(handle: int, *pointers: int, function: int = 0, name: str = "kernel") -> DeviceNode:
    return DeviceNode(handle, "kernel", name, function, tuple(p.to_bytes(8, "little") for p in pointers), ())


def program(*ops: Op) -> Program:
    return Program(ops, BUFFERS, {MAIN: "caller", AUX: "lane0"}, 0)


def graph(
    *nodes: DeviceNode, edges: tuple[Any, ...] = (), unordered: tuple[Any, ...] = (), unreadable: Any = ()
) -> Any:
    return DeviceGraph(nodes, edges, unordered, unreadable)


MULTIPLY = op(MAIN, aten.mul.Tensor, (0,), (1,))
ADD = op(AUX, aten.add.Tensor, (1,), (2,))
BLOCKS = (Block(A, SIZE, 0, None), Block(B, SIZE, 1, None))
OWNERS = {101: 0, 102: 1}


def report(
    device: DeviceGraph,
    ops: tuple[Op, ...] = (MULTIPLY, ADD),
    owners: dict[int, int | None] = OWNERS,  # type: ignore[assignment]
    blocks: tuple[Block, ...] = BLOCKS,
    before: tuple[tuple[int, int], ...] = (),
    triton: Any = None,
) -> Any:
    memory = Memory(blocks, before, SEGMENTS)
    return verify(from_capture(program(*ops), device, owners, memory, triton or NoTriton()))


def kinds(found: Any) -> list[tuple[str, str, str]]:
    return [(race.first.op, race.second.op, race.first.buffer) for race in found.races]


# --- order and schemas ------------------------------------------------------------------------------------------------


def test_the_graph_s_own_edges_order() -> None:
    nodes = (kernel(101, OUTSIDE, A), kernel(102, A, B))
    assert report(graph(*nodes, edges=((0, 1),))).ok
    assert kinds(report(graph(*nodes))) == [("mul.Tensor", "add.Tensor", "mul")]


def test_nodes_come_in_the_order_they_were_enqueued() -> None:
    shuffled = graph(kernel(102, A, B), kernel(101, OUTSIDE, A), edges=((1, 0),))
    found = report(shuffled)
    assert found.ok
    assert [node.name for node in found.nodes] == ["mul.Tensor", "add.Tensor"]
    assert found.edges == ((0, 1),)


def test_programmatic_edges_order_only_kernels_of_torch() -> None:
    nodes = (kernel(101, OUTSIDE, A), kernel(102, A, B, function=7))
    trusted = report(graph(*nodes, unordered=((0, 1),)))
    assert trusted.ok
    assert any("start early" in text for text in trusted.assumptions)
    mine = OneTriton(Parameter("a", 0, True, False), Parameter("b", 1, False, True))
    assert kinds(report(graph(*nodes, unordered=((0, 1),)), triton=mine)) == [("mul.Tensor", "add.Tensor", "mul")]


def test_every_kernel_of_an_op_counts() -> None:
    """Three kernels of one op in a row: a neighbour ordered behind the first alone still races with the last."""
    chain = (kernel(101), kernel(111), kernel(121), kernel(102, A, B))
    owners = {101: 0, 111: 0, 121: 0, 102: 1}
    assert report(graph(*chain, edges=((0, 1), (1, 2), (2, 3))), owners=owners).ok
    assert report(graph(*chain, edges=((0, 1), (1, 2), (0, 3))), owners=owners).races
    fan = ((0, 1), (0, 2), (1, 3))  # no chain: the middle one counts as well
    assert report(graph(*chain, edges=fan), owners=owners).races


# --- the allocator ----------------------------------------------------------------------------------------------------


def test_scratch_of_an_op_is_seen() -> None:
    """`mul` dies early and its block becomes scratch of a third op, which nothing orders behind the reader."""
    sort = op(MAIN, aten.neg.default, (0,), ())
    nodes = (kernel(101, OUTSIDE, A), kernel(102, A, B), kernel(103, OUTSIDE, A))
    owners = {101: 0, 102: 1, 103: 2}
    blocks = (Block(A, SIZE, 0, 1), Block(B, SIZE, 1, None), Block(A, SIZE, 2, 2))
    device = graph(*nodes, edges=((0, 1), (0, 2)))
    found = report(device, (MULTIPLY, ADD, sort), owners, blocks)
    assert kinds(found) == [("add.Tensor", "neg.default", "mul")]
    assert found.races[0].reuse
    assert report(device, (MULTIPLY, ADD, sort), owners, blocks[:2]).ok  # without the history nobody knows


@pytest.mark.parametrize("where", ["older", "never freed"])
def test_a_workspace_that_two_streams_share(where: str) -> None:
    first, second = op(MAIN, aten.mm.default, (0,), (1,)), op(AUX, aten.mm.default, (0,), (2,))
    nodes = (kernel(101, OUTSIDE, A, WORKSPACE), kernel(102, OUTSIDE, B, WORKSPACE + 64))
    older = ((WORKSPACE, 0x1000),) if where == "older" else ()
    blocks = BLOCKS if older else (Block(WORKSPACE, 0x1000, 0, None), *BLOCKS)
    found = report(graph(*nodes), (first, second), blocks=blocks, before=older)
    assert [race.nbytes for race in found.races] == [0x1000]
    apart = (kernel(101, OUTSIDE, A, WORKSPACE), kernel(102, OUTSIDE, B))
    assert report(graph(*apart), (first, second), blocks=BLOCKS, before=((WORKSPACE, 0x1000),)).ok


def test_a_generator_s_state_is_only_read() -> None:
    drop = torch.ops.aten.bernoulli.p
    first, second = op(MAIN, drop, (0,), (1,)), op(AUX, drop, (0,), (2,))
    nodes = (kernel(101, OUTSIDE, A, WORKSPACE), kernel(102, OUTSIDE, B, WORKSPACE))
    found = report(graph(*nodes), (first, second), before=((WORKSPACE, 0x1000),))
    assert found.ok
    assert any("generator" in text for text in found.assumptions)


def test_an_address_of_another_tensor_is_an_assumption() -> None:
    third = op(MAIN, aten.neg.default, (0,), ())
    nodes = (kernel(101, OUTSIDE, A), kernel(102, A, B), kernel(103, OUTSIDE, B))
    found = report(graph(*nodes, edges=((0, 1), (0, 2))), (MULTIPLY, ADD, third), {101: 0, 102: 1, 103: 2})
    assert found.ok
    assert any("`neg.default`" in text and "`add`" in text for text in found.assumptions)


# --- work without an op -----------------------------------------------------------------------------------------------


def test_a_kernel_nobody_launched_fails_the_proof_and_counts_as_writing() -> None:
    nodes = (kernel(101, OUTSIDE, A), kernel(102, A, B), kernel(103, B))
    owners = {101: 0, 102: 1, 103: None}
    found = report(graph(*nodes, edges=((0, 1),)), owners=owners)
    assert not found.ok
    assert "no recorded op launched it" in found.unattributed[0]
    assert len(found.races) == 1
    assert found.races[0].second.writes
    ordered = report(graph(*nodes, edges=((0, 1), (1, 2))), owners=owners)
    assert not ordered.races
    assert not ordered.ok


def test_copies_and_fills_explain_themselves() -> None:
    fill = DeviceNode(103, "memset", "memset", 0, (), (Access(B, B + 64, True),))
    nodes = (kernel(101, OUTSIDE, A), kernel(102, A, B), fill)
    owners = {101: 0, 102: 1, 103: None}
    assert report(graph(*nodes, edges=((0, 1), (1, 2))), owners=owners).ok
    (race,) = report(graph(*nodes, edges=((0, 1),)), owners=owners).races
    assert race.nbytes == 64


def test_a_node_never_seen_while_recording() -> None:
    found = report(graph(kernel(101, OUTSIDE, A), kernel(102, A, B), kernel(999), edges=((0, 1),)))
    assert found.unattributed


@pytest.mark.parametrize(
    ("kind", "silent"), [("host", False), ("batch memop", False), ("empty", True), ("event record", True)]
)
def test_kinds_without_an_op(kind: str, silent: bool) -> None:
    extra = DeviceNode(103, kind, kind, 0, (), ())
    found = report(graph(kernel(101, OUTSIDE, A), kernel(102, A, B), extra, edges=((0, 1),)))
    assert found.ok is silent


def test_what_cannot_be_read_back_is_never_safe() -> None:
    found = report(graph(kernel(101), kernel(102), edges=((0, 1),), unreadable=("conditional bodies",)))
    assert not found.ok
    assert "conditional bodies" in str(found)


# --- Triton -----------------------------------------------------------------------------------------------------------


def test_a_triton_kernel_outside_of_any_op() -> None:
    nodes = (kernel(101, OUTSIDE, A), kernel(102, A, B), kernel(103, B, A, function=7))
    owners = {101: 0, 102: 1, 103: None}
    reads_b = OneTriton(Parameter("b", 0, True, False), Parameter("a", 1, False, True))
    ordered = graph(*nodes, edges=((0, 1), (1, 2)))
    assert report(ordered, owners=owners, triton=reads_b).ok
    assert len(report(graph(*nodes, edges=((0, 1),)), owners=owners, triton=reads_b).races) == 3


@pytest.mark.parametrize("lies", [False, True])
def test_a_triton_kernel_that_writes_what_its_op_declares_it_reads(lies: bool) -> None:
    """Both streams read `x`, so no edge is needed; the kernel on the lane stores to it."""
    first = op(MAIN, aten.mul.Tensor, (0,), (1,))
    second = op(AUX, aten.add.Tensor, (0,), (2,))
    nodes = (kernel(101, OUTSIDE, A), kernel(102, OUTSIDE, B, function=7))
    stores = OneTriton(Parameter("x", 0, True, lies), Parameter("out", 1, False, True))
    found = report(graph(*nodes), (first, second), triton=stores)
    assert bool(found.races) is lies
    assert any("declares it only reads" in text for text in found.assumptions) is lies


def test_a_triton_parameter_that_was_not_read_back() -> None:
    node = kernel(102, A, function=7)
    stores = OneTriton(Parameter("x", 0, True, False), Parameter("out", 1, False, True))
    assert not report(graph(kernel(101, OUTSIDE, A), node, edges=((0, 1),)), triton=stores).ok


# --- the host ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["host", "copy"])
def test_the_host_is_ahead_of_what_it_enqueues_later_and_of_nothing_else(first: str) -> None:
    host, copy = op(HOST, aten.fill_.Scalar, (), (), (0,)), op(MAIN, aten.copy_.default, (0,), (1,))
    steps = (host, copy) if first == "host" else (copy, host)
    owners: dict[int, int | None] = {101: steps.index(copy)}
    found = report(graph(kernel(101, OUTSIDE, A)), steps, owners, ())
    assert found.ok is (first == "host")
    if not found.ok:
        assert {found.races[0].first.stream, found.races[0].second.stream} == {"host", "caller"}


# --- the allocator's history ------------------------------------------------------------------------------------------


def event(action: str, address: int, step: int, size: int = SIZE) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "user_metadata": str(step)}


def test_reading_a_snapshot() -> None:
    traces = [
        event("alloc", A, 0),
        event("free_requested", A, 3),
        event("free_completed", A, 3),
        event("alloc", A, 4, 1024),
        event("alloc", B, 5),
    ]
    blocks = [
        {"address": A, "size": 1024, "state": "active_allocated"},
        {"address": B, "size": SIZE, "state": "active_allocated"},
        {"address": B + SIZE, "size": SIZE, "state": "inactive"},
    ]
    weights = [{"address": OUTSIDE, "size": SIZE, "state": "active_allocated"}]
    segments = [
        {"device": 0, "address": POOL, "total_size": 0x10000, "blocks": blocks},
        {"device": 0, "address": OUTSIDE, "total_size": 0x1000, "blocks": weights},
        {"device": 1, "address": 0, "total_size": 1 << 40, "blocks": []},
    ]
    memory = memory_of({"device_traces": [traces], "segments": segments}, 0)
    assert memory.blocks == (Block(A, SIZE, 0, 3), Block(A, 1024, 4, None), Block(B, SIZE, 5, None))
    assert memory.before == ((OUTSIDE, SIZE),)
    assert memory.segments == ((OUTSIDE, 0x1000), (POOL, 0x10000))
    assert memory.at(A + 100, 2) == memory.blocks[0]
    assert memory.at(A + 100, 4) == memory.blocks[1]
    assert memory.at(A + 1000, 2) is None
    assert memory.at(B, 4) is None
    assert memory.older(OUTSIDE + SIZE - 1) == (OUTSIDE, SIZE)
    assert memory.older(OUTSIDE + SIZE) is None
    assert memory_of({"device_traces": [traces], "segments": segments}, 0, start=3).blocks == memory.blocks[1:]
