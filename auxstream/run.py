"""`auxstream run`: the user's own model, its decode step on one stream and with regions on lanes, bit for bit.

    python -m auxstream run --model FOLDER --prompts FILE --tokens 64

Enters: a checkpoint on this machine, or a config alone; prompts. Leaves: what was compared, what was proved, tokens per
second of both; with `--bisect`, the regions that make a difference. Exit code 0: equal, and proved; 1: not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .bench.harness import Figure, interleave, machine
from .bench.lab import repeatable_attention
from .bisect import Regions, Unsteady, find_causes
from .checkpoint import Checkpoint, Prompt, encode, load, random_prompts, read_prompts
from .runtime.errors import InputError, SettingsError
from .runtime.settings import SETTINGS, parse_overlap
from .side_by_side import Capture, Comparison, Group, Step, Workbench, capture_step, compare, decoding_rate

_ROUND_UP = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it. `causes`: of a difference, as far as they were looked for and found; `why` is in words."""

    comparisons: tuple[Comparison, ...]
    proved: bool
    causes: tuple[Regions, ...] = ()
    why: str = ""

    @property
    def equal(self) -> bool:
        return all(comparison.equal for comparison in self.comparisons)

    @property
    def nan(self) -> int:
        """Steps with logits that are no numbers."""
        return sum(comparison.nan for comparison in self.comparisons)


def run_model(options: argparse.Namespace, capture: Capture = capture_step) -> int:
    """Load, compile twice, compare, print. Returns the exit code. `capture`: how a step becomes a graph."""
    _refuse_settings()
    rules = (*parse_overlap(options.overlap, "--overlap"), *SETTINGS.overlap)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    if gpu and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU", came="none", remedy="leave --device out: the simulated machine")
    written = read_prompts(options.prompts) if options.prompts else options.prompt
    checkpoint = load(options.model, options.layers, device, options.seed)
    if written:
        prompts, tokenizer = encode(written, checkpoint)
    else:
        prompts, tokenizer = random_prompts(options.batch, checkpoint.vocabulary, options.seed), None
    context = _context(prompts, options, checkpoint)
    where = torch.cuda.get_device_name(device) if gpu else "the simulated machine (no GPU)"
    print(
        f"{checkpoint.name}: {type(checkpoint.model).__name__}, {checkpoint.weights}, on {where}\n"
        f"prompts: {len(prompts)}{'' if written else ', of random ids'}; {options.tokens} tokens behind each, "
        f"batch {options.batch}, context {context}",
        flush=True,
    )
    with repeatable_attention():
        bench = Workbench(checkpoint.model, options.batch, context, rules, capture)
        print(f"fused: {bench.fused}\nregions: {len(bench.regions)}{_some(bench.regions)}", flush=True)
        for glob in bench.unmatched:
            print(f"the overlap rule {glob!r} matches no branch; there are {_listed(bench.branches)}", flush=True)
        serial, overlapped = bench.step((), "serial"), bench.step(bench.regions, "overlapped")
        groups = [
            Group([prompt.ids for prompt in batch], options.tokens, device)
            for batch in _batches(prompts, options.batch)
        ]
        verdict = Verdict(
            tuple(compare(serial, overlapped, group, bench.states) for group in groups),
            serial.captured.report.ok and overlapped.captured.report.ok,
        )
        rates: dict[str, Figure] = {}
        if gpu:
            steps = {"serial": serial, "overlapped": overlapped}
            rates = interleave(
                {name: lambda step=step: decoding_rate(step, groups[0]) for name, step in steps.items()},
                options.rounds,
                "tokens/s",
            )
        _print_steps(serial, overlapped, rates)
        _print_comparison(verdict, options.batch, bench)
        if not verdict.equal and options.bisect:
            worst = next(i for i, found in enumerate(verdict.comparisons) if not found.equal)
            verdict = _bisect(verdict, bench, serial, groups[worst], options.retries)
    print(_conclusion(verdict, options.bisect, bench))
    if options.json:
        _write(options, checkpoint, prompts, tokenizer, context, bench, (serial, overlapped), rates, verdict)
    return 0 if verdict.equal and verdict.proved and not verdict.nan else 1


