"""The router of a mixture of experts as one op, `auxstream::moe_router`: two launches per step and layer.

Enters: hidden states [T, H] and the router's weight [E, H]. Leaves: the experts chosen per token [T, K], best first,
and their weights [T, K]. Invariant: whatever the scores are, a token's K choices are K different experts; the same
inputs give the same bits. `reference` says what is computed, step by step and rounded where eager rounds; the kernels
differ in the order of sums, and round nothing between the norm and the product.

    x       = hidden                                     rms norm without weight if `eps` is given, * scale, * factor
    logits  = x @ weight.T                               both cast to `product` before
    scores  = softmax(logits) or sigmoid(logits)         in float32
    choice  = scores + bias                              within the best groups, by the sum of a group's two best
    index   = the K largest of choice                    of equal ones the lowest index first; NaN is the largest
    weights = scores[index]                              / (their sum + smallest), * routed_scale, * expert_scale[index]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from ..runtime.errors import AuxstreamError, CaptureError
from .on_device import on_its_device
from .router_plan import Operands, Plan, plan
from .variants import next_power_of_two

_HALF: Final = (torch.bfloat16, torch.float16)
_FLOATS: Final = (*_HALF, torch.float32)
MOST_EXPERTS: Final = 1024
MOST_CHOSEN: Final = 32


@dataclass(frozen=True, slots=True)
class Rules:
    """What a router does with a product, apart from its tensors."""

    product: torch.dtype
    """What hidden states and weight are cast to before the product, and the type of the logits."""
    softmax: bool
    """Softmax; sigmoid if not."""
    top_k: int
    out: torch.dtype
    """The type of the weights."""
    eps: float | None = None
    """Of the norm in front of the product; None if there is none."""
    factor: float = 1.0
    """What the normed and scaled hidden states are multiplied by."""
    groups: int = 1
    kept: int = 1
    """How many groups a token may choose from."""
    renormalised: bool = False
    smallest: float = 0.0
    """Added to the sum the weights are divided by."""
    routed_scale: float = 1.0

    @property
    def fields(self) -> tuple[Any, ...]:
        """In the order of the op's arguments."""
        return tuple(getattr(self, field) for field in self.__slots__)

    def operands(self, hidden: torch.dtype, weight: torch.dtype, scaled: bool) -> Operands:
        """What the product's tensor cores are given: what is exact, but for the scaled input's one rounding."""
        if scaled:  # not in float16: hidden states that no norm has made small may leave its range
            return "half" if self.product is torch.bfloat16 else "wide"
        if weight in _HALF and hidden == weight:
            return "half"
        return "split" if hidden is torch.bfloat16 and weight is torch.float32 else "wide"


@dataclass(frozen=True, slots=True)
class Tensors:
    """What a router is given: [T, H], [E, H], [H], [E], [E]."""

    hidden: Tensor
    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    expert_scale: Tensor | None = None

    def all(self) -> tuple[Tensor | None, ...]:
        """In the order of the op's arguments."""
        return self.hidden, self.weight, self.scale, self.bias, self.expert_scale

    def present(self) -> list[Tensor]:
        return [tensor for tensor in self.all() if tensor is not None]

    def in_rows(self) -> Tensors:
        """The same with columns side by side, copied where they are not."""
        if all(tensor.stride(-1) == 1 for tensor in self.present()):
            return self
        scale, bias, expert_scale = (None if t is None else t.contiguous() for t in self.all()[2:])
        return Tensors(self.hidden.contiguous(), self.weight.contiguous(), scale, bias, expert_scale)


def refusal(given: Tensors, rules: Rules) -> str:
    """Why no kernel does this; empty if one does."""
    hidden, weight = given.hidden, given.weight
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[1]:
        return f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} are not [T, H] and [E, H]"
    experts, width = weight.shape
    for tensor, length in ((given.scale, width), (given.bias, experts), (given.expert_scale, experts)):
        if tensor is not None and tuple(tensor.shape) != (length,):
            return f"a scale or a bias of shape {tuple(tensor.shape)} where ({length},) is needed"
    for tensor in given.present():
        if tensor.dtype not in _FLOATS or tensor.device != hidden.device:
            return f"a {tensor.dtype} tensor on {tensor.device}: all must be float32, bfloat16 or float16 on one device"
    if rules.product not in _FLOATS or rules.out not in _FLOATS:
        return f"products in {rules.product} or weights in {rules.out}: neither is known"
    if rules.product is not torch.float32 and not rules.product == hidden.dtype == weight.dtype:
        return f"a product in {rules.product} of {hidden.dtype} and {weight.dtype}"
    if not 1 <= rules.top_k <= min(experts, MOST_CHOSEN) or experts > MOST_EXPERTS:
        return f"{rules.top_k} of {experts} experts: at most {MOST_CHOSEN} of at most {MOST_EXPERTS}"
    if not 1 <= rules.kept <= rules.groups or experts % rules.groups or 1 < rules.groups > experts // 2:
        return f"{rules.kept} of {rules.groups} groups of {experts} experts"
    return ""


