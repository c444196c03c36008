"""Constants and ranges are written down in the kernels that use them, unless something writes to them."""

from __future__ import annotations

import pytest
import torch
from one_op import DEVICE
from patterns import randn
from test_numerics import agree
from torch import Tensor
from torch.fx import Node
from ways import Function, ModuleOf

from auxstream.kernels.free import FREE

X = randn(5, 48, dtype=torch.bfloat16)

FILLS: dict[str, Function] = {
    "zeros": lambda x: torch.zeros(48, device=DEVICE, dtype=torch.bfloat16),
    "ones": lambda x: torch.ones(5, 1, device=DEVICE),
    "full": lambda x: torch.full((48,), 0.3, device=DEVICE, dtype=torch.bfloat16),
    "full of a number without dimensions": lambda x: torch.full([], -torch.inf, device=DEVICE),
    "zeros_like": torch.zeros_like,
    "ones_like": lambda x: torch.ones_like(x, dtype=torch.float32),
    "full_like": lambda x: torch.full_like(x, 1.1),
    "new_zeros": lambda x: x.new_zeros(5, 48),
    "new_ones": lambda x: x.new_ones(1, 48),
    "new_full": lambda x: x.new_full((48,), 7.3),
    "scalar_tensor": lambda x: torch.scalar_tensor(0.1, device=DEVICE),
    "arange": lambda x: torch.arange(48, device=DEVICE),
    "arange from, in a dtype": lambda x: torch.arange(3, 51, device=DEVICE, dtype=torch.float32),
    "arange in steps": lambda x: torch.arange(100, 4, -2, device=DEVICE, dtype=torch.int32),
    "arange, seen through views": lambda x: torch.arange(48, device=DEVICE).view(1, 1, 48).squeeze(0).expand(1, 48),
    "full, expanded": lambda x: torch.full((1, 1), 2.5, device=DEVICE).expand(5, 48),
}


@pytest.mark.parametrize("fill", FILLS)
def test_a_free_value_is_no_input(fill: str) -> None:
    _, report = agree(lambda x: (x + FILLS[fill](x)) * 0.5, [X])
    (fusion,) = report.fusions
    assert len(fusion.inputs) == 1


def test_every_free_op_is_tried() -> None:
    seen = {node.target for fill in FILLS.values() for node in trace_of(fill) if node.target in FREE}
    assert seen == set(FREE)


def trace_of(fill: Function) -> list[Node]:
    program = torch.export.export(ModuleOf(lambda x: x + fill(x)), (X,), strict=False)
    return list(program.graph.nodes)


def test_a_range_over_rows_is_read() -> None:
    _, report = agree(lambda x: (x + torch.arange(5, device=DEVICE)[:, None]) * 0.5, [X])
    (fusion,) = report.fusions
    assert len(fusion.inputs) == 2


def test_a_range_that_is_no_whole_numbers_is_read() -> None:
    _, report = agree(lambda x: (x + torch.arange(0, 4.8, 0.1, device=DEVICE)) * 0.5, [X])
    assert len(report.fusions[0].inputs) == 2


def test_a_constant_that_is_written_to_is_read() -> None:
    def function(x: Tensor) -> Tensor:
        counts = torch.zeros(5, 48, device=DEVICE)
        counts.index_add_(0, torch.tensor([1, 1, 4], device=DEVICE), torch.ones(3, 48, device=DEVICE))
        return (x + counts) * 0.5

    agree(function, [X])


def test_a_constant_that_leaves_is_made_anew() -> None:
    gm, _ = agree(lambda x: ((x + torch.ones_like(x)) * 2, torch.ones_like(x)), [X])
    gm(X)[1].zero_()
    assert gm(X)[1].all()


def test_constants_joined_to_columns() -> None:
    agree(lambda x: torch.cat([x, x.new_full((5, 3), 1.5), torch.zeros_like(x)], -1) * 2, [X])
    agree(lambda x: torch.cat([torch.arange(48, device=DEVICE).expand(5, 48), x], -1) * 2, [X])


def test_nothing_but_constants_is_no_kernel() -> None:
    _, report = agree(lambda x: (x * 2 + 1, torch.ones_like(x) + torch.arange(48, device=DEVICE)), [X])
    assert len(report.fusions) == 1


def test_constants_of_a_size_that_is_not_known() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)

    def function(x: Tensor) -> Tensor:
        return (x + torch.full((x.shape[0], 48), 1.5, device=DEVICE)) * torch.arange(48, device=DEVICE)

    _, report = agree(function, [X], dynamic=[{0: rows}])
    assert len(report.fusions[0].inputs) == 1
