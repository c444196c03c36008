"""Errors: where users find them, and that they survive a way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch

import auxstream
from auxstream.runtime import errors

ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_every_error_and_warning_has_a_public_name() -> None:
    assert sorted(kind.__name__ for kind in ERRORS) == auxstream.errors.__all__
    assert all(getattr(auxstream.errors, kind.__name__) is kind for kind in ERRORS)


def test_public_names_load_on_first_use() -> None:
    script = """
import sys, auxstream
assert not {"torch", "auxstream.errors"} & set(sys.modules)
assert issubclass(auxstream.errors.RaceError, auxstream.AuxstreamError)
assert "errors" in dir(auxstream)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if issubclass(kind, errors.AuxstreamError)])
def test_an_error_is_the_same_behind_pickle_and_copy(kind: type[errors.AuxstreamError]) -> None:
    """What cannot be unpickled hangs pools of processes."""
    made = kind("it", "its report") if kind is errors.RaceError else kind("it", expected="a", came="b", remedy="c")
    made.add_note("seen here")
    for same in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert type(same) is kind
        assert str(same) == str(made)
        assert vars(same) == vars(made)
        assert same.__notes__ == ["seen here"]


def test_a_race_takes_its_report_along() -> None:
    def race(x: torch.Tensor) -> None:
        with auxstream.graph(device="cpu"):
            y = x * 2
            region = auxstream.fork("aux", y)
            with region:
                region.returns(y + 1)
            y.add_(1)
            region.join()

    with pytest.raises(auxstream.errors.RaceError) as caught:
        race(torch.randn(8))
    same = pickle.loads(pickle.dumps(caught.value))
    assert str(same.report) == str(caught.value.report)
    assert len(same.report.races) == 1
