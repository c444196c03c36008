"""In-place ops on a graph's own temporaries become ops that return new tensors, where nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from auxstream.capture.trace import trace
from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.local import functionalise_locals

X = torch.arange(12.0).reshape(3, 4) - 5


class Holds(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("cache", torch.ones(3, 4))
        self.register_buffer("row", torch.tensor([1]))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def rewritten(body: Callable[[Any, Tensor], Any]) -> GraphModule:
    """The traced function with its local writes rewritten; run once against the original, state and inputs too."""
    gm = trace(Holds(body), (X.clone(),)).graph_module
    reference = copy.deepcopy(gm)
    functionalise_locals(Dataflow.of(gm), lambda node: True)
    gm.graph.lint()
    gm.recompile()
    one, other = X.clone(), X.clone()
    torch.testing.assert_close(gm(one), reference(other), rtol=0, atol=0)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    for value, expected in zip(gm.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    return gm


def in_place(gm: GraphModule) -> list[str]:
    ops = [node for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [node.name for node in ops if node.target._schema.name.endswith("_")]


def both(y: Tensor, then: Callable[[Tensor, Tensor], Any]) -> Any:
    """A tensor and a view of it, made ahead of what follows."""
    return then(y, y[0])


LOCAL: dict[str, Callable[[Any, Tensor], Any]] = {
    "a temporary": lambda m, x: (x * 2).add_(1),
    "a chain": lambda m, x: (x * 2).add_(1).mul_(3).relu_(),
    "with itself": lambda m, x: (lambda y: y.mul_(y))(x * 2),
    "read before": lambda m, x: (lambda y: (y + 1, y.mul_(3)))(x * 2),
    "read by its old name afterwards": lambda m, x: (lambda y: (y.mul_(3), y + 1, y.sum()))(x * 2),
    "a view was read before": lambda m, x: (lambda y: (y[0] + 1, y.mul_(3)))(x * 2),
    "viewed afterwards, by its result": lambda m, x: (x * 2).mul_(3).view(4, 3).t(),
    "one of two results": lambda m, x: (lambda v: (v[0].div_(2), v[1]))(torch.topk(x, 2)),
    "broadcast into": lambda m, x: (x * 2).add_(x[0]),
    "a number of another type": lambda m, x: (x * 2).clamp_(0, 3),
    "a mask": lambda m, x: (x * 2).masked_fill_(x > 0, 7.0),
    "returned, twice": lambda m, x: (lambda y: (y, y.mul_(2)))(x + 1),
}
SEEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "an input": lambda m, x: x.mul_(2) + 1,
    "a view of an input": lambda m, x: x[0].mul_(2).sum() + x,
    "a buffer": lambda m, x: m.cache.add_(x) * 2,
    "a view is read afterwards": lambda m, x: both(x * 2, lambda y, v: (y.mul_(3), v + 1)),
    "a view is read on both sides": lambda m, x: both(x * 2, lambda y, v: (v + 1, y.mul_(3), v + 2)),
    "through a view": lambda m, x: (lambda y: (y[0].mul_(3), y))(x * 2),
    "a write that is no arithmetic": lambda m, x: (x * 2).index_fill_(0, m.row, 3.0),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_writes_are_rewritten(name: str) -> None:
    assert not in_place(rewritten(LOCAL[name]))


@pytest.mark.parametrize("name", SEEN)
def test_writes_that_can_be_seen_stay(name: str) -> None:
    assert in_place(rewritten(SEEN[name]))


def test_a_result_of_another_dtype_is_not_taken() -> None:
    """x.add_(y) keeps the dtype of x; add(x, y) would promote."""

    def body(m: Any, x: Tensor) -> Tensor:
        return (x > 0).to(torch.int32).bitwise_or_(torch.ones(4, dtype=torch.int32)), (x > 0).to(torch.float16).add_(x)

    gm = rewritten(body)
    assert in_place(gm) == ["add_"]


def test_an_earlier_view_that_is_read_later_keeps_both_writes_apart() -> None:
    """The first write is seen through the view, the second by nobody."""

    def body(m: Any, x: Tensor) -> Any:
        y = x * 2
        view = y[0]
        y.add_(1)
        read = view * 3
        return y.mul_(5), read

    gm = rewritten(body)
    assert in_place(gm) == ["add_"]


def test_marked_writes_stay() -> None:
    gm = trace(Holds(lambda m, x: (x * 2).add_(1).mul_(3)), (X,)).graph_module
    assert functionalise_locals(Dataflow.of(gm), lambda node: node.name != "add_") == 1
    assert in_place(gm) == ["add_"]


def test_one_dataflow_serves_many_writes() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y, z = x * 2, x * 3
        for step in range(20):
            y.add_(step)
            z.mul_(y).clamp_(-9, 9)
        return y, z, m.cache.add_(y).clone()

    gm = rewritten(body)
    assert in_place(gm) == ["add__20"]
