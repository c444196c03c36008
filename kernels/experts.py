"""The experts of a mixture as one op, `auxstream::moe_experts`: both products, the activation between, and the sum.

Enters: hidden states [T, H], the experts chosen per token [T, K], their weights [T, K], and all experts' matrices.
Leaves: [T, H]. Invariant: capture-safe (grids depend on shapes, nothing is read back, workspaces are the call's own),
and the same inputs give the same bits. `experts_reference` says what is computed. The forms, by the number of tokens:

    one     T = 1         each choice's weights read once, at the pace of memory
    few     T <= 32       each reached expert's weights read once, by all tokens that chose it
    many    more          pairs grouped by expert on the device; or torch's grouped product, whichever is faster here

An index outside the experts reads memory that is not theirs; `checked` asserts, on the device, that there is none.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ..runtime.errors import InputError
from .experts_reference import reference
from .experts_work import Activation, Work, refused, require
from .on_device import on_its_device

if TYPE_CHECKING:
    from .experts_plan import Experts

# --- the op -----------------------------------------------------------------------------------------------------------

_SCHEMA: Final = (
    "moe_experts(Tensor hidden, Tensor chosen, Tensor scale, Tensor up, Tensor down, Tensor? up_bias, "
    "Tensor? down_bias, str activation, bool gated, float alpha, float? limit, float shift, bool interleaved, "
    "bool transposed, bool checked) -> Tensor"
)


def _work(
    hidden: Tensor, chosen: Tensor, scale: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, gated: bool, alpha: float, limit: float | None, shift: float,
    interleaved: bool, transposed: bool,
) -> Work:  # fmt: skip
    """A call as kernels take it: weights as [experts, outputs, inputs] wherever they lie, rows side by side."""
    dimensions = [tensor.dim() for tensor in (hidden, chosen, scale, up, down)]
    if dimensions != [2, 2, 2, 3, 3]:
        raise refused(f"tensors of {', '.join(map(str, dimensions))} dimensions")
    if transposed:
        up, down = up.mT, down.mT
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    act = Activation(activation, gated, alpha, limit, shift)
    return Work(hidden, chosen.contiguous(), scale.contiguous(), up, down, up_bias, down_bias, act, interleaved)


def _within(work: Work) -> Tensor:
    return ((work.chosen >= 0) & (work.chosen < work.experts)).all()


@functools.cache
def _experts() -> Experts:
    from .experts_plan import Experts  # imports triton

    return Experts()


def _on_cuda(*arguments: Any) -> Tensor:
    *given, checked = arguments
    work = _work(*given)
    if checked:
        torch.ops.aten._assert_async.msg(_within(work), "moe_experts: an index outside the experts")
    return _experts()(work)


def _on_cpu(*arguments: Any) -> Tensor:
    *given, checked = arguments
    work = _work(*given)
    require(work)
    if checked and not _within(work):
        raise InputError(
            "moe_experts was given an index outside the experts",
            expected=f"0 to {work.experts - 1}",
            came=str(work.chosen[(work.chosen < 0) | (work.chosen >= work.experts)].tolist()[:8]),
            remedy="look at the router: padding must choose experts too",
        )
    return reference(work)


def _fake(*arguments: Any) -> Tensor:
    work = _work(*arguments[:-1])
    require(work)
    return work.hidden.new_empty(work.hidden.shape)


@functools.cache
def moe_experts() -> Any:
    """The op `auxstream::moe_experts`, as its schema says."""
    library = _library()
    library.define(_SCHEMA)
    library.impl("moe_experts", on_its_device(_on_cuda), "CUDA")
    library.impl("moe_experts", _on_cpu, "CPU")
    torch.library.register_fake("auxstream::moe_experts", _fake, lib=library)
    return torch.ops.auxstream.moe_experts.default


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("auxstream", "FRAGMENT")
