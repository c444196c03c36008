"""`auxstream::moe_experts` as an experts implementation of transformers, under the names "auxstream" and
"auxstream_checked" (which asserts that indices are experts, for debugging).

Enters: an experts module of transformers, hidden states, choices and their weights. Leaves: the layer's output, as one
opaque op a layer in a traced graph. Invariant: a module is run by the op only if the op's activation gave the same
numbers as the module's own on a probe; whatever is not known keeps the grouped products, and that is said once.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
    is_traceable_wrapper_subclass,
)

from ..kernels.experts import moe_experts
from ..kernels.experts_reference import activate
from ..kernels.experts_work import ACTIVATIONS, MOST_CHOICES, Activation
from .source import warn_user

NAME: Final = "auxstream"
CHECKED: Final = "auxstream_checked"
_FORM: Final = "_auxstream_experts"
"""Attribute of an experts module: its `Form`, or why there is none, found at its first call."""
_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")
_LIMITS: Final = ("limit", "swiglu_limit")
_ALPHAS: Final = ("alpha", "swiglu_alpha")
_SCALES: Final = (3.0, 30.0, 3000.0)
"""Of the probe: where activations bend, and beyond where they are clamped."""


@dataclass(frozen=True, slots=True)
class Form:
    """How the op must be called for a module."""

    activation: Activation
    interleaved: bool
    transposed: bool


def register() -> None:
    """Make both names known to transformers; again is a no-op."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    interface: Any = ALL_EXPERTS_FUNCTIONS
    moe_experts()
    interface.register(NAME, functools.partial(experts_forward, checked=False))
    interface.register(CHECKED, functools.partial(experts_forward, checked=True))


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, checked: bool
) -> Tensor:
    """The experts of `module`, as transformers' interface calls them: [T, H], [T, K], [T, K] -> [T, H]."""
    experts: Any = module
    found = _unable(hidden_states.device) or _form(module)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, top_k_weights, *module.parameters())):
        found = "it has no gradients (run under torch.no_grad)"
    if top_k_index.shape[1] > MOST_CHOICES:
        found = f"a token has at most {MOST_CHOICES} experts"
    if isinstance(found, str):
        _say(type(module).__name__, found)
        return _own()(module, hidden_states, top_k_index, top_k_weights)
    up = "gate_up_proj" if found.activation.gated else "up_proj"
    biases = (getattr(experts, f"{up}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
    act = found.activation
    weight: Tensor = getattr(experts, up)
    out: Tensor = moe_experts()(
        hidden_states.to(weight.dtype), top_k_index, top_k_weights, weight, experts.down_proj, *biases,
        act.name, act.gated, act.alpha, act.limit, act.shift, found.interleaved, found.transposed, checked,
    )  # fmt: skip
    return out.to(hidden_states.dtype)


@functools.cache
def _unable(device: torch.device) -> str:
    """Why no kernel runs there; empty if one does."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "it needs triton"
        return "" if torch.cuda.get_device_capability(device) >= (8, 0) else "it needs a GPU of sm_80 or later"
    return "" if device.type in ("cpu", "meta") else f"it has no kernels for {device.type}"


def _form(module: nn.Module) -> Form | str:
    found = module.__dict__.get(_FORM)
    if found is None:
        found = module.__dict__[_FORM] = form_of(module)
    return found


def form_of(module: nn.Module) -> Form | str:
    """How to call the op for an experts module, or why not to."""
    experts: Any = module
    if getattr(experts, "has_post_expert_norm", False):
        return "it has no norm behind an expert"
    weight: Any = getattr(experts, "gate_up_proj" if experts.has_gate else "up_proj", None)
    for tensor in (weight, getattr(experts, "down_proj", None)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3 or not tensor.is_floating_point():
            return "its weights are not two tensors with a matrix per expert"
        if tensor.element_size() < 2 or is_traceable_wrapper_subclass(tensor):
            return f"its weights are {type(tensor).__name__} of {tensor.dtype}"
    # Before transformers 5.24 no flag says that a module has but some of the model's experts.
    counts = {getattr(place, name, None) for place in (experts, experts.config) for name in _COUNTS}
    whole = {count for count in counts if isinstance(count, int)} <= {weight.shape[0]}
    if getattr(experts, "_is_expert_parallel", False) or not whole:
        return "its experts are only some of the model's"
    activation = _activation(module)
    if isinstance(activation, str):
        return activation
    return Form(activation, not experts.is_concatenated, experts.is_transposed)


def _activation(module: nn.Module) -> Activation | str:
    """The activation that does what the module's own does to a probe."""
    experts: Any = module
    own: Callable[[Tensor], Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn
    interleaved = not experts.is_concatenated
    with _disable_current_modes(), torch.no_grad():
        probe = _probe()
        try:
            expected = own(probe)
        except Exception as error:
            return f"its activation cannot be asked on a probe: {type(error).__name__}: {error}"
        for activation in _candidates(module):
            found = activate(probe, activation, interleaved)
            if found.shape == expected.shape and _same(found, expected, probe):
                return activation
    return f"its activation is none of {', '.join(ACTIVATIONS)}, clamped or not"


def _probe() -> Tensor:
    """Rows of gates and ups of both signs and every size, the same every time."""
    grid = torch.linspace(-1, 1, 4093)
    mixed = grid[torch.arange(4096) * 1021 % 4093].view(64, 64)
    return torch.cat([mixed * scale for scale in _SCALES])


def _same(found: Tensor, expected: Tensor, probe: Tensor) -> bool:
    slack = 1e-5 * probe.abs().amax(1, keepdim=True) + 1e-5 * expected.abs()
    return bool(((found - expected).abs() <= slack).all())


def _candidates(module: nn.Module) -> list[Activation]:
    gated = bool(module.has_gate)
    limits = [None, *_numbers(module, _LIMITS)]
    plain = [Activation(name, gated, 1.0, limit) for name, limit in itertools.product(ACTIVATIONS, limits)]
    alphas = _numbers(module, _ALPHAS)
    return plain + [Activation("silu", gated, a, limit, 1.0) for a, limit in itertools.product(alphas, limits)]


def _numbers(module: nn.Module, names: tuple[str, ...]) -> list[float]:
    found = [getattr(place, name, None) for place in (module, module.config) for name in names]
    return list(dict.fromkeys(float(number) for number in found if isinstance(number, int | float)))


def _own() -> Callable[..., Tensor]:
    """The grouped products that models run by default."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    interface: Any = ALL_EXPERTS_FUNCTIONS
    return interface["grouped_mm"]


@functools.cache
def _say(name: str, why: str) -> None:
    warn_user(
        f"{name} keeps transformers' grouped products: auxstream's experts do not do this one, {why}.",
    )
