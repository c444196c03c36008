"""What calls hand out: containers and tensors of their own, views of the caller's own inputs, copies that share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture import dynamo
from auxstream.capture.options import Options


class Body(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(6, 8))

    def forward(self, *args: Any) -> Any:
        return self.body(self, *args)


def compiled(body: Callable[..., Any], *example: Tensor, **options: Any) -> tuple[Body, auxstream.CompiledModel]:
    torch.manual_seed(0)
    model = Body(body)
    return model, auxstream.compile(model, example or (draw(),), Options(**options))


def draw(rows: int = 6, width: int = 8) -> Tensor:
    return torch.randn(rows, width)


everywhere = pytest.mark.parametrize("mode", ["full", "none", "piecewise"])


# --- containers and objects -------------------------------------------------------------------------------------------


@everywhere
def test_what_the_caller_does_to_a_container_is_not_there_in_the_next_call(mode: Any) -> None:
    model, fast = compiled(lambda m, x: {"y": m.linear(x), "more": [x * 2]}, mode=mode)
    out = fast(draw())
    out["y"] = None
    out["more"].append(1)
    x = draw()
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("rows", [6, 3])
def test_nor_what_he_does_to_a_tensor_but_for_its_numbers(rows: int) -> None:
    for options in ({}, {"buckets": (6,)}):
        model, fast = compiled(lambda m, x: m.linear(x), **options)
        if rows < 6 and not options:
            continue
        fast(draw(rows)).t_()
        fast(draw(rows)).requires_grad_()
        x = draw(rows)
        found = fast(x)
        torch.testing.assert_close(found, model(x).detach())
        assert not found.requires_grad


def test_nor_to_one_of_several_tensors() -> None:
    model, fast = compiled(lambda m, x: (m.linear(x), x * 2))
    for out in fast(draw()):
        out.t_()
    x = draw()
    for found, expected in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(found, expected.detach())


def test_the_models_own_tensors_are_handed_out_themselves() -> None:
    model, fast = compiled(lambda m, x: (m.linear.weight, m.seen.add_(1), m.seen[:2]))
    weight, seen, part = fast(draw())
    assert weight is model.linear.weight
    assert seen is model.seen
    assert part.data_ptr() == model.seen.data_ptr()


# --- outputs that lie in an input -------------------------------------------------------------------------------------


@everywhere
def test_a_view_of_an_input_is_one_of_the_callers_own(mode: Any) -> None:
    model, fast = compiled(lambda m, x: (x.t(), x[1:, ::2], m.linear(x), x.view(2, 24)), mode=mode)
    for whole in (draw(6, 8), draw(12, 8)[3:9]):  # at an offset, too
        turned, part, _, folded = fast(whole)
        for found, expected in zip((turned, part, folded), (whole.t(), whole[1:, ::2], whole.view(2, 24)), strict=True):
            assert found.data_ptr() == expected.data_ptr()
            assert found.stride() == expected.stride()
            assert torch.equal(found, expected)
        part.fill_(7)
        assert torch.equal(turned[::2, 1:], torch.full((4, 5), 7.0))
        assert torch.equal(fast(whole)[0], whole.t())
        torch.testing.assert_close(fast(whole)[2], model.linear(whole))


def test_of_an_input_that_is_written_it_is_up_to_date() -> None:
    _, fast = compiled(lambda m, x: (x.mul_(2), x[:2])[1])
    x = torch.ones(6, 8)
    found = fast(x)
    assert torch.equal(found, torch.full((2, 8), 2.0))
    assert found.data_ptr() == x.data_ptr()


def test_of_an_input_laid_out_otherwise_it_is_a_copy() -> None:
    _, fast = compiled(lambda m, x: x.t())
    for x in (draw(8, 6).t(), draw(1, 8).expand(6, 8), draw(6, 16)[:, ::2]):
        found = fast(x)
        assert torch.equal(found, x.t())
        found.zero_()
        assert x.any()


def test_of_other_numbers_it_is_a_copy() -> None:
    _, fast = compiled(lambda m, x: (x.view(torch.int32), torch.view_as_complex(x.view(6, 4, 2)).conj()))
    x = draw()
    bits, numbers = fast(x)
    assert torch.equal(bits, x.view(torch.int32))
    assert torch.equal(numbers, torch.view_as_complex(x.view(6, 4, 2)).conj())


def test_in_a_padded_call_rows_are_the_callers_own_and_anything_else_is_a_copy() -> None:
    _, fast = compiled(lambda m, x: (x[:, 2:], x[:1], x.t()), buckets=(6,))
    for rows in (6, 4):
        x = draw(rows)
        part, first, turned = fast(x)
        assert torch.equal(part, x[:, 2:])
        assert torch.equal(first, x[:1])
        assert torch.equal(turned, x.t())
        part.fill_(3)
        assert torch.equal(x[:, 2:], torch.full((rows, 6), 3.0))
    _, leaky = compiled(lambda m, x: x[-1:], buckets=(6,), verify="off")
    x = draw(2)
    assert torch.equal(leaky(x), x[-1:])  # behind the caller's own memory there would be nothing, or somebody else's


# --- copies -----------------------------------------------------------------------------------------------------------


def test_copies_of_outputs_that_share_memory_share_it_too() -> None:
    def body(m: Body, x: Tensor) -> Any:
        y = m.linear(x)
        return y, y[2:].t(), y.view(-1), x * 2

    model, fast = compiled(body, copy_outputs=True)
    x = draw()
    found = fast(x)
    fast(draw())
    torch.testing.assert_close(found, model(x))
    assert len({tensor.untyped_storage()._cdata for tensor in found}) == 2
    found[2].zero_()
    assert not found[0].any()
    assert not found[1].any()


@pytest.mark.parametrize("copied", [False, True])
def test_expanded_outputs_where_nothing_is_captured(copied: bool) -> None:
    model, fast = compiled(
        lambda m, x: m.linear(x).mean(0, keepdim=True).expand(4, 8), mode="none", copy_outputs=copied
    )
    for _ in range(2):
        x = draw()
        torch.testing.assert_close(fast(x), model(x))


# --- torch.compile ----------------------------------------------------------------------------------------------------


def broken(between: Callable[[Tensor], object], views: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
    def body(x: Tensor) -> Tensor:
        kept, view = views(x)
        torch._dynamo.graph_break()
        between(view)
        return kept

    return body


@pytest.mark.parametrize(
    "views",
    [
        pytest.param(lambda x: (x, (x.view(-1), x * 2)[0]), id="of an input"),
        pytest.param(lambda x: (y := x * 2, y.view(-1)), id="of an output"),
    ],
)
def test_what_is_written_to_a_view_behind_a_graph_break_is_not_lost(views: Any) -> None:
    body = broken(torch._dynamo.disable(lambda view: view.add_(1)), views)
    fast = torch.compile(body, backend=dynamo.auxstream)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(torch.ones(2, 3)), body(torch.ones(2, 3)))
