"""Writes that a rewrite must see, and operands that a kernel must refuse: each of these was wrong once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_op import DEVICE
from torch import Tensor, nn
from torch.fx import GraphModule
from ways import every_way, fused

from auxstream.capture.trace import trace
from auxstream.kernels import fuse_elementwise
from auxstream.kernels.launch import kernel_of
from auxstream.runtime.errors import InputError


def agrees(body: Callable[..., Any], *inputs: Tensor) -> None:
    """A function, fused, gives what eager gives, every way its kernels can run."""
    gm, report = fused(body, inputs)
    wanted = body(*(x.clone() for x in inputs))
    for way, found in every_way(gm, report, [x.clone() for x in inputs]):
        for ours, other in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            assert ours.stride() == other.stride(), way
            torch.testing.assert_close(ours, other, rtol=2e-6, atol=2e-6, msg=lambda text, way=way: f"{way}: {text}")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


# --- writes that a rewrite must see -----------------------------------------------------------------------------------


def test_gathered_rows_that_are_written_to_are_not_gathered_again() -> None:
    def body(rows: Tensor, index: Tensor) -> Tensor:
        gathered = rows[index]
        grid = gathered.view(3, 4, 16)
        gathered.mul_(2)
        return grid.sum(1).tanh() * 2

    agrees(body, drawn(12, 16), torch.arange(12, device=DEVICE).flip(0))


@pytest.mark.parametrize(("p", "train"), [(0.5, False), (0.0, True)])
def test_a_dropout_of_nothing_is_its_input(p: float, train: bool) -> None:
    def body(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2 + 1
        kept = nn.functional.dropout(y, p, train)
        kept.index_fill_(0, torch.zeros(1, dtype=torch.int64, device=x.device), 5.0)
        return y * 3, kept + 1

    agrees(body, drawn(4, 8))


def test_a_dropout_of_nothing_keeps_a_chain_in_one_kernel() -> None:
    def body(x: Tensor) -> Tensor:
        return nn.functional.dropout(x * 2 + 1, 0.1, False).sigmoid()

    gm, report = fused(body, [drawn(4, 8)])
    assert [len(fusion.group.nodes) for fusion in report.fusions] == [3]
    assert not any(node.target is torch.ops.aten.dropout.default for node in gm.graph.nodes)
    agrees(body, drawn(4, 8))


def test_an_inverse_through_indices_that_were_written_to_stays() -> None:
    def body(chosen: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.sort(chosen)[1]
        places.view(-1).copy_(places.flip(0))
        inverse = torch.empty_like(places)
        inverse[places] = torch.arange(8, device=chosen.device)
        return inverse, places * 2

    agrees(body, torch.tensor([3, 1, 2, 0, 7, 5, 6, 4], device=DEVICE))


def test_a_short_sum_keeps_its_strides() -> None:
    x = drawn(8, 4, 2).transpose(0, -1)
    agrees(lambda x: x.sum(-2), x)
    agrees(lambda x: x.sum(-2).bfloat16().sum(-1), x)


# --- operands that lie oddly ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [5, 6, 7])
def test_a_result_whose_rows_take_many_levels(rank: int) -> None:
    agrees(lambda x: (x * 2 + 1).relu(), drawn(*(2 + i % 2 for i in range(rank))).permute(*reversed(range(rank))))


def test_an_index_that_passes_make_a_constant() -> None:
    agrees(lambda table, x: table[x % 1] + 1, drawn(1), torch.arange(1, device=DEVICE))
    agrees(lambda table, x: table[x % 1] * 2 + 1, drawn(1), torch.arange(4, device=DEVICE))


def test_columns_may_lie_far_apart() -> None:
    far = 2**30 + 16
    base = torch.empty(2 * far + 8, dtype=torch.int8, device=DEVICE)  # of which six bytes are touched
    x = base.as_strided((2, 3), (1, far))
    x.copy_(torch.arange(6).view(2, 3))
    (fusion,) = fused(lambda x: (x * 2 + 1).sum(-1) + 1, [x])[1].fusions
    kernel = kernel_of(fusion.spec)
    outputs = kernel.fake([x], ())
    read, written = (found.access for found in fusion.spec.layouts([x], outputs, ()) if found is not None)
    source = kernel.source("resident", (read,), (written,))
    assert "col.to(tl.int64) * in0_c" in source, "an int32 product would wrap, and read what is not the tensor's"
    next(iter(kernel.candidates([x], outputs, ()).values()))([x, *outputs])
    assert outputs[0].tolist() == [10, 28]


@pytest.mark.parametrize("shapes", [((8, 16), (4, 16)), ((2, 16), (4, 16)), ((4, 16), (2, 16)), ((4, 8), (4, 16))])
def test_inputs_of_another_shape_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x * 2 + y).relu()

    traced = trace(Model(), (drawn(4, 16), drawn(4, 16))).graph_module
    gm = GraphModule(traced, traced.graph)  # without export's own check of inputs
    fuse_elementwise(gm)
    with pytest.raises(InputError, match="another shape"):
        gm(*(drawn(*shape) for shape in shapes))


def test_a_choice_of_any_number_of_operands_has_a_file_name() -> None:
    def body(*inputs: Tensor) -> Tensor:
        total = inputs[0] * 2
        for x in inputs[1:]:
            total = total + x
        return total

    inputs = [drawn(11, 13, 7, 17, 16)[:, i % 3 :: 3, :5, :15, :8][:, :4] for i in range(30)]
    (fusion,) = fused(body, inputs)[1].fusions
    kernel = kernel_of(fusion.spec)
    launch = next(iter(kernel.candidates(inputs, kernel.fake(inputs, ()), ()).values()))
    assert len(launch.numbers) > 150
    name = f".{kernel.choice_key(launch.numbers, 'NVIDIA_H200_of_some_long_name')}.json.12345678"
    assert len(name) < 255, "what a file system takes"


def test_values_of_several_fake_modes_are_fused_without_rewrites() -> None:
    """As make_fx leaves them: a new node has no mode to be computed in."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randperm(8)
    gm = make_fx(lambda c: torch.sort(c)[1] * 2 + 1)(x)
    fuse_elementwise(gm)
    assert torch.equal(gm(x), torch.sort(x)[1] * 2 + 1)


def test_threads_register_a_kernel_once() -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 3.25 + 1.75).sigmoid() - 0.5

    graphs = [trace(Chain(), (torch.ones(2, 8),)).graph_module for _ in range(8)]
    errors: list[BaseException] = []

    def work(gm: GraphModule) -> None:
        try:
            fuse_elementwise(gm)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(gm,)) for gm in graphs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
