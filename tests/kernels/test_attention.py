"""Attention at one query per row: the kernels against float64, what they read, and what is refused.

On a GPU the kernels run there; else in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from auxstream.kernels.attention import Attention, Work, decode_attention, reference, refusal, settle
from auxstream.kernels.attention_plan import Plan, Sizes, plan
from auxstream.runtime.errors import CaptureError, InputError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {  # batch, heads of keys, queries to each, keys, numbers in a key, in a value
    "gemma4 sliding": (2, 2, 2, 80, 256, 256),
    "gemma4 full": (1, 1, 8, 70, 512, 512),
    "one query to a head": (3, 3, 1, 33, 64, 64),
    "latent": (2, 2, 1, 65, 192, 128),
    "odd": (2, 1, 3, 50, 72, 40),
    "small": (3, 2, 2, 17, 16, 16),
}
MASKS = ("none", "causal", "sliding", "floor", "numbers", "per head")


def visible(kind: str, batch: int, heads: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    """One row sees a single key."""
    key, position = torch.arange(keys), torch.tensor([0, keys - 1, keys // 2])[:batch, None]
    causal = (key <= position)[:, None, None]
    generator = torch.Generator().manual_seed(1)
    match kind:
        case "causal":
            return causal
        case "sliding":
            return causal & (key > position - 20)[:, None, None]
        case "floor":
            return torch.zeros(causal.shape, dtype=dtype).masked_fill(~causal, torch.finfo(dtype).min)
        case "numbers":
            added = torch.randn(batch, 1, 1, keys, generator=generator)
            return added.masked_fill(~causal, -math.inf).to(dtype)
        case "per head":
            seen = torch.rand(batch, heads, 1, keys, generator=generator) < 0.5
            return seen | (key == 3)
        case _:
            return None


def work(shape: str, mask: str = "causal", dtype: torch.dtype = BF16, softcap: float | None = None) -> Work:
    batch, kv_heads, group, keys, d, dv = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(DEVICE, dtype)

    q, k, v = normal(batch, kv_heads * group, 1, d), normal(batch, kv_heads, keys, d), normal(batch, kv_heads, keys, dv)
    seen = visible(mask, batch, kv_heads * group, keys, dtype)
    return Work(q, k, v, None if seen is None else seen.to(DEVICE), 1.5 * d**-0.5, softcap)


def kernels(given: Work, cut: Plan | None = None) -> Tensor:
    out = given.out()
    settle(given, cut)(given, out)
    return out


def unfused(given: Work) -> Tensor:
    """As models have it: keys and values for every query of their own."""
    group = given.sizes.group
    k, v = given.k.repeat_interleave(group, 1), given.v.repeat_interleave(group, 1)
    if given.softcap is None:
        return functional.scaled_dot_product_attention(given.q, k, v, given.mask, scale=given.scale)
    scores = (given.q @ k.mT * given.scale / given.softcap).tanh() * given.softcap
    if given.mask is not None:
        scores = scores.masked_fill(~given.mask, -math.inf) if given.mask.dtype is torch.bool else scores + given.mask
    return scores.softmax(-1, dtype=F32).to(v.dtype) @ v


def exact(given: Work) -> Tensor:
    """In float64, by torch's own."""
    wide = replace(given, q=given.q.double(), k=given.k.double(), v=given.v.double())
    if given.mask is not None and given.mask.dtype is not torch.bool:
        wide = replace(wide, mask=given.mask.double())
    return unfused(wide)


def error(found: Tensor, given: Work) -> float:
    truth = exact(given)
    return float((found.double() - truth).norm() / truth.norm())


def no_worse(found: Tensor, given: Work) -> bool:
    """The gate: within 1.1 of the error of the model's own ops."""
    return error(found, given) <= 1.1 * error(unfused(given), given) + 2**-22


CASES = [("odd", mask, BF16) for mask in MASKS]
CASES += [(shape, mask, BF16) for shape in SHAPES if shape != "odd" for mask in ("none", "sliding")]
CASES += [("small", "per head", BF16), ("latent", "numbers", BF16)]
CASES += [("odd", mask, dtype) for mask in ("causal", "numbers", "per head") for dtype in (F16, F32)]


