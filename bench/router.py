"""A mixture of experts' router, alone: one op of two kernels against the model's own ops and torch.compile.

    python -m auxstream.bench.router [--models NAME ...] [--batch B ...] [--sweep] [--json PATH]

Measures: device time per router of a CUDA graph of many routers with weights of their own, which lie in no cache when a
replay begins; every variant in turn. "two empty kernels" is what two launches cost that do nothing; "products" and
"selections" are the op's two kernels, each alone. Also the launches per router, and how far each variant's weights are
from those of float32 routers given the same experts. `--sweep`: all ways to cut the product into programs, fastest
first, per batch. Does not measure: eager launches, what runs beside a router. Needs a GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.router import Rules, Tensors, fake, moe_router, settle
from ..kernels.router_plan import Plan, plan
from .command import CommandLine
from .harness import interleave, write
from .replays import Chain, flusher


@dataclass(frozen=True, slots=True)
class Router:
    """A model's router: its sizes, its rules, and the types of what it is given."""

    experts: int
    width: int
    rules: Rules
    weight: torch.dtype = torch.bfloat16
    scaled: bool = False
    biased: bool = False

    def given(self, hidden: Tensor) -> Tensors:
        """With a random weight, scales and bias."""

        def uniform(length: int, dtype: torch.dtype) -> Tensor:
            return (torch.rand(length, device=hidden.device) + 0.5).to(dtype)

        weight = (torch.randn(self.experts, self.width, device=hidden.device) * 2 / self.width**0.5).to(self.weight)
        scale = uniform(self.width, torch.bfloat16) if self.scaled else None
        bias = uniform(self.experts, torch.float32) / 10 if self.biased else None
        return Tensors(hidden, weight, scale, bias, uniform(self.experts, torch.bfloat16) if self.scaled else None)

    def plan(self, batch: int) -> Plan:
        """The op's own."""
        operands = self.rules.operands(torch.bfloat16, self.weight, self.scaled)
        return plan(batch, self.experts, self.width, operands)


_SIGMOID: Final = Rules(torch.float32, False, 8, torch.float32, renormalised=True, smallest=1e-20, routed_scale=2.5)
_SOFTMAX: Final = Rules(torch.bfloat16, True, 8, torch.float32)
MODELS: Final[Mapping[str, Router]] = {
    "gemma4": Router(128, 2816, replace(_SOFTMAX, eps=1e-6, factor=2816**-0.5, renormalised=True), scaled=True),
    "qwen2_moe": Router(60, 2048, replace(_SOFTMAX, top_k=4, out=torch.bfloat16)),
    "glm4_moe": Router(128, 4096, _SIGMOID, torch.float32, biased=True),
    "deepseek_v3": Router(256, 7168, replace(_SIGMOID, groups=8, kept=4), torch.float32, biased=True),
}


