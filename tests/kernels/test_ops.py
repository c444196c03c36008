"""Every row of the op tables against eager: by torch from its MLIR, and by its Triton kernel.

A row without a case, and a case whose op turns out opaque, fail.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from compare import EXACT, disagreement
from one_op import DEVICE, bundle_of, fusion_of, inputs_of, likeliest, results, tensors_of
from op_values import Case
from pointwise_cases import pointwise_cases
from rowwise_cases import rowwise_cases
from torch import Tensor

from auxstream.kernels.emit import Fusion
from auxstream.kernels.lower import BY_ROWS
from auxstream.kernels.pointwise import POINTWISE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes behind a mask


def by_target() -> Iterator[tuple[str, list[Case]]]:
    cases = sorted(itertools.chain(pointwise_cases(), rowwise_cases()), key=lambda case: str(case.target))
    for target, group in itertools.groupby(cases, key=lambda case: str(case.target)):
        yield target.removeprefix("aten."), list(group)


GROUPS = dict(by_target())
PER_KERNEL = 12 if DEVICE == "cuda" else 1
"""Pointwise cases that share a kernel: on a GPU, compiling hundreds would take minutes."""


def kernels(cases: Sequence[Case]) -> Iterator[tuple[Fusion | None, Sequence[Case]]]:
    """The kernels of cases; None for what is opaque."""
    together = PER_KERNEL if cases[0].target in POINTWISE else 1
    for start in range(0, len(cases), together):
        some = cases[start : start + together]
        if together > 1:
            yield bundle_of([case.call for case in some]), some
        else:
            yield fusion_of(*some[0].call), some


@pytest.fixture(scope="module", autouse=True)
def compiled_side_by_side() -> None:
    compile_side_by_side()


def compile_side_by_side() -> None:
    """On a GPU, all that the cases will launch."""
    if DEVICE == "cuda":
        with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
            for fusion, cases in itertools.chain.from_iterable(map(kernels, GROUPS.values())):
                if fusion is not None:
                    inputs = inputs_of(fusion, [case.call for case in cases])
                    launch, outputs = likeliest(fusion, inputs)
                    pool.submit(launch.compile, [tensor.dtype for tensor in (*inputs, *outputs)])


def complaints(cases: Sequence[Case]) -> Iterator[str]:
    """What is wrong with cases of one target."""
    for fusion, some in kernels(cases):
        if fusion is None:
            yield f"{some[0]}: opaque"
            continue
        for case, ways in zip(some, results(fusion, [case.call for case in some]), strict=True):
            eager = case.target(*case.args, **case.kwargs)
            for way, ours in ways.items():
                what = disagreement(ours, eager, case.bound, magnitude_of(case))
                if what is not None:
                    yield f"{case} by {way}: {what}"


def magnitude_of(case: Case) -> float:
    """The largest finite number among the operands."""
    read: list[Tensor] = [t for t in tensors_of(case.given) if t.dtype.is_floating_point and t.dim()]
    return max((float(t[torch.isfinite(t)].abs().max()) for t in read if t.numel()), default=0.0)


@pytest.mark.parametrize("target", GROUPS)
def test_a_row_agrees_with_eager(target: str) -> None:
    found = list(complaints(GROUPS[target]))
    assert not found, "\n".join(found)


def test_every_row_has_a_case() -> None:
    tested = {case.target for group in GROUPS.values() for case in group}
    assert set(POINTWISE) | set(BY_ROWS) == tested


def test_cases_are_compared_bit_for_bit_unless_they_say_otherwise() -> None:
    exact = sum(case.bound is EXACT for group in GROUPS.values() for case in group)
    assert exact > len(GROUPS)