@pytest.mark.parametrize(("shape", "mask", "dtype"), CASES)
def test_kernels_are_as_exact_as_the_unfused_ops(shape: str, mask: str, dtype: torch.dtype) -> None:
    given = work(shape, mask, dtype)
    assert not refusal(given)
    assert no_worse(kernels(given), given)


def test_the_gate_sees_less() -> None:
    """A key too many, a scale that is off, weights of eight bits."""
    given = work("gemma4 sliding", "sliding")
    assert given.mask is not None
    assert not no_worse(kernels(replace(given, mask=given.mask | given.mask.roll(1, -1))), given)
    assert not no_worse(kernels(replace(given, scale=given.scale * 1.01)), given)
    assert not no_worse(kernels(replace(given, v=given.v.to(torch.float8_e4m3fn).to(BF16))), given)


@pytest.mark.parametrize("mask", ["none", "causal", "numbers"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_softcap(mask: str, dtype: torch.dtype) -> None:
    given = work("small", mask, dtype, softcap=2.0)
    assert no_worse(kernels(given), given)
    assert error(kernels(replace(given, softcap=None)), given) > 0.01


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", ["odd", "latent"])
def test_the_reference_is_what_torch_computes(shape: str, mask: str) -> None:
    given = work(shape, mask, F32)
    torch.testing.assert_close(reference(given), unfused(given), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(reference(given, torch.float64, rounds=False), exact(given), rtol=1e-6, atol=1e-7)


# --- plans ------------------------------------------------------------------------------------------------------------

PLANS = (
    Plan(16, 1, 4, 1), Plan(16, 3, 4, 1), Plan(16, 7, 2, 3), Plan(32, 2, 4, 2), Plan(64, 2, 8, 2),
    Plan(128, 1, 8, 1), Plan(16, 9, 4, 1, cols=16), Plan(32, 5, 4, 1, cols=256, whole_warps=8),
)  # fmt: skip


@pytest.mark.parametrize(("cut", "mask"), [*((cut, "sliding") for cut in PLANS), (PLANS[2], "per head")], ids=str)
def test_every_plan_computes_the_same(cut: Plan, mask: str) -> None:
    given = work("odd", mask)
    assert no_worse(kernels(given, cut), given)


def test_a_plan_covers_every_key_and_has_no_idle_program() -> None:
    for batch in (1, 8, 32, 300):
        for keys in (1, 17, 1024, 8192, 131072):
            for kv_heads, group, d in ((8, 2, 256), (2, 8, 512), (16, 1, 64)):
                cut = plan(Sizes(batch, kv_heads, group, keys, d, d, 2))
                assert cut.turns(keys) * cut.splits * cut.block >= keys
                assert (cut.splits - 1) * cut.block < keys


def test_more_keys_than_a_program_looks_at_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 5000, 16, generator=generator).to(DEVICE)
    key = torch.arange(5000, device=DEVICE)
    for first, last in ((0, 3), (4990, 5000), (2040, 2060)):
        given = Work(k[:, :, :1], k, k, ((key >= first) & (key < last))[None, None, None], 0.25)
        assert no_worse(kernels(given, Plan(64, 2, 4, 1)), given)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "sliding", "floor", "numbers"])
@pytest.mark.parametrize("cut", [Plan(32, 1, 4, 1), Plan(32, 2, 4, 2)], ids=str)
def test_what_nobody_sees_is_not_read(mask: str, cut: Plan | None) -> None:
    given = work("gemma4 sliding", mask)
    assert given.mask is not None
    usual = kernels(given, cut)
    sees = given.mask if given.mask.dtype is torch.bool else given.mask > torch.finfo(given.mask.dtype).min
    hidden = ~sees[:, 0, 0, :, None].expand(-1, -1, 256)[:, None]
    poisoned = replace(given, k=given.k.masked_fill(hidden, math.nan), v=given.v.masked_fill(hidden, math.nan))
    assert torch.equal(kernels(poisoned, cut), usual)
    assert torch.equal(reference(poisoned), reference(given))


