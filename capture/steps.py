"""A step of several pieces, proved and executed as one: graphs and eager work, launched on streams of their choice.

Enters: `Piece`s, in the order the host launches them. Leaves: their `Evidence` as one; and on the simulated machine one
`Program`, and a `Simulation` of it. Invariant: evidence and program count nodes alike, so the evidence's edges are the
program's too.

Note "what a launch orders". The whole of a graph follows what its stream and its waits bring, and precedes what its
stream does next, however many streams it was captured on. Eager work is no launch: its caller's stream is the piece's,
and its lanes are the thread's own, which know nothing but what they waited for, and go on from piece to piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch.utils._pytree as pytree
from torch import Tensor

from ..runtime.errors import CaptureError
from .allocator import BASE
from .evidence import Evidence, Node, from_program
from .graphs import CapturedGraph, SimulatedGraph
from .program import Buffer, Op, Program, Record, Step, TensorRef, Wait
from .proof import Report, verify
from .simulate import Simulation


@dataclass(frozen=True, slots=True)
class Piece:
    """One launch of a step.

    Attributes:
        graph: what is launched.
        stream: on which stream: any name or number, the same for the same stream.
        after: positions of earlier pieces whose end this one waits for (events between launches). It follows the piece
            before it on its own stream anyway.
        eager: no graph but the ops themselves, recorded under auxstream.graph.
        name: for reports; default: the graph's.
    """

    graph: CapturedGraph | Program
    stream: int | str = 0
    after: tuple[int, ...] = ()
    eager: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        graph, after = cast("tuple[object, object]", (self.graph, self.after))  # callers without a type checker
        if not isinstance(graph, CapturedGraph | Program) or not isinstance(after, tuple):
            raise CaptureError(
                "a Piece cannot be made of this",
                expected="a CapturedGraph or a Program (of a compiled model, its `graph`), and a tuple of positions",
                came=f"a {type(graph).__name__}, after={after!r}",
                remedy="Piece(graph, stream, after=(0,))",
            )

    @property
    def program(self) -> Program:
        return self.graph if isinstance(self.graph, Program) else self.graph.program

    @property
    def evidence(self) -> Evidence:
        """Of eager work, what was recorded: its CUDA graph has edges that the ops themselves do not."""
        return from_program(self.program) if isinstance(self.graph, Program) or self.eager else self.graph.evidence


def verify_step(pieces: Sequence[Piece], rounds: int = 1) -> Report:
    """Prove a step of several pieces as a whole; parties of races name their pieces.

    Args:
        pieces: in launch order.
        rounds: how often the step runs, one right after the other. Two show whatever a step does to the next one.

    Returns:
        one report of all of it.

    Raises:
        CaptureError: no piece; or a piece waits for one that is not launched before it.
    """
    kinds = [type(piece) for piece in pieces]
    if not pieces or any(kind is not Piece for kind in kinds):
        raise CaptureError(
            "verify_step() was given no step",
            expected="at least one Piece, and nothing else",
            came=repr([kind.__name__ for kind in kinds]),
            remedy="verify_step([Piece(graph), ...])",
        )
    return verify(compose(pieces, rounds))


def compose(pieces: Sequence[Piece], rounds: int = 1) -> Evidence:
    """The evidence of all pieces as one, each between a node for its launch and one for its end."""
    memory = _Memory(pieces)
    nodes: list[Node] = []
    edges: list[tuple[int, int]] = []
    unattributed: dict[str, None] = {}
    assumptions: dict[str, None] = {}
    last: dict[int | str, int] = {}  # per stream
    ends: list[int] = []
    for earlier, name, piece in _launches(pieces, rounds):
        evidence = piece.evidence
        launch, first = len(nodes), len(nodes) + 1
        end = first + len(evidence.nodes)
        nodes.append(Node(f"launch of {name}", str(piece.stream)))
        for node in evidence.nodes:
            touches = tuple((memory.moved(piece, ref), writes) for ref, writes in node.touches)
            nodes.append(replace(node, stream=f"{node.stream} of {name}", touches=touches))
        nodes.append(Node(f"end of {name}", str(piece.stream)))
        edges += [(ends[earlier + other], launch) for other in piece.after]
        if piece.eager:
            outer = {_caller(piece.program): piece.stream}
            lines: dict[int | str, list[int]] = {piece.stream: [launch]}
            for position, step in enumerate(piece.program.steps):
                lines.setdefault(outer.get(step.stream, step.stream), []).append(first + position)
            lines[piece.stream].append(end)
        else:
            lines = {piece.stream: [launch, end]}
            followed, following = {a for a, _ in evidence.edges}, {b for _, b in evidence.edges}
            edges += [(launch, first + node) for node in range(len(evidence.nodes)) if node not in following]
            edges += [(first + node, end) for node in range(len(evidence.nodes)) if node not in followed]
        for stream, line in lines.items():
            edges += pairwise([last[stream], *line] if stream in last else line)
            last[stream] = line[-1]
        edges += [(first + source, first + target) for source, target in evidence.edges]
        ends.append(end)
        unattributed.update(dict.fromkeys(f"in {name}: {item}" for item in evidence.unattributed))
        assumptions.update(dict.fromkeys(evidence.assumptions))
    return Evidence(tuple(nodes), tuple(edges), tuple(memory.buffers), tuple(unattributed), tuple(assumptions))


def one_program(pieces: Sequence[Piece], rounds: int = 1) -> Program:
    """The recordings of all pieces as one, step for step the nodes of `compose`, whose edges it does not know."""
    memory = _Memory(pieces)
    steps: list[Step] = []
    streams: dict[Any, int] = {}
    names: dict[int, str] = {}
    for number, (_, name, piece) in enumerate(_launches(pieces, rounds)):
        caller, first = _caller(piece.program), len(steps) + 1
        numbers = {caller: streams.setdefault(piece.stream, len(streams))}
        names.setdefault(numbers[caller], str(piece.stream))
        steps.append(Record(numbers[caller], f"launch of {name}"))
        for step in piece.program.steps:
            if step.stream not in numbers:
                key = step.stream if piece.eager else (number, step.stream)
                numbers[step.stream] = streams.setdefault(key, len(streams))
                names[numbers[step.stream]] = f"{piece.program.stream_names.get(step.stream, step.stream)} of {name}"
            steps.append(memory.moved_step(piece, step, numbers[step.stream], first))
        steps.append(Record(numbers[caller], f"end of {name}"))
    return Program(tuple(steps), tuple(memory.buffers), names, memory.arena_bytes)


def simulate_step(pieces: Sequence[Piece], rounds: int = 1) -> Simulation:
    """All pieces, graphs of the simulated machine, ready to execute over the memory they were captured on."""
    memory = _Memory(pieces)
    outside: dict[int, Tensor] = {}
    visible: dict[int, Tensor] = {}
    for piece in pieces:
        assert isinstance(piece.graph, SimulatedGraph), piece.graph
        numbers = memory.numbers[id(piece.graph)]
        simulation = piece.graph.simulation
        for buffer, view in simulation.outside.items():
            if memory.buffers[numbers[buffer]].stream is None:  # else a piece before it made it, in the arena
                outside[numbers[buffer]] = view
        visible.update((numbers[b], view) for b, view in simulation.visible.items())
    return Simulation(one_program(pieces, rounds), outside, visible, compose(pieces, rounds).edges)


def _launches(pieces: Sequence[Piece], rounds: int) -> Iterator[tuple[int, str, Piece]]:
    """Per launch: how many came before its round, a name that no other piece has, and the piece."""
    names = [
        piece.name or (piece.graph.name if isinstance(piece.graph, CapturedGraph) else "piece") for piece in pieces
    ]
    for number in range(rounds):
        for position, piece in enumerate(pieces):
            if not all(0 <= other < position for other in piece.after):
                raise CaptureError(
                    f"piece {position}, {names[position]!r}, waits for what has not been launched",
                    expected=f"positions of earlier pieces, below {position}",
                    came=f"after={piece.after}",
                    remedy="list pieces in launch order",
                )
            name = names[position] if names.count(names[position]) == 1 else f"{names[position]} ({position})"
            yield number * len(pieces), f"{name}, round {number}" if rounds > 1 else name, piece


def _caller(program: Program) -> int:
    """The stream a recording began on."""
    return next(iter(program.stream_names))


class _Memory:
    """The buffers of all pieces under common numbers, and at addresses that do not collide by chance.

    Every allocator model counts addresses from the same base, so pools are laid side by side. What one graph of the
    simulated machine leaves in its pool the next sees as outside memory, by the storage that replays copy it to; here
    it is the buffer in the pool, as on a GPU.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.buffers: list[Buffer] = []
        self.arena_bytes = 0
        self.numbers: dict[int, list[int]] = {}  # per graph, of its own buffers
        self._known: dict[tuple[int, int], int] = {}  # address and bytes that pieces see -> number
        pools: dict[int, int] = {}  # how far each reaches
        graphs = {id(piece.graph): piece for piece in pieces}
        for piece in graphs.values():
            pool = _pool(piece.program)
            pools[pool] = max(pools.get(pool, 0), piece.program.arena_bytes)
        origins: dict[int, int] = {}
        for pool, reach in pools.items():
            origins[pool] = self.arena_bytes
            self.arena_bytes += reach
        for graph, piece in graphs.items():
            origin = origins[_pool(piece.program)]
            self.numbers[graph] = [self._number(buffer, origin) for buffer in piece.evidence.buffers]
            if isinstance(piece.graph, SimulatedGraph):
                for buffer, view in piece.graph.simulation.visible.items():
                    self._known[view.data_ptr(), view.numel()] = self.numbers[graph][buffer]

    def _number(self, buffer: Buffer, origin: int) -> int:
        seen = (buffer.address, buffer.nbytes)
        if buffer.stream is None and seen in self._known:
            return self._known[seen]
        if buffer.address >= BASE:
            buffer = replace(buffer, address=buffer.address + origin)
        self._known[seen] = len(self.buffers)
        self.buffers.append(buffer)
        return self._known[seen]

    def moved(self, piece: Piece, ref: TensorRef) -> TensorRef:
        return replace(ref, buffer=self.numbers[id(piece.graph)][ref.buffer])

    def moved_step(self, piece: Piece, step: Step, stream: int, first: int) -> Step:
        """A step of the piece's program, which begins at step `first` of the whole."""
        match step:
            case Record():
                return replace(step, stream=stream)
            case Wait():
                return replace(step, stream=stream, source=first + step.source)
            case Op():
                parts = (step.args, dict(step.kwargs), step.fresh, step.reads, step.writes)
                args, kwargs, fresh, reads, writes = pytree.tree_map_only(
                    TensorRef, lambda ref: self.moved(piece, ref), parts
                )
                return replace(step, stream=stream, args=args, kwargs=kwargs, fresh=fresh, reads=reads, writes=writes)


def _pool(program: Program) -> int:
    return id(program if program.pool is None else program.pool)
