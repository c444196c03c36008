"""Products of few rows against float64 and torch: every form, odd sizes, biases, tails, and what is refused.

On a GPU the kernels run there; else in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from auxstream.kernels.products import gated_linear, skinny_linear
from auxstream.kernels.products_launch import run
from auxstream.kernels.products_tiles import every, likely
from auxstream.kernels.products_work import MOST_ROWS, Tile, Work, reference, refusal
from auxstream.runtime.errors import AuxstreamError, CaptureError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2**-9, F16: 2**-12, F32: 2**-24}
ONE = Tile(4, 32, 4, ahead=True)
FEW = Tile(16, 32, 4, 3)


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes, a type, and how it is cut."""

    rows: int
    summed: int
    widths: tuple[int, ...]
    tile: Tile
    dtype: torch.dtype = BF16
    biased: bool = False
    activation: str | None = None

    def work(self, device: str = DEVICE, seed: int = 0) -> Work:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, by: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * by).to(device, self.dtype)

        weights = tuple(normal(width, self.summed, by=self.summed**-0.5) for width in self.widths)
        biases = tuple(normal(width) for width in self.widths) if self.biased else ()
        return Work(normal(self.rows, self.summed), weights, biases, self.activation)


CASES = [
    Case(1, 64, (33,), ONE),
    Case(1, 100, (40, 9, 24, 5), ONE, biased=True),
    Case(1, 72, (20, 31), replace(ONE, cols=64, ahead=False), F16),
    Case(1, 50, (7, 3), ONE, F32, biased=True),
    Case(1, 96, (21, 21), ONE, activation="gelu_tanh", biased=True),
    Case(1, 96, (21, 21), ONE, activation="silu"),
    Case(2, 72, (40,), FEW),
    Case(3, 100, (20, 9, 33, 17), FEW, biased=True),
    Case(8, 64, (40, 16), replace(FEW, rows=32), F16),
    Case(17, 72, (20,), FEW, F32, biased=True),
    Case(32, 64, (33, 8), FEW),
    Case(2, 100, (20, 9, 33), replace(FEW, splits=3), biased=True),
    Case(17, 80, (33,), replace(FEW, splits=2), F32),
    Case(1, 64, (40, 40), ONE, F32, activation="gelu_tanh"),
]


def exact(work: Work) -> list[Tensor]:
    """In float64, element by element as the mathematics says."""
    biases: Sequence[Tensor | float] = work.biases or [0.0] * len(work.weights)
    found = [
        torch.einsum("tk,nk->tn", work.x.double(), weight.double()) + bias
        for weight, bias in zip(work.weights, biases, strict=True)
    ]
    if work.activation is None:
        return found
    gate, up = found
    if work.activation == "silu":
        return [gate / (1 + torch.exp(-gate)) * up]
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return [gate * torch.sigmoid(2 * inner) * up]


