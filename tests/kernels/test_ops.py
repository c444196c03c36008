"""Every row of the op tables against eager: by torch from its MLIR, and by its Triton kernel.

A row without a case, and a case whose op turns out opaque, fail.
"""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import EXACT, disagreement
from one_op import DEVICE, fusion_of, inputs_of, results, tensors_of
from op_values import Case
from pointwise_cases import pointwise_cases
from rowwise_cases import rowwise_cases

from auxstream.kernels.launch import kernel_of
from auxstream.kernels.lower import BY_ROWS
from auxstream.kernels.pointwise import POINTWISE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes behind a mask


def by_target() -> Iterator[tuple[str, list[Case]]]:
    cases = sorted(itertools.chain(pointwise_cases(), rowwise_cases()), key=lambda case: str(case.target))
    for target, group in itertools.groupby(cases, key=lambda case: str(case.target)):
        yield target.removeprefix("aten."), list(group)


GROUPS = dict(by_target())


@pytest.fixture(scope="module", autouse=True)
def compiled_side_by_side() -> None:
    """On a GPU, where one after the other would take as many minutes as there are hundreds of cases."""
    if DEVICE == "cuda":
        launches = [launch for group in GROUPS.values() for case in group for launch in prepared(case)]
        with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
            for done in [pool.submit(launch.compile, dtypes) for launch, dtypes in launches]:
                done.result()


def prepared(case: Case) -> Iterator[tuple[Any, list[torch.dtype]]]:
    fusion = fusion_of(case.target, case.given)
    if fusion is not None:
        inputs = inputs_of(fusion, case.given)
        kernel = kernel_of(fusion.spec)
        outputs = kernel.fake(inputs, ())
        launch = next(iter(kernel.candidates(inputs, outputs, ()).values()))
        yield launch, [tensor.dtype for tensor in (*inputs, *outputs)]


def complaints(case: Case) -> list[str]:
    """What is wrong with a case, by way; nothing if all is well."""
    try:
        eager = case.target(*case.args, **case.kwargs)
    except (RuntimeError, NotImplementedError) as refusal:
        return [f"{case}: eager refuses it: {refusal}"]
    fusion = fusion_of(case.target, case.given)
    if fusion is None:
        return [f"{case}: opaque"]
    read = [t for t in tensors_of(case.given) if t.dtype.is_floating_point and t.dim()]
    magnitude = max((float(t[torch.isfinite(t)].abs().max()) for t in read if t.numel()), default=0.0)
    ways = results(fusion, case.given)
    found = {way: disagreement(ours, eager, case.bound, magnitude) for way, ours in ways.items()}
    return [f"{case} by {way}: {what}" for way, what in found.items() if what]


@pytest.mark.parametrize("target", GROUPS)
def test_a_row_agrees_with_eager(target: str) -> None:
    found = [complaint for case in GROUPS[target] for complaint in complaints(case)]
    assert not found, "\n".join(found)


def test_every_row_has_a_case() -> None:
    tested = {case.target for group in GROUPS.values() for case in group}
    assert set(POINTWISE) | set(BY_ROWS) == tested


def test_cases_are_compared_bit_for_bit_unless_they_say_otherwise() -> None:
    exact = sum(case.bound is EXACT for group in GROUPS.values() for case in group)
    assert exact > len(GROUPS)
