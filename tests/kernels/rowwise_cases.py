"""Calls on which each row that needs more than a formula is tried: reductions, norms, softmax, joins, gathers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from compare import FLOAT32, TIES, Bound
from one_op import DEVICE
from op_values import COLUMNS, EVERY, FLOATS, ROWS, Case, aten, values
from torch import Tensor

SUM = Bound(ulp=1, share=0.02, float32=FLOAT32)
"""Added up in another order than eager's."""
LOG_SOFTMAX = SUM if DEVICE == "cuda" else replace(SUM, share=0.3)
"""The CPU's is less exact in half precision: every sixteenth result is not the nearest, where ours are."""


def _reductions() -> Iterator[Case]:
    for dtype, keep in itertools.product(EVERY, (True, False)):
        x = values(dtype, 1, awkward=not dtype.is_floating_point)
        yield Case(aten.sum.dim_IntList, (x, [-1], keep), {}, SUM)
        yield Case(aten.amax.default, (values(dtype, 1), [-1], keep), {}, TIES)
        yield Case(aten.amin.default, (values(dtype, 2), [1], keep), {}, TIES)
        yield from (Case(op.dim, (values(dtype, 1) > 1, 1, keep)) for op in (aten.any, aten.all))
        yield from (Case(op.dim, (values(dtype, 1), -1, keep)) for op in (aten.any, aten.all))
    for dtype, asked in itertools.product(FLOATS, (None, *FLOATS)):
        x = values(dtype, 1, awkward=False)
        yield Case(aten.sum.dim_IntList, (x, [-1]), {"dtype": asked}, SUM)
        yield Case(aten.mean.dim, (x, [-1], True), {"dtype": asked}, SUM)
        yield Case(aten.softmax.int, (x, -1), {"dtype": asked}, SUM)
        yield Case(aten.log_softmax.int, (x, -1), {"dtype": asked}, LOG_SOFTMAX)
    for dtype in FLOATS:
        x = values(dtype, 1, awkward=False)
        for op in (aten.var, aten.std):
            yield from (Case(op.correction, (x, [-1]), {"correction": c}, SUM) for c in (None, 0, 2))
            yield from (Case(op.dim, (x, [-1], unbiased, True), {}, SUM) for unbiased in (True, False))
        yield Case(aten._softmax.default, (x, -1, False), {}, SUM)
        yield Case(aten._log_softmax.default, (x, -1, False), {}, LOG_SOFTMAX)
        yield Case(aten.sum.dim_IntList, (values(dtype, 1), [-1]), {}, SUM)
        yield Case(aten.softmax.int, (values(dtype, 1), -1), {}, SUM)
        weights = [values(dtype, i, awkward=False)[0] for i in (3, 4)]
        for w in (None, weights[0]):
            yield Case(aten.rms_norm.default, (x, [COLUMNS], w, 1e-5), {}, SUM)
            yield Case(aten.rms_norm.default, (x, [COLUMNS], w), {}, SUM)
            yield Case(aten.layer_norm.default, (x, [COLUMNS], w, None, 1e-5), {}, SUM)
        yield Case(aten.layer_norm.default, (x, [COLUMNS], *weights, 1e-5), {}, SUM)


def _joins() -> Iterator[Case]:
    for dtype in EVERY:
        x, y = values(dtype, 1), values(dtype, 2)
        yield Case(aten.cat.default, ([x, y[:, :5], x], -1))
    yield Case(aten.cat.default, ([values(torch.bfloat16, 1), values(torch.float32, 2)], 1))


def _indices(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(7)).to(dtype).to(DEVICE)


def _gathers() -> Iterator[Case]:
    for dtype in EVERY:
        table = values(dtype, 1)
        for index in (_indices(ROWS, 11), _indices(ROWS, 2, 3), _indices(ROWS, 1, dtype=torch.int32)):
            yield Case(aten.index.Tensor, (table, [index]))
            if dtype.is_floating_point:
                yield Case(aten.embedding.default, (table, index))
        yield Case(aten.index.Tensor, (table, [_indices(2 * ROWS, 9) - ROWS]))
        yield Case(aten.index.Tensor, (table[0], [_indices(2 * COLUMNS, 3, 9) - COLUMNS]))
        yield Case(aten.index_select.default, (table, 0, _indices(ROWS, 4)))
        yield Case(aten.index_select.default, (table[:, 3], 0, _indices(ROWS, 4)))
        yield Case(aten.gather.default, (table, -1, _indices(COLUMNS, ROWS, 4)))
        yield Case(aten.gather.default, (table.view(2, 3, COLUMNS), 2, _indices(COLUMNS, 2, 3, 70)))
    yield Case(aten.embedding.default, (values(torch.float32, 1).t(), _indices(COLUMNS, 5)))


def rowwise_cases() -> Iterator[Case]:
    """For every row that needs more than a formula at least one case."""
    for family in (_reductions, _joins, _gathers):
        yield from family()
