"""The number of rows must not reach a value: what two graphs of one model, at two sizes, may differ in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from bucket_steps import serving_step
from torch import Tensor, nn

from auxstream.capture.inputs import StaticInputs
from auxstream.capture.size_effects import output_rows, refuse_size_effects
from auxstream.capture.sizes import Sizes
from auxstream.runtime.errors import CaptureError

LARGE, SMALL = 6, 4


class Body(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(8, 8)
        self.register_buffer("table", torch.rand(32, 8))
        self.register_buffer("counter", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def sizes_of(body: Callable[..., Any]) -> Sizes:
    return Sizes(Body(body), StaticInputs((torch.randn(LARGE, 8),)), LARGE, {"x": 0})


def refuse(body: Callable[..., Any], small: int = SMALL) -> None:
    sizes = sizes_of(body)
    refuse_size_effects(sizes.trace(LARGE), sizes.trace(small), (LARGE, small))


def rows(x: Tensor) -> int:
    return x.shape[0]


HARMLESS: dict[str, Callable[..., Any]] = {
    "views": lambda m, x: m.linear(x).view(rows(x), 2, 4).transpose(0, 1).reshape(2 * rows(x), 4)[: rows(x)],
    "positions": lambda m, x: x + torch.arange(rows(x))[:, None],
    "positions through a table": lambda m, x: x + m.table[torch.arange(rows(x)) * 2],
    "the beginning of a table": lambda m, x: x + m.table[: rows(x)].exp(),
    "a mask of pairs": lambda m, x: x @ x.t() * torch.ones(rows(x), rows(x)).tril(),
    "new tensors": lambda m, x: x + torch.zeros(rows(x), 8).fill_(3) + x.new_ones(rows(x), 1),
    "a filled part": lambda m, x: (z := torch.zeros(rows(x), 8), z[:, 2].fill_(1.5), x + z)[2],
    "random numbers": lambda m, x: x + torch.rand(rows(x), 8),
    "weights": lambda m, x: F.linear(x, (m.linear.weight * 2).t()),
    "a counter": lambda m, x: (m.counter.add_(1), x * m.counter)[1],
    "a part of a written buffer": lambda m, x: (m.table[: rows(x)].add_(x), x * 2)[1],
    "one hot": lambda m, x: x @ torch.eye(rows(x))[:, :1].new_zeros(8, 8) + torch.eye(rows(x))[:, :1],
}

HARMFUL: dict[str, Callable[..., Any]] = {
    "a divisor": lambda m, x: x / rows(x),
    "a power": lambda m, x: x ** (1 + rows(x) % 4),
    "a scalar of arithmetic": lambda m, x: torch.add(x, x, alpha=rows(x)),
    "a float argument": lambda m, x: F.layer_norm(x, (8,), eps=1 / rows(x)),
    "an attention scale": lambda m, x: F.scaled_dot_product_attention(*[x[None]] * 3, scale=1 / rows(x))[0],
    "a clamp": lambda m, x: x.clamp(max=rows(x) / 50),
    "a constant": lambda m, x: x * torch.tensor(float(rows(x))),
    "a full tensor": lambda m, x: x * torch.full((8,), 1 / rows(x)),
    "positions from the end": lambda m, x: x + torch.arange(rows(x) - 1, -1, -1)[:, None],
    "a grid": lambda m, x: x + torch.linspace(0, 1, rows(x))[:, None],
    "a mean of positions": lambda m, x: x + torch.arange(rows(x)).float().mean(),
    "a sum over a table": lambda m, x: x + m.table[: rows(x)].sum(0),
    "a place in a mask": lambda m, x: (z := torch.zeros(32), z[rows(x)].fill_(1), x + z[:8])[2],
    "a count that is written": lambda m, x: (m.counter.add_(rows(x)), x * 2)[1],
    "the last entry of a table": lambda m, x: x + m.table[rows(x)],
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_only_follows_the_number_of_rows(case: str) -> None:
    refuse(HARMLESS[case])


@pytest.mark.parametrize("case", HARMFUL)
def test_what_the_number_of_rows_changes_is_refused(case: str) -> None:
    with pytest.raises(CaptureError, match="reaches the values") as caught:
        refuse(HARMFUL[case])
    assert "test_size_effects.py" in caught.value.came


OTHERWISE = ("random numbers", "a mask of pairs", "a counter", "a count that is written")
"""Rows in common do not say it: random, mixed, or counted."""


@pytest.mark.parametrize("case", [case for case in (*HARMLESS, *HARMFUL) if case not in OTHERWISE])
def test_numbers_agree(case: str) -> None:
    """An independent reference: rows in common have the same values, or not, when the model runs on them."""
    body = {**HARMLESS, **HARMFUL}[case]
    x = torch.randn(LARGE, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    large = Body(body)(x)[:SMALL]
    torch.manual_seed(0)
    small = Body(body)(x[:SMALL])
    assert torch.allclose(large, small) == (case in HARMLESS)


def test_another_path_is_refused() -> None:
    with pytest.raises(CaptureError, match="other ops for 6 rows than for 4") as caught:
        refuse(lambda m, x: m.linear(x) if rows(x) > 4 else x.relu())
    assert "bucket" in caught.value.remedy
    with pytest.raises(CaptureError, match="other ops"):
        refuse(lambda m, x: x.relu() if rows(x) > 4 else x.relu() + 1)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_decode_steps_are_harmless(name: str) -> None:
    step = serving_step(name, batch=4)
    sizes = Sizes(step, StaticInputs((torch.arange(4)[:, None], torch.arange(4))), 4, {})
    refuse_size_effects(sizes.trace(4), sizes.trace(2), (4, 2))
    assert output_rows(sizes.trace(4), sizes.trace(2), (4, 2)) == (0,)


# --- outputs ----------------------------------------------------------------------------------------------------------


def outputs_of(body: Callable[..., Any]) -> tuple[int | None, ...]:
    sizes = sizes_of(body)
    return output_rows(sizes.trace(LARGE), sizes.trace(SMALL), (LARGE, SMALL))


def test_rows_of_outputs_are_found() -> None:
    found = outputs_of(lambda m, x: {"a": x * 2, "b": (x.t(), x.sum(0), None, 3), "c": m.table, "d": x[:, None].exp()})
    assert found == (0, 1, None, None, None, None, 0)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x.repeat(2, 1),
        lambda m, x: x[1:],
        lambda m, x: x @ x.t(),
        lambda m, x: (x, rows(x)),
        lambda m, x: x.reshape(-1),
    ],
    ids=["twice", "one less", "pairs", "the number itself", "flat"],
)
def test_outputs_that_cannot_be_cut_are_refused(body: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match=r"output \d cannot be cut"):
        outputs_of(body)