def error(found: Sequence[Tensor], work: Work) -> float:
    """Relative, of all outputs."""
    wanted = torch.cat([out.flatten() for out in exact(work)])
    return float((torch.cat([out.double().flatten() for out in found]) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_as_near_to_float64_as_torch(case: Case) -> None:
    work = case.work()
    found, eager = run(work, case.tile), reference(work)
    assert [(out.shape, out.dtype) for out in found] == [(out.shape, out.dtype) for out in eager]
    assert 0 < error(found, work) <= 1.1 * error(eager, work) + ROUNDING[case.dtype] / 4


@pytest.mark.parametrize("case", [case for case in CASES if case.activation and case.dtype is BF16], ids=str)
def test_what_follows_is_rounded_where_eager_rounds(case: Case) -> None:
    """Of products that are exact, so that the order of sums is no matter, the same bits."""
    work = case.work()

    def coarse(tensor: Tensor) -> Tensor:
        return (tensor.float() * 8).round().clamp(-8, 8).to(case.dtype) / 4

    biases = tuple(coarse(bias) for bias in work.biases)
    work = replace(work, x=coarse(work.x), weights=tuple(coarse(weight * 4) for weight in work.weights), biases=biases)
    assert torch.equal(run(work, case.tile)[0], reference(work)[0])


def test_unrounded_products_would_show() -> None:
    """The tail in float32 from end to end has other bits: the test above sees roundings."""
    work = next(case for case in CASES if case.activation and case.dtype is BF16).work()
    wide = replace(
        work,
        x=work.x.float(),
        weights=tuple(w.float() for w in work.weights),
        biases=tuple(b.float() for b in work.biases),
    )
    assert not torch.equal(reference(wide)[0].to(BF16), reference(work)[0])


def spoiled(name: str, work: Work) -> Work:
    match name:
        case "a column too few":
            return replace(work, x=torch.cat([work.x[:, :-1], work.x[:, -1:] * 0], 1))
        case "another weight":
            return replace(work, weights=(work.weights[0], *work.weights[:1], *work.weights[2:]))
        case _:
            return replace(work, biases=tuple(bias * 1.05 for bias in work.biases))


@pytest.mark.parametrize("name", ["a column too few", "another weight", "a bias that is off"])
def test_the_gate_sees(name: str) -> None:
    work = Case(3, 100, (21, 21), FEW, biased=True).work()
    found = run(spoiled(name, work), FEW)
    assert error(found, work) > 1.1 * error(reference(work), work) + ROUNDING[BF16] / 4


@pytest.mark.parametrize("case", [CASES[1], CASES[11]], ids=str)
def test_the_same_bits_every_time(case: Case) -> None:
    work = case.work()
    first = run(work, case.tile)
    for _ in range(2):
        assert all(map(torch.equal, first, run(work, case.tile)))


@pytest.mark.parametrize("case", [CASES[1], CASES[7]], ids=str)
def test_a_weight_alone_has_the_bits_it_has_in_company(case: Case) -> None:
    work = case.work()
    for i, together in enumerate(run(work, case.tile)):
        alone = replace(work, weights=(work.weights[i],), biases=(work.biases[i],))
        assert torch.equal(run(alone, case.tile)[0], together)


@pytest.mark.parametrize("tile", [ONE, FEW, replace(FEW, splits=2)], ids=str)
def test_rows_may_lie_apart(tile: Tile) -> None:
    work = Case(1 if tile is ONE else 5, 64, (24, 9), tile).work()

    def apart(tensor: Tensor) -> Tensor:
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 24), torch.nan, dtype=tensor.dtype, device=DEVICE)
        wide[:, 8:-16] = tensor
        return wide[:, 8:-16]

    other = replace(work, x=apart(work.x), weights=tuple(map(apart, work.weights)))
    assert all(map(torch.equal, run(work, tile), run(other, tile)))


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 32])
@pytest.mark.parametrize(("summed", "widths"), [(2816, (4096, 2048, 2048)), (8192, (2816,)), (100, (24,)), (64, (1,))])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_there_is_a_tile_for_every_shape(
    rows: int, summed: int, widths: tuple[int, ...], activation: str | None, dtype: torch.dtype
) -> None:
    if activation is not None:
        rows, widths = 1, (widths[0], widths[0])
    weights = tuple(torch.empty(n, summed, dtype=dtype, device="meta") for n in widths)
    work = Work(torch.empty(rows, summed, dtype=dtype, device="meta"), weights, (), activation)
    tiles = every(work)
    assert likely(work)
    assert set(likely(work)) <= set(tiles)
    assert len(likely(work)) <= 4
    assert len({str(tile) for tile in tiles}) == len(tiles)  # a choice is remembered by its text
    for tile in tiles:
        assert all(size & (size - 1) == 0 for size in (tile.rows, tile.cols, tile.warps))
        if rows == 1:
            assert tile.splits == 1
        else:
            assert tile.rows >= 16 <= tile.cols
            assert (tile.rows + 32) * tile.cols * 4 * (tile.stages - 1) <= 400 << 10


