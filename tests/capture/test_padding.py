"""Padding that leaves a trace is refused, says where, and would give wrong numbers; what leaves none is not refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture import padding
from auxstream.capture.buckets import BucketedModel
from auxstream.capture.options import Options
from auxstream.capture.padded_runs import PaddedRuns
from auxstream.runtime.errors import AuxstreamWarning, CaptureError, InputError

SIZE, SLOTS, SCRATCH = 6, 12, 11
ROWS = {"x": 0, "slots": 0}


class Body(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(SLOTS, 8))
        self.register_buffer("lengths", torch.zeros(SLOTS, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor, slots: Tensor) -> Any:
        return self.body(self, x, slots)


def draw(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows, each with a slot of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator), torch.randperm(SCRATCH, generator=generator)[:rows]


def example() -> tuple[Tensor, Tensor]:
    return draw(SIZE)[0], torch.arange(SIZE)


def compiled(body: Callable[..., Any], given: Any = None, **options: Any) -> tuple[Body, BucketedModel]:
    torch.manual_seed(0)
    model = Body(body)
    fast = auxstream.compile(model, given or example(), Options(buckets=(2, SIZE), token_dims=ROWS, **options))
    assert isinstance(fast, BucketedModel)
    return model, fast


def agrees(model: Body, fast: BucketedModel, *, scratch: int | None = None, seeds: int = 4) -> bool:
    """Whether calls of every size leave what the model leaves: outputs, inputs and state, but for a scratch slot."""
    reference = copy.deepcopy(model)
    kept = [slot for slot in range(SLOTS) if slot != scratch]
    for seed in range(seeds):
        for rows in (3, 1, 6, 2, 5, 4):
            given, same = draw(rows, seed), draw(rows, seed)
            found, expected = fast(*given), reference(*same)
            pairs = [(found, expected), *zip(given, same, strict=True), (model.steps, reference.steps)]
            pairs += [(model.cache[kept], reference.cache[kept]), (model.lengths[kept], reference.lengths[kept])]
            if not all(torch.allclose(one, other, atol=1e-6) for one, other in pairs):
                return False
    return True


def write(m: Body, x: Tensor, slots: Tensor) -> Tensor:
    m.cache.index_copy_(0, slots, m.linear(x))
    return x + m.cache[slots]


def masked_mean(m: Body, x: Tensor, slots: Tensor) -> Tensor:
    real = (slots != SCRATCH)[:, None]
    return x - torch.where(real, x, 0.0).sum(0) / real.sum()


# --- harmless ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "how"),
    [
        (lambda m, x, s: m.linear(x).relu() * s[:, None], "proved"),
        (lambda m, x, s: x.add_(m.linear(x)), "proved"),
        (lambda m, x, s: (m.steps.add_(1), m.linear(x) * m.steps)[1], "checked"),
        (lambda m, x, s: torch.einsum("rc,cd->rd", x, m.linear.weight), "checked"),
        (lambda m, x, s: x.flip(1), "checked"),
    ],
    ids=["rows apart", "an input in place", "a counter", "einsum", "an op that no rule is for"],
)
def test_padding_without_a_trace(body: Callable[..., Any], how: str) -> None:
    model, fast = compiled(body)
    assert [verdict.how for verdict in fast.padding] == [how, how]
    assert agrees(model, fast)


def test_writes_to_a_scratch_slot() -> None:
    model, fast = compiled(write, pad={"slots": SCRATCH})
    assert [verdict.scratch for verdict in fast.padding] == [(("cache", 8),)] * 2
    assert "checked; padded rows write 8 elements of cache" in str(fast.padding[1])
    assert torch.equal(model.cache, torch.zeros(SLOTS, 8)), "compiling is not a call"
    assert agrees(model, fast, scratch=SCRATCH)
    assert model.cache[SCRATCH].any()


def test_rows_that_use_each_other_under_a_mask() -> None:
    model, fast = compiled(masked_mean, pad={"slots": SCRATCH})
    assert [verdict.how for verdict in fast.padding] == ["compared", "compared"]
    assert agrees(model, fast)


def test_a_bucket_for_each_size_is_never_padded() -> None:
    fast = auxstream.compile(
        Body(lambda m, x, s: x - x.mean(0)), example(), Options(buckets=tuple(range(1, SIZE + 1)), token_dims=ROWS)
    )
    assert isinstance(fast, BucketedModel)
    assert {verdict.how for verdict in fast.padding} == {"unpadded"}
    for rows in range(1, SIZE + 1):
        x, slots = draw(rows)
        assert torch.equal(fast(x, slots), x - x.mean(0))


# --- refused, and rightly ---------------------------------------------------------------------------------------------

LEAKS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "a mean over rows": (lambda m, x, s: m.linear(x) - x.mean(0), {}, "leaks into output 0"),
    "a softmax over rows": (lambda m, x, s: m.linear(x).softmax(0), {}, "leaks into output 0"),
    "attention among rows": (lambda m, x, s: (x @ x.t()).softmax(-1) @ m.linear(x), {}, "leaks into output 0"),
    "a sum over slots": (lambda m, x, s: x * s.sum(), {}, "leaks into output 0"),
    "an input in place": (lambda m, x, s: (x.sub_(x.mean(0)), s * 2.0)[1], {}, "leaks into input 'x'"),
    "a mean, padded with zeros": (lambda m, x, s: x - x.mean(0), {"pad": {"x": 0}}, "leaks into output 0"),
    "a mask that lets one row in": (
        lambda m, x, s: x - torch.where((s < 4)[:, None], x, 0.0).sum(0),
        {"pad": {"slots": 3}},
        "leaks into output 0",
    ),
    "a running mean": (lambda m, x, s: (m.steps.copy_(x.mean()[None]), x * 2)[1], {}, "would write 'steps'"),
    "a running mean, padded": (
        lambda m, x, s: (m.steps.copy_(x.mean()[None]), x * 2)[1],
        {"pad": {"slots": SCRATCH}},
        "leaks into what the first rows write to 'steps'",
    ),
    "a cache that adds up": (
        lambda m, x, s: (m.cache.index_add_(0, s, m.linear(x)), x * 2)[1],
        {},
        "would write 'cache'",
    ),
    "a cache, and another input padded": (write, {"pad": {"x": 0}}, "'cache'|leaks"),
    "a cache, padded into a live slot": (write, {"pad": {"slots": 4}}, "'cache'"),
    "counters beside a cache": (
        lambda m, x, s: (m.lengths[: x.shape[0]].add_(1), write(m, x, s))[1],
        {"pad": {"slots": SCRATCH}},
        "would write 'lengths'",
    ),
    "counters": (lambda m, x, s: (m.lengths[: x.shape[0]].add_(1), x * 2)[1], {}, "would write 'lengths'"),
    "a cache by row": (
        lambda m, x, s: (m.cache[: x.shape[0]].copy_(m.linear(x)), x * 2)[1],
        {"pad": {"slots": SCRATCH}},
        "would write 'cache'",
    ),
    "counts that add up": (
        lambda m, x, s: (m.lengths.index_add_(0, s * 0, torch.ones_like(s)), x * 2)[1],
        {"pad": {"slots": SCRATCH}},
        "gives another what the first rows write to 'lengths'",
    ),
    "a count of rows": (lambda m, x, s: x.flip(1) / torch.ones_like(s).sum(), {}, "gives another output 0"),
    "a count of good rows": (lambda m, x, s: m.linear(x) * (s >= 0).sum(), {}, "gives another output 0"),
    "a path for few rows": (
        lambda m, x, s: x * 2 if x.shape[0] < 5 else x + s[:, None],
        {},
        "other ops for 6 rows than",
    ),
    "a path for one size": (lambda m, x, s: x * 2 if x.shape[0] == 5 else x + s[:, None], {}, "for 6 rows than for 5"),
    "the number of rows": (lambda m, x, s: m.linear(x) / x.shape[0], {}, "the number of rows reaches"),
}


@pytest.mark.parametrize("case", LEAKS)
def test_padding_that_leaves_a_trace_is_refused(case: str) -> None:
    body, options, says = LEAKS[case]
    with pytest.raises(CaptureError, match=says) as caught:
        compiled(body, **options)
    assert "bucket" in caught.value.remedy


def test_a_cache_without_a_scratch_slot_is_refused() -> None:
    """Padding repeats the last row, so the same is written twice; but by two rows of one op, which keep no order."""
    with pytest.raises(CaptureError, match="would write 'cache'") as caught:
        compiled(write)
    assert "Options(pad={'slots': ...})" in caught.value.remedy


@pytest.mark.parametrize("case", LEAKS)
def test_without_the_check_it_would_be_wrong(case: str) -> None:
    """The twin: what is refused above compiles with verification off, and then gives other numbers than the model."""
    body, options, _ = LEAKS[case]
    model, fast = compiled(body, **options, verify="off")
    assert {verdict.how for verdict in fast.padding} == {"not checked"}
    assert not agrees(model, fast, scratch=SCRATCH)


def test_the_op_that_mixes_is_named_with_its_line() -> None:
    def body(m: Body, x: Tensor, slots: Tensor) -> Tensor:
        return m.linear(x) - x.mean(0)

    with pytest.raises(CaptureError) as caught:
        compiled(body)
    assert "aten.mean.dim" in caught.value.came
    assert "test_padding.py" in caught.value.came


def test_a_warning_in_place_of_an_error() -> None:
    body, _, _ = LEAKS["a mean over rows"]
    with pytest.warns(AuxstreamWarning, match="leaks into output 0"):
        _, fast = compiled(body, verify="warn")
    assert [verdict.how for verdict in fast.padding] == ["not checked", "not checked"]


def test_a_failed_check_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = Body(lambda m, x, s: write(m, x, s) - x.mean(0))
    model.cache.fill_(0.5)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(CaptureError, match="leaks"):
        auxstream.compile(model, example(), Options(buckets=(SIZE,), token_dims=ROWS, pad={"slots": SCRATCH}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


# --- what cannot be told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proved", [True, False])
def test_a_pad_value_that_the_model_cannot_take_is_refused(proved: bool) -> None:
    """On a GPU the first padded call would end the process's work there, whatever is proved of rows."""

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(8, 4))

        def forward(self, i: Tensor) -> Tensor:
            found = self.table[i]
            return found if proved else torch.einsum("ij,ij->i", found, found)

    how = [verdict.how for verdict in compiled_for(Looks(), 7).padding]
    assert how == ["proved" if proved else "checked"]
    with pytest.raises(CaptureError, match=r"(?s)fails on padded rows of bucket 4.*i=8.*out of bounds"):
        compiled_for(Looks(), 8)


