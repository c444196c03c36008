"""What eager does on CUDA and not on the CPU, as kernels for CUDA do it: traced for CUDA, run by torch on any machine.

The oracle is arithmetic written out here, rounding by rounding, from how CUDA's kernels are documented to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import disagreement
from op_values import aten, values
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule

from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.emit import emit
from auxstream.kernels.grouping import find_groups
from auxstream.kernels.launch import kernel_of

HALVES = (torch.bfloat16, torch.float16)
X = {dtype: values(dtype, 1, awkward=False).cpu() for dtype in (*HALVES, torch.float32)}


def on_cuda(target: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A call as a kernel traced for CUDA computes it."""
    graph, mode = Graph(), FakeTensorMode()
    nodes, fakes, inputs = list[Any](), list[Any](), dict[str, Tensor]()
    for number, value in enumerate(args):
        node = fake = value
        if isinstance(value, Tensor):
            node = graph.placeholder(f"x{number}")
            fake = FakeTensor(mode, value.to("meta"), torch.device("cuda:0"))
            node.meta["val"], inputs[node.name] = fake, value
        nodes.append(node)
        fakes.append(fake)
    call = graph.call_function(target, tuple(nodes), kwargs)
    with mode:
        call.meta["val"] = target(*fakes, **kwargs)
    graph.output(call)
    (group,) = find_groups(Dataflow.of(GraphModule(torch.nn.Module(), graph)), lambda node: True, least=1)
    fusion = emit(group)
    return kernel_of(fusion.spec).reference([inputs[node.name] for node in fusion.inputs], ())[0]


def exactly(ours: Tensor, wanted: Tensor) -> None:
    assert disagreement(ours, wanted) is None, disagreement(ours, wanted)


def single(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


@pytest.mark.parametrize("dtype", X, ids=str)
def test_division_by_a_number_multiplies_by_its_reciprocal(dtype: torch.dtype) -> None:
    assert single(1 / 1.1) != 1 / single(1.1)  # true division rounds once, what rounds quotients rounds before it
    wanted = (X[dtype].float() * single(1 / 1.1)).to(dtype)
    for target in (aten.div.Tensor, aten.div.Scalar, aten.divide.Scalar, aten.true_divide.Scalar):
        exactly(on_cuda(target, X[dtype], 1.1), wanted)
    trunc = (X[dtype].float() * (1 / single(1.1))).trunc().to(dtype)
    exactly(on_cuda(aten.div.Scalar_mode, X[dtype], 1.1, rounding_mode="trunc"), trunc)


NUMBERS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.add.Tensor: lambda x, n: x + n,
    aten.sub.Tensor: lambda x, n: x - n,
    aten.mul.Tensor: lambda x, n: x * n,
    aten.rsub.Scalar: lambda x, n: n - x,
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", NUMBERS, ids=str)
def test_numbers_of_arithmetic_stay_in_float32(target: Any, dtype: torch.dtype) -> None:
    exactly(on_cuda(target, X[dtype], 1.1), NUMBERS[target](X[dtype].float(), single(1.1)).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_of_comparisons_and_remainders_are_rounded(dtype: torch.dtype) -> None:
    number = single(1.1).to(dtype).float()
    exactly(on_cuda(aten.remainder.Scalar, X[dtype], 1.1), torch.remainder(X[dtype].float(), number).to(dtype))
    near = torch.full_like(X[dtype], 1.1)
    exactly(on_cuda(aten.lt.Scalar, near, 1.1), near.float() < number)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("target", [aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor], ids=str)
def test_a_tensor_without_dimensions_is_rounded(target: Any, dtype: torch.dtype) -> None:
    one, other = X[dtype], single(1.1)
    exactly(on_cuda(target, one, other), target(one.float(), other.to(dtype).float()).to(dtype))
    exactly(on_cuda(target, other, one), target(other.to(dtype).float(), one.float()).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cubes_are_rounded_twice(dtype: torch.dtype) -> None:
    square = (X[dtype].float() ** 2).to(dtype).float()
    exactly(on_cuda(aten.pow.Tensor_Scalar, X[dtype], 3), (square * X[dtype].float()).to(dtype))
    exactly(on_cuda(aten.pow.Tensor_Scalar, X[dtype], -2), (1 / square).to(dtype))
    root = X[dtype].abs()
    exactly(on_cuda(aten.pow.Tensor_Scalar, root, 0.5), root.float().sqrt().to(dtype))


@pytest.mark.parametrize("dtype", X, ids=str)
def test_alpha_is_a_fused_multiply_add(dtype: torch.dtype) -> None:
    x, y = X[dtype], X[dtype].flip(0)
    wanted = (x.double() + y.double() * single(0.7).double()).float().to(dtype)
    exactly(on_cuda(aten.add.Tensor, x, y, alpha=0.7), wanted)


def test_a_mean_multiplies_by_the_reciprocal_of_the_count() -> None:
    x = X[torch.float32]
    exactly(on_cuda(aten.mean.dim, x, [-1]), x.sum(-1) * (1 / single(x.shape[-1])))
    half = x.to(torch.bfloat16)
    asked = half.float().sum(-1) * (1 / single(x.shape[-1]))
    exactly(on_cuda(aten.mean.dim, x, [-1], dtype=torch.bfloat16), asked.to(torch.bfloat16))


def test_the_cpu_does_otherwise() -> None:
    """Or the oracle here would be blind."""
    x = X[torch.bfloat16]
    assert disagreement(on_cuda(aten.add.Tensor, x, 1.1), x + 1.1) is not None
    assert disagreement(on_cuda(aten.div.Tensor, x.float(), 1.1), x.float() / 1.1) is not None
    assert disagreement(on_cuda(aten.mul.Tensor, x, single(1.1)), x * single(1.1)) is not None
    y = X[torch.float16]
    assert disagreement(on_cuda(aten.pow.Tensor_Scalar, y, 3), y**3) is not None
