"""Routers to test with: their tensors, and what float64 makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auxstream.kernels.router import Rules, Tensors, moe_router

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SOFTMAX = Rules(BF16, True, 4, F32)
SIGMOID = Rules(F32, False, 4, F32, renormalised=True, smallest=1e-20, routed_scale=2.5)
GEMMA = replace(SOFTMAX, eps=1e-6, factor=0.25, renormalised=True)


@dataclass(frozen=True, slots=True)
class Case:
    """A router's sizes and rules."""

    name: str
    tokens: int
    experts: int
    width: int
    rules: Rules
    hidden: torch.dtype = BF16
    weight: torch.dtype = BF16
    scaled: bool = False
    biased: bool = False

    def given(self, device: str = "cpu", seed: int = 0) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def uniform(length: int, dtype: torch.dtype) -> Tensor:
            return (torch.rand(length, generator=generator) + 0.5).to(device, dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return Tensors(
            (normal(self.tokens, self.width) * 3).to(device, self.hidden),
            (normal(self.experts, self.width) * 2 / self.width**0.5).to(device, self.weight),
            uniform(self.width, self.hidden) if self.scaled else None,
            (normal(self.experts) / 10).to(device) if self.biased else None,
            uniform(self.experts, self.hidden) if self.scaled else None,
        )


CASES = (
    Case("gemma4 one token", 1, 128, 704, replace(GEMMA, top_k=8), scaled=True),
    Case("gemma4 three tokens", 3, 32, 128, GEMMA, scaled=True),
    Case("gemma4 many tokens", 64, 128, 128, replace(GEMMA, top_k=8), scaled=True),
    Case("gemma4 odd", 100, 24, 72, replace(GEMMA, top_k=3), scaled=True),
    Case("gemma4 float32", 3, 16, 96, replace(GEMMA, product=F32), F32, F32, scaled=True),
    Case("gemma4 float32 many", 20, 16, 96, replace(GEMMA, product=F32), F32, F32, scaled=True),
    Case("gemma4 float16", 20, 16, 96, replace(GEMMA, product=F16), F16, F16, scaled=True),
    Case("deepseek_v3 one token", 1, 256, 256, replace(SIGMOID, top_k=8, groups=8, kept=4), BF16, F32, biased=True),
    Case("deepseek_v3 bfloat16", 3, 64, 128, replace(SIGMOID, groups=4, kept=2), biased=True),
    Case("deepseek_v3 many", 64, 64, 128, replace(SIGMOID, groups=8, kept=3), BF16, F32, biased=True),
    Case("deepseek_v3 float32", 10, 64, 128, replace(SIGMOID, groups=4, kept=2), F32, F32, biased=True),
    Case("deepseek_v3 odd groups", 9, 30, 50, replace(SIGMOID, groups=3, kept=2), BF16, F32, biased=True),
    Case("glm4_moe", 3, 160, 96, replace(SIGMOID, top_k=8), BF16, F32, biased=True),
    Case("glm4_moe all groups", 5, 16, 96, replace(SIGMOID, groups=2, kept=2), BF16, F32, biased=True),
    Case("no bias", 5, 16, 96, SIGMOID, BF16, F32),
    Case("qwen2_moe", 3, 60, 128, replace(SOFTMAX, out=BF16)),
    Case("qwen2_moe many", 33, 60, 128, replace(SOFTMAX, out=BF16)),
    Case("qwen2_moe float16", 6, 60, 128, replace(SOFTMAX, product=F16, out=F16), F16, F16),
    Case("softmax with a bias", 6, 12, 64, SOFTMAX, biased=True),
    Case("softmax in groups", 6, 12, 64, replace(SOFTMAX, groups=3, kept=2)),
    Case("the best alone", 5, 8, 40, replace(SOFTMAX, top_k=1)),
    Case("all experts", 5, 8, 40, replace(SOFTMAX, top_k=8, renormalised=True)),
    Case("384 experts, sixteen each", 5, 384, 64, replace(SIGMOID, top_k=16), BF16, F32, biased=True),
    Case("no tokens", 0, 8, 40, SOFTMAX),
)


def run(given: Tensors, rules: Rules) -> tuple[Tensor, Tensor]:
    """The op."""
    return moe_router()(*given.all(), *rules.fields)


def truth(given: Tensors, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: what is chosen by [T, E], which experts may be chosen at all, and the scores."""
    hidden, weight, scale, bias, _ = (None if tensor is None else tensor.double() for tensor in given.all())
    assert hidden is not None
    assert weight is not None
    if rules.eps is not None:
        hidden = hidden * (hidden.pow(2).mean(-1, keepdim=True) + rules.eps).pow(-0.5)
    logits = (hidden if scale is None else hidden * scale) * rules.factor @ weight.T
    scores = logits.softmax(-1) if rules.softmax else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    allowed = torch.ones_like(choice, dtype=torch.bool)
    if rules.groups > 1:
        size = choice.shape[1] // rules.groups
        best = choice.unflatten(1, (rules.groups, size)).topk(2).values.sum(-1).topk(rules.kept).indices
        allowed = torch.zeros_like(choice, dtype=torch.bool).unflatten(1, (rules.groups, size))
        allowed = allowed.scatter(1, best[..., None].expand(-1, -1, size), True).flatten(1)
    return choice, allowed, scores


def weights_of(index: Tensor, scores: Tensor, given: Tensors, rules: Rules) -> Tensor:
    """In float64, the weights of the experts in `index`."""
    weights = scores.gather(1, index)
    if rules.renormalised:
        weights = weights / (weights.sum(-1, keepdim=True) + rules.smallest)
    weights = weights * rules.routed_scale
    return weights if given.expert_scale is None else weights * given.expert_scale.double()[index]