def compiled_for(model: nn.Module, pad: int) -> BucketedModel:
    fast = auxstream.compile(model, (torch.arange(4),), Options(buckets=(4,), pad={"i": pad}))
    assert isinstance(fast, BucketedModel)
    return fast


def test_example_rows_that_are_alike_tell_nothing() -> None:
    x, slots = example()
    with pytest.raises(CaptureError, match="padding of 'slots' cannot be checked"):
        compiled(lambda m, x, s: x.flip(1) * s[:, None], (x, slots * 0))
    with pytest.raises(CaptureError, match="padding of 'x' cannot be checked"):
        compiled(write, (torch.zeros_like(x), slots), pad={"x": 0, "slots": SCRATCH})
    _, fast = compiled(lambda m, x, s: m.linear(x) * s[:, None], (torch.zeros_like(x), slots * 0))
    assert fast.padding[1].how == "proved", "a proof needs no example"


def test_a_model_that_gives_other_bits_each_time_is_told_from_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = PaddedRuns.replayed
    count = iter(range(100))

    def unsteady(self: PaddedRuns, *args: Any) -> Any:
        outcome = replayed(self, *args)
        for tensor in outcome.kept.values():
            tensor.add_(next(count))
        return outcome

    monkeypatch.setattr(PaddedRuns, "replayed", unsteady)
    with pytest.raises(CaptureError, match="the same bits twice"):
        compiled(lambda m, x, s: x.flip(1) * s[:, None])


