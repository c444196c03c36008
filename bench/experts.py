"""The experts of a mixture alone: `auxstream::moe_experts` against torch's grouped product, in one run.

    python -m auxstream.bench.experts [--batch B ...] [--sweep] [--json PATH]

Measures: device time per layer of one CUDA graph of LAYERS layers with weights of their own, which no cache holds, and
experts chosen at random per layer; variants interleaved. Shapes are those of Gemma-4-26B-A4B. Floors are the bytes of
the weights that are reached, at the pace of a device copy measured beside. `--sweep`: every pair of candidate tiles, in
place of the pair that was chosen. Does not measure: the router, the host, other layers' shapes. Needs a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels import experts_many as many
from ..kernels.experts_plan import Experts, Form, Plan, down_tiles, form_of, run, tokens_of, up_tiles
from ..kernels.experts_reference import activate
from ..kernels.experts_work import Activation, Work
from .command import CommandLine
from .harness import Figure, interleave, write
from .replays import Chain, paces

HIDDEN, INNER, EXPERTS, CHOICES = 2816, 704, 128, 8
LAYERS = 8
ACTIVATION = Activation("gelu_tanh")


def layers(tokens: int, weights: list[tuple[Tensor, Tensor]]) -> list[Work]:
    """A call per layer, with random tokens and choices."""
    found: list[Work] = []
    for up, down in weights:
        hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        scores, chosen = torch.randn(tokens, EXPERTS, device="cuda").softmax(-1).topk(CHOICES)
        scale = scores / scores.sum(-1, keepdim=True)
        found.append(Work(hidden, chosen, scale, up, down, None, None, ACTIVATION, interleaved=False))
    return found


def stacked() -> list[tuple[Tensor, Tensor]]:
    """Both weights of every layer, at a scale that keeps values near one."""
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(LAYERS):
        up = torch.empty(EXPERTS, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16).normal_(0, HIDDEN**-0.5)
        down = torch.empty(EXPERTS, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16).normal_(0, INNER**-0.5)
        found.append((up, down))
    return found


def grouped_mm(work: Work) -> Tensor:
    """The sorted, grouped form that models run by default, op by op as transformers has it."""
    ids, order = torch.sort(work.chosen.reshape(-1))
    counts = torch.histc(ids.int(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    product = cast(Any, torch)._grouped_mm
    inner = activate(product(work.hidden[order // CHOICES], work.up.mT, offs=offsets), ACTIVATION, False)
    rows = product(inner, work.down.mT, offs=offsets) * work.scale.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return rows[back].view(work.tokens, CHOICES, -1).sum(1).to(work.hidden.dtype)


def variants(work: Work, sweep: bool) -> dict[str, Callable[[Work], Tensor]]:
    """What is compared, by name."""
    experts = Experts()
    found: dict[str, Callable[[Work], Tensor]] = {"moe_experts": experts}
    if sweep:
        for form in forms(work):
            for up, down in itertools.product(up_tiles(work, form), down_tiles(work, form)):
                plan = Plan(form, up, down, tokens_of(work))
                found[str(plan)] = planned(plan)
        found["grouped"] = planned(Plan("grouped"))
    found["grouped_mm"] = grouped_mm
    return found


def forms(work: Work) -> tuple[Form, ...]:
    """The forms that could take it."""
    if work.tokens == 1:
        return ("one", "few")
    if work.tokens <= 32:
        return ("few", "many")
    return ("many",) if work.pairs <= many.MOST_PAIRS else ()


def planned(plan: Plan) -> Callable[[Work], Tensor]:
    return lambda work: run(work, plan)


@dataclass(frozen=True, slots=True)
class Batch:
    """One number of tokens."""

    experts: float
    """That some token chose, a layer."""
    floor: float
    """Microseconds that reading their weights takes."""
    figures: Mapping[str, Figure]
    errors: Mapping[str, float]
    """Against float64, relative."""

    def lines(self) -> list[str]:
        found = [f"{self.experts:.1f} experts, floor {self.floor:.1f} us"]
        for name in sorted(self.figures, key=lambda name: self.figures[name].median):
            us = self.figures[name].median
            found.append(f"  {us:8.2f} us  {us / self.floor:5.2f} floors  error {self.errors[name]:.5f}  {name}")
        return found


def exact(work: Work) -> Tensor:
    """In float64, one expert after the other."""
    out = torch.zeros(work.hidden.shape, dtype=torch.float64, device=work.hidden.device)
    for expert in work.chosen.unique().tolist():
        tokens, choices = (work.chosen == expert).nonzero(as_tuple=True)
        inner = activate(work.hidden[tokens].double() @ work.up[expert].double().T, ACTIVATION, False)
        rows = inner @ work.down[expert].double().T * work.scale[tokens, choices, None].double()
        out.index_add_(0, tokens, rows)
    return out


def measure(calls: list[Work], pace: float, sweep: bool, rounds: int) -> Batch:
    runs = variants(calls[0], sweep)
    figures = interleave({name: Chain(call, calls, replays=4).sample for name, call in runs.items()}, rounds, "us")
    expected = exact(calls[0])
    errors = {name: float((call(calls[0]).double() - expected).norm() / expected.norm()) for name, call in runs.items()}
    count = sum(work.chosen.unique().numel() for work in calls) / len(calls)
    return Batch(count, count * 3 * INNER * HIDDEN * 2 / pace / 1e6, figures, errors)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = CommandLine(__doc__, rounds=7, limit=300, quick={"rounds": 3, "batch": [1]})
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 32, 64, 128, 512, 2048])
    parser.add_argument("--sweep", action="store_true", help="every pair of candidate tiles")
    options = parser.options(arguments)
    torch.manual_seed(0)
    left_out: list[str] = []
    results: dict[str, Any] = {"TB/s": paces(), "left out": left_out}
    print(f"{torch.cuda.get_device_name()}: {results['TB/s']}")
    weights = stacked()
    for tokens in options.clock.in_time(options.batch, left_out, "batch {}".format):
        calls = layers(tokens, weights)
        batch = measure(calls, results["TB/s"]["copy"], options.sweep, options.rounds)
        print(f"batch {tokens} ({form_of(calls[0])}): " + "\n".join(batch.lines()), flush=True)
        results[f"batch {tokens}"] = {
            "experts": batch.experts, "floor us": batch.floor, "errors": batch.errors, **batch.figures,
        }  # fmt: skip
        write(options.json, "experts", results)
    write(options.json, "experts", results)
    return results


if __name__ == "__main__":
    main()
