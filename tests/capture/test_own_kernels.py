"""Attention and routers as kernels of our own, through the whole of `compile`, each alone and together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import auxstream
from auxstream.capture import Options
from auxstream.capture.graphs import CapturedGraph
from auxstream.capture.program import Op
from auxstream.runtime.errors import SettingsError

pytest.importorskip("transformers")
from auxstream.capture.huggingface import DecodeStep, build, gemma4_config

SWITCHES = ("decode_attention", "router_kernels")


def step() -> DecodeStep:
    return DecodeStep(build(gemma4_config(2, "tiny")), 2, 16)


def calls(model: DecodeStep, run: object) -> list[Tensor]:
    assert callable(run)
    draw = torch.Generator().manual_seed(0)
    outputs: list[Tensor] = []
    with torch.no_grad():
        for turn in range(4):
            ids = torch.randint(512, (2, 1), generator=draw)
            outputs.append(run(ids, torch.tensor([turn, 15 - turn])).clone())
    return [*outputs, *(buffer.clone() for state in model.caches() for buffer in state.values())]


def compiled(**options: bool | str) -> tuple[list[Tensor], CapturedGraph]:
    model = step()
    example = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([3, 5])
    fast = auxstream.compile(model, example, Options(mlir_elementwise_fusion=False, **options))  # type: ignore[arg-type]
    return calls(model, fast), fast.graph


def ops(graph: CapturedGraph) -> set[str]:
    return {str(step.func) for step in graph.program.steps if isinstance(step, Op)}


@pytest.mark.parametrize("on", [SWITCHES[:1], SWITCHES[1:], SWITCHES])
def test_each_switch_changes_rounding_alone_and_streams_change_nothing(on: tuple[str, ...]) -> None:
    switches = dict.fromkeys(on, True)
    serial, _ = compiled(multi_stream_moe=False, **switches)
    overlapped, graph = compiled(**switches)
    assert graph.regions
    assert graph.report.ok
    names = " ".join(ops(graph))
    assert ("decode_attention" in names) == ("decode_attention" in on)
    assert ("moe_router" in names) == ("router_kernels" in on)
    assert all(torch.equal(one, other) for one, other in zip(serial, overlapped, strict=True))
    for got, expected in zip(overlapped, calls(model := step(), model), strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0.05)


def test_without_a_gpu_they_are_off_unless_asked_for() -> None:
    _, graph = compiled()
    assert not any("decode_attention" in name or "moe_router" in name for name in ops(graph))


@pytest.mark.parametrize("name", [*SWITCHES, "product_kernels"])
def test_a_switch_is_a_switch(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        Options(**{name: "yes"})  # type: ignore[arg-type]
