"""What models are made of, fused, against eager: every pattern, every variant of its kernels, every kind of row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from compare import EXACT, FUNCTION, Bound, disagreement
from one_op import DEVICE
from patterns import PATTERNS, Pattern, randn
from torch import Tensor
from ways import Function, every_way, fused, left_over

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes behind a mask

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
# One column is no row to reduce, and two halves of a head need two each.
WIDTHS = (2, 3, 7, 64, 1000, 4096)


def agree(function: Function, args: Sequence[Tensor], bound: Bound = EXACT, dynamic: Any = None) -> Any:
    """Fuse a function and compare it with itself, every way; returns the graph and the report."""
    gm, report = fused(function, args, dynamic)
    wrong = disagreements(function, args, gm, report, bound)
    assert not wrong, "\n".join([*wrong, str(report)])
    return gm, report


def disagreements(function: Function, args: Sequence[Tensor], gm: Any, report: Any, bound: Bound = EXACT) -> list[str]:
    eager = function(*args)
    eager = list(eager) if isinstance(eager, tuple) else [eager]
    floats = [t for t in args if t.dtype.is_floating_point and t.numel()]
    magnitude = max((float(t[torch.isfinite(t)].abs().max()) for t in floats), default=0.0)
    wrong: list[str] = []
    for way, ours in every_way(gm, report, args):
        for number, (one, other) in enumerate(zip(ours, eager, strict=True)):
            what = disagreement(one, other, bound, magnitude)
            wrong += [f"output {number} by {way}: {what}"] if what else []
    return wrong


def check(pattern: Pattern, rows: int, width: int, dtype: torch.dtype) -> None:
    gm, report = agree(pattern.function, pattern.make(rows, width, dtype), pattern.bound)
    if dtype is not torch.float32:  # there a cast is a copy, and what surrounds it may be too little for a kernel
        assert not left_over(gm), f"left over: {left_over(gm)}\n{report}"
        assert len(report.fusions) == pattern.kernels, str(report)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_fused_and_agrees(name: str, dtype: torch.dtype) -> None:
    check(PATTERNS[name], 5, 96, dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["residual_and_norm", "layer_norm", "softmax", "swiglu_of_chunks"])
def test_rows_of_any_width(name: str, width: int) -> None:
    check(PATTERNS[name], 3, width, torch.bfloat16)


@pytest.mark.parametrize("name", ["masked_softmax", "layer_norm"])
def test_long_rows_are_tiled(name: str) -> None:
    check(PATTERNS[name], 2, 40_000, torch.bfloat16)


@pytest.mark.parametrize("name", ["log_softmax", "softcap"])
def test_a_row_of_a_vocabulary(name: str) -> None:
    check(PATTERNS[name], 1, 262_144, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 2, 33, 200])
@pytest.mark.parametrize("name", ["residual_and_norm", "routed"])
def test_any_number_of_rows(name: str, rows: int) -> None:
    check(PATTERNS[name], rows, 64, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 33])
def test_any_number_of_heads_and_positions(rows: int) -> None:
    check(PATTERNS["rope"], rows, 64, torch.bfloat16)


def test_single_columns() -> None:
    for one, other in (((5, 1), (5, 1)), ((1,), (1, 1)), ((), (3, 1))):
        x, y = randn(*one, dtype=torch.bfloat16), randn(*other, dtype=torch.bfloat16, seed=1)
        agree(lambda x, y: (x * y + 1).relu(), [x, y])


def test_no_rows() -> None:
    for shape in ((0, 64), (3, 0, 64)):
        x, w = randn(*shape, dtype=torch.float32), randn(64, dtype=torch.float32)
        agree(lambda x, w: torch.softmax(x * w, -1) + 1, [x, w])


# --- shapes -----------------------------------------------------------------------------------------------------------

BROADCASTS = [
    ((4, 5, 6), (6,)), ((4, 5, 6), (5, 6)), ((4, 5, 6), (4, 1, 6)), ((4, 5, 6), (1, 5, 1)), ((4, 5, 6), (4, 5, 1)),
    ((4, 5, 6), (4, 1, 1)), ((4, 5, 6), ()), ((4, 5, 6), (1,)), ((5, 1), (1, 6)), ((2, 1, 3, 1, 7), (4, 1, 5, 1)),
    ((6,), (6,)), ((6, 6), (6, 1)), ((6, 6), (1, 6)), ((2, 3, 2, 3, 2, 3), (2, 1, 2, 1, 2, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), BROADCASTS, ids=str)
def test_broadcasting_in_every_position(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    x, y = randn(*one, dtype=torch.bfloat16), randn(*other, dtype=torch.bfloat16, seed=1)
    agree(lambda x, y: (x * y - y).neg() + x, [x, y])
    agree(lambda x, y: (y - x).relu() * y, [x, y])


VIEWS: dict[str, Any] = {
    "transposed": lambda x: x.transpose(0, 1),
    "columns apart": lambda x: x[..., ::2],
    "rows apart": lambda x: x[::2],
    "a part": lambda x: x[..., 3:35],
    "expanded": lambda x: x[:, :1].expand(-1, 6, -1),
    "permuted": lambda x: x.permute(2, 0, 1),
    "from the third": lambda x: x[2:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_inputs_are_read_where_they_lie(view: str) -> None:
    base = randn(6, 6, 64, dtype=torch.bfloat16)
    x = VIEWS[view](base)
    assert x.data_ptr() != base.data_ptr() or x.stride() != base.stride()
    w = randn(x.shape[-1], dtype=torch.bfloat16, seed=1)
    agree(lambda x, w: (x * w + 1).relu() - x, [x, w])
    agree(lambda x, w: (x * w).amax(-1, keepdim=True) - x, [x, w])


def test_several_outputs_of_several_dtypes() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        return total, total > 0, (total * 4).to(torch.int32), total.float().amax(-1), total.to(torch.float16)

    _, report = agree(function, [randn(5, 40, dtype=torch.bfloat16), randn(5, 40, dtype=torch.bfloat16, seed=1)])
    assert len(report.fusions) == 1


def test_a_result_that_is_a_constant_is_written_once() -> None:
    """`a - a` of integers is folded; its one element is not a row of the columns that went into `a`."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.amax(-1)
        return largest - largest, (x - x).amax(-1)

    for shape in ((6,), (3, 6)):
        agree(function, [torch.arange(18, device=DEVICE)[: torch.Size(shape).numel()].view(shape)])


