"""Every planted race is found, as what it is and nowhere else; every clean twin is proved. On both machines."""

from __future__ import annotations

import warnings

import pytest
from planted import CASES, Case, Work, found_in, report_of

from auxstream.runtime.errors import AuxstreamWarning

ON_THE_SIMULATOR = [case for case in CASES if case.where != "gpu"]
ON_A_GPU = [case for case in CASES if case.where != "simulator"]


def build(case: Case, device: str, broken: bool) -> Work:
    """Racy captures warn; a clean one must not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if broken else "error", AuxstreamWarning)
        return case.build(device, broken)


def check_found(case: Case, device: str) -> None:
    report = report_of(build(case, device, broken=True))
    assert not report.ok
    assert found_in(report) == case.finds, str(report)
    assert report.unattributed == (), str(report)


def check_proved(case: Case, device: str) -> None:
    report = report_of(build(case, device, broken=False))
    assert report.ok, str(report)


@pytest.mark.parametrize("case", ON_THE_SIMULATOR, ids=lambda case: case.name)
def test_found_on_the_simulator(case: Case) -> None:
    check_found(case, "cpu")


@pytest.mark.parametrize("case", ON_THE_SIMULATOR, ids=lambda case: case.name)
def test_clean_twin_proved_on_the_simulator(case: Case) -> None:
    check_proved(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU, ids=lambda case: case.name)
def test_found_on_a_gpu(case: Case) -> None:
    check_found(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU, ids=lambda case: case.name)
def test_clean_twin_proved_on_a_gpu(case: Case) -> None:
    check_proved(case, "cuda")
