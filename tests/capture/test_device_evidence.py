"""What the nodes of a captured graph touch: each source of knowledge, and what happens without it.

The graphs here are written by hand as the driver would show them; on a GPU, tests/capture/test_planted.py and
tests/end_to_end/test_gpu_proof.py capture real ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from auxstream.capture.device_evidence import from_capture
from auxstream.capture.hazards import Access
from auxstream.capture.history import Block, Memory, after, during, memory_of
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


def block(address: int, nbytes: int, step: int, freed: int | None) -> Block:
    """Handed out while `step` ran, and freed after it or a later one."""
    return Block(address, nbytes, during(step), None if freed is None else after(freed))


BLOCKS = (block(A, SIZE, 0, None), block(B, SIZE, 1, None))
OWNERS: dict[int, int | None] = {101: 0, 102: 1}


def report(
    device: DeviceGraph,
    ops: tuple[Op, ...] = (MULTIPLY, ADD),
    owners: dict[int, int | None] = OWNERS,
    blocks: tuple[Block, ...] = BLOCKS,
    before: tuple[tuple[int, int], ...] = (),
    triton: Any = None,
    whole: bool = True,
) -> Any:
    """`owners`: per node the step that made it, in that order; None: it appeared after the step before."""
    memory = Memory(blocks, before, SEGMENTS, whole)
    moments: dict[int, int] = {}
    last = -1
    for handle, step in owners.items():
        last = last if step is None else step
        moments[handle] = after(last) if step is None else during(step)
    return verify(from_capture(program(*ops), device, moments, memory, triton or NoTriton()))


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
    blocks = (block(A, SIZE, 0, 1), block(B, SIZE, 1, None), block(A, SIZE, 2, 2))
    device = graph(*nodes, edges=((0, 1), (0, 2)))
    found = report(device, (MULTIPLY, ADD, sort), owners, blocks)
    assert kinds(found) == [("add.Tensor", "neg.default", "mul")]
    assert found.races[0].reuse
    assert report(device, (MULTIPLY, ADD, sort), owners, blocks[:2]).ok  # without the history nobody knows


def test_scratch_that_the_result_came_to_lie_on_is_seen_whole() -> None:
    """A sort takes 8 KiB, gives them back, and returns a tensor that lies in their first bytes."""
    sort, beside = op(MAIN, aten.sort.default, (0,), (1,)), op(AUX, aten.add.Tensor, (0,), (2,))
    nodes = graph(kernel(101, OUTSIDE, A), kernel(102, OUTSIDE, B))
    blocks = (block(A, 0x2000, 0, 0), block(A, SIZE, 0, None), block(B, SIZE, 1, None))
    assert kinds(report(nodes, (sort, beside), blocks=blocks)) == [
        ("sort.default", "add.Tensor", "scratch of sort.default")
    ]
    assert report(nodes, (sort, beside), blocks=blocks[1:]).ok


def test_memory_taken_between_two_ops_is_no_scratch() -> None:
    """Generated code takes memory without an op: what came before has nothing to do with it."""
    nodes = graph(kernel(101, OUTSIDE, A), kernel(102, OUTSIDE, B))
    second = op(AUX, aten.add.Tensor, (0,), (2,))
    taken = Block(SCRATCH, SIZE, after(0), after(0))
    for where in (taken, replace(taken, address=B, freed=after(0))):
        assert report(nodes, (MULTIPLY, second), blocks=(BLOCKS[0], where, BLOCKS[1])).ok
    inside = replace(taken, address=B, born=during(0))
    assert report(nodes, (MULTIPLY, second), blocks=(BLOCKS[0], inside, BLOCKS[1])).races


@pytest.mark.parametrize("where", ["older", "never freed"])
def test_a_workspace_that_two_streams_share(where: str) -> None:
    first, second = op(MAIN, aten.mm.default, (0,), (1,)), op(AUX, aten.mm.default, (0,), (2,))
    nodes = (kernel(101, OUTSIDE, A, WORKSPACE), kernel(102, OUTSIDE, B, WORKSPACE + 64))
    older = ((WORKSPACE, 0x1000),) if where == "older" else ()
    blocks = BLOCKS if older else (block(WORKSPACE, 0x1000, 0, None), *BLOCKS)
    found = report(graph(*nodes), (first, second), blocks=blocks, before=older)
    assert [race.nbytes for race in found.races] == [0x1000]
    apart = (kernel(101, OUTSIDE, A, WORKSPACE), kernel(102, OUTSIDE, B))
    assert report(graph(*apart), (first, second), blocks=BLOCKS, before=((WORKSPACE, 0x1000),)).ok


@pytest.mark.parametrize(("before", "seen"), [(b"", True), (bytes(8), True), (bytes(4), False)])
def test_words_are_whole_and_aligned(before: bytes, seen: bool) -> None:
    """An address in a struct lies at a multiple of eight; other parameters may have any length."""
    struct = before + WORKSPACE.to_bytes(8, "little") + bytes(4)
    first, second = op(MAIN, aten.mm.default, (0,), (1,)), op(AUX, aten.mm.default, (0,), (2,))
    nodes = [DeviceNode(handle, "kernel", "k", 0, (b"\xff" * 7, struct), ()) for handle in (101, 102)]
    assert bool(report(graph(*nodes), (first, second), before=((WORKSPACE, 0x1000),)).races) is seen


def test_a_generator_s_state_is_only_read() -> None:
    drop = torch.ops.aten.bernoulli.p
    first, second = op(MAIN, drop, (0,), (1,)), op(AUX, drop, (0,), (2,))
    nodes = (kernel(101, OUTSIDE, A, WORKSPACE), kernel(102, OUTSIDE, B, WORKSPACE))
    found = report(graph(*nodes), (first, second), before=((WORKSPACE, 512),))
    assert found.ok
    assert any("generator" in text for text in found.assumptions)
    assert report(graph(*nodes), (first, second), before=((WORKSPACE, 0x1000),)).races  # that is a workspace


def test_an_address_of_another_tensor_is_an_assumption() -> None:
    third = op(MAIN, aten.neg.default, (0,), ())
    nodes = (kernel(101, OUTSIDE, A), kernel(102, A, B), kernel(103, OUTSIDE, B))
    found = report(graph(*nodes, edges=((0, 1), (0, 2))), (MULTIPLY, ADD, third), {101: 0, 102: 1, 103: 2})
    assert found.ok
    assert any("`neg.default`" in text and "`add`" in text for text in found.assumptions)


def test_a_workspace_where_a_tensor_of_no_op_lay_before() -> None:
    """Generated code makes tensors without an op: what they are is known when an op meets them, but not how long."""
    first, second = op(MAIN, aten.mm.default, (0,), (1,)), op(AUX, aten.mm.default, (0,), (2,))
    nodes = graph(kernel(101, OUTSIDE, A, WORKSPACE), kernel(102, OUTSIDE, B, WORKSPACE))
    met = Program((first, second), (*BUFFERS, Buffer(WORKSPACE, SIZE, None, "outside tensor")), {MAIN: "caller"}, 0)
    moments = {101: during(0), 102: during(1)}
    for workspace, races in (((), 0), ((Block(WORKSPACE, 0x1000, after(-1), None),), 1)):
        memory = Memory((*BLOCKS, *workspace), (), SEGMENTS)
        found = verify(from_capture(met, nodes, moments, memory, NoTriton()))
        assert len(found.races) == races


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


def test_memory_torch_did_not_allocate_is_told_by_its_address() -> None:
    foreign = 1 << 40
    owners: dict[int, int | None] = {101: 0, 102: 1, 103: None, 104: None}
    writes = OneTriton(Parameter("p", 0, False, True))
    for second, races in ((foreign, 1), (foreign + 64, 0)):
        nodes = (kernel(101), kernel(102), kernel(103, foreign, function=7), kernel(104, second, function=7))
        found = report(graph(*nodes, edges=((0, 1),)), owners=owners, triton=writes)
        assert len(found.races) == races
        assert any("torch did not allocate" in text for text in found.assumptions[1:])


@pytest.mark.parametrize("ordered", [False, True])
def test_a_kernel_between_ops_reads_what_lay_there_when_it_was_launched(ordered: bool) -> None:
    """`mul`'s block is read by a kernel on the lane, and later handed out again in halves: both must wait for it."""
    low, high = Buffer(A, SIZE, MAIN, "low"), Buffer(A + SIZE, SIZE, MAIN, "high")
    buffers = (BUFFERS[0], Buffer(A, 2 * SIZE, MAIN, "mul"), low, high)
    both = TensorRef(1, 0, (2 * SIZE,), (1,), torch.uint8)
    makes = [
        replace(op(MAIN, aten.mul.Tensor, (0,), ()), fresh=(made,), writes=(made,)) for made in (both, ref(2), ref(3))
    ]
    recorded = Program(tuple(makes), buffers, {MAIN: "caller", AUX: "lane0"}, 0)
    blocks = (block(A, 2 * SIZE, 0, 0), block(A, SIZE, 1, None), block(A + SIZE, SIZE, 2, None))
    moments = {101: during(0), 102: after(0), 103: during(1), 104: during(2)}
    nodes = (kernel(101), kernel(102, A, function=7), kernel(103), kernel(104))
    edges = ((0, 1), (1, 2), (2, 3) if ordered else (0, 3))
    reads = OneTriton(Parameter("y", 0, True, False))
    found = verify(from_capture(recorded, graph(*nodes, edges=edges), moments, Memory(blocks, (), SEGMENTS), reads))
    assert found.ok is ordered
    assert [(race.second.buffer, race.nbytes) for race in found.races] == ([] if ordered else [("high", SIZE)])


