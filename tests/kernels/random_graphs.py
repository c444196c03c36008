"""Random graphs of ops that eager computes exactly, over mixed dtypes and shapes that broadcast.

A graph is drawn node by node, each op on values drawn before it. Left out is what eager itself leaves open: which sign
a zero has that is the larger of two, and what integer a float out of range becomes. Sums are of integers, so that they
do not depend on order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from one_op import DEVICE
from op_values import EVERY, FLOATS, INTEGERS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
Draw = Callable[[st.SearchStrategy[Any]], Any]

SHAPES = [(2, 3, 8), (1, 5, 33), (4, 2), (1, 1, 7), (6,), (3, 1, 2, 5), (5, 5)]
BINARY = (aten.add, aten.sub, aten.mul, aten.div, aten.lt, aten.ge, aten.eq)
LARGER = (aten.maximum.default, aten.minimum.default)
UNARY = (aten.neg, aten.abs, aten.relu, aten.square, aten.floor, aten.round, aten.trunc, aten.isnan, aten.logical_not)
NUMBERS = (2, -3, 0.5, 1.1, 0.3)
ROWS = (aten.amax.default, aten.amin.default)


class Drawing:
    """A graph being drawn."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.graph = Graph()
        self.mode = FakeTensorMode()
        self.base: tuple[int, ...] = draw(st.sampled_from(SHAPES))
        self.real: dict[Node, Tensor] = {}
        self.inputs = [self.input() for _ in range(draw(st.integers(1, 4)))]

    def input(self) -> Tensor:
        dtype = self.draw(st.sampled_from(EVERY))
        kept = [size if self.draw(st.integers(0, 3)) else 1 for size in self.base]
        shape = kept[self.draw(st.integers(0, 3)) // 3 * len(kept) :]  # now and then without dimensions
        tensor = _filled(shape, dtype, self.draw(st.integers(0, 99)))
        if len(shape) > 1 and self.draw(st.booleans()):
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = self.mode.from_tensor(tensor)
        self.real[node] = tensor
        return tensor

    @property
    def values(self) -> list[Node]:
        return list(self.real)

    def one(self) -> Node:
        """A value, the youngest the likeliest."""
        back = min(self.draw(st.integers(0, 9)), self.draw(st.integers(0, 9)))
        return self.values[-1 - back % len(self.values)]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node | None:
        """One more node; None where eager refuses the call."""
        try:
            value = target(*map_arg(args, self.real.__getitem__), **kwargs)
        except (RuntimeError, IndexError, NotImplementedError):
            return None
        if not 0 < value.numel() <= 2000 or value.dtype not in EVERY:
            return None
        node = self.graph.call_function(target, args, kwargs)
        with self.mode:
            node.meta["val"] = target(*map_arg(args, lambda other: other.meta["val"]), **kwargs)
        if node.meta["val"].stride() != value.stride():  # fake tensors are wrong about some expanded ones
            self.graph.erase_node(node)
            return None
        self.real[node] = value
        return node

    def step(self) -> None:
        kinds = (self.binary, self.binary, self.with_number, self.unary, self.larger, self.choice, self.cast)
        self.draw(st.sampled_from([*kinds, self.row, self.total, self.view, self.join]))()

    def binary(self) -> None:
        op, x, y = self.draw(st.sampled_from(BINARY)), self.one(), self.one()
        self.call(op.Tensor, x, y)

    def with_number(self) -> None:
        op, x = self.draw(st.sampled_from((aten.add, aten.sub, aten.mul, aten.div, aten.lt))), self.one()
        number = self.draw(st.sampled_from(NUMBERS))
        if x.meta["val"].dtype in FLOATS or isinstance(number, int):
            self.call(op.Tensor if op is not aten.lt else op.Scalar, x, number)

    def unary(self) -> None:
        self.call(self.draw(st.sampled_from(UNARY)).default, self.one())

    def larger(self) -> None:
        found = self.call(self.draw(st.sampled_from(LARGER)), self.one(), self.one())
        self.unsigned(found)

    def unsigned(self, found: Node | None) -> None:
        """A zero of either sign becomes the positive one; the value as it was is not used again."""
        if found is not None and found.meta["val"].dtype in FLOATS:
            self.call(aten.add.Tensor, found, 0.0)
            del self.real[found]

    def choice(self) -> None:
        truths = [value for value in self.values if value.meta["val"].dtype is torch.bool]
        if truths:
            self.call(aten.where.self, self.draw(st.sampled_from(truths)), self.one(), self.one())

    def cast(self) -> None:
        x = self.one()
        whole = x.meta["val"].dtype not in FLOATS
        dtypes = EVERY if whole else (*FLOATS, torch.bool)
        dtype = self.draw(st.sampled_from(dtypes))
        if dtype is not x.meta["val"].dtype:
            self.call(aten.to.dtype, x, dtype)

    def row(self) -> None:
        keep = self.draw(st.booleans())
        self.unsigned(self.call(self.draw(st.sampled_from(ROWS)), self.one(), [-1], keep))

    def total(self) -> None:
        x = self.one()
        if x.meta["val"].dtype in (*INTEGERS, torch.bool):
            self.call(aten.sum.dim_IntList, x, [-1], self.draw(st.booleans()))

    def view(self) -> None:
        x = self.one()
        shape = tuple(x.meta["val"].shape)
        match self.draw(st.integers(0, 5)):
            case 0:
                self.call(aten.unsqueeze.default, x, self.draw(st.integers(-1, 1)))
            case 1:
                self.call(aten.transpose.int, x, 0, -1)
            case 2 if shape:
                self.call(aten.slice.Tensor, x, -1, 1, shape[-1])
            case 3:
                self.call(aten.expand.default, x, list(self.base))
            case 4 if len(shape) > 1:
                self.call(aten.reshape.default, x, [shape[0] * shape[1], *shape[2:]])
            case _ if shape and shape[-1] == 1:
                self.call(aten.squeeze.dim, x, -1)

    def join(self) -> None:
        self.call(aten.cat.default, [self.one(), self.one()], -1)


def _filled(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return (torch.rand(list(shape), generator=draw) < 0.5).to(DEVICE)
    if dtype in INTEGERS:
        return torch.randint(-9, 10, list(shape), generator=draw).to(dtype).to(DEVICE)
    return (torch.randn(list(shape), generator=draw) * 3).to(dtype).to(DEVICE)


@st.composite
def graphs(draw: Draw) -> tuple[GraphModule, list[Tensor]]:
    """A graph and its arguments; the outputs are the values that nothing else reads."""
    drawing = Drawing(draw)
    for _ in range(draw(st.integers(2, 14))):
        drawing.step()
    made = [value for value in drawing.values if value.op == "call_function"]
    drawing.graph.output(tuple(value for value in made if not value.users) or (drawing.values[0],))
    return GraphModule(torch.nn.Module(), drawing.graph), drawing.inputs