def reference(given: Tensors, rules: Rules) -> tuple[Tensor, Tensor]:
    """The router by torch, rounded where eager rounds."""
    scores = scored(given, rules)
    index = chosen(scores, given, rules)
    return index, weighed(scores, index, given, rules)


def logits(given: Tensors, rules: Rules) -> Tensor:
    """The product [T, E], of the type it is computed in."""
    x = given.hidden
    if rules.eps is not None:
        wide = x.float()
        x = (wide * (wide.pow(2).mean(-1, keepdim=True) + rules.eps).pow(-0.5)).to(x.dtype)
    if given.scale is not None:
        x = x * given.scale
    if rules.factor != 1.0:
        x = x * rules.factor
    return functional.linear(x.to(rules.product), given.weight.to(rules.product))


def scored(given: Tensors, rules: Rules) -> Tensor:
    """Scores [T, E], in float32."""
    product = logits(given, rules)
    return product.softmax(-1, dtype=torch.float32) if rules.softmax else product.float().sigmoid()


def best_of_groups(choice: Tensor, rules: Rules) -> Tensor:
    """What groups are ranked by [T, groups]: the sum of each one's two best."""
    return choice.unflatten(1, (rules.groups, -1)).topk(2).values.sum(-1)


def choices(scores: Tensor, given: Tensors, rules: Rules) -> Tensor:
    """What experts are chosen by [T, E]: -inf outside the best groups."""
    choice = scores if given.bias is None else scores + given.bias
    if rules.kept < rules.groups:
        best = best_of_groups(choice, rules).sort(descending=True, stable=True).indices
        outside = torch.ones_like(best, dtype=torch.bool).scatter(1, best[:, : rules.kept], False)
        grouped = choice.unflatten(1, (rules.groups, -1))
        choice = grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
    return choice


def chosen(scores: Tensor, given: Tensors, rules: Rules) -> Tensor:
    order = choices(scores, given, rules).sort(descending=True, stable=True).indices
    return order[:, : rules.top_k].contiguous()


def weighed(scores: Tensor, index: Tensor, given: Tensors, rules: Rules) -> Tensor:
    """The weights of the experts in `index`."""
    weights = scores.gather(1, index)
    if rules.renormalised:
        weights = weights / (weights.sum(-1, keepdim=True) + rules.smallest)
    weights = weights * rules.routed_scale
    if given.expert_scale is not None:
        weights = weights * given.expert_scale[index]
    return weights.to(rules.out)


def fake(given: Tensors, rules: Rules) -> tuple[Tensor, Tensor]:
    """Results with nothing in them."""
    hidden, shape = given.hidden, (given.hidden.shape[0], rules.top_k)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=rules.out)


# --- launching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Launches:
    """Both launches of one layout of inputs, ready but for pointers."""

    product: Any
    product_grid: tuple[int, int, int]
    select: Any
    numbers: tuple[int, int, int]
    """Tokens, and the strides of the rows of hidden states and weight."""
    terms: tuple[float, float, float]
    splits: int
    product_options: dict[str, Any]
    select_options: dict[str, Any]

    def __call__(self, given: Tensors, index: Tensor, weights: Tensor) -> None:
        partial, squares = self.workspace(given)
        self.multiply(given, partial, squares)
        self.choose(given, partial, squares, index, weights)

    def workspace(self, given: Tensors) -> tuple[Tensor, Tensor | None]:
        """Parts of the products [T, splits, E], and of the sums of squares [T, splits] if there is a norm."""
        hidden, normed = given.hidden, self.product_options["NORMED"]
        shape = (len(hidden), self.splits)
        partial = hidden.new_empty((*shape, len(given.weight)), dtype=torch.float32)
        return partial, hidden.new_empty(shape, dtype=torch.float32) if normed else None

    def multiply(self, given: Tensors, partial: Tensor, squares: Tensor | None) -> None:
        self.product[self.product_grid](*self._multiplied(given, partial, squares), **self.product_options)

    def choose(self, given: Tensors, partial: Tensor, squares: Tensor | None, index: Tensor, weights: Tensor) -> None:
        tensors = (partial, squares, given.bias, given.expert_scale, index, weights)
        self.select[self.numbers[:1]](*tensors, *self.terms, **self.select_options)

    def compile(self, given: Tensors) -> None:
        """Compile the product for tensors like these; launch nothing."""
        arguments = self._multiplied(given, *self.workspace(given))
        self.product.warmup(*arguments, grid=self.product_grid, **self.product_options)

    def _multiplied(self, given: Tensors, partial: Tensor, squares: Tensor | None) -> tuple[Any, ...]:
        return given.hidden, given.weight, given.scale, partial, squares, *self.numbers


