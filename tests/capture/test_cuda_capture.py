"""`auxstream.graph` on a GPU: its arguments, host memory inside a capture, and what a failed capture leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import auxstream
from auxstream.runtime.errors import CaptureError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(120),
]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8, device="cuda")


def assert_untouched(x: Tensor, **arguments: Any) -> None:
    """A capture works as on the first day, and so do eager random numbers."""
    stream = torch.cuda.current_stream()
    torch.rand(3, device="cuda")
    with auxstream.graph("again", **arguments) as g:
        with auxstream.aux_region("aux", x) as region:
            y = region.returns(x * 2)
        region.join()
        torch.rand(3, device="cuda")
    x.normal_()
    g.replay()
    assert torch.equal(y, x * 2)
    assert torch.cuda.current_stream() == stream
    assert gc.isenabled()


def test_a_stream_and_a_pool_of_the_callers(x: Tensor) -> None:
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    with auxstream.graph(stream=stream, pool=pool, device="cuda:0") as first:
        y = x * 2
    with auxstream.graph(stream=stream, pool=pool) as second:
        z = y + 1
    x.normal_()
    first.replay()
    second.replay()
    assert torch.equal(z, x * 2 + 1)
    assert_untouched(x)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"stream": "default"}, "the default stream"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_arguments_that_cannot_be(x: Tensor, arguments: dict[str, Any], says: str) -> None:
    if "stream" in arguments:
        arguments = {"stream": torch.cuda.default_stream()}
    with pytest.raises(CaptureError, match=says), auxstream.graph(**arguments):
        pytest.fail("the block must not run")
    assert_untouched(x)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + torch.randn(4, 8),
        lambda x: x.clone().copy_(torch.randn(4, 8)),
        lambda x: x.clone().copy_(torch.tensor(3.0)),
        lambda x: torch.tensor(3.0).cuda(),
        lambda x: x.clone().copy_(torch.randn(4, 8).pin_memory()),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.cpu(),
        lambda x: torch.tensor([x[0, 0], x[0, 1]]),
    ],
)
def test_host_memory_is_refused_by_line(x: Tensor, work: Callable[[Tensor], Any]) -> None:
    with pytest.raises(CaptureError, match=r"test_cuda_capture\.py"), auxstream.graph():
        work(x)
    assert_untouched(x)


def test_numbers_and_pinned_memory_are_not(x: Tensor) -> None:
    pinned = torch.randn(4, 8).pin_memory()
    with auxstream.graph() as g:
        out = x.clone().copy_(pinned, non_blocking=True) + torch.tensor(2.0)
        host = (torch.ones(3) * 2).tolist()
    assert host == [2.0] * 3
    pinned.fill_(1.0)
    g.replay()
    assert out.tolist() == [[3.0] * 8] * 4


def test_the_gpu_inside_a_simulated_capture_is_refused(x: Tensor) -> None:
    for work in (lambda: x * 2, lambda: torch.ones(3, device="cuda")):
        with pytest.raises(CaptureError, match="simulated machine"), auxstream.graph(device="cpu"):
            work()
    assert_untouched(x)


@pytest.mark.parametrize("shared", [False, True], ids=["own pool", "shared pool"])
def test_a_capture_that_cuda_gave_up_leaves_its_pool_usable(x: Tensor, shared: bool) -> None:
    arguments = {"pool": torch.cuda.graph_pool_handle()} if shared else {}
    with auxstream.graph(**arguments) as before:
        y = x * 2
    for _ in range(3):
        line = r"test_cuda_capture\.py.*torch\.cuda\.synchronize\(\)"
        with pytest.raises(CaptureError, match=line) as refused, auxstream.graph(**arguments):  # noqa: PT012
            torch.rand(1 << 20, device="cuda")
            torch.cuda.synchronize()
        assert "no synchronize()" in str(refused.value)
        assert_untouched(x, **arguments)
    before.replay()
    assert torch.equal(y, x * 2)


def test_a_stream_that_is_not_joined_back(x: Tensor) -> None:
    aside = torch.cuda.Stream()
    with pytest.raises(CaptureError, match="could not end"), auxstream.graph(verify="off"):  # noqa: PT012
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            x * 2
    assert_untouched(x)


def test_failed_captures_keep_no_memory(x: Tensor) -> None:
    def failed() -> None:
        with pytest.raises(CaptureError), auxstream.graph():
            torch.rand(1 << 22, device="cuda").cpu()

    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    failed()
    before = reserved()
    for _ in range(5):
        failed()
    assert reserved() == before


def test_an_op_that_cuda_refuses_is_named(x: Tensor) -> None:
    big = torch.randn(300, 300, device="cuda")
    torch.linalg.eigvalsh(big)
    with pytest.raises(CaptureError, match=r"test_cuda_capture\.py.*eigvalsh") as refused, auxstream.graph():
        torch.linalg.eigvalsh(big)
    assert refused.value.remedy
    assert_untouched(x)
