"""What depends on nothing is computed once; weights, what may change, what leaves and what is large is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from auxstream.capture.trace import trace
from auxstream.kernels import fold, fuse_elementwise
from auxstream.kernels.fold import fold_constants

X = torch.arange(8.0).reshape(2, 4)
ELSEWHERE = torch.arange(4.0)


class Holds(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.arange(16.0).reshape(4, 4))
        self.register_buffer("scale", torch.arange(4.0))
        self.register_buffer("hidden", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def folded(
    body: Callable[[Any, Tensor], Any], allowed: Callable[[Any], bool] = lambda node: True
) -> tuple[GraphModule, int]:
    """The traced function with its constants folded; run twice against the original, state included."""
    gm = trace(Holds(body), (X,)).graph_module
    reference, state = copy.deepcopy(gm), set(gm.state_dict())
    count = fold_constants(gm, allowed)
    gm.graph.lint()
    gm.recompile()
    assert set(gm.state_dict()) == state
    for seed in range(2):
        torch.manual_seed(seed)
        got = gm(X.clone())
        torch.manual_seed(seed)
        torch.testing.assert_close(got, reference(X.clone()), rtol=0, atol=0)
        left = dict(gm.named_buffers())
        assert all(torch.equal(left[name], value) for name, value in reference.named_buffers() if name in left)
    return gm, count


def ops(gm: GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.op == "call_function"]


FOLDED: dict[str, tuple[Callable[[Any, Tensor], Any], int, list[str]]] = {
    "a cast": (lambda m, x: x * torch.arange(4).to(torch.float64), 1, ["mul"]),
    "a chain of casts and sums": (lambda m, x: x * (1 + torch.arange(4).double()).float(), 1, ["mul"]),
    "a chain that is read twice": (
        lambda m, x: (lambda c: (x * c, x + c.exp()))(torch.arange(4.0) * 2),
        2,
        ["mul_1", "add"],
    ),
    "a range": (lambda m, x: x + torch.arange(4) * 2, 1, ["add"]),
    "what a view shows": (lambda m, x: x @ (torch.ones(4, 4).t()[:, :2] * 2), 1, ["matmul"]),
    "a view of something folded": (lambda m, x: x + (torch.arange(4.0) * 2).view(1, 4).expand(2, 4), 1, ["add"]),
    "an opaque op's operand": (
        lambda m, x: torch.sort(x + torch.cumsum(torch.arange(4), 0))[0],
        1,
        ["add", "sort", "getitem"],
    ),
}
KEPT: dict[str, Callable[[Any, Tensor], Any]] = {
    "a parameter": lambda m, x: x @ m.weight,
    "a view of a parameter": lambda m, x: x @ m.weight.t().unsqueeze(0)[0],
    "a cast to the same dtype": lambda m, x: x @ m.weight.to(torch.float32),
    "what depends on the input": lambda m, x: x * (m.scale + x[0]),
    "a buffer that is written": lambda m, x: (m.scale.add_(1), x * (m.scale * 2))[1],
    "a buffer that is written later": lambda m, x: (x * (m.scale * 2), m.scale.add_(1))[0],
    "a buffer that is written through a view": lambda m, x: (m.scale[1:].add_(1), x * (m.scale * 2))[1],
    "random numbers": lambda m, x: x * torch.rand(4) + torch.rand_like(m.scale),
    "dropout": lambda m, x: x * torch.nn.functional.dropout(m.scale, 0.5, True),
    "what is computed from a parameter": lambda m, x: x @ (1 + m.weight.double()).float(),
    "what is computed from a buffer": lambda m, x: x * (m.scale * 2) + m.hidden.exp(),
    "what is computed from a view of a weight": lambda m, x: x @ (m.weight.t()[:, :2] * 2),
    "what is computed from a tensor from elsewhere": lambda m, x: x * (ELSEWHERE + 1),
    "what leaves": lambda m, x: (x + 1, torch.arange(4)),
    "what leaves through a view": lambda m, x: (lambda c: (x + c, c[1:]))(torch.arange(4)),
    "what is written in place": lambda m, x: (lambda c: (c.add_(x[0]), x + c)[1])(torch.zeros(4)),
    "an in-place fill": lambda m, x: x + torch.zeros(4).index_fill_(0, torch.tensor([2]), 3.0),
}


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_folded(name: str) -> None:
    body, count, rest = FOLDED[name]
    gm, found = folded(body)
    assert found == count
    assert [op for op in ops(gm) if op not in ("view", "expand", "unsqueeze")] == rest


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_constant_is_kept(name: str) -> None:
    gm = trace(Holds(KEPT[name]), (X,)).graph_module
    before = ops(gm)
    gm, _ = folded(KEPT[name])
    assert [op for op in before if not op.startswith(("lift_fresh", "_lifted", "detach"))] == [
        op for op in ops(gm) if not op.startswith(("lift_fresh", "_lifted", "detach"))
    ]


def test_what_leaves_is_the_callers_own() -> None:
    gm, _ = folded(KEPT["what leaves"])
    gm(X)[1].zero_()
    assert gm(X)[1].any()


@torch.library.custom_op("auxstream_test::tally", mutates_args=())
def tally(x: Tensor) -> Tensor:
    return x.clone()


@tally.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_ops_from_outside_are_not_trusted() -> None:
    gm, count = folded(lambda m, x: x + tally(m.scale))
    assert not count
    assert "tally" in ops(gm)


def test_what_is_large_is_computed_in_every_step() -> None:
    limit, together = fold.MOST_BYTES // 4, fold.MOST_BYTES_TOGETHER // 4  # elements of float32
    for elements, count, found in ((limit + 1, 1, 0), (limit, together // limit + 3, together // limit)):

        def body(m: Any, x: Tensor, elements: int = elements, count: int = count) -> Tensor:
            for number in range(count):
                x = x + torch.full((elements,), number + 0.5)[:4]
            return x

        gm = trace(Holds(body), (X,)).graph_module
        assert fold_constants(gm, lambda node: True) == found
        added = [value for name, value in gm.named_buffers() if name.startswith("_folded")]
        assert sum(value.untyped_storage().nbytes() for value in added) <= fold.MOST_BYTES_TOGETHER
        gm.recompile()
        assert torch.equal(gm(X), body(None, X))


def test_marked_constants_stay() -> None:
    gm, count = folded(lambda m, x: (x * torch.arange(4), x + torch.zeros(4)), lambda node: node.name != "arange")
    assert count == 1
    assert ops(gm) == ["arange", "mul", "add"]


def test_names_that_are_taken() -> None:
    gm = trace(Holds(lambda m, x: x * torch.arange(4)), (X,)).graph_module
    gm.register_buffer("_folded_arange", torch.zeros(1))
    assert fold_constants(gm, lambda node: True) == 1
    gm.recompile()
    assert torch.equal(gm._folded_arange, torch.zeros(1))
    assert torch.equal(gm(X), X * torch.arange(4))


def test_models_keep_their_state_and_memory() -> None:
    gm = tiny_models.decode_step("gemma4").graph_module
    state = {name: value.data_ptr() for name, value in gm.state_dict(keep_vars=True).items()}
    size = sum(value.untyped_storage().nbytes() for value in gm.parameters())
    report = fuse_elementwise(gm, safe=(("*", "1"),))
    assert report.folded
    assert {name: value.data_ptr() for name, value in gm.state_dict(keep_vars=True).items()} == state
    added = [value for name, value in gm.named_buffers() if name.startswith("_folded")]
    assert sum(value.untyped_storage().nbytes() for value in added) < 0.05 * size
    copied = copy.deepcopy(gm)
    with torch.no_grad():
        assert torch.equal(copied(*tiny_models.inputs()), gm(*tiny_models.inputs()))
    mine, theirs = dict(gm.named_buffers()), dict(copied.named_buffers())
    assert all(mine[name].data_ptr() != value.data_ptr() for name, value in theirs.items())