def _refuse_settings() -> None:
    """With these there would be nothing to compare, or nothing proved."""
    for name, given in (("AUXSTREAM_DISABLE", SETTINGS.disable), ("AUXSTREAM_VERIFY", SETTINGS.verify)):
        if given:
            raise SettingsError(f"`auxstream run` sets what {name} would override", remedy=f"unset {name}")


def _context(prompts: Sequence[Prompt], options: argparse.Namespace, checkpoint: Checkpoint) -> int:
    """Positions of the caches: as asked for, or as many as are needed."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    length = len(prompts[longest].ids)
    needed = length + options.tokens - 1  # the last token is made and not fed
    most = checkpoint.positions or max(needed, options.context or 0)
    context = options.context or min(-(-needed // _ROUND_UP) * _ROUND_UP, most)
    if needed <= context <= most:
        return context
    if context > most and needed <= most:
        raise InputError(
            f"{checkpoint.name} has no {context} positions",
            expected=f"a context of {needed} to {most} (max_position_embeddings)",
            came=f"--context {context}",
            remedy="leave --context out",
        )
    limit = min(context, most)
    named = "--context" if options.context and context <= most else "max_position_embeddings"
    raise InputError(
        f"prompt {longest + 1} does not fit into the context",
        expected=f"at most {limit} positions ({named}), so "
        f"{max(0, limit - options.tokens + 1)} tokens of prompt before {options.tokens} new ones",
        came=f"{length} tokens",
        remedy="a larger --context" if needed <= most else "a shorter prompt, or fewer --tokens",
    )


def _batches(prompts: Sequence[Prompt], batch: int) -> list[list[Prompt]]:
    """Prompts by the batch; the last one is filled up with the first prompts."""
    filled = [*prompts, *(prompts[i % len(prompts)] for i in range(-len(prompts) % batch))]
    return [filled[start : start + batch] for start in range(0, len(filled), batch)]


def _bisect(verdict: Verdict, bench: Workbench, serial: Step, group: Group, retries: int) -> Verdict:
    """Which regions are the cause, on the first group that differed."""
    print("\nbisecting: regions are switched off until the cause is found", flush=True)

    def differs(regions: Regions) -> bool:
        step = bench.step(regions, "bisected")
        found = any(not compare(serial, step, group, bench.states).equal for _ in range(retries))
        print(f"  {'differs' if found else 'equal  '}  {len(regions)} on{_some(regions)}", flush=True)
        return found

    causes: list[Regions] = []
    if differs(()):
        why = (
            "one stream differs from itself: the model's own kernels do not give the same bits twice, so no region is "
            "to blame (torch.use_deterministic_algorithms(True) finds such kernels)"
        )
    else:
        why = f"the difference did not come again in {retries} runs, so no region can be named; try --retries"
        try:
            causes = find_causes(bench.regions, differs)
        except Unsteady as error:
            why = f"{error} differed once and not again in {retries} runs, so no region can be named; try --retries"
    if causes:
        named = "; ".join(" with ".join(cause) for cause in causes)
        why = f"guilty: {named}. With {'it' if sum(map(len, causes)) == 1 else 'these'} off, nothing differs"
    return Verdict(verdict.comparisons, verdict.proved, tuple(causes), why)


# --- what is said -----------------------------------------------------------------------------------------------------


def _some(regions: Sequence[str]) -> str:
    names = regions if len(regions) <= 4 else (*regions[:3], "...", regions[-1])
    return f": {', '.join(names)}" if regions else ""


def _listed(branches: Sequence[str]) -> str:
    return ", ".join(branches) or "none"


def _print_steps(serial: Step, overlapped: Step, rates: dict[str, Figure]) -> None:
    print(f"\n{'step':12}{'regions':>8}  {'tokens/s':28}proved")
    for name, step in (("serial", serial), ("overlapped", overlapped)):
        report = step.captured.report
        rate = f"{rates[name].median:,.1f} [{rates[name].low:,.1f} .. {rates[name].high:,.1f}]" if rates else "n/a"
        print(f"{name:12}{len(step.regions):>8}  {rate:28}{report.verdict}: {report.size}")
    if rates:
        print(f"overlapped / serial: {rates['overlapped'].median / rates['serial'].median:.3f}")
        print("these regions were asked for; `compile` measures which pay, and keeps those (its `choice`)")
    else:
        print("no tokens per second: on the simulated machine timing means nothing")
    for name, step in (("serial", serial), ("overlapped", overlapped)):
        if not step.captured.report.ok:
            print(f"\n{name} is not proved:\n{step.captured.report}")


def _print_comparison(verdict: Verdict, batch: int, bench: Workbench) -> None:
    turns = sum(found.turns for found in verdict.comparisons)
    differing = sum(len(found.differing) for found in verdict.comparisons)
    print(f"\nlogits: the same bits in {turns - differing} of {turns} steps")
    pairs = len(verdict.comparisons) * len(bench.states)
    unlike = sum(len(found.caches) for found in verdict.comparisons)
    print(f"caches at the end: the same bits in {pairs - unlike} of {pairs}")
    for number, found in enumerate(verdict.comparisons):
        if found.differing:
            rows = ", ".join(str(number * batch + row + 1) for row in found.rows)
            largest = "no number" if found.largest is None else f"up to {found.largest:.3g}"
            others = sum(mine != theirs for mine, theirs in zip(found.made, found.other, strict=True))
            print(
                f"  prompt {rows}: first in step {found.differing[0] + 1}, by {largest}; of this batch, {others} of "
                f"{batch} would choose other tokens"
            )
        if found.caches:
            print(f"  batch {number + 1}: caches {', '.join(found.caches[:4])}{' ...' * (len(found.caches) > 4)}")


def _conclusion(verdict: Verdict, bisected: bool, bench: Workbench) -> str:
    if verdict.equal:
        if verdict.nan:
            return f"NO NUMBERS: logits were NaN in {verdict.nan} steps, on one stream too: equal bits say nothing"
        if verdict.proved and not bench.regions:
            return f"NOTHING OVERLAPS: both steps are one stream. Branches for --overlap: {_listed(bench.branches)}"
        if verdict.proved:
            return "EQUAL: overlapped gives the bits of one stream"
        return "NOT PROVED: the bits were the same in these runs, and the graph does not make sure of that"
    return "DIFFERENT: " + (verdict.why if bisected else "run it again with --bisect to have the region named")


def _write(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    context: int,
    bench: Workbench,
    steps: tuple[Step, Step],
    rates: dict[str, Figure],
    verdict: Verdict,
) -> None:
    made = [tokens for found in verdict.comparisons for tokens in found.made][: len(prompts)]
    document: dict[str, Any] = {
        "machine": machine(),
        "model": {"given": checkpoint.name, "class": type(checkpoint.model).__name__, "weights": checkpoint.weights},
        "batch": options.batch,
        "tokens": options.tokens,
        "context": context,
        "seed": options.seed,
        "fused": bench.fused,
        "overlap": options.overlap,
        "branches": list(bench.branches),
        "regions": list(bench.regions),
        "steps": {
            name: {
                "regions": list(step.regions),
                "ok": step.captured.report.ok,
                "proof": str(step.captured.report),
                "tokens_per_second": asdict(rates[name]) if rates else None,
            }
            for name, step in zip(("serial", "overlapped"), steps, strict=True)
        },
        "prompts": [
            {
                "text": prompt.text,
                "ids": list(prompt.ids),
                "made": tokens,
                "says": tokenizer.decode(tokens) if tokenizer is not None else None,
            }
            for prompt, tokens in zip(prompts, made, strict=True)
        ],
        "comparisons": [asdict(found) for found in verdict.comparisons],
        "equal": verdict.equal,
        "proved": verdict.proved,
        "guilty": [list(cause) for cause in verdict.causes],
        "conclusion": _conclusion(verdict, options.bisect, bench),
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n")
