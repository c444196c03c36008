"""Which dimensions count tokens, found or refused; and one trace that is the graph of every count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from auxstream.capture import sizes as module
from auxstream.capture.inputs import StaticInputs
from auxstream.capture.sizes import Sizes
from auxstream.capture.trace import TracedGraph
from auxstream.runtime.errors import CaptureError, InputError, TraceError


class Body(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(32, 8))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def sizes_of(body: Callable[..., Any], example: Any, largest: int = 6, **said: int | None) -> Sizes:
    return Sizes(Body(body), StaticInputs(example), largest, said)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


# --- which dimensions -------------------------------------------------------------------------------------------------

FOUND: dict[str, tuple[Callable[..., Any], Any, tuple[int | None, ...]]] = {
    "rows": (lambda m, x: m.linear(x), (draw(6, 8),), (0,)),
    "columns": (lambda m, x: m.linear.weight @ x, (draw(8, 6),), (1,)),
    "in a batch of one": (lambda m, x: m.linear(x), (draw(1, 6, 8),), (1,)),
    "tied by a sum": (lambda m, x, y: m.linear(x) + y, (draw(6, 8), draw(6, 1)), (0, 0)),
    "tied by an index": (lambda m, x, s: m.cache.index_copy_(0, s, x), (draw(6, 8), torch.arange(6)), (0, 0)),
    "in other dimensions": (lambda m, x, y: x * y.t(), (draw(6, 8), draw(8, 6)), (0, 1)),
    "beside a fixed one": (lambda m, x, w: m.linear(x) @ w, (draw(6, 8), draw(8, 6)), (0, None)),
    "with a constant": (lambda m, x, n, none: m.linear(x) * n, (draw(6, 8), 3, None), (0, None, None)),
    "nested": (lambda m, d: m.linear(d["x"]) + d["more"][0], ({"x": draw(6, 8), "more": [draw(6, 1)]},), (0, 0)),
}


@pytest.mark.parametrize("case", [case for case in FOUND if case != "beside a fixed one"])
def test_token_dimensions_are_found(case: str) -> None:
    body, example, dims = FOUND[case]
    found = sizes_of(body, example)
    assert found.dims == dims
    assert found.names == found.trace(6).input_names


def test_a_fixed_dimension_of_the_same_size_must_be_told_apart() -> None:
    body, example, dims = FOUND["beside a fixed one"]
    with pytest.raises(CaptureError, match=r"args_0\[0\], or args_1\[1\]"):
        sizes_of(body, example)
    assert sizes_of(body, example, args_1=None).dims == dims


def test_keywords() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return x * scale.exp()

    example = {"scale": draw(6, 1), "x": draw(6, 8)}
    found = Sizes(Named(), StaticInputs(example), 6, {})
    assert dict(zip(found.names, found.dims, strict=True)) == {"scale": 0, "x": 0}
    traced = found.trace(4)
    assert traced.input_names == found.names
    x, scale = draw(4, 8), draw(4, 1)
    assert torch.equal(traced.graph_module(x=x, scale=scale), x * scale.exp())


def test_what_export_cannot_leave_open_is_said_by_hand() -> None:
    """torch.export takes no open dimensions for `**kwargs`."""

    def body(model: Body, x: Tensor, y: Tensor) -> Tensor:
        return model.linear(x) + y

    example = {"x": draw(6, 8), "y": draw(6, 1)}
    with pytest.raises(CaptureError, match="no trace with open dimensions") as caught:
        sizes_of(body, example)
    assert "token_dims={'x': 0, 'y': 0}" in caught.value.remedy
    found = sizes_of(body, example, x=0, y=0)
    assert found.dims == (0, 0)
    assert [tuple(out.shape) for out in (found.trace(n).graph_module(**found.inputs(n).kwargs) for n in (6, 3))] == [
        (6, 8),
        (3, 8),
    ]


@pytest.mark.parametrize("case", FOUND)
def test_they_can_be_said_by_hand(case: str) -> None:
    body, example, dims = FOUND[case]
    leaves = pytree.tree_leaves(example)
    names = ("args_0_x", "args_0_more_0") if case == "nested" else tuple(f"args_{k}" for k in range(len(leaves)))
    said = {name: dim for name, dim, leaf in zip(names, dims, leaves, strict=True) if isinstance(leaf, Tensor)}
    assert sizes_of(body, example, **said).dims == dims


def test_two_answers_are_a_question() -> None:
    def body(model: Body, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model.linear(x), y * 2

    example = draw(6, 8), draw(6)
    with pytest.raises(CaptureError, match=r"args_0\[0\], or args_1\[0\]") as caught:
        sizes_of(body, example)
    assert "token_dims={'args_0': 0, 'args_1': 0}" in caught.value.remedy
    assert sizes_of(body, example, args_1=None).dims == (0, None)
    assert sizes_of(body, example, args_0=0, args_1=0).dims == (0, 0)
    with pytest.raises(CaptureError, match=r"args_1\[0\]"):
        sizes_of(body, example, args_0=0)


@pytest.mark.parametrize(
    ("body", "example", "says"),
    [
        (lambda m, x: x + m.cache[:6], (draw(6, 8),), "fixes the size"),
        (lambda m, x: m.linear(x) / int(x.shape[0]), (draw(6, 8),), "fixes the size"),
        (lambda m, x: m.linear(x), (draw(5, 8),), "fixes the size"),
        (lambda m, x: x * x.t(), (draw(6, 6),), "two dimensions|in two dimensions"),
    ],
)
def test_what_has_no_answer_is_refused(body: Callable[..., Any], example: Any, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        sizes_of(body, example)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"x": 0}, "not among args_0"),
        ({"args_0": 1}, r"shape \(6, 8\)"),
        ({"args_0": 2}, "shape"),
        ({"args_0": -2}, ""),
    ],
)
def test_a_wrong_word_is_refused(said: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        sizes_of(lambda m, x: m.linear(x), (draw(6, 8),), **said)


def test_one_token_does_not_show_its_dimension() -> None:
    with pytest.raises(CaptureError, match="2 or more"):
        sizes_of(lambda m, x: m.linear(x), (draw(1, 8),), 1)
    assert sizes_of(lambda m, x: m.linear(x), (draw(1, 8),), 1, args_0=0).dims == (0,)


def test_a_model_that_cannot_be_traced_says_so() -> None:
    with pytest.raises(TraceError, match="values of tensors"):
        sizes_of(lambda m, x: x if x.sum() > 0 else -x, (draw(6, 8),))


# --- one trace for all ------------------------------------------------------------------------------------------------


def described(traced: TracedGraph) -> list[Any]:
    """Ops, arguments, shapes, strides and lines. A slice may begin at 0 or at None."""
    number = {node: k for k, node in enumerate(traced.graph_module.graph.nodes)}
    found: list[Any] = []
    for node in number:
        args = pytree.tree_map_only(Node, lambda n: f"node {number[n]}", (node.args, node.kwargs))
        if node.target is torch.ops.aten.slice.Tensor:
            args = (*args[0][:2], args[0][2] or 0, *args[0][3:])
        values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        shapes = [(tuple(value.shape), value.stride(), value.dtype) for value in values if node.op != "output"]
        found.append((node.op, str(node.target), args, shapes, node.meta.get("stack_trace")))
    return found


def own_trace(model: nn.Module, inputs: StaticInputs) -> TracedGraph:
    return module._traced(model, inputs)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_the_shared_trace_at_a_size_is_the_trace_at_that_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bucket_steps import serving_step

    step = serving_step(name, batch=4)
    sizes = Sizes(step, StaticInputs((torch.arange(4)[:, None], torch.arange(4))), 4, {})
    assert sizes.dims == (0, 0)
    expected = {size: own_trace(step, sizes.inputs(size)) for size in (4, 3, 2)}
    monkeypatch.setattr(module, "_traced", lambda *_: pytest.fail("the shared trace holds for this size"))
    for size, own in expected.items():
        traced = sizes.trace(size)
        assert described(traced) == described(own)
        assert (traced.input_names, traced.mutated_buffers) == (own.input_names, own.mutated_buffers)


def test_a_size_that_the_guards_leave_out_is_traced_on_its_own() -> None:
    def body(model: Body, x: Tensor) -> Tensor:
        return model.linear(x) if x.shape[0] > 3 else x.relu()

    sizes = sizes_of(body, (draw(6, 8),))
    assert [sizes.first_unlike(range(2, stop)) for stop in (3, 6)] == [2, 2]
    assert sizes.first_unlike(range(4, 6)) is None
    targets = {n: [str(node.target) for node in sizes.trace(n).graph_module.graph.nodes][-2] for n in (5, 3, 1)}
    assert targets == {5: "aten.linear.default", 3: "aten.relu.default", 1: "aten.relu.default"}


def test_graphs_of_all_sizes_share_the_models_tensors_and_run() -> None:
    model = Body(lambda m, x, s: m.linear(x) + m.cache.index_copy_(0, s, x * 2)[s])
    sizes = Sizes(model, StaticInputs((draw(6, 8), torch.arange(6))), 6, {})
    for size in (1, 2, 5, 6, 7):
        traced = sizes.trace(size)
        assert traced.mutated_buffers == ("cache",)
        assert traced.written_tensors()[0] is model.cache
        x, slots = draw(size, 8), torch.randperm(32)[:size]
        with torch.no_grad():
            assert torch.equal(traced.graph_module(x, slots), model(x, slots))


def test_inputs_of_a_smaller_size_are_the_first_rows_of_the_same_memory() -> None:
    sizes = sizes_of(lambda m, x, y: m.linear(x) + y, (draw(6, 8), draw(6, 1)))
    for large, small in zip(sizes.inputs(6).tensors(), sizes.inputs(2).tensors(), strict=True):
        assert small.data_ptr() == large.data_ptr()
        assert torch.equal(small, large[:2])
