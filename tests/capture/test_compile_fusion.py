"""Fusion as part of `compile`: what the marker keeps off, what is declared safe, and what must first be proved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_blocks import HIDDEN, TOKENS, Layer, Model
from torch import Tensor

import auxstream
from auxstream.capture import compiler
from auxstream.capture.options import Options
from auxstream.runtime.errors import AuxstreamWarning, RaceError, SettingsError
from auxstream.runtime.settings import Settings

Compiled = auxstream.CompiledModel


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Layer(pre_norm=True, merge="norm_behind"), Layer(pre_norm=True, merge="norm_behind")).eval()


def draw(seed: int) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def fused_in(fast: Compiled) -> dict[str | None, int]:
    """Fused ops per region; None is the caller."""
    assert fast.fusion is not None
    counts: dict[str | None, int] = {}
    for fusion in fast.fusion.fusions:
        counts[fusion.group.region] = counts.get(fusion.group.region, 0) + len(fusion.group.nodes)
    return counts


def agrees(model: Model, fast: Compiled) -> None:
    for seed in range(5):
        x = draw(seed)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(fast(x), fast(x))
    assert fast.report.ok


def test_by_default_the_marker_keeps_fused_kernels_off_the_branch(model: Model) -> None:
    fast = auxstream.compile(model, draw(0))
    assert len(fast.regions) == 2
    assert set(fused_in(fast)) == {None}
    agrees(model, fast)


def test_what_is_declared_safe_runs_fused_kernels_and_later_entries_win(model: Model) -> None:
    fast = auxstream.compile(model, draw(0), Options(fusion_safe="layers.*.shared,layers.1.*=0"))
    assert set(fused_in(fast)) == {None, "layers.0.shared"}
    agrees(model, fast)


def test_a_region_on_auto_stays_fused_where_the_proof_holds(model: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AuxstreamWarning)
        fast = auxstream.compile(model, draw(0), Options(fusion_safe="*=auto"))
    assert set(fused_in(fast)) == {None, "layers.0.shared", "layers.1.shared"}
    assert "layers.0.shared: fused kernels proved safe" in str(fast.fusion)
    agrees(model, fast)


def test_a_region_on_auto_falls_back_to_the_marker_where_the_proof_fails(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., Any] = compiler.warm_up_and_capture
    proofs: list[str] = []

    def first_fails(*args: Any, verify: str, **kwargs: Any) -> Any:
        proofs.append(verify)
        captured = whole(*args, verify=verify, **kwargs)
        if len(proofs) == 1:
            raise RaceError("a race, planted by the test", captured[0].report)
        return captured

    monkeypatch.setattr(compiler, "warm_up_and_capture", first_fails)
    with pytest.warns(AuxstreamWarning, match=r"(?s)layers\.0\.shared, layers\.1\.shared.*planted"):
        fast = auxstream.compile(model, draw(0), Options(fusion_safe="*=auto", verify="off"))
    assert proofs == ["error", "off"], "a trial is always proved"
    assert set(fused_in(fast)) == {None}
    assert "proved safe" not in str(fast.fusion)
    assert len(fast.regions) == 2, "the overlap stays"
    torch.testing.assert_close(fast(draw(1)), model(draw(1)), rtol=1e-5, atol=1e-5)


def test_a_failed_proof_is_an_error_where_nothing_was_on_trial(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RaceError("a race, planted by the test", None)

    monkeypatch.setattr(compiler, "warm_up_and_capture", fails)
    with pytest.raises(RaceError, match="planted"):
        auxstream.compile(model, draw(0), Options(fusion_safe="*"))


def test_fusion_can_be_turned_off_in_code_and_from_outside(model: Model) -> None:
    assert auxstream.compile(model, draw(0), Options(mlir_elementwise_fusion=False)).fusion is None
    assert not Options().in_force(Settings(fusion="off")).mlir_elementwise_fusion
    assert Options(mlir_elementwise_fusion=False).in_force(Settings(fusion="on")).mlir_elementwise_fusion


def test_without_overlap_there_is_no_branch_to_keep_off(model: Model) -> None:
    fast = auxstream.compile(model, draw(0), Options(multi_stream_moe=False))
    everything = auxstream.compile(model, draw(0), Options(fusion_safe="*"))
    assert not fast.regions
    assert fused_in(fast)[None] >= sum(fused_in(everything).values())
    agrees(model, fast)


def test_every_stage_can_be_read(model: Model, tmp_path: Path) -> None:
    auxstream.compile(model, draw(0), Options(dump_dir=tmp_path))
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        "1-traced",
        "2-overlap",
        "3-fused",
        "4-regions",
        "5-program",
        "6-report",
    ]
    assert "func.func @main" in (tmp_path / "3-fused.txt").read_text()
    assert "auxstream_fused" in (tmp_path / "4-regions.txt").read_text()


@pytest.mark.parametrize("text", ["layers.*=maybe", "=1", "a,,b"])
def test_a_malformed_list_of_safe_regions_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="fusion_safe"):
        Options(fusion_safe=text)