@pytest.mark.parametrize(
    ("pad", "says"),
    [
        ({"slot": 0}, "no input has"),
        ({"slots": 0.5}, "int64"),
        ({"slots": float("nan")}, "int64"),
        ({"x": 1e39}, "float32"),
        ({"w": 0}, "another"),
    ],
)
def test_pad_values_that_no_input_takes_are_refused(pad: dict[str, Any], says: str) -> None:
    class Weighted(nn.Module):
        def forward(self, x: Tensor, slots: Tensor, w: Tensor) -> Tensor:
            return x @ w * slots[:, None]

    with pytest.raises(InputError, match=says):
        auxstream.compile(Weighted(), (*example(), torch.randn(8, 8)), Options(buckets=(SIZE,), pad=pad))


def test_writes_of_what_is_already_there_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding of zeros writes zeros into a cache of zeros: seen from the second beginning alone."""

    def body(m: Body, x: Tensor, slots: Tensor) -> Tensor:
        m.cache.index_copy_(0, slots, x)
        return x * 2

    options: dict[str, Any] = {"buckets": (SIZE,), "pad": {"x": 0, "slots": 0}}
    x, _ = example()
    given = x, torch.arange(1, SIZE + 1)
    fast = auxstream.compile(Body(body), given, Options(**options))
    assert isinstance(fast, BucketedModel)
    assert fast.padding[0].scratch == (("cache", 8),)

    checkpoint = padding.PaddedRuns.__init__.__globals__["Checkpoint"]
    restore = checkpoint.restore
    monkeypatch.setattr(checkpoint, "restore", lambda self, *, flipped=False: restore(self))
    written = checkpoint.written
    monkeypatch.setattr(checkpoint, "written", lambda self, *, flipped: written(self, flipped=False))
    blind = auxstream.compile(Body(body), given, Options(**options))
    assert isinstance(blind, BucketedModel)
    assert blind.padding[0].scratch == (), "the twin"


def test_no_warning_is_given_without_need() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AuxstreamWarning)
        compiled(write, pad={"slots": SCRATCH})
