"""Capturing as users see it: a bar, a summary, a collector held still, errors that say what to do, scarce memory."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture import bucketing, compiler, progress
from auxstream.capture.allocator import AllocatorModel
from auxstream.capture.refusals import refused_by_cuda
from auxstream.runtime.errors import CaptureError, SettingsError

ROWS = 8


class Wide(nn.Module):
    """Temporaries of 4 KiB a row."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 1024)
        self.down = nn.Linear(1024, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cumsum(self.up(x), 1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, 8)


def compiled(x: Tensor, **options: Any) -> auxstream.CompiledModel:
    options = {"mlir_elementwise_fusion": False, **options}
    return auxstream.compile(Wide().to(x.device), x, auxstream.Options(**options), name="wide")


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_bar_where_it_is_asked_for(x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(x, buckets=(2, 4, 8), progress=True)
    said = capsys.readouterr()
    assert not said.out
    assert "capturing wide" in said.err
    assert said.err.index("bucket 8") < said.err.index("bucket 4") < said.err.index("bucket 2")
    assert "2/3" in said.err
    assert "free" not in said.err, "the simulated machine has no memory to speak of"


@pytest.mark.parametrize(
    ("asked", "terminal", "shown"), [(None, False, False), (None, True, True), (False, True, False)]
)
def test_a_bar_only_on_a_terminal(
    asked: bool | None,
    terminal: bool,
    shown: bool,
    x: Tensor,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    compiled(x, progress=asked)
    assert ("capturing wide" in capsys.readouterr().err) == shown


def test_a_summary_is_logged_and_printed(x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "auxstream"):
        fast = compiled(x, buckets=(2, 8))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "auxstream"]
    assert line == str(fast) == fast.summary
    assert line.startswith("wide: ")
    assert line.endswith("GiB, 2 graphs, 0 regions, proved")
    unproved = str(compiled(x, verify="off"))
    assert unproved.endswith("1 graph, 0 regions, 0 of 1 proved")
    assert str(compiled(x, mode="none")).endswith(" s, 0 graphs, 0 regions")


def test_a_malformed_option_is_named() -> None:
    with pytest.raises(SettingsError, match="progress"):
        auxstream.Options(progress="yes")  # pyright: ignore


# --- the collector ----------------------------------------------------------------------------------------------------


@pytest.fixture
def thawed() -> Iterator[None]:
    """Nothing is frozen: the other tests' imports are."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_is_held_still_and_let_go(fails: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    seen: list[int] = []

    def forward(self: Wide, x: Tensor) -> Tensor:
        seen.append(gc.get_freeze_count())
        return x.nonzero() if fails else x + 1

    monkeypatch.setattr(Wide, "forward", forward)
    if fails:
        with pytest.raises(auxstream.AuxstreamError):
            compiled(x)
    else:
        compiled(x)
    assert seen
    assert min(seen) > before + 1000
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()


@pytest.mark.usefixtures("thawed")
def test_what_somebody_else_froze_stays_frozen(x: Tensor) -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    assert frozen > progress._PYTHONS_OWN
    compiled(x)
    assert gc.get_freeze_count() >= frozen - 1000  # some have died


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("frozen", [False, True], ids=["nothing is frozen", "somebody froze"])
def test_what_a_compilation_leaves_in_cycles_goes_at_its_end(
    frozen: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Knot:
        def __init__(self) -> None:
            self.itself = self

    knots: list[weakref.ref[Knot]] = []

    def forward(self: Wide, x: Tensor) -> Tensor:
        knots.append(weakref.ref(Knot()))
        return x + 1

    monkeypatch.setattr(Wide, "forward", forward)
    if frozen:
        gc.freeze()
    gc.disable()
    try:
        compiled(x)
        assert knots
        assert [knot() for knot in knots] == [None] * len(knots)
    finally:
        gc.enable()


# --- scarce memory ----------------------------------------------------------------------------------------------------


def limited(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[AllocatorModel]:
    pools: list[AllocatorModel] = []

    def new_pool(*_: Any) -> AllocatorModel:
        pools.append(AllocatorModel(limit))
        return pools[-1]

    monkeypatch.setattr(bucketing, "new_pool", new_pool)
    return pools


def test_a_bucket_that_memory_does_not_hold_is_dropped(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = limited(monkeypatch, 40 << 10)
    with pytest.warns(auxstream.AuxstreamWarning, match="bucket 8 is dropped") as said:
        fast: Any = compiled(x, buckets=(1, 2, 4, 8))
    texts = [str(one.message) for one in said if one.category is auxstream.AuxstreamWarning]
    assert len(texts) == 1
    assert "of 40960 are reserved" in texts[0]
    assert list(fast.buckets) == [1, 2, 4]
    assert fast.memory.pool <= 40 << 10
    assert len(pools) == 1
    model = fast._lives().model
    with torch.no_grad():
        for rows in (1, 3, 4):
            torch.testing.assert_close(fast(x[:rows]), model(x[:rows]))
        with pytest.warns(auxstream.AuxstreamWarning, match="eagerly"):
            torch.testing.assert_close(fast(x), model(x))


def test_with_room_for_all_none_is_dropped(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 1 << 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", auxstream.AuxstreamWarning)
        fast: Any = compiled(x, buckets=(1, 2, 4, 8))
    assert list(fast.buckets) == [1, 2, 4, 8]


def test_if_all_are_dropped_the_error_is_raised(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 2 << 10)
    with pytest.warns(auxstream.AuxstreamWarning, match="dropped"), pytest.raises(torch.OutOfMemoryError):
        compiled(x, buckets=(2, 4, 8))


def test_a_call_between_a_dropped_bucket_and_a_larger_one_runs_eagerly(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger one's padding was not checked for it."""
    original = compiler.warm_up_and_capture
    names: list[str] = []

    def capture(*args: Any, name: str, **rest: Any) -> Any:
        names.append(name)
        if name == "wide[4]":
            raise torch.OutOfMemoryError("as the test wants")
        return original(*args, name=name, **rest)

    monkeypatch.setattr(compiler, "warm_up_and_capture", capture)
    with pytest.warns(auxstream.AuxstreamWarning, match="bucket 4 is dropped"):
        fast: Any = compiled(x, buckets=(2, 4, 8))
    assert names == ["wide[8]", "wide[4]", "wide[2]"]
    with pytest.warns(auxstream.AuxstreamWarning, match="3 rows runs eagerly"):
        fast(x[:3])
    replays = fast.buckets[8].graph.replays
    fast(x[:5])
    assert fast.buckets[8].graph.replays == replays + 1


def test_any_other_error_in_a_bucket_releases_those_before_it(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    original = compiler.warm_up_and_capture

    def capture(*args: Any, name: str, **rest: Any) -> Any:
        if name == "wide[4]":
            raise RuntimeError("as the test wants")
        found = original(*args, name=name, **rest)
        made.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(compiler, "warm_up_and_capture", capture)
    model = Wide()
    rng = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="as the test wants"):
        auxstream.compile(model, x, auxstream.Options(buckets=(2, 4, 8)), name="wide")
    assert len(made) == 1
    gc.collect()
    assert made[0]() is None
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_failed_recording_leaves_its_pool_as_it_was(x: Tensor) -> None:
    pool = AllocatorModel()
    with auxstream.graph(pool=pool, device="cpu"):
        kept = x * 2
    before = pool.reserved
    with pytest.raises(CaptureError), auxstream.graph(pool=pool, device="cpu"):  # noqa: PT012
        _ = torch.zeros(1 << 16)
        x.sum().item()
    assert pool.reserved == before
    with auxstream.graph(pool=pool, device="cpu"):
        again = x * 3
    assert pool.reserved <= before + (1 << 10)
    assert kept.shape == again.shape


# --- what CUDA refuses ------------------------------------------------------------------------------------------------


def raised(text: str) -> RuntimeError:
    try:
        raise RuntimeError(text)  # the user's line
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors", "synchronize"),
        ("CUDA error: operation failed due to a previous error during capture", "synchronize"),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "warmup"),
    ],
)
def test_what_cuda_refuses_gets_its_line_and_a_remedy(text: str, remedy: str) -> None:
    error = refused_by_cuda(raised(text))
    assert error is not None
    assert "test_progress.py" in error.what
    assert "the user's line" in error.what
    assert error.came == text.partition("\n")[0]
    assert remedy in error.remedy


def test_other_errors_are_left_alone() -> None:
    assert refused_by_cuda(None) is None
    assert refused_by_cuda(raised("mat1 and mat2 shapes cannot be multiplied")) is None
    assert refused_by_cuda(ValueError("while capturing")) is None
    assert refused_by_cuda(torch.OutOfMemoryError("CUDA out of memory, while capturing")) is None


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.timeout(240)
def test_on_a_gpu_a_bucket_that_memory_does_not_hold_is_dropped() -> None:
    class Huge(nn.Module):
        """A temporary of 64 MiB a row."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x.repeat_interleave(1 << 21, 1), 1)[:, -8:]

    x = torch.randn(64, 8, device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (3 << 30)) / total)
        with pytest.warns(auxstream.AuxstreamWarning, match=r"bucket 64 is dropped.*GiB free"):
            fast: Any = auxstream.compile(Huge(), x, auxstream.Options(buckets=(2, 64), progress=True))
        assert list(fast.buckets) == [2]
        assert torch.equal(fast(x[:2]), Huge()(x[:2]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with auxstream.graph():
        y = x * 2
    assert y.shape == x.shape
