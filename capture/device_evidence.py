"""Evidence about a captured CUDA graph: its own nodes and edges, and what each node touches.

Enters: the program recorded beside the capture, the graph read back, when each node appeared, the allocator's history,
and the Triton kernels launched. Leaves: `Evidence` at the level of nodes. What a node touches comes from three sources
that check one another:
- its op's schema, and what Triton's own IR says a kernel stores to;
- the allocator: memory the op took inside itself, libraries' workspaces;
- the words of its arguments that are addresses.
Invariant: order is the graph's own; the program's waits are not consulted.

Note "programmatic edges". A kernel may be launched before the one ahead of it has ended, and then must wait itself. The
graph does not say whether it does. Torch's own ops run in order on one stream, so their kernels do (cuBLAS launches its
products so); that is trusted, and said. Of anybody else's kernel it is not.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final, Protocol

import numpy as np
import torch

from ..kernels.triton_accesses import TritonAccesses
from .evidence import Evidence, Node, Touch, span, touches
from .history import Block, Memory, after, during
from .inspect import DeviceGraph, DeviceNode
from .program import Buffer, Op, Program, TensorRef
from .record import HOST, OWN_NAMESPACES

ALWAYS: Final = (
    "memory reached through addresses in device memory, tensor-map descriptors or host callbacks is not seen, nor is "
    "memory that neither torch allocated nor a tensor lies in"
)
EARLY: Final = "kernels of torch's own ops that start early (programmatic edges) wait before they touch memory"
LOST: Final = "memory that ops take and free inside themselves: torch's memory history was lost in mid-capture"
MOST_LISTED: Final = 12
GENERATOR_STATE: Final = 512  # bytes of the allocator's smallest block, for a seed or an offset
_WORKING: Final = frozenset({"kernel", "memcpy", "memset", "host", "batch memop"})


class Launches(Protocol):
    """Which Triton kernel a function handle is."""

    def of(self, function: int) -> TritonAccesses | None: ...


def from_capture(
    program: Program, graph: DeviceGraph, moments: Mapping[int, int], memory: Memory, launches: Launches
) -> Evidence:
    """The evidence of one captured graph.

    Args:
        program: recorded while it was captured.
        graph: read back from it.
        moments: per node handle when it appeared (capture/history.py, note "moments"), in that order.
        memory: the allocator's history of the capture.
        launches: the Triton kernels launched in it.
    """
    return _Attribution(program, graph, moments, memory, launches).evidence()


class _Attribution:
    def __init__(
        self,
        program: Program,
        graph: DeviceGraph,
        moments: Mapping[int, int],
        memory: Memory,
        launches: Launches,
    ) -> None:
        self._program, self._graph, self._memory, self._launches = program, graph, memory, launches
        self._moments = moments
        self._buffers = list(program.buffers)
        self._extra: dict[tuple[int, int], int] = {}  # (address, bytes) of memory that is no tensor -> buffer
        outside = [(b.address, b.nbytes, n) for n, b in enumerate(program.buffers) if b.stream is None and b.nbytes]
        self._outside = sorted(outside)
        self._unattributed: Counter[str] = Counter(f"cannot be read back: {what}" for what in graph.unreadable)
        self._stale: Counter[str] = Counter()
        self._noted: Counter[str] = Counter()
        if not memory.whole:
            self._unattributed[LOST] += 1

    def evidence(self) -> Evidence:
        """Nodes in the order they were enqueued, the host's own steps first."""
        ranks = {handle: rank for rank, handle in enumerate(self._moments)}
        order = sorted(range(len(self._graph.nodes)), key=lambda n: ranks.get(self._graph.nodes[n].handle, len(ranks)))
        host = [i for i, step in enumerate(self._program.steps) if isinstance(step, Op) and step.stream == HOST]
        place = {node: len(host) + position for position, node in enumerate(order)}
        pointers = self._pointers()
        carriers = self._carriers()
        nodes = [self._host_node(index) for index in host]
        nodes += [self._node(n, self._graph.nodes[n], n in carriers, pointers.get(n, ())) for n in order]
        edges = [(place[a], place[b]) for a, b in self._ordering]
        edges += [(i, i + 1) for i in range(len(host) - 1)]
        for n in order:  # what the host did before it enqueued a node, it did before the node runs
            earlier = bisect_right(host, self._moments.get(self._graph.nodes[n].handle, after(-1)) // 2)
            if earlier:
                edges.append((earlier - 1, place[n]))
        assumptions = [ALWAYS, *_listed(self._noted), *_listed(self._stale)]
        return Evidence(
            tuple(nodes), tuple(edges), tuple(self._buffers), tuple(_listed(self._unattributed)), tuple(assumptions)
        )

    @cached_property
    def _ordering(self) -> tuple[tuple[int, int], ...]:
        """Edges that order memory: full ones, and programmatic ones to kernels that wait themselves."""
        trusted: list[tuple[int, int]] = []
        for a, b in self._graph.unordered:
            node = self._graph.nodes[b]
            op = self._op(self._moment(node))
            if op is not None and op.func.namespace in OWN_NAMESPACES and self._launches.of(node.function) is None:
                trusted.append((a, b))
        if trusted:
            self._noted[EARLY] += 1
        return (*self._graph.edges, *trusted)

    # -- one node ------------------------------------------------------------------------------------------------

    def _host_node(self, index: int) -> Node:
        op = self._op(during(index))
        assert op is not None
        return Node(op.name, "host", op.region, op.line, touches(op))

    def _moment(self, node: DeviceNode) -> int:
        """When it appeared; one that nobody saw, at the end."""
        return self._moments.get(node.handle, after(len(self._program.steps)))

    def _op(self, moment: int) -> Op | None:
        """The op that ran then."""
        step = self._program.steps[moment // 2] if moment % 2 == 0 else None
        return step if isinstance(step, Op) else None

    def _node(self, number: int, node: DeviceNode, carries: bool, pointers: Sequence[int]) -> Node:
        moment = self._moment(node)
        op = self._op(moment)
        kernel = node.name if node.kind == "kernel" else node.kind
        triton = self._launches.of(node.function) if node.function else None
        found: dict[Touch, None] = {}
        if op is not None and carries:
            found.update(dict.fromkeys(touches(op)))
            for block in self._scratch(op, moment // 2):
                found[self._whole(block.address, block.nbytes, f"scratch of {op.name}"), True] = None
        declared = self._declared(op)
        for access in node.accesses:
            self._exact(found, declared, access.start, access.stop, access.writes, moment)
        explained = node.kind in ("memcpy", "memset") and bool(node.accesses)
        if triton is not None:
            explained = True
            self._triton(found, declared, node, triton, op, moment)
        elif node.kind == "kernel":
            self._words(found, declared, pointers, node, op, moment)
        if op is None and node.kind in _WORKING and not explained:
            self._unattributed[f"{node.kind} `{_short(kernel)}`: no recorded op launched it"] += 1
        if op is None:
            return Node(_short(kernel), "?", None, "", tuple(found), kernel)
        stream = self._program.stream_names.get(op.stream, f"stream {op.stream:#x}")
        if node.kind == "kernel" and triton is None and op.func.namespace not in OWN_NAMESPACES:
            self._noted[f"custom op {op.name} touches what its schema declares and its insides show"] += 1
        return Node(op.name, stream, op.region, op.line, tuple(found), kernel)

    def _exact(
        self,
        found: dict[Touch, None],
        declared: Sequence[Touch],
        start: int,
        stop: int,
        writes: bool,
        moment: int,
    ) -> None:
        """Bytes that the node itself names."""
        for ref, written in declared:
            hull = ref.extent(self._buffers[ref.buffer].address)
            if (written or not writes) and hull.start <= start and stop <= hull.stop:
                return
        found[self._bytes(start, stop, moment), writes] = None

    def _triton(
        self,
        found: dict[Touch, None],
        declared: Sequence[Touch],
        node: DeviceNode,
        kernel: TritonAccesses,
        op: Op | None,
        moment: int,
    ) -> None:
        """What Triton's IR says the kernel does with each pointer it was given."""
        for what in kernel.assumed:
            self._noted[f"Triton kernel {kernel.kernel}: {what}"] += 1
        for parameter in kernel.parameters:
            if parameter.position >= len(node.parameters):
                self._unattributed[f"Triton kernel {kernel.kernel}: parameter {parameter.name} was not read back"] += 1
                continue
            address = int.from_bytes(node.parameters[parameter.position][:8], "little")
            if not address or not (parameter.reads or parameter.writes):
                continue
            own = self._declared_at(declared, address)
            if not own:
                found[self._around(address, moment), parameter.writes] = None
            elif parameter.writes and not any(writes for _, writes in own):
                found.update(dict.fromkeys((ref, True) for ref, _ in own))
                label = self._buffers[own[0][0].buffer].label
                name = op.name if op is not None else "nothing"
                self._noted[
                    f"kernel {kernel.kernel} writes `{label}`, which {name} declares it only reads: counted"
                ] += 1

    def _words(
        self,
        found: dict[Touch, None],
        declared: Sequence[Touch],
        pointers: Sequence[int],
        node: DeviceNode,
        op: Op | None,
        moment: int,
    ) -> None:
        """Words of the arguments that are addresses of something the op did not declare."""
        for address in pointers:
            if any(self._holds(ref.buffer, address) for ref, _ in declared):
                continue
            if any(self._holds(ref.buffer, address) for ref, _ in found):
                continue
            if op is None:
                found[self._around(address, moment), True] = None
                continue
            tensor = self._tensor_at(address, moment)
            if tensor is not None:
                label = self._buffers[tensor].label
                self._stale[
                    f"`{op.name}` ({_short(node.name)}) holds an address in `{label}`, taken for a leftover"
                ] += 1
                continue
            block = self._memory.at(address, moment)
            place = (block.address, block.nbytes) if block is not None else self._memory.older(address)
            if place is None:
                continue  # memory that is free: a leftover
            if torch.Tag.nondeterministic_seeded in op.func.tags and place[1] <= GENERATOR_STATE:
                self._noted[f"`{op.name}` reads its generator's state, and nothing else it did not declare"] += 1
                continue
            found[self._whole(*place, f"workspace of {op.name}"), True] = None

    # -- memory --------------------------------------------------------------------------------------------------

    def _declared(self, op: Op | None) -> tuple[Touch, ...]:
        return () if op is None else touches(op)

    def _scratch(self, op: Op, step: int) -> list[Block]:
        """What an op was handed while it ran, but for the tensors it returns."""
        first = step
        while first and not isinstance(self._program.steps[first - 1], Op):
            first -= 1  # a custom op with regions inside it began before their steps
        taken = [block for n in range(first, step + 1) for block in self._memory.born_at.get(during(n), ())]
        fresh = {self._buffers[ref.buffer].address for ref in op.fresh if ref is not None}
        # A tensor may lie where scratch was: the last block there is the tensor's.
        returned = {block.address: block for block in taken if block.address in fresh}
        return [block for block in taken if returned.get(block.address) is not block]

    def _declared_at(self, declared: Sequence[Touch], address: int) -> list[Touch]:
        """What is declared at an address; if nothing is, what is anywhere in the buffer there."""
        own = [touch for touch in declared if self._holds(touch[0].buffer, address)]
        hulls = [(touch, touch[0].extent(self._buffers[touch[0].buffer].address)) for touch in own]
        return [touch for touch, hull in hulls if hull.start <= address < hull.stop] or own

    def _holds(self, buffer: int, address: int) -> bool:
        found = self._buffers[buffer]
        return found.address <= address < found.address + found.nbytes

    def _whole(self, address: int, nbytes: int, label: str) -> TensorRef:
        """All of a block that is no tensor."""
        number = self._extra.get((address, nbytes))
        if number is None:
            number = self._extra[address, nbytes] = len(self._buffers)
            self._buffers.append(Buffer(address, nbytes, None, label))
        return span(number, 0, nbytes)

    def _tensor_at(self, address: int, moment: int) -> int | None:
        """The program's buffer that holds `address` at that moment."""
        block = self._memory.at(address, moment)
        if block is not None:
            return self._born.get((block.address, block.born))
        index = bisect_right(self._outside, (address, 1 << 62, 0)) - 1
        if index >= 0 and address < self._outside[index][0] + self._outside[index][1]:
            return self._outside[index][2]
        return None

    @cached_property
    def _born(self) -> dict[tuple[int, int], int]:
        """(address, moment) -> the buffer that an op allocated there."""
        return {
            (self._buffers[ref.buffer].address, during(index)): ref.buffer
            for index, step in enumerate(self._program.steps)
            if isinstance(step, Op)
            for ref in step.fresh
            if ref is not None
        }

    def _around(self, address: int, moment: int) -> TensorRef:
        """All of the allocation that holds `address`."""
        tensor = self._tensor_at(address, moment)
        if tensor is not None:
            return span(tensor, 0, self._buffers[tensor].nbytes)
        block = self._memory.at(address, moment)
        place = (block.address, block.nbytes) if block is not None else self._memory.older(address)
        if place is not None:
            return self._whole(*place, "memory of no recorded tensor")
        self._noted["memory torch did not allocate is told apart by the addresses that kernels are given"] += 1
        return self._whole(address, 1, "memory torch did not allocate")

    def _bytes(self, start: int, stop: int, moment: int) -> TensorRef:
        tensor = self._tensor_at(start, moment)
        if tensor is not None and self._holds(tensor, stop - 1):
            base = self._buffers[tensor].address
            return span(tensor, start - base, stop - base)
        return self._whole(start, stop - start, "memory of no recorded tensor")

    # -- all nodes at once ---------------------------------------------------------------------------------------

    def _pointers(self) -> dict[int, tuple[int, ...]]:
        """Per kernel node, the words of its arguments that lie in the allocator's memory or in an outside tensor."""
        spans = sorted({*self._memory.segments, *((address, nbytes) for address, nbytes, _ in self._outside)})
        kernels = [(n, node) for n, node in enumerate(self._graph.nodes) if node.kind == "kernel" and node.parameters]
        if not spans or not kernels:
            return {}
        starts = np.array([start for start, _ in spans], np.uint64)
        # Spans may nest (a tensor in its segment): what lies in any is below the furthest end so far.
        stops = np.maximum.accumulate(np.array([start + size for start, size in spans], np.uint64))
        data = [b"".join(p[: len(p) // 8 * 8] for p in node.parameters) for _, node in kernels]
        words = np.frombuffer(b"".join(data), np.uint64)
        whose = np.repeat(np.arange(len(kernels)), [len(part) // 8 for part in data])
        index = np.searchsorted(starts, words, side="right") - 1
        hits = np.nonzero((index >= 0) & (words < stops[np.maximum(index, 0)]))[0]
        found: dict[int, dict[int, None]] = {}
        for hit in hits:
            found.setdefault(kernels[int(whose[hit])][0], {})[int(words[hit])] = None
        return {number: tuple(addresses) for number, addresses in found.items()}

    def _carriers(self) -> set[int]:
        """Nodes that stand for their op's schema: the first and last of a chain, else all of the op's nodes."""
        by_op: dict[int, list[int]] = {}
        for n, node in enumerate(self._graph.nodes):
            moment = self._moment(node)
            if self._op(moment) is not None and node.kind in (*_WORKING, "conditional"):
                by_op.setdefault(moment, []).append(n)
        edges = set(self._ordering)
        ranks = {handle: rank for rank, handle in enumerate(self._moments)}
        carriers: set[int] = set()
        for members in by_op.values():
            members.sort(key=lambda n: ranks[self._graph.nodes[n].handle])
            chain = all(pair in edges for pair in itertools.pairwise(members))
            carriers.update((members[0], members[-1]) if chain else members)
        return carriers


def _listed(counted: Counter[str]) -> list[str]:
    lines = [text if count == 1 else f"{text} ({count} times)" for text, count in counted.most_common(MOST_LISTED)]
    rest = len(counted) - len(lines)
    return [*lines, f"and {rest} more of the kind"] if rest > 0 else lines


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."