def test_what_somebody_sees_is_read() -> None:
    given = work("gemma4 sliding")
    given.v[0, 0, 0] = math.nan
    assert kernels(given)[0, :2].isnan().all()


@pytest.mark.parametrize("cut", [Plan(16, 1, 4, 1), Plan(16, 3, 4, 1)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "floor"])
def test_a_row_that_sees_nothing_gets_zeros(mask: str, cut: Plan) -> None:
    given = work("small", mask)
    assert given.mask is not None
    given.mask[1] = False if mask == "causal" else -math.inf
    found = kernels(given, cut)
    assert not found[1].any()
    assert found[0].any()
    assert torch.equal(found[1], reference(given)[1])


def test_caches_are_read_where_they_lie() -> None:
    """Rows of a larger cache; keys and values side by side; heads behind keys."""
    given = work("gemma4 sliding")
    usual = kernels(given)
    larger = torch.zeros(5, *given.k.shape[1:], device=DEVICE, dtype=BF16)
    larger[1:3] = given.k
    both = torch.cat([given.k, given.v], -1)
    turned = given.v.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (
        replace(given, k=larger[1:3]),
        replace(given, k=both[..., :256], v=both[..., 256:]),
        replace(given, v=turned),
        replace(given, q=given.q.transpose(1, 2).contiguous().transpose(1, 2)),
        replace(given, mask=None if given.mask is None else given.mask.expand(-1, 4, 1, -1)),
    ):
        assert torch.equal(kernels(other), usual)


def test_the_same_inputs_give_the_same_bits() -> None:
    given = work("gemma4 full")
    usual = kernels(given)
    assert torch.equal(kernels(given), usual)


# --- the op -----------------------------------------------------------------------------------------------------------


def test_the_op() -> None:
    given = work("small", "numbers", softcap=3.0)
    found = decode_attention()(given.q, given.k, given.v, given.mask, given.scale, 3.0)
    assert error(found, given) < 2**-7
    torch.library.opcheck(decode_attention(), (given.q, given.k, given.v, given.mask, given.scale))


def test_a_mask_of_fewer_dimensions() -> None:
    given = work("small", "none")
    mask = torch.arange(17, device=DEVICE) < 5
    found = decode_attention()(given.q, given.k, given.v, mask, given.scale)
    assert torch.equal(found, decode_attention()(given.q, given.k, given.v, mask[None, None, None], given.scale))


REFUSED: dict[str, Any] = {
    "2 queries per row": lambda w: replace(w, q=w.q.expand(-1, -1, 2, -1)),
    "3 heads of queries and 2": lambda w: replace(w, q=w.q[:, :3]),
    "of other than four": lambda w: replace(w, k=w.k[0]),
    "keys in torch.float32": lambda w: replace(w, k=w.k.float()),
    "apart": lambda w: replace(w, k=w.k.mT.contiguous().mT),
    "a mask of torch.int64": lambda w: replace(w, mask=w.mask.long()),
    "a mask of (3, 1, 1, 16)": lambda w: replace(w, mask=w.mask[..., :16]),
    "values (3, 2, 16, 16)": lambda w: replace(w, v=w.v[:, :, :16]),
    "of 1024": lambda w: replace(w, q=w.q.repeat(1, 1, 1, 64), k=w.k.repeat(1, 1, 1, 64)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why: str) -> None:
    given = REFUSED[why](work("small"))
    assert why in refusal(given)
    with pytest.raises(InputError, match="no kernel for this"):
        decode_attention()(given.q, given.k, given.v, given.mask, given.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_of_it_replays(shape: str) -> None:
    given, attention, graph = work(shape), Attention(), torch.cuda.CUDAGraph()
    attention(given)
    with torch.cuda.graph(graph):
        out = attention(given)
    given.q.neg_()
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, Attention()(given))


@pytest.mark.gpu
def test_a_layout_that_is_new_to_a_capture_is_refused() -> None:
    given, graph = work("small"), torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError, match="new input layout"), torch.cuda.graph(graph):
        Attention()(given)
