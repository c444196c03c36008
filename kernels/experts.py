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
from typing import Any, Final

import torch
from torch import Tensor

from ..runtime.errors import CaptureError, InputError
from . import experts_few as few
from . import experts_many as many
from .experts_few import Activation, Work
from .experts_plan import Plan, default, run, settle
from .experts_reference import reference

ACTIVATIONS: Final = ("silu", "gelu_tanh", "gelu", "relu2")
MOST_CHOICES: Final = 64
_FLOATS: Final = (torch.bfloat16, torch.float16, torch.float32)
_MOST_NUMBERS: Final = 2**31
"""Numbers in one expert's weight: addresses within it are 32 bits."""


def refusal(work: Work) -> str:
    """Why no form does this; empty if one does. Asks for nothing but shapes, types and devices."""
    hidden, chosen, up, down, activation = work.hidden, work.chosen, work.up, work.down, work.activation
    tokens, width, inner, experts = hidden.shape[0], hidden.shape[1], down.shape[2], up.shape[0]
    outputs = (2 if activation.gated else 1) * inner
    if not experts or not width or not inner:
        return f"{experts} experts from {width} over {inner}"
    for name, tensor, shape in (
        ("choices", chosen, (tokens, chosen.shape[1])),
        ("weights of the choices", work.scale, (tokens, chosen.shape[1])),
        ("a first weight (experts, outputs, inputs)", up, (experts, outputs, width)),
        ("a second weight (experts, outputs, inputs)", down, (experts, width, inner)),
        ("a first bias", work.up_bias, (experts, outputs)),
        ("a second bias", work.down_bias, (experts, width)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return f"{name} of {tuple(tensor.shape)} where {shape} is needed"
        if tensor.device != hidden.device:
            return f"{name} on {tensor.device}, hidden states on {hidden.device}"
        if tensor is not chosen and tensor.dtype not in _FLOATS:
            return f"{name} in {tensor.dtype}"
    if hidden.dtype not in _FLOATS or not hidden.dtype == up.dtype == down.dtype:
        return f"hidden states in {hidden.dtype} and weights in {up.dtype} and {down.dtype}"
    if chosen.dtype not in (torch.int64, torch.int32):
        return f"choices in {chosen.dtype}"
    if not 1 <= chosen.shape[1] <= MOST_CHOICES:
        return f"{chosen.shape[1]} choices per token"
    if max(outputs, inner) * width >= _MOST_NUMBERS:
        return f"experts of {outputs} x {width} numbers"
    if activation.name not in ACTIVATIONS or (activation.alpha != 1.0 and activation.name != "silu"):
        return f"{activation}"
    return ""


class Experts:
    """What launches; remembers plans by class of tokens and layout of the inputs."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}

    def __call__(self, work: Work) -> Tensor:
        if not work.tokens:
            _require(work)
            return work.hidden.new_empty(work.hidden.shape)
        if work.pairs > many.MOST_PAIRS and not many.groupable(work):
            most = max(1, many.MOST_PAIRS // work.choices)
            return torch.cat([self(part) for part in _cut(work, most)])
        key = (
            few.row_class(work.tokens), few.by_pair(work), work.choices, work.hidden.device, work.hidden.stride(0),
            work.hidden.dtype, work.chosen.dtype, work.scale.dtype, work.up.shape, work.up.stride(), work.down.stride(),
            work.up_bias is None, work.down_bias is None, work.activation, work.interleaved,
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._settle(work)
        return run(work, plan)

    def _settle(self, work: Work) -> Plan:
        _require(work)
        if not work.hidden.is_cuda:
            return default(work)
        if torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                "moe_experts meets a new layout or number of tokens inside a capture",
                expected="one it was launched with before: nothing is compiled or timed inside a capture",
                came=f"{work.tokens} tokens, hidden states with strides {work.hidden.stride()}",
                remedy="run the graph once with these shapes before capturing it (auxstream.compile does)",
            )
        return settle(work, _device_name(work.hidden.device))


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "_")


def _cut(work: Work, most: int) -> list[Work]:
    parts = zip(work.hidden.split(most), work.chosen.split(most), work.scale.split(most), strict=True)
    rest = (work.up, work.down, work.up_bias, work.down_bias, work.activation, work.interleaved)
    return [Work(*part, *rest) for part in parts]


def _require(work: Work) -> None:
    if why := refusal(work):
        raise _refused(why)


def _refused(why: str) -> InputError:
    return InputError(
        "moe_experts has no form for this",
        expected="hidden [T, H], chosen and scale [T, K], up [E, 2I, H] (or [E, I, H] without a gate), down "
        "[E, H, I], or both transposed, all bfloat16, float16 or float32 on one device",
        came=why,
        remedy="keep the model's own experts",
    )


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
        raise _refused(f"tensors of {', '.join(map(str, dimensions))} dimensions")
    if transposed:
        up, down = up.mT, down.mT
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    act = Activation(activation, gated, alpha, limit, shift)
    return Work(hidden, chosen.contiguous(), scale.contiguous(), up, down, up_bias, down_bias, act, interleaved)


def _within(work: Work) -> Tensor:
    return ((work.chosen >= 0) & (work.chosen < work.experts)).all()


def _on_cuda(experts: Experts, *arguments: Any) -> Tensor:
    *given, checked = arguments
    work = _work(*given)
    if checked:
        torch._assert_async(_within(work), "moe_experts: an index outside the experts")
    return experts(work)


def _on_cpu(*arguments: Any) -> Tensor:
    *given, checked = arguments
    work = _work(*given)
    _require(work)
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
    _require(work)
    return work.hidden.new_empty(work.hidden.shape)


@functools.cache
def moe_experts() -> Any:
    """The op `auxstream::moe_experts`, as its schema says."""
    library = _library()
    library.define(_SCHEMA)
    library.impl("moe_experts", functools.partial(_on_cuda, Experts()), "CUDA")
    library.impl("moe_experts", _on_cpu, "CPU")
    torch.library.register_fake("auxstream::moe_experts", _fake, lib=library)
    return torch.ops.auxstream.moe_experts.default


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("auxstream", "FRAGMENT")