# --- the ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)])
def test_the_ops_keep_their_word(shape: tuple[int, ...]) -> None:
    """Their schemas, and what they say of results before they run."""
    work = Case(1, 64, (24, 24), ONE, biased=True).work()
    x = torch.randn(shape).to(DEVICE, BF16)
    checks = ("test_schema", "test_faketensor")
    for biases in ([], list(work.biases)):
        torch.library.opcheck(skinny_linear(), (x, list(work.weights), biases), test_utils=checks)
        if x.numel() <= 64:
            torch.library.opcheck(gated_linear(), (x, *work.weights, biases, "silu"), test_utils=checks)


def test_the_ops_are_torchs() -> None:
    work = Case(6, 64, (24, 24), FEW, F32, biased=True).work()
    x = work.x.view(2, 3, 64)
    own = [functional.linear(x, *pair) for pair in zip(work.weights, work.biases, strict=True)]
    found = skinny_linear()(x, list(work.weights), list(work.biases))
    torch.testing.assert_close(found, own)
    gated = gated_linear()(x[:1, :1], *work.weights, list(work.biases), "gelu_tanh")
    wanted = functional.gelu(own[0], approximate="tanh") * own[1]
    torch.testing.assert_close(gated, wanted[:1, :1])


def of(**fields: Any) -> Callable[[Work], Work]:
    return lambda work: replace(work, **fields)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (of(x=torch.zeros(MOST_ROWS + 1, 64, dtype=BF16)), "33 rows"),
        (of(x=torch.zeros(2, 65, dtype=BF16)), r"\[N, 65\]"),
        (of(x=torch.zeros(2, 64)), "float32"),
        (of(weights=(torch.zeros(24, 64, dtype=torch.int8),) * 2), "int8"),
        (of(weights=(torch.zeros(64, 24, dtype=BF16).T,) * 2), r"strides \(1, 24\)"),
        (of(weights=(torch.zeros(24, 64, dtype=BF16),) * 5, biases=()), "5 weights"),
        (of(weights=(), biases=()), "0 weights"),
        (of(biases=(torch.zeros(24, dtype=BF16),)), "1 biases"),
        (of(biases=(torch.zeros(23, dtype=BF16),) * 2), r"a bias \(23,\)"),
        (of(activation="relu"), "'relu'"),
        (of(activation="silu"), "2 rows with an activation"),
        (of(activation="silu", weights=(torch.zeros(24, 64, dtype=BF16), torch.zeros(25, 64, dtype=BF16))), "bias"),
    ],
)
def test_what_no_kernel_does_is_refused_with_the_reason(change: Callable[[Work], Work], why: str) -> None:
    work = Case(2, 64, (24, 24), FEW, biased=True).work("cpu")
    assert not refusal(work)
    wrong = change(work)
    assert refusal(wrong)
    op: Any = skinny_linear() if wrong.activation is None else gated_linear()
    weights = [list(wrong.weights)] if wrong.activation is None else wrong.weights
    last = [] if wrong.activation is None else [wrong.activation]
    with pytest.raises(AuxstreamError, match=why):
        op(wrong.x, *weights, list(wrong.biases), *last)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "summed", "widths", "activation"),
    [
        *((rows, 2816, (4096, 2048, 2048), None) for rows in (1, 2, 8, 32)),
        *((rows, 8192, (2816,), None) for rows in (1, 2, 8, 32)),
        *((rows, 2112, (2816,), None) for rows in (1, 2, 8, 32)),
        (1, 2816, (2112, 2112), "gelu_tanh"),
    ],
)
def test_every_tile_on_a_gpu(rows: int, summed: int, widths: tuple[int, ...], activation: str | None) -> None:
    """No further from float64 than cuBLAS by a tenth, and the same bits every time."""
    work = Case(rows, summed, widths, ONE, activation=activation).work()
    eager = error(reference(work), work)
    for tile in likely(work):
        first = run(work, tile)
        assert error(first, work) <= 1.1 * eager, tile
        for _ in range(5):
            assert all(map(torch.equal, first, run(work, tile)))


@pytest.mark.gpu
def test_a_layout_that_is_new_to_a_capture_is_refused() -> None:
    work, graph = Case(3, 512, (256,), FEW).work("cuda"), torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError, match="new layout"), torch.cuda.graph(graph):
        skinny_linear()(work.x, list(work.weights), [])