def eager(given: Tensors, rules: Rules) -> tuple[Tensor, Tensor]:
    """The ops of the models' own routers."""
    x = given.hidden
    if rules.eps is not None:
        wide = x.float()
        x = (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + rules.eps, -0.5)).type_as(x)
        x = x * (1 if given.scale is None else given.scale) * rules.factor
    logits = functional.linear(x.to(rules.product), given.weight.to(rules.product))
    if rules.softmax:
        weights, index = torch.topk(functional.softmax(logits, dim=-1, dtype=torch.float32), rules.top_k, dim=-1)
        if rules.renormalised:
            weights /= weights.sum(-1, keepdim=True)
        weights = weights if given.expert_scale is None else weights * given.expert_scale[index]
        return index, weights.to(rules.out)
    scores = logits.sigmoid()
    choice = scores if given.bias is None else scores + given.bias
    grouped = choice.view(len(choice), rules.groups, -1)
    best = torch.topk(grouped.topk(2, dim=-1)[0].sum(-1), rules.kept, dim=-1, sorted=False)[1]
    mask = torch.zeros(len(choice), rules.groups, device=x.device).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand_as(grouped).reshape(len(choice), -1)
    index = torch.topk(choice.masked_fill(~mask.bool(), float("-inf")), rules.top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    weights /= weights.sum(-1, keepdim=True) + rules.smallest
    return index, weights * rules.routed_scale


def error(given: Tensors, rules: Rules, index: Tensor, weights: Tensor) -> float:
    """Of the weights, given the experts, relative to double precision."""
    x = given.hidden.double()
    if rules.eps is not None and given.scale is not None:
        x = x * (x.pow(2).mean(-1, keepdim=True) + rules.eps).pow(-0.5) * given.scale.double() * rules.factor
    logits = x @ given.weight.double().T
    exact = (logits.softmax(-1) if rules.softmax else logits.sigmoid()).gather(1, index)
    if rules.renormalised:
        exact = exact / exact.sum(-1, keepdim=True)
    exact = exact * rules.routed_scale * (1 if given.expert_scale is None else given.expert_scale.double()[index])
    return float((weights.double() - exact).norm() / exact.norm())


def two_empty_kernels(device: torch.device) -> Callable[[Tensors], Tensor]:
    """Two launches that do next to nothing."""
    one = torch.empty(1, device=device)

    def run(given: Tensors) -> Tensor:
        one.fill_(1.0)
        return one.fill_(2.0)

    return run


def parts(like: Tensors, rules: Rules, cut: Plan) -> dict[str, Callable[[Tensors], Any]]:
    """The op by a plan, and each of its two kernels."""
    found, outputs = settle(like, rules, cut), fake(like, rules)
    workspace = found.workspace(like)
    return {
        "op": lambda given: found(given, *outputs),
        "products": lambda given: found.multiply(given, *workspace),
        "selections": lambda given: found.choose(given, *workspace, *outputs),
    }


def measure(router: Router, stack: Sequence[Tensors], flush: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """One model at one batch: every variant."""
    rules, op, like = router.rules, moe_router(), stack[0]
    routers: dict[str, Callable[[Tensors], tuple[Tensor, Tensor]]] = {
        "auxstream::moe_router": lambda given: op(*given.all(), *rules.fields),
        "unfused": lambda given: eager(given, rules),
    }
    if not options.no_compile:
        compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        routers["torch.compile"] = lambda given: compiled(given, rules)
    kernels = parts(like, rules, router.plan(len(like.hidden)))
    others = {which: kernels[which] for which in ("products", "selections")}
    others["two empty kernels"] = two_empty_kernels(like.hidden.device)
    chains = {which: Chain(run, stack, flush=flush) for which, run in (routers | others).items()}
    figures = interleave({which: chain.sample for which, chain in chains.items()}, options.rounds, "us")
    found: dict[str, Any] = {}
    for which, figure in figures.items():
        found[which] = {"us per router": figure, "launches": chains[which].launches()}
        line = f"  {which:24} {figure}   {found[which]['launches']:5.1f} launches"
        if which in routers:
            errors = [error(given, rules, *routers[which](given)) for given in stack[:8]]
            found[which]["error"] = sum(errors) / len(errors)
            line += f"   error {found[which]['error']:.2e}"
        print(line, flush=True)
    return found


# --- the sweep --------------------------------------------------------------------------------------------------------


def candidates(batch: int, experts: int, width: int) -> Iterator[Plan]:
    """Ways to cut the product: whole warps read whole lines, and there are programs for most multiprocessors."""
    for span, block_e, warps in itertools.product((64, 128, 256, 512), (2, 4, 8, 16, 32), (1, 2, 4, 8)):
        for block_t in sorted({1, 2, 4, 8} & {batch, min(batch, 4), min(batch, 8)}):
            cut = Plan(False, block_e, block_t, span, span, warps)
            programs = cut.splits(width) * -(-experts // block_e) * -(-batch // block_t)
            if batch <= 16 and span * block_e // (32 * warps) in (8, 16, 32) and 80 <= programs <= 3000:
                yield cut
    sizes = itertools.product((128, 256, 512), (64, 128, 256), (16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3))
    for span, block_k, block_e, block_t, warps, stages in sizes:
        cut = Plan(True, block_e, block_t, span, block_k, warps, stages)
        programs = cut.splits(width) * -(-experts // block_e) * -(-batch // block_t)
        fits = block_k <= span and (stages > 1) == (span > block_k) and stages * block_k * (block_e + block_t) < 1 << 16
        small = block_t <= max(16, batch) and (block_t * 4 >= batch) and block_e * block_t >= 64 * warps
        if fits and small and batch > 1 and 40 <= programs <= 1500:
            yield cut


def compile_ahead(cuts: Sequence[Plan], like: Tensors, rules: Rules) -> None:
    """Compile the products of all plans, side by side."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
        concurrent.futures.wait([pool.submit(settle(like, rules, cut).compile, like) for cut in cuts])


def sweep(router: Router, stack: Sequence[Tensors], flush: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Every candidate once; the best again beside one another, with other numbers of warps that select."""
    like, rules, batch = stack[0], router.rules, len(stack[0].hidden)
    cuts, times = list(candidates(batch, router.experts, router.width)), dict[Plan, float]()
    compile_ahead(cuts, like, rules)
    for cut in cuts:
        chain = Chain(parts(like, rules, cut)["op"], stack, flush=flush)
        times[cut] = statistics.median(chain.sample() for _ in range(9))
    ranked = sorted(times, key=lambda cut: times[cut])
    for cut in ranked:
        print(f"  {times[cut]:7.2f} us  {cut}", flush=True)
    best = [*ranked[:6], router.plan(batch)]
    best += [replace(cut, select_warps=warps) for cut in ranked[:2] for warps in (2, 4)]
    found: dict[str, Any] = {}
    for cut in dict.fromkeys(best):
        chains = {which: Chain(run, stack, flush=flush) for which, run in parts(like, rules, cut).items()}
        figures = interleave({which: chain.sample for which, chain in chains.items()}, options.rounds, "us")
        found[str(cut)] = figures
        medians = "  ".join(f"{which} {figure.median:.2f}" for which, figure in figures.items())
        print(f"  again: {medians}  {cut}", flush=True)
    return {"all": {str(cut): times[cut] for cut in ranked}, "again": found}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = {"rounds": 5, "batch": [1], "no_compile": True}
    parser = CommandLine(__doc__, rounds=30, limit=300, quick=quick)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["gemma4"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--routers", type=int, default=64)
    parser.add_argument("--sweep", action="store_true", help="also try every way to cut the product")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.options(arguments)
    torch.manual_seed(0)
    flush, left_out = flusher(), list[str]()
    results: dict[str, Any] = {"left out": left_out}
    cases = itertools.product(options.models, options.batch)
    for name, batch in options.clock.in_time(cases, left_out, lambda case: f"{case[0]}, batch {case[1]}"):
        router = MODELS[name]
        hidden = torch.randn(batch, router.width, device="cuda").to(torch.bfloat16)
        stack = [router.given(hidden) for _ in range(options.routers)]
        print(f"{name}, batch {batch}, {options.routers} routers: {router.plan(batch)}")
        results[f"{name}, batch {batch}"] = measure(router, stack, flush, options)
        if options.sweep:
            results[f"{name}, batch {batch}: sweep"] = sweep(router, stack, flush, options)
        write(options.json, "router", results)
    write(options.json, "router", results)
    return results


if __name__ == "__main__":
    main()