def test_more_inputs_than_an_op_takes() -> None:
    tensors = [randn(4, 32, dtype=torch.bfloat16, seed=i) for i in range(90)]

    def function(*xs: Tensor) -> Tensor:
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total

    gm, report = agree(function, tensors)
    assert len(report.fusions) > 1
    assert not left_over(gm)


def test_rows_of_any_number_in_one_graph() -> None:
    rows = torch.export.Dim("rows", min=2, max=4096)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.softmax(x * w, -1) * w

    def made(count: int) -> list[Tensor]:
        return [randn(count, 3, 64, dtype=torch.float32), randn(64, dtype=torch.float32, seed=1)]

    gm, report = agree(function, made(5), PATTERNS["softmax"].bound, dynamic=[{0: rows}, None])
    assert len(report.fusions) == 1
    for count in (2, 17, 130):
        assert not disagreements(function, made(count), gm, report, PATTERNS["softmax"].bound)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_rounding_point_is_eagers(dtype: torch.dtype) -> None:
    """Long chains in half precision, where one rounding too few shows in every third element."""

    def function(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return ((x * y + z) / (y.abs() + 1.1) - x.square() * 0.3).clamp(-5, 5) * (z - 1.7) + x / 3

    agree(function, [randn(64, 128, dtype=dtype, seed=i) for i in range(3)])


def test_a_row_that_is_not_finite() -> None:
    x = randn(6, 64, dtype=torch.float32)
    x[0] = -torch.inf
    x[1, 3] = torch.inf
    x[2, 5] = torch.nan
    x[3, :] = 0.0
    x[4] = 1e35
    for name in ("softmax", "log_softmax", "standardized"):
        agree(PATTERNS[name].function, [x], PATTERNS[name].bound)
    rest = [torch.zeros_like(x[:4]), randn(64, dtype=torch.float32), randn(64, dtype=torch.float32, seed=1)]
    agree(PATTERNS["layer_norm"].function, [x[:4], *rest], PATTERNS["layer_norm"].bound)


def test_numbers_below_the_least_normal_one() -> None:
    x = torch.tensor([[1.0, 2e-40, -3e-41, 0.5, -95.0, 1e-38]], device=DEVICE)
    agree(lambda x: ((x + 1e-40) * 0.25, torch.where(x > 1e-40, x, 1e-40) * 3), [x])
    agree(lambda x: x.exp() * x.abs().pow(1e-42), [x], FUNCTION)


def test_a_mean_far_from_zero() -> None:
    """Where a variance from squares would cancel."""
    x = randn(8, 1000, dtype=torch.float32) + 1000.0
    exact = torch.nn.functional.layer_norm(x.double(), (1000,)).float()
    gm, report = fused(lambda x: torch.nn.functional.layer_norm(x, (1000,)) * 1.0, [x])
    for way, (ours,) in every_way(gm, report, [x]):
        assert float((ours - exact).abs().max()) < 2e-6 * 1000, way


def test_an_index_out_of_range_is_an_error() -> None:
    if DEVICE != "cpu":
        pytest.skip("on a GPU it ends the process, as eager's does")
    table, ids = randn(4, 8, dtype=torch.float32), torch.tensor([1, 2])
    gm, report = fused(lambda t, i: t[i] * 2 + 1, [table, ids])
    with pytest.raises(IndexError):
        next(iter(every_way(gm, report, [table, torch.tensor([1, 4])])))