def settle(given: Tensors, rules: Rules, chosen: Plan | None = None) -> Launches:
    """The launches for inputs laid out like these; by the plan of their shapes, or the one given."""
    from . import router_kernels as kernels

    hidden, weight, scale = given.hidden, given.weight, given.scale
    (tokens, width), experts = hidden.shape, len(weight)
    operands = rules.operands(hidden.dtype, weight.dtype, scale is not None)
    cut = chosen or plan(tokens, experts, width, operands)
    grouped = rules.kept < rules.groups
    groups = rules.groups if grouped else 1
    product_options: dict[str, Any] = {
        "H": width, "E": experts, "SPAN": cut.span, "BLOCK_K": cut.block_k, "BLOCK_E": cut.block_e,
        "BLOCK_T": cut.block_t, "NORMED": rules.eps is not None, "SCALED": scale is not None, "num_warps": cut.warps,
        "enable_fp_fusion": True,
    }  # fmt: skip
    if cut.many:
        product_options |= {"OPERANDS": operands, "STAGES": cut.stages}
    select_options: dict[str, Any] = {
        "H": width, "E": experts, "SPLITS": cut.splits(width),
        "SPLITS_2": next_power_of_two(cut.splits(width)), "product_type": _triton_type(rules.product),
        "NORMED": rules.eps is not None, "SOFTMAX": rules.softmax, "BIASED": given.bias is not None, "GROUPS": groups,
        "GROUPS_2": next_power_of_two(groups), "SIZE_2": next_power_of_two(experts // groups), "KEPT": rules.kept,
        "TOP_K": rules.top_k, "TOP_K_2": next_power_of_two(rules.top_k), "RENORMALISED": rules.renormalised,
        "SMALLEST": rules.smallest,
        "SCALED": given.expert_scale is not None,
        "num_warps": cut.select_warps, "enable_fp_fusion": False, "enable_reflect_ftz": False,
    }  # fmt: skip
    return Launches(
        product=kernels.router_product_many if cut.many else kernels.router_product_few,
        product_grid=cut.grid(tokens, experts, width, rules.eps is not None),
        select=kernels.router_select,
        numbers=(tokens, hidden.stride(0), weight.stride(0)),
        terms=(rules.eps or 0.0, rules.factor, rules.routed_scale),
        splits=cut.splits(width),
        product_options=product_options,
        select_options=select_options,
    )


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


class Router:
    """What launches; remembers launches by the layout of the inputs."""

    def __init__(self) -> None:
        self._settled: dict[Any, Launches] = {}

    def __call__(self, given: Tensors, rules: Rules) -> tuple[Tensor, Tensor]:
        given = given.in_rows()
        outputs = fake(given, rules)
        if not len(given.hidden):
            return outputs
        key = (rules, *((t.shape, t.stride(), t.dtype) if t is not None else None for t in given.all()))
        found = self._settled.get((given.hidden.device, key))
        if found is None:
            found = self._settled[given.hidden.device, key] = self._settle(given, rules)
        found(given, *outputs)
        return outputs

    def _settle(self, given: Tensors, rules: Rules) -> Launches:
        if why := refusal(given, rules):
            raise AuxstreamError("moe_router has no kernel for this", came=why, remedy="keep the model's own router")
        if given.hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            raise CaptureError(
                "moe_router meets a new input layout inside a capture",
                expected="a layout it was launched with before: compiling inside a capture is not safe",
                came=", ".join(f"{tuple(t.shape)} strides {t.stride()}" for t in given.present()),
                remedy="run the graph once with these shapes before capturing it (auxstream.compile does)",
            )
        return settle(given, rules)


# --- the op -----------------------------------------------------------------------------------------------------------

_SCHEMA: Final = (
    "moe_router(Tensor hidden, Tensor weight, Tensor? scale, Tensor? bias, Tensor? expert_scale, "
    "ScalarType product, bool softmax, int top_k, ScalarType out, float? eps, float factor, int groups, int kept, "
    "bool renormalised, float smallest, float routed_scale) -> (Tensor, Tensor)"
)


def _by_rules(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`run` as the op calls it, with the rules laid out."""

    def op(hidden: Tensor, weight: Tensor, scale: Any, bias: Any, expert_scale: Any, *rules: Any) -> Any:
        return run(Tensors(hidden, weight, scale, bias, expert_scale), _rules(*rules))

    return op


@functools.cache
def _rules(*fields: Any) -> Rules:
    return Rules(*fields)


@functools.cache
def moe_router() -> Any:
    """The op `auxstream::moe_router`: five tensors, then the fields of `Rules` in their order."""
    library = _library()
    library.define(_SCHEMA)
    library.impl("moe_router", on_its_device(_by_rules(Router())), "CUDA")
    library.impl("moe_router", _by_rules(reference), "CPU")
    torch.library.register_fake("auxstream::moe_router", _by_rules(fake), lib=library)
    return torch.ops.auxstream.moe_router.default


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("auxstream", "FRAGMENT")
