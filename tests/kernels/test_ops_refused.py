"""What no table row can express is opaque: it runs as it was, and is never wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_op import DEVICE, fusion_of, results
from op_values import ROWS, Case, aten, values
from torch import Tensor

F32, I32, I8 = values(torch.float32, 1), values(torch.int32, 1), values(torch.int8, 1)
INDEX = torch.zeros(3, dtype=torch.int64, device=DEVICE)


def made(dtype: torch.dtype) -> Tensor:
    return torch.ones(ROWS, 8, dtype=dtype, device=DEVICE)


REFUSED: dict[str, Case] = {
    "float64": Case(aten.add.Tensor, (made(torch.float64), made(torch.float64))),
    "float64 beside float32": Case(aten.mul.Tensor, (made(torch.float32), made(torch.float64))),
    "a cast to float64": Case(aten.to.dtype, (F32, torch.float64)),
    "complex": Case(aten.add.Tensor, (made(torch.complex64), made(torch.complex64))),
    "a complex number": Case(aten.add.Tensor, (F32, 1j)),
    "unsigned bytes": Case(aten.add.Tensor, (made(torch.uint8), made(torch.uint8))),
    "a cast from unsigned bytes": Case(aten.to.dtype, (made(torch.uint8), torch.float32)),
    "an integer to a large power": Case(aten.pow.Tensor_Scalar, (I32, 100)),
    "integers to integers": Case(aten.pow.Tensor_Tensor, (I32, I32.abs())),
    "a number to integers": Case(aten.pow.Scalar, (2, I32.abs())),
    "a number too large for its integers": Case(aten.lt.Scalar, (I8, 1000)),
    "rounding that is no rounding": Case(aten.div.Tensor_mode, (F32, F32), {"rounding_mode": None}),
    "decimals": Case(aten.round.decimals, (F32,), {"decimals": 2}),
    "a dropout that drops": Case(aten.dropout.default, (F32, 0.5, True)),
    "a sum over rows": Case(aten.sum.dim_IntList, (F32, [0])),
    "a sum over all": Case(aten.sum.dim_IntList, (F32, [0, 1])),
    "a sum over everything": Case(aten.sum.default, (F32,)),
    "a softmax over rows": Case(aten.softmax.int, (F32, 0)),
    "a norm over two dimensions": Case(aten.layer_norm.default, (F32, list(F32.shape))),
    "a join of rows": Case(aten.cat.default, ([F32, F32], 0)),
    "two indices": Case(aten.index.Tensor, (F32, [INDEX, INDEX])),
    "an index of columns": Case(aten.index.Tensor, (F32, [None, INDEX])),
    "rows of three dimensions": Case(aten.index.Tensor, (F32.view(2, 3, -1), [INDEX % 2])),
    "a gather over rows": Case(aten.gather.default, (F32, 0, torch.zeros_like(I32, dtype=torch.int64))),
    "a gather from fewer rows": Case(aten.gather.default, (F32, 1, INDEX.expand(2, 3))),
    "a selection of columns": Case(aten.index_select.default, (F32, 1, INDEX)),
    "a prefix sum": Case(aten.cumsum.default, (F32, 1)),
    "a matrix product": Case(aten.mm.default, (F32, F32.t())),
    "random numbers": Case(aten.rand_like.default, (F32,)),
    "no elements": Case(aten.add.Tensor, (F32[:0], F32[:0])),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_op_that_cannot_be_expressed_is_opaque(what: str) -> None:
    case = REFUSED[what]
    case.target(*case.args, **case.kwargs)  # eager takes it
    assert fusion_of(*case.call) is None


ERRORS: dict[str, Any] = {
    "an integer over zero": Case(aten.floor_divide.Scalar, (I32, 0)),
    "an integer's remainder by zero": Case(aten.remainder.Scalar, (I32, 0)),
    "an integer to a negative power": Case(aten.pow.Tensor_Scalar, (I32, -1)),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_eager_refuses_is_left_to_eager(what: str) -> None:
    assert fusion_of(*ERRORS[what].call) is None


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the quotient is undefined, as eager's is")
def test_a_zero_among_integers_is_eagers_error() -> None:
    case = Case(aten.floor_divide.default, (I32, values(torch.int32, 2)))
    fusion = fusion_of(*case.call)
    assert fusion is not None
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        results(fusion, [case.call])
