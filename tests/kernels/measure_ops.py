"""How far fused ops are from eager's here, as a table for docs/numerics.md: the rows that are not bit for bit.

    cd tests/kernels && python measure_ops.py

Runs the calls of `test_ops`, on a GPU if there is one. Per op and dtype: the units in the last place that the worst
result is off, the same in parts of the operands' magnitude, and the share of results that differ at all. A result that
is NaN or infinite where eager's is not counts as differing, and is named behind the table.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import conftest  # noqa: F401  # decides how triton runs, before it is imported
import torch
from compare import ulp_apart
from one_op import DEVICE, results
from op_values import NAMES, Case
from test_ops import GROUPS, compile_side_by_side, kernels, magnitude_of
from torch import Tensor


@dataclass
class Row:
    """Results of one op in one dtype, all cases together."""

    ulp: int = 0
    of_magnitude: float = 0.0
    differing: int = 0
    results: int = 0
    unlike: int = 0
    """Results that are NaN or infinite where eager's are not, or the other way round."""

    def take(self, ours: Tensor, eager: Tensor, magnitude: float) -> None:
        wrong = ~((ours == eager) | (ours.isnan() & eager.isnan()))
        self.results += eager.numel()
        self.differing += int(wrong.sum())
        if not eager.dtype.is_floating_point:
            return
        finite = wrong & torch.isfinite(ours) & torch.isfinite(eager)
        self.unlike += int((wrong & ~finite).sum())
        if bool(finite.any()):
            self.ulp = max(self.ulp, int(ulp_apart(ours, eager)[finite].max()))
            scale = eager.double().abs().clamp(min=magnitude or torch.finfo(eager.dtype).tiny)
            self.of_magnitude = max(
                self.of_magnitude, float(((ours.double() - eager.double()).abs() / scale)[finite].max())
            )


def measured(cases: Sequence[Case]) -> dict[torch.dtype, Row]:
    """The rows of one op."""
    rows: dict[torch.dtype, Row] = {}
    for fusion, some in kernels(cases):
        assert fusion is not None, f"{some[0]} is opaque"
        for case, ways in zip(some, results(fusion, [case.call for case in some]), strict=True):
            eager = case.target(*case.args, **case.kwargs)
            rows.setdefault(eager.dtype, Row()).take(ways["kernel"], eager, magnitude_of(case))
    return rows


def table() -> Iterator[str]:
    """The lines of the table, as they come."""
    yield "| op | dtype | worst, ulp | worst, of the operands' magnitude | share that differs |"
    yield "|---|---|---|---|---|"
    exact, unlike = 0, list[str]()
    for target, cases in GROUPS.items():
        for dtype, row in measured(cases).items():
            name = NAMES.get(dtype, str(dtype)[6:])
            exact += not row.differing
            if row.differing:
                share = row.differing / row.results
                yield f"| {target} | {name} | {row.ulp} | {row.of_magnitude:.1e} | {share:.2%} |"
            if row.unlike:
                unlike.append(f"{target} in {name}: {row.unlike}")
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU"
    yield ""
    yield f"{exact} other rows are bit for bit, on {where}, torch {torch.__version__}."
    yield f"NaN or infinite on one side only: {'; '.join(unlike) or 'none'}."


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of lanes behind a mask
    compile_side_by_side()
    for line in table():
        print(line, flush=True)
