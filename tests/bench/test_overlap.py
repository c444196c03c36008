"""Overlap alone: every way to run a feed-forward, and that those called unsafe are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from auxstream.bench import overlap
from auxstream.bench.blocks import FeedForward, weight_bytes
from auxstream.bench.by_hand import EVENTS, RECORDED, REGIONS, SYNCHRONIZED, ByHand, OneStream, Regions, differing
from auxstream.capture.huggingface import build, gemma4_config

QUICK = ["--quick", "--rounds", "2", "--limit", "240"]


@pytest.fixture(scope="module")
def layers() -> Any:
    decoder: Any = build(gemma4_config(2, "tiny"), torch.device("cpu"))
    return decoder.model.layers


def like(layers: Any) -> Tensor:
    return torch.randn(2, 1, len(layers[0].pre_feedforward_layernorm.weight), dtype=torch.bfloat16)


def test_by_hand_computes_what_the_model_does(layers: Any) -> None:
    model, hidden = FeedForward(layers), like(layers)
    for handoff in (OneStream(), Regions()):
        assert differing(ByHand(layers, handoff), torch.no_grad()(model), hidden, 3) == 0
    assert differing(lambda given: ByHand(layers, OneStream())(given + 1), model, hidden, 3) == 3


def test_bytes_are_those_of_the_experts_that_are_reached(layers: Any) -> None:
    layer = layers[0]
    hidden = like(layers)[:1]
    experts = sum(weight.nbytes for weight in layer.experts.parameters())
    rest = sum(weight.nbytes for part in (layer.mlp, layer.router) for weight in part.parameters())
    count, top = len(layer.experts.gate_up_proj), layer.router(hidden[0])[2].shape[-1]
    assert top < count
    assert weight_bytes(FeedForward([layer]), hidden) == rest + experts // count * top


def test_all_of_it_is_measured_on_the_simulated_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "figures.json"
    found = overlap.main(["--device", "cpu", "--size", "tiny", "--layers", "1", "--json", str(to), *QUICK])
    assert found["all passed"]
    batch = json.loads(to.read_text())["results"]["batch 1"]
    names = {f"eager, {REGIONS}", f"graph, {REGIONS}", "eager, one stream"}
    names |= {f"compile, own kernels, {how}" for how in overlap.OPTIONS}
    names |= {f"compile, own kernels, {branch}" for branch in (overlap.SHARED_ALONE, overlap.ROUTED_ALONE)}
    assert set(batch["us per layer"]) == names
    assert batch[overlap.CORRUPT] == {f"eager, {REGIONS}": [0, 20], f"graph, {REGIONS}": [0, 20]}
    assert found["left out"] == ["torch.compile reduce-overhead, max-autotune, as asked"]
    alone = [batch["us per layer"][f"compile, own kernels, {branch}"]["median"] for branch in
             (overlap.SHARED_ALONE, overlap.ROUTED_ALONE)]  # fmt: skip
    assert batch["bound: longer branch, own kernels, us"] == max(alone)
    assert "shared experts on a lane" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("corrupt", "passes"),
    [
        ({f"eager, {EVENTS}": (20, 20), f"eager, {REGIONS}": (0, 20), f"graph, {RECORDED}": (0, 20)}, True),
        ({f"eager, {REGIONS}": (1, 20)}, False),
        ({f"graph, {RECORDED}": (1, 20)}, False),
    ],
)
def test_what_must_be_safe_decides(corrupt: dict[str, tuple[int, int]], passes: bool) -> None:
    assert overlap.passed({overlap.CORRUPT: corrupt}) is passes


@pytest.mark.gpu
@pytest.mark.timeout(280)
def test_events_alone_are_corrupt_and_what_is_recorded_is_not() -> None:
    results = overlap.main(["--layers", "2", *QUICK])
    assert results["all passed"]
    wrong = {name: count for name, (count, _) in results["batch 1"][overlap.CORRUPT].items()}
    safe = {f"{how}, {way}" for how in ("eager", "graph") for way in (RECORDED, REGIONS)}
    assert {name for name, count in wrong.items() if not count} >= safe
    for name in (f"eager, {EVENTS}", f"graph, {EVENTS}"):
        assert wrong[name] > 10, f"{name}: the control must fail"
    assert f"eager, {SYNCHRONIZED}" in wrong
