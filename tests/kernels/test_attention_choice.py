"""Which form of attention is kept: the rule, that it is measured once, and that what it chose is compiled by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from auxstream.kernels import attention_choice, store
from auxstream.kernels.attention import Attention, Work, compile_ahead, reference
from auxstream.kernels.attention_choice import choose, expanded, fastest, grouped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def work(batch: int = 2, keys: int = 48, kv_heads: int = 2, softcap: float | None = None, device: str = DEVICE) -> Work:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device)

    q, k, v = normal(batch, 2 * kv_heads, 1, 32), normal(batch, kv_heads, keys, 32), normal(batch, kv_heads, keys, 32)
    added = torch.zeros(1, 1, 1, keys, device=device)
    added[..., 7:] = -torch.inf
    return Work(q, k, v, added.expand(batch, 1, 1, keys), 0.2, softcap)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"kept": 10.0, "own": 8.9}, "own"),
        ({"kept": 10.0, "own": 9.1}, "kept"),
        ({"kept": 10.0, "own": 8.0, "grouped": 9.5}, "own"),
        ({"kept": 10.0, "own": 8.0, "grouped": 8.5}, "grouped"),
        ({"kept": 10.0, "own": 4.0, "grouped": 5.0}, "own"),
        ({"kept": 10.0, "own": 12.0, "grouped": 12.0}, "kept"),
    ],
)
def test_the_rule(times: Any, chosen: str) -> None:
    assert fastest(times) == chosen


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_is_measured_are_the_same_sums(softcap: float | None) -> None:
    given = work(softcap=softcap)
    exact = reference(given, torch.float64, rounds=False)
    forms: list[Callable[[Work], Tensor]] = [expanded] if softcap else [expanded, grouped]
    for form in forms:
        torch.testing.assert_close(form(given).double(), exact, rtol=1e-4, atol=1e-5)


def test_trials_lie_as_the_call_does_and_see_all_keys() -> None:
    """Rows may share a mask, and a cache may be a part of another."""
    given = work()
    trial = attention_choice._trials(Work(given.q, given.k[:, :, 8:], given.v, given.mask, 0.2))[0]
    assert trial.mask is not None
    assert given.mask is not None
    assert trial.mask.stride() == given.mask.stride()
    assert trial.mask.stride(0) == 0
    assert not trial.mask.any()
    assert (trial.k.shape, trial.k.stride()) == ((2, 2, 40, 32), given.k.stride())
    assert trial.k.isfinite().all()


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "times", None)
    assert choose(work(device="cpu")) == "own"


@pytest.mark.gpu
def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = work(batch=8, keys=2048, kv_heads=8)
    measured = attention_choice.times(given)
    assert set(measured) == {"kept", "own", "grouped"}
    asked: list[Work] = []
    known: dict[str, str] = {}
    monkeypatch.setattr(attention_choice, "times", lambda like: asked.append(like) or measured)
    monkeypatch.setattr(store, "read_choice", known.get)
    monkeypatch.setattr(store, "write_choice", known.__setitem__)
    assert choose(given) == choose(given) == fastest(measured)
    assert len(asked) == 1
    choose(work(batch=8, keys=1024, kv_heads=8))
    assert len(asked) == 2


@pytest.mark.gpu
def test_what_is_compiled_ahead_is_not_compiled_at_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **about: compiled.append(about["fn"]))
    given = [work(keys=176 + turn, softcap=11.5) for turn in range(2)]
    compile_ahead(given)
    ahead = len(compiled)
    assert ahead >= 2
    for one in given:
        Attention()(one)
    assert len(compiled) == ahead
    Attention()(work(keys=176, softcap=12.5))
    assert len(compiled) > ahead, "the hook sees nothing"
