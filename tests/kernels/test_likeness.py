"""Groups that are alike share a kernel, and no others do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_op import graph_of
from pointwise_cases import pointwise_cases
from rowwise_cases import rowwise_cases
from torch import Tensor, nn

from auxstream.capture.trace import trace
from auxstream.kernels import fuse_elementwise
from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.emit import emit, emit_all
from auxstream.kernels.grouping import Group, find_groups
from auxstream.kernels.likeness import Likeness

X = torch.arange(12.0).reshape(3, 4) - 5
WHOLE = torch.arange(12).reshape(3, 4)


class Of(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(*inputs)


def group_of(body: Callable[..., Any], *inputs: Tensor) -> Group:
    (group,) = find_groups(Dataflow.of(trace(Of(body), inputs).graph_module), lambda node: True)
    return group


def text_of(body: Callable[..., Any], *inputs: Tensor) -> str:
    likeness = Likeness.of(group_of(body, *inputs))
    assert likeness is not None
    return likeness.text


def filled(value: float) -> Callable[[Tensor], Tensor]:
    """Reads a constant through a view."""
    return lambda x: x * 2 + torch.full((12,), value).view(3, 4)


Body = tuple[Callable[..., Any], Tensor]
UNLIKE: dict[str, tuple[Body, Body]] = {
    "a number": ((lambda x: x * 2 + 1, X), (lambda x: x * 2 + 3, X)),
    "a number's type": ((lambda x: (x * 2) < 1, WHOLE), (lambda x: (x * 2) < 1.0, WHOLE)),
    "a zero's sign": ((lambda x: x * 2 * 0.0, X), (lambda x: x * 2 * -0.0, X)),
    "an op": ((lambda x: x * 2 + 1, X), (lambda x: x * 2 - 1, X)),
    "the order of operands": ((lambda x: (x * 2) - (x + 1), X), (lambda x: (x + 1) - (x * 2), X)),
    "one operand twice": ((lambda x: x[0] * 2 + x[1], X), (lambda x: (lambda row: row * 2 + row)(x[0]), X)),
    "what is returned": ((lambda x: x * 2 + 1, X), (lambda x: (lambda y: (y, y + 1))(x * 2), X)),
    "a dtype": ((lambda x: x * 2 + 1, X), (lambda x: x * 2 + 1, X.bfloat16())),
    "a shape": ((lambda x: x * 2 + 1, X), (lambda x: x * 2 + 1, X.view(4, 3))),
    "where results lie": ((lambda x: x * 2 + 1, X), (lambda x: x * 2 + 1, X.view(4, 3).t())),
    "a constant behind a view": ((filled(1.0), X), (filled(2.0), X)),
    "rows or columns": ((lambda x: x * 2 + x.sum(-1, True), X), (lambda x: x * 2 + x.sum(-1, True).view(3), X[:, :3])),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_groups_that_differ_are_not_alike(what: str) -> None:
    one, other = UNLIKE[what]
    assert text_of(*one) == text_of(*one)
    assert text_of(*one) != text_of(*other)


def test_alike_groups_have_one_kernel_and_inputs_of_their_own() -> None:
    def body(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 2 + y).relu() * x, (z * 2 + x).relu() * z

    gm = trace(Of(body), (X, X + 1, X - 1)).graph_module
    report = fuse_elementwise(gm)
    one, other = report.fusions
    assert one.spec is other.spec
    named = {tuple(node.name for node in fusion.inputs) for fusion in report.fusions}
    assert named == {("inputs_0", "inputs_1"), ("inputs_2", "inputs_0")}
    for ours, wanted in zip(gm(X, X + 1, X - 1), body(X, X + 1, X - 1), strict=True):
        assert torch.equal(ours, wanted)


def test_symbolic_sizes_are_like_no_other() -> None:
    rows = torch.export.Dim("rows")
    program = torch.export.export(Of(lambda x: x * 2 + 1), (X,), dynamic_shapes=(({0: rows},),))
    (group,) = find_groups(Dataflow.of(program.module()), lambda node: True)  # pyright: ignore[reportArgumentType]
    assert Likeness.of(group) is None


def test_every_op_is_emitted_as_if_alone() -> None:
    """All calls of the op tests together: were two that differ taken for alike, one would have the other's kernel."""
    groups: list[Group] = []
    for case in itertools.chain(pointwise_cases(), rowwise_cases()):
        groups += find_groups(Dataflow.of(graph_of([case.call])), lambda node: True, least=1)
    together = emit_all(groups)
    assert len({fusion.spec for fusion in together}) > 300
    for group, fusion in zip(groups, together, strict=True):
        alone = emit(group)
        assert (fusion.spec, fusion.inputs, fusion.sizes) == (alone.spec, alone.inputs, alone.sizes), str(group)
