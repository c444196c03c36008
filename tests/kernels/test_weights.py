"""Work on weights is no launch of its own, and a weight that is written in place is seen by the next step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from auxstream.capture.trace import trace
from auxstream.kernels import fuse_elementwise
from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.weights import leave_out_casts

pytestmark = pytest.mark.usefixtures("by_torch")
X = torch.arange(12.0).reshape(3, 4) / 7


class Norm(nn.Module):
    """RMSNorm, with what `scale` makes of its weight."""

    def __init__(self, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.linspace(-1, 2, 4).bfloat16())
        self.register_buffer("number", torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * self.scale(self.weight)).relu()


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "a cast": lambda w: w.float(),
    "one and a cast": lambda w: 1 + w.float(),
    "a chain": lambda w: (1 + w.float()).sigmoid() * (w.float() + w),
}


def launches(gm: GraphModule) -> list[str]:
    flow = Dataflow.of(gm)
    return [node.name for node in gm.graph.nodes if node.op == "call_function" and not flow.is_view(node)]


@pytest.mark.parametrize("name", SCALES)
def test_work_on_a_weight_joins_its_readers_kernel(name: str) -> None:
    gm = trace(Norm(SCALES[name]), (X,)).graph_module
    reference = copy.deepcopy(gm)
    fuse_elementwise(gm)
    assert len([name for name in launches(gm) if not name.startswith("getitem")]) == 1
    for value in (None, 0.7):
        if value is not None:
            gm.weight.data.fill_(value)
            reference.weight.data.fill_(value)
        torch.testing.assert_close(gm(X), reference(X))


def casts(body: Callable[[Any, Tensor], Any]) -> tuple[int, list[str], bool]:
    """How many casts were left out, the ops that are left, and whether the values are the same bits."""

    class Holds(Norm):
        def forward(self, x: Tensor) -> Any:
            return body(self, x)

    gm = trace(Holds(SCALES["a cast"]), (X,)).graph_module
    reference = copy.deepcopy(gm)
    count = leave_out_casts(Dataflow.of(gm))
    gm.recompile()
    return count, launches(gm), torch.equal(gm(X), reference(X)) and gm(X).dtype == reference(X).dtype


def test_a_cast_that_its_reader_makes_is_left_out() -> None:
    assert casts(lambda m, x: x * m.weight.float()) == (1, ["mul"], True)
    assert casts(lambda m, x: m.weight.float() - x) == (1, ["sub"], True)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.double() * m.weight.float(),  # the cast is not to the common dtype
        lambda m, x: x.bfloat16() * m.weight.to(torch.float16),  # which is wider than both
        lambda m, x: x * m.weight.float().sum(),  # of something else
        lambda m, x: x.bfloat16() * m.number.to(torch.bfloat16),  # a number rounds before, and not after
        lambda m, x: x @ m.weight.float(),  # products do not promote
        lambda m, x: torch.floor_divide(x, m.weight.float() + 9),
        lambda m, x: x.bfloat16() * x.bfloat16().float(),  # of no weight
    ],
)
def test_a_cast_that_matters_stays(body: Callable[[Any, Tensor], Any]) -> None:
    count, _, same = casts(body)
    assert count == 0
    assert same


def test_a_models_casts_of_weights_take_no_launch() -> None:
    gm = tiny_models.decode_step("gemma4", batch=3).graph_module
    weights = {node for node in gm.graph.nodes if node.op == "get_attr" and node.name.endswith("norm_weight")}
    assert len(weights) > 8
    fuse_elementwise(gm)
    weights = {node for node in gm.graph.nodes if node.op == "get_attr" and "norm" in node.name}
    assert weights
    assert not [user for node in weights for user in node.users if str(user.target).startswith("aten.to")]
