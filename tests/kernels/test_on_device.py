"""Kernels of ours run on the device of their tensors, whichever is current."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.kernels.on_device import on_its_device

KERNELS = Path(__file__).parents[2] / "kernels"


class Lies:
    """What an op's implementation asks of a tensor."""

    def __init__(self, device: int) -> None:
        self.device = device

    def get_device(self) -> int:
        return self.device


@pytest.mark.parametrize("as_list", [False, True])
def test_the_device_of_the_first_tensor_is_current_in_the_op(as_list: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    run = on_its_device(lambda first, second: (current[-1], len(current), second))
    for index, depth in ((0, 1), (1, 2)):
        first: Any = [Lies(index), Lies(0)] if as_list else Lies(index)
        assert run(first, "second") == (index, depth, "second")
    assert current == [0]


def test_every_implementation_on_a_gpu_does_so() -> None:
    found = [
        line.strip()
        for file in KERNELS.glob("*.py")
        for line in file.read_text().splitlines()
        if re.search(r'\.impl\(.*"CUDA"\)', line)
    ]
    assert len(found) == 5
    assert [line for line in found if "on_its_device(" not in line] == []


class Block(nn.Module):
    """A branch beside products, and what fusion finds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.first(x)) * self.second(x) + x.softmax(-1)


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", ["full", "none", "piecewise"])
def test_on_two_gpus_a_model_on_the_other_one_is_compiled_and_called_there(mode: Any) -> None:
    torch.manual_seed(0)
    with torch.cuda.device(0), torch.no_grad():
        model = Block().to("cuda:1")
        x = torch.randn(4, 64, device="cuda:1")
        fast = auxstream.compile(model, x, auxstream.Options(mode=mode))
        assert torch.cuda.current_device() == 0
        for _ in range(3):
            x = torch.randn(4, 64, device="cuda:1")
            found = fast(x)
            assert found.device == torch.device("cuda", 1)
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus_ops_called_by_hand_run_where_their_tensors_are() -> None:
    from auxstream.kernels.experts import moe_experts
    from auxstream.kernels.products import skinny_linear
    from auxstream.kernels.router import Rules, moe_router

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((2, 64), (8, 64)))
    up = torch.randn(8, 32, 64, generator=generator).bfloat16() / 8
    chosen, scale = torch.tensor([[0, 3], [5, 3]]), torch.rand(2, 2, generator=generator)
    rules = Rules(product=torch.bfloat16, softmax=True, top_k=2, out=torch.float32)
    flags = (False, 1.0, None, 0.0, False, False, False)
    calls: dict[str, Any] = {
        "experts": lambda t: moe_experts()(t(x), t(chosen), t(scale), t(up), t(up.mT), None, None, "silu", *flags),
        "router": lambda t: moe_router()(t(x), t(weight), None, None, None, *rules.fields)[1],
        "product": lambda t: skinny_linear()(t(x), [t(weight)], [])[0],
    }
    with torch.cuda.device(0):
        for name, call in calls.items():
            found = call(lambda tensor: tensor.to("cuda:1"))
            assert found.device == torch.device("cuda", 1), name
            torch.testing.assert_close(found.cpu().float(), call(lambda tensor: tensor).float(), rtol=0.03, atol=0.03)