@pytest.mark.parametrize("kind", ["triton", "memset"])
def test_a_view_that_is_written_says_nothing_of_its_neighbour(kind: str) -> None:
    """One buffer: an op declares that it reads the first half and writes the second, and writes the first too."""
    first, second = (TensorRef(0, start, (SIZE // 2,), (1,), torch.uint8) for start in (0, SIZE // 2))
    halves = replace(op(AUX, aten.add.Tensor, (), ()), reads=(first,), writes=(second,))
    beside = replace(op(MAIN, aten.neg.default, (), (1,)), reads=(first,))
    for lies in (False, True):
        target = OUTSIDE if lies else OUTSIDE + SIZE // 2
        if kind == "triton":
            node = kernel(102, OUTSIDE, OUTSIDE + SIZE // 2, function=7)
            triton = OneTriton(Parameter("x", 0, True, lies), Parameter("out", 1, False, True))
        else:
            node, triton = DeviceNode(102, "memset", "memset", 0, (), (Access(target, target + 64, True),)), None
        found = report(graph(kernel(101, OUTSIDE, A), node), (beside, halves), triton=triton)
        assert bool(found.races) is lies, str(found)


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


OURS = "auxstream 7: "


def event(action: str, address: int, stamp: int | str, size: int = SIZE) -> dict[str, Any]:
    told = f"{OURS}{stamp}" if isinstance(stamp, int) or stamp == "begin" else stamp
    return {"action": action, "addr": address, "size": size, "stream": 0, "user_metadata": told}


BEGIN = (event("alloc", WORKSPACE, "begin", 1), event("free_requested", WORKSPACE, "begin", 1))


def remembered(*traces: dict[str, Any], weights: tuple[tuple[int, int], ...] = ()) -> Memory:
    blocks = [
        {"address": A, "size": 1024, "state": "active_allocated"},
        {"address": B, "size": SIZE, "state": "active_allocated"},
        {"address": B + SIZE, "size": SIZE, "state": "inactive"},
    ]
    older = [{"address": address, "size": size, "state": "active_allocated"} for address, size in weights]
    segments = [
        {"device": 0, "address": POOL, "total_size": 0x10000, "blocks": blocks},
        {"device": 0, "address": OUTSIDE, "total_size": 0x1000, "blocks": older},
        {"device": 1, "address": 0, "total_size": 1 << 40, "blocks": []},
    ]
    return memory_of({"device_traces": [list(traces)], "segments": segments}, 0, OURS)


TRACES = (
    event("alloc", A, during(0)),
    event("free_requested", A, after(3)),
    event("free_completed", A, after(3)),
    event("alloc", A, during(4), 1024),
    event("alloc", B, during(5)),
)


def test_reading_a_snapshot() -> None:
    memory = remembered(*BEGIN, *TRACES, weights=((OUTSIDE, SIZE),))
    assert memory.whole
    assert memory.blocks[1:] == (block(A, SIZE, 0, 3), block(A, 1024, 4, None), block(B, SIZE, 5, None))
    assert memory.before == ((OUTSIDE, SIZE),)
    assert memory.segments == ((OUTSIDE, 0x1000), (POOL, 0x10000))
    assert memory.at(A + 100, during(2)) == memory.blocks[1]
    assert memory.at(A + 100, during(4)) == memory.blocks[2]
    assert memory.at(A + 1000, during(2)) is None
    assert memory.at(B, during(4)) is None
    assert memory.older(OUTSIDE + SIZE - 1) == (OUTSIDE, SIZE)
    assert memory.older(OUTSIDE + SIZE) is None
    earlier = (event("alloc", A, during(0)), event("alloc", B, "somebody's own"))  # of a history that was on before
    assert remembered(*earlier, *BEGIN, *TRACES).blocks == memory.blocks


def test_a_history_that_lost_its_beginning_proves_nothing() -> None:
    """A ring buffer that came round (the user's own may be small), or that somebody cleared."""
    assert remembered(*BEGIN[1:], *TRACES).whole  # only the first event is gone, and it was ours
    assert not remembered(*TRACES).whole
    assert not remembered().whole
    nodes = graph(kernel(101, OUTSIDE, A), kernel(102, A, B), edges=((0, 1),))
    assert report(nodes).ok
    lost = report(nodes, whole=False)
    assert not lost.ok
    assert "history was lost" in lost.unattributed[0]


@pytest.mark.parametrize("stamp", ["", "auxstream 6: 0", "auxstream 77: 0"])
def test_what_other_threads_are_handed_is_no_op_s(stamp: str) -> None:
    """Another capture, and a thread without one: their blocks live, but are nobody's scratch."""
    other, own = event("alloc", OUTSIDE, stamp), event("alloc", A, during(1))
    memory = remembered(*BEGIN, event("alloc", B, during(0)), other, own, event("free_requested", OUTSIDE, stamp))
    assert [b.address for b in memory.born_at[during(0)]] == [B]
    assert [b.address for b in memory.born_at[during(1)]] == [A]
    assert memory.at(OUTSIDE, after(0)) == Block(OUTSIDE, SIZE, after(0), during(1))


def test_a_block_from_before_that_is_freed_meanwhile_is_known() -> None:
    memory = remembered(*BEGIN, event("alloc", A, during(0)), event("free_requested", WORKSPACE, after(0), 0x1000))
    assert memory.older(WORKSPACE + 100) == (WORKSPACE, 0x1000)
