"""Rewrites that make ops fusible: parts as slices, short sums as additions, short sorts by counting."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from auxstream.capture.trace import trace
from auxstream.kernels import fuse_elementwise


class Of(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(*inputs)


def fused(body: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    gm = trace(Of(body), inputs).graph_module
    fuse_elementwise(gm)
    return gm


def targets(gm: GraphModule) -> set[str]:
    return {str(node.target) for node in gm.graph.nodes if node.op == "call_function"}


def agree(body: Callable[..., Any], gm: GraphModule, *inputs: Tensor) -> None:
    expected, got = body(*inputs), gm(*inputs)
    expected, got = (value if isinstance(value, tuple) else (value,) for value in (expected, got))
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6) if one.dtype == torch.float32 else None
        assert one.dtype == torch.float32 or torch.equal(one, other)


# --- sorts ------------------------------------------------------------------------------------------------------------


def grouped(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What experts that are grouped by products compute of the experts each token was sent to."""
    ordered, places = torch.sort(chosen)
    inverse = torch.empty_like(places)
    inverse[places] = torch.arange(places.shape[0])
    return ordered + 1, places, inverse, torch.div(places, 2, rounding_mode="floor")


@pytest.mark.parametrize("size", [2, 8, 33, 64])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_short_sort_counts_and_is_stable(size: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(size)
    chosen = torch.randint(-3, 3, (size,), generator=draw).to(dtype)
    gm = fused(grouped, chosen)
    assert not {name for name in targets(gm) if "sort" in name or "index_put" in name}
    for _ in range(5):
        chosen = torch.randint(-3, 3, (size,), generator=draw).to(dtype)
        ordered, places, inverse, tokens = gm(chosen)
        right = torch.sort(chosen, stable=True)
        assert torch.equal(ordered, right.values + 1)
        assert torch.equal(places, right.indices)
        assert torch.equal(inverse[places], torch.arange(size))
        assert torch.equal(tokens, places // 2)


@pytest.mark.parametrize(
    ("body", "x"),
    [
        (lambda x: torch.sort(x)[1] + 1, torch.arange(65).flip(0)),
        (lambda x: torch.sort(x, descending=True)[1] + 1, torch.arange(8)),
        (lambda x: torch.sort(x)[1] + 1, torch.rand(8)),
        (lambda x: torch.sort(x)[1] + 1, torch.arange(8).reshape(2, 4)),
    ],
    ids=["long", "descending", "of floats", "of a matrix"],
)
def test_other_sorts_stay(body: Callable[[Tensor], Tensor], x: Tensor) -> None:
    gm = fused(body, x)
    assert "aten.sort.default" in targets(gm)
    agree(body, gm, x)


def test_a_write_through_the_indices_that_is_no_inverse_stays() -> None:
    def body(x: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.sort(x)[1]
        counted = torch.zeros_like(places)
        counted[places] = torch.arange(8)
        scaled = torch.empty_like(places)
        scaled[places] = torch.arange(8) * 2
        return counted, scaled

    x = torch.tensor([5, 1, 4, 2, 7, 0, 3, 6])
    gm = fused(body, x)
    assert "aten.index_put_.default" in targets(gm)
    agree(body, gm, x)


# --- counts -----------------------------------------------------------------------------------------------------------


def ends(chosen: Tensor) -> Tensor:
    """Where each expert's tokens end, as models with grouped experts compute it."""
    return torch.cumsum(torch.histc(chosen.float(), bins=8, min=0, max=7), dim=0, dtype=torch.int32)


@pytest.mark.parametrize("size", [2, 16, 200])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_running_counts_of_few_numbers_compare(size: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(size)
    gm = fused(ends, torch.zeros(size, dtype=dtype))
    assert not {name for name in targets(gm) if "histc" in name or "cumsum" in name or "aten.to" in name}
    assert sum("auxstream_fused" in str(node.target) for node in gm.graph.nodes) == 1
    for _ in range(5):
        chosen = torch.randint(-3, 11, (size,), generator=draw).to(dtype)  # some out of range
        assert torch.equal(gm(chosen), ends(chosen))
        assert gm(chosen).dtype == torch.int32


@pytest.mark.parametrize(
    ("body", "x"),
    [
        (ends, torch.arange(257)),
        (ends, torch.arange(8).reshape(2, 4)),
        (lambda x: torch.cumsum(torch.histc(x.float(), bins=8, min=0, max=8), 0, dtype=torch.int32), torch.arange(8)),
        (lambda x: torch.cumsum(torch.histc(x.float(), bins=8), 0, dtype=torch.int32), torch.arange(8)),
        (lambda x: torch.cumsum(torch.histc(x.float(), bins=8, min=0, max=7), 0), torch.arange(8)),
        (lambda x: (lambda h: h.cumsum(0, dtype=torch.int32) + h)(torch.histc(x.float(), 8, 0, 7)), torch.arange(8)),
        (lambda x: torch.cumsum(torch.histc(x, bins=8, min=0, max=7), 0, dtype=torch.int32), torch.rand(8)),
    ],
    ids=["long", "of a matrix", "other bins", "bins by the data", "of floats", "counts wanted too", "of fractions"],
)
def test_other_counts_stay(body: Callable[[Tensor], Tensor], x: Tensor) -> None:
    gm = fused(body, x)
    assert {"aten.histc.default", "aten.cumsum.default"} <= targets(gm)
    agree(body, gm, x)


def test_counts_of_numbers_that_are_written_later() -> None:
    def body(x: Tensor) -> tuple[Tensor, Tensor]:
        numbers = x * 2
        floats = numbers.float()
        numbers.index_fill_(0, torch.tensor([0]), 7)
        return torch.cumsum(torch.histc(floats, bins=8, min=0, max=7), 0, dtype=torch.int32), numbers

    x = torch.tensor([0, 1, 1, 3])
    agree(body, fused(body, x), x)


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [2, 8, 16])
def test_a_short_sum_is_unrolled_and_fuses_with_what_follows(terms: int, dtype: torch.dtype) -> None:
    def body(x: Tensor) -> Tensor:
        return torch.relu(x.sum(1) * 2)

    x = torch.randn(3, terms, 32).to(dtype)
    gm = fused(body, x)
    assert "aten.sum.dim_IntList" not in targets(gm)
    assert sum("auxstream_fused" in str(node.target) for node in gm.graph.nodes) == 1
    expected = torch.relu(x.double().sum(1).to(dtype) * 2)
    torch.testing.assert_close(gm(x), expected)


def test_rows_that_are_summed_are_gathered_one_by_one() -> None:
    def body(rows: Tensor, index: Tensor) -> Tensor:
        return rows[index].view(3, 4, 16).sum(1).tanh()

    rows, index = torch.randn(12, 16), torch.randperm(12)
    gm = fused(body, rows, index)
    assert not targets(gm) & {"aten.sum.dim_IntList", "aten.index.Tensor"}
    torch.testing.assert_close(gm(rows, index), body(rows, index), rtol=2e-6, atol=2e-6)
    other = torch.randint(0, 12, (12,))
    torch.testing.assert_close(gm(rows, other), body(rows, other), rtol=2e-6, atol=2e-6)


def scored(rows: Tensor, scores: Tensor, index: Tensor) -> Tensor:
    """Experts' outputs times their scores, put back in the order of tokens and added up."""
    return (rows * scores[:, None])[index].view(3, 4, 16).sum(1).tanh()


def test_rows_that_are_scaled_for_a_gather_are_scaled_behind_it() -> None:
    rows, scores, index = torch.randn(12, 16).to(torch.bfloat16), torch.randn(12), torch.randperm(12)
    gm = fused(scored, rows, scores, index)
    assert not targets(gm) & {"aten.sum.dim_IntList", "aten.index.Tensor", "aten.mul.Tensor"}
    assert sum("auxstream_fused" in str(node.target) for node in gm.graph.nodes) == 1
    for _ in range(3):
        index = torch.randint(0, 12, (12,))
        torch.testing.assert_close(gm(rows, scores, index), scored(rows, scores, index), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("reason", ["read elsewhere", "an operand is written", "the result is written"])
def test_rows_that_others_see_are_scaled_ahead(reason: str) -> None:
    def body(rows: Tensor, scores: Tensor, index: Tensor) -> Any:
        work = rows + 1
        scaled = work * scores[:, None]
        if reason == "the result is written":
            scaled.index_fill_(0, index[:1], 3.0)
        gathered = scaled[index]
        if reason == "an operand is written":
            work.index_fill_(0, index[:1], 3.0)
        total = gathered.view(3, 4, 16).sum(1).tanh()
        return (total, scaled.flip(0)) if reason == "read elsewhere" else (total, work)

    inputs = torch.randn(12, 16), torch.randn(12), torch.randperm(12)
    gm = fused(body, *inputs)
    agree(body, gm, *inputs)


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda x: x.sum(1) + 1, (3, 17, 32)),
        (lambda x: x.sum(0) + 1, (3, 4, 32)),
        (lambda x: x.sum(1, keepdim=True) + 1, (3, 4, 32)),
        (lambda x: x.sum((0, 1)) + 1, (3, 4, 32)),
    ],
    ids=["long", "over the first", "kept", "over two"],
)
def test_other_sums_stay(body: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    gm = fused(body, x)
    assert "aten.sum.dim_IntList" in targets(gm)
    agree(body, gm, x)


def test_a_sum_in_a_marked_branch_stays() -> None:
    gm = trace(Of(lambda x: torch.relu(x.sum(1) * 2)), (torch.randn(3, 4, 32),)).graph_module
    for node in gm.graph.nodes:
        node.meta["skip_mlir_fusion"] = True
    fuse_elementwise(gm)
    assert targets(gm) == {"aten.sum.dim_IntList", "aten.mul.Tensor", "aten.relu.default"}


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x.chunk(2, -1),
        lambda x: x.chunk(2, 1),
        lambda x: x.split(8, -1),
        lambda x: x.split([4, 12], dim=-1),
        lambda x: x.chunk(3, 0),
    ],
    ids=["chunk", "chunk of dim 1", "split", "split with sizes", "chunk of rows"],
)
def test_parts_are_slices_with_the_same_strides(part: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    def body(x: Tensor) -> tuple[Tensor, ...]:
        parts = part(x * 2)
        return (parts[0] + 1).sigmoid(), *parts[1:]

    x = torch.randn(6, 16)
    gm = fused(body, x)
    assert not {name for name in targets(gm) if "chunk" in name or "split" in name}
    agree(body, gm, x)


def test_parts_of_what_a_group_computes_are_read_inside_it() -> None:
    def body(x: Tensor) -> Tensor:
        gate, up = (x * 2 + 1).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    x = torch.randn(6, 16)
    gm = fused(body, x)
    assert sum("auxstream_fused" in str(node.target) for node in gm.graph.nodes) == 1
    assert targets(gm) - {str(operator.getitem)} == {
        str(node.target) for node in gm.graph.nodes if "auxstream_fused" in str(node.target)
    }
    torch.testing.assert_close(gm(x), body(x), rtol=2e-6, atol=2e-6)
