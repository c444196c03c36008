"""A group as MLIR and as a kernel spec.

Enters: a `Group`. Leaves: `Fusion`: the spec of its kernel, the nodes it reads in the order of the spec's inputs, and
the symbolic sizes it needs. Invariant: an operand is described by the shape its user broadcasts it to, so the spec
does not depend on the operand's strides, nor on the rest of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from . import mlir
from .build import GroupBuilder, Kind, Value
from .call import Call
from .free import free_value
from .grouping import Group
from .likeness import Likeness
from .lower import lower
from .meet import use_of
from .pointwise import POINTWISE
from .rowwise import CONCATENATION
from .shapes import memory_order, product, same, width_of
from .spec import Dim, KernelSpec, Operand, Result, Shape, Size
from .use import Use
from .views import column_slice, seen_through


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """A group with its kernel."""

    group: Group
    spec: KernelSpec
    inputs: tuple[Node, ...]
    sizes: tuple[Any, ...]
    """Symbolic sizes, in the order of the spec's `Size`s."""

    def __str__(self) -> str:
        return f"{self.spec.name}: {self.group}"


def emit(group: Group) -> Fusion:
    """Write the group's function, run the passes over it, and describe its operands."""
    return _Emitter(group).fusion()


def emit_all(groups: Iterable[Group]) -> tuple[Fusion, ...]:
    """A fusion for each group; of groups that are alike, the first is emitted, and the others have its kernel."""
    known: dict[str, tuple[KernelSpec, list[int]]] = {}
    return tuple(_emit_once(group, known) for group in groups)


def _emit_once(group: Group, known: dict[str, tuple[KernelSpec, list[int]]]) -> Fusion:
    likeness = Likeness.of(group)
    if likeness is None:
        return emit(group)
    if likeness.text not in known:
        fusion = emit(group)
        known[likeness.text] = fusion.spec, [likeness.numbers[node] for node in fusion.inputs]
    (spec, inputs), nodes = known[likeness.text], list(likeness.numbers)
    return Fusion(group, spec, tuple(nodes[number] for number in inputs), ())


class _Emitter:
    def __init__(self, group: Group) -> None:
        self.group = group
        self.rows = product(group.rows)
        self.builder = GroupBuilder()
        self.values: dict[Node, Value] = {}
        self.operands: list[Operand] = []
        self.inputs: list[Node] = []
        self.given: dict[tuple[Node, Operand, Kind], Value] = {}
        self.sizes: list[Any] = []

    def fusion(self) -> Fusion:
        for node in self.group.nodes:
            call = Call.of(node)
            value = lower(self.builder, call, functools.partial(self._operand, call))
            self.values[node] = self._as(value, self.group.kinds[node], width_of(node.meta["val"]))
        results = [self.values[node] for node in self.group.outputs]
        spec = KernelSpec(
            title=_title(self.group.nodes),
            mlir=_optimised(self.builder.finish("group", results)),
            rows=self._shape(self.group.rows),
            inputs=tuple(self.operands),
            outputs=tuple(self._result(node) for node in self.group.outputs),
        )
        return Fusion(self.group, spec, tuple(self.inputs), tuple(self.sizes))

    def _operand(self, user: Call, node: Node) -> Value:
        """The value of `node` as `user` reads it."""
        if node not in self.group.kinds:
            free = self._written_down(user, node) if node in self.group.free else None
            return free or self._input(node, use_of(user, self.group.kinds[user.node], node, self.rows))
        if node not in self.values:
            source = seen_through(node)
            assert source is not None, f"{node} is read before it is computed"
            value, columns = self._operand(user, source), column_slice(node)
            if columns is not None and self.group.kinds[source] is Kind.FULL:
                value = self.builder.columns(value, *columns)
            self.values[node] = self._as(value, self.group.kinds[node], width_of(node.meta["val"]))
        return self.values[node]

    def _written_down(self, user: Call, node: Node) -> Value | None:
        """The value of a free node, where its user can take it: a range only over columns."""
        if user.node.target is CONCATENATION:
            return free_value(self.builder, node, width_of(node.meta["val"]))
        if user.node.target not in POINTWISE:
            return None
        over_columns = self.group.kinds[user.node] is Kind.FULL
        return free_value(self.builder, node, width_of(user.value) if over_columns else None)

    def _input(self, node: Node, use: Use) -> Value:
        operand = Operand(node.meta["val"].dtype, self._shape(use.shape), use.role)
        key = (node, operand, use.kind)
        if key not in self.given:
            width = int(use.shape[-1]) if use.kind in (Kind.FULL, Kind.COL) else 1
            if use.role == "table":
                self.given[key] = self.builder.table(int(use.shape[0]), width, operand.dtype)
            else:
                self.given[key] = self.builder.input(use.kind, width, operand.dtype)
            self.operands.append(operand)
            self.inputs.append(node)
        return self.given[key]

    def _as(self, value: Value, kind: Kind, width: Any) -> Value:
        """A result as its group wants it: what varies over less than that is repeated."""
        if kind is Kind.FULL and value.kind in (Kind.ROW, Kind.SCALAR):
            value = self.builder.repeat_columns(value, int(width))
        if kind in (Kind.FULL, Kind.ROW) and value.kind in (Kind.COL, Kind.SCALAR):
            value = self.builder.repeat_rows(value)
        return value

    def _result(self, node: Node) -> Result:
        value: Tensor = node.meta["val"]
        order = memory_order(value)
        assert order is not None, f"{node} is not dense"
        per_row = self.group.kinds[node] is Kind.ROW
        kept = value.dim() > 0 and same(width_of(value), 1) and same(product(value.shape[:-1]), self.rows)
        return Result(
            value.dtype, self._shape(tuple(value.shape)), order, "rows" if per_row and not kept else "columns"
        )

    def _shape(self, shape: Sequence[Any]) -> Shape:
        return tuple(self._dim(size) for size in shape)

    def _dim(self, size: Any) -> Dim:
        if not isinstance(size, torch.SymInt):
            return int(size)
        number = next((i for i, known in enumerate(self.sizes) if same(known, size)), len(self.sizes))
        if number == len(self.sizes):
            self.sizes.append(size)
        return Size(number)


@functools.cache
def _optimised(text: str) -> str:
    return str(mlir.run_passes(mlir.parse(text)))


_TELLING: Final = (
    "softmax", "log_softmax", "layer_norm", "rms_norm", "mean", "sum", "amax", "amin", "gelu", "silu", "sigmoid",
    "tanh", "exp", "cos", "rsqrt", "cat", "where", "pow", "div", "mul", "add", "sub",
)  # fmt: skip


def _title(nodes: Sequence[Node]) -> str:
    """A readable name: what the group does, in the words of its ops, the most telling first."""
    names = {_op_name(node) for node in nodes}
    told = [name for name in _TELLING if name in names][:3]
    return "_".join(["fused", *(told or sorted(names)[:2])])


def _op_name(node: Node) -> str:
    return str(node.target).split(".")[1].strip("_")
