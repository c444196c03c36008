"""What a proof is about, in one form: nodes that touch memory, and the edges that order them.

Enters: a recorded `Program` (here), or one with the CUDA graph captured beside it (capture/device_evidence.py).
Leaves: `Evidence`. Invariant: all that touches memory is a `TensorRef` on one of `buffers`: tensors of the program, the
scratch of its ops, and memory that only a kernel's arguments speak of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from .program import Buffer, Op, Program, Record, TensorRef

OP_LEVEL: Final = (
    "ops access what their schemas declare, and nothing else",
    "memory an op takes and frees inside itself (library workspaces) is not seen",
)

Touch = tuple[TensorRef, bool]
"""Bytes of a buffer, and whether they are written."""


@dataclass(frozen=True, slots=True)
class Node:
    """An op of a program, or a node of a CUDA graph. `kernel` is the device's name for it, where there is one."""

    name: str
    stream: str
    region: str | None = None
    line: str = ""
    touches: tuple[Touch, ...] = ()
    kernel: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.kernel})" if self.kernel else self.name


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is proved or refuted.

    Attributes:
        nodes: in the order the host enqueued them.
        edges: what orders memory accesses, as positions in `nodes`.
        buffers: what `TensorRef.buffer` counts.
        unattributed: work that nothing explains.
        assumptions: what is taken for granted.
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]
    buffers: tuple[Buffer, ...]
    unattributed: tuple[str, ...]
    assumptions: tuple[str, ...]


def from_program(program: Program) -> Evidence:
    """The evidence of a recording alone. Node numbers are step numbers."""
    nodes: list[Node] = []
    strangers: dict[str, None] = {}
    for step in program.steps:
        stream = program.stream_names.get(step.stream, f"stream {step.stream:#x}")
        if isinstance(step, Op):
            if step.stream not in program.stream_names:
                strangers[f"`{step.name}` ran on a stream no region opened, at {step.line}"] = None
            nodes.append(Node(step.name, stream, step.region, step.line, touches(step)))
        else:
            verb = "record" if isinstance(step, Record) else "wait for"
            nodes.append(Node(f"{verb} {step.what}", stream))
    return Evidence(tuple(nodes), program.edges(), program.buffers, tuple(strangers), OP_LEVEL)


def touches(op: Op) -> tuple[Touch, ...]:
    """What an op touches, by its schema."""
    return (*((ref, True) for ref in op.writes), *((ref, False) for ref in op.reads))


def span(buffer: int, start: int, stop: int) -> TensorRef:
    """Bytes [start, stop) of a buffer, counted from its own start."""
    return TensorRef(buffer, start, (stop - start,), (1,), torch.uint8)
