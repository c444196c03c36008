"""What a refused call is told: which arguments were expected, which came, and what to do about the difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from auxstream.capture.arguments import Arguments
from auxstream.runtime.errors import InputError

X = torch.ones(4, 64)


def fitting(*args: Any, dims: tuple[int | None, ...] | None = None, **keywords: Any) -> Arguments:
    leaves, spec = pytree.tree_flatten((args, keywords))
    return Arguments(leaves, spec, [f"args_{position}" for position in range(len(leaves))], dims)


@pytest.mark.parametrize(
    ("arguments", "args", "keywords", "expected", "came"),
    [
        (
            fitting(X),
            (),
            {"x": X},
            "1 positional argument and no keywords",
            "0 positional arguments and keywords x",
        ),
        (
            fitting(X),
            (X, X),
            {},
            "1 positional argument and no keywords",
            "2 positional arguments and no keywords",
        ),
        (
            fitting(b=X, a=X),
            (),
            {"a": X},
            "0 positional arguments and keywords a, b",
            "0 positional arguments and keywords a",
        ),
        (
            fitting(X, [X, X]),
            (X, [X]),
            {},
            "argument 1 as list of (a tensor, a tensor)",
            "argument 1 as list of (a tensor)",
        ),
        (
            fitting(X, c={"k": X}),
            (X,),
            {"c": {"v": X}},
            "c= as dict of ('k': a tensor)",
            "c= as dict of ('v': a tensor)",
        ),
        (fitting(X, [X]), (X, X), {}, "argument 1 as list of (a tensor)", "argument 1 as a tensor"),
    ],
)
def test_another_structure_is_said_in_words(
    arguments: Arguments, args: tuple[Any, ...], keywords: dict[str, Any], expected: str, came: str
) -> None:
    with pytest.raises(InputError, match="another structure") as caught:
        arguments.leaves(args, keywords)
    assert (caught.value.expected, caught.value.came) == (expected, came)
    assert "as in the example inputs" in caught.value.remedy


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (X.double(), "cast it with .to(torch.float32)"),
        (X.to("meta"), "move it with .to('cpu')"),
        (X[:, :3], "dimension 1 must be 64: compile for this shape too"),
        (X[:3], "dimension 0 must be 4: compile for this shape too"),
        (X[0], "give it 2 dimensions, or compile for this shape too"),
        (X[:, :3].double(), "cast it with .to(torch.float32); dimension 1 must be 64: compile for this shape too"),
        (X.to_sparse(), "make it dense with .to_dense()"),
        (1.0, "pass a tensor"),
    ],
)
def test_the_remedy_fits_the_difference(value: Any, remedy: str) -> None:
    with pytest.raises(InputError, match="'args_0' differs") as caught:
        fitting(X).rows([value])
    assert caught.value.remedy == remedy


def test_rows_that_differ_are_padded_or_cut() -> None:
    arguments = fitting(X, X, dims=(0, 0))
    assert arguments.rows([X[:3], X[:3]]) == 3
    with pytest.raises(InputError, match="'args_1' differs") as caught:
        arguments.rows([X[:3], X])
    assert caught.value.remedy == "pad or cut its dimension 0 to 3"
