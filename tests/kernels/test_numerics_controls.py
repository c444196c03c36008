"""The gates of the other files can fail: with one formula, one rounding, or one conversion wrong, they do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from compare import EXACT, FUNCTION, TIES, disagreement
from measure_ops import Row, measured
from op_values import Case, aten
from patterns import randn
from test_ops import GROUPS, complaints
from torch import Tensor
from ways import fused

from auxstream.kernels import eager, formulas, pointwise, rowwise
from auxstream.kernels.body import MLIR_TYPE, Scalar
from auxstream.kernels.interpreter_math import share_of
from auxstream.kernels.launch import kernel_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# --- a formula that is wrong ------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[object, Callable[..., object]]] = {
    "a product one ulp off": (aten.mul.Tensor, lambda b, x, y: b.mul(b.mul(x, y), 1.0000001)),
    "a quotient by way of the reciprocal": (aten.div.Tensor, lambda b, x, y: b.mul(x, b.div(1, y))),
    "a zero that loses its sign": (aten.relu.default, lambda b, x: b.maximum(x, 0)),
    "a negative zero that becomes positive": (aten.neg.default, lambda b, x: b.sub(0, x)),
    "alpha dropped": (aten.add.Tensor, lambda b, x, y, alpha=1: formulas.plus(b, x, y)),
    "one gelu for the other": (aten.gelu.default, lambda b, x, approximate: formulas.gelu(b, x)),
    "NaN that becomes a bound": (aten.clamp.default, lambda b, x, low, high: b.select(b.compare("lt", x, 2.0), x, 2.0)),
    "a remainder with the dividend's sign": (aten.remainder.Tensor, formulas.fmod),
    "a cube rounded once": (aten.pow.Tensor_Scalar, lambda b, x, n: b.mul(b.mul(x, x), x) if n == 3 else b.mul(x, x)),
    "an ordered inequality": (aten.ne.Tensor, lambda b, x, y: b.either(b.compare("lt", x, y), b.compare("gt", x, y))),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_formula_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, body = WRONG[fault]
    row = dataclasses.replace(pointwise.POINTWISE[target], body=body)
    monkeypatch.setitem(pointwise.POINTWISE, target, row)  # pyright: ignore[reportArgumentType]
    assert noticed(str(target))


def noticed(target: str) -> bool:
    """Whether the cases of a row complain, or the kernel cannot even be made."""
    return any(complaints(GROUPS[target.removeprefix("aten.")]))


# --- a conversion that is wrong ---------------------------------------------------------------------------------------


def test_numbers_that_are_not_rounded_as_eager_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not noticed("add.Scalar")
    monkeypatch.setattr(eager.Terms, "number", lambda terms, value: value)
    assert noticed("remainder.Scalar")


def test_operands_that_do_not_pass_through_the_common_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 number without dimensions meets half precision."""

    def straight(body: eager.EagerBody, x: Scalar, *, exact: bool = False) -> Scalar:
        return body.convert(x, MLIR_TYPE[body.terms.compute])

    monkeypatch.setattr(eager.EagerBody, "operand", straight)
    assert noticed("add.Tensor")


def test_a_row_that_is_not_cast_to_the_dtype_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "_source", lambda builder, call, operand: operand(call.source))
    assert noticed("softmax.int")


def test_shares_are_quotients() -> None:
    """Bit for bit, though nothing is divided but 1; without the correction they would not be."""
    part = randn(1000, 1000, dtype=torch.float32, scale=4).abs().neg().exp()
    total = part.sum(-1, keepdim=True) + 1
    assert torch.equal(share_of(part, total), part / total)
    assert not torch.equal(part * (1 / total), part / total)


# --- a rounding point that is missing ---------------------------------------------------------------------------------


def chain(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return ((x * y + z) / (y.square() + 1.1) - x.square()) * z


def test_each_rounding_point_matters() -> None:
    """Every `truncf` that is widened again at once is one of eager's; without it, bits differ."""
    args = [randn(64, 128, dtype=torch.bfloat16, seed=i) for i in range(3)]
    _, report = fused(chain, args)
    (fusion,) = report.fusions
    inputs = [args[int(node.name.removeprefix("args_"))] for node in fusion.inputs]
    wanted = chain(*args)
    rounded = r"(%\w+) = arith.truncf (%\w+) : f32 to bf16"
    pairs = [
        (widened, source)
        for name, source in re.findall(rounded, fusion.spec.mlir)
        for widened in re.findall(rf"(%\w+) = arith.extf {name} : bf16 to f32", fusion.spec.mlir)
    ]
    assert len(pairs) >= 6
    for widened, source in pairs:
        mlir = re.sub(rf"    +{widened} = .*\n", "", fusion.spec.mlir)
        mlir = re.sub(rf"{widened}\b", source, mlir)
        (ours,) = kernel_of(dataclasses.replace(fusion.spec, mlir=mlir)).reference(inputs, ())
        assert disagreement(ours, wanted) is not None, f"{widened} is not needed:\n{fusion.spec.mlir}"
    (ours,) = kernel_of(fusion.spec).reference(inputs, ())
    assert disagreement(ours, wanted) is None


# --- the comparison itself --------------------------------------------------------------------------------------------


def test_what_the_comparison_sees() -> None:
    one = torch.tensor([1.0, -0.0, torch.nan, torch.inf, 2.0])
    off = 1 + 2**-8
    assert disagreement(one, one.clone()) is None
    for i, value in enumerate((1.0000001, 0.0, 0.0, -torch.inf, torch.nan)):
        other = one.clone()
        other[i] = value
        assert disagreement(other, one) is not None
    assert disagreement(one[1:2].abs(), one[1:2], TIES) is None
    assert disagreement(one.double(), one) is not None
    assert disagreement(one.view(5, 1), one) is not None
    assert disagreement(one[::2], one[::2].contiguous()) is not None
    many = torch.ones(100, dtype=torch.bfloat16) * torch.arange(100)
    few = many.clone()
    few[7] *= off
    assert disagreement(few, many) is not None
    assert disagreement(few, many, FUNCTION) is None
    assert disagreement(many * off, many, FUNCTION) is not None
    few[7] *= off
    assert disagreement(few, many, FUNCTION) is not None


def test_what_the_table_of_measured_differences_counts() -> None:
    row, one = Row(), torch.tensor([1.0, -2.0, torch.nan, 3.0, torch.inf])
    row.take(one.clone(), one, 0.0)
    assert (row.ulp, row.differing, row.unlike, row.results) == (0, 0, 0, 5)
    other = torch.tensor([1.0 + 2**-22, -2.0, torch.nan, 3.0, 7.0])
    row.take(other, one, 4.0)
    assert (row.ulp, row.differing, row.unlike, row.results) == (2, 2, 1, 10)
    assert row.of_magnitude == 2**-24
    assert {dtype for dtype, found in measured(GROUPS["neg.default"]).items() if found.differing} == set()


def test_a_case_that_is_opaque_complains() -> None:
    x = torch.ones(2, 3)
    assert any(complaints([Case(aten.cumsum.default, (x, 1))]))
    assert not any(complaints([Case(aten.neg.default, (x,), {}, EXACT)]))
