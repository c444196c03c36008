"""`compile`: a model and example inputs become a `CompiledModel`.

Enters: a module, example inputs, `Options`. Leaves: a callable that copies its inputs in, replays one graph and hands
the outputs out. `_Pipeline.compile` reads as the picture: trace, choose, mark, fuse, insert, capture; with buckets
(capture/buckets.py) it runs once for each. Invariant: compiling is not a call: caches, positions and RNG are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..kernels.fuse import FusionReport
from ..kernels.safety import unknown_regions
from ..runtime import ranges
from ..runtime.errors import RaceError, TraceError
from ..runtime.settings import SETTINGS, OverlapRules, Verify, parse_overlap, parse_safety
from .bucketing import compile_buckets
from .compiled import CompiledModel
from .graphs import CapturedGraph, graph
from .inputs import Calls, Padding, StaticInputs
from .laying import Laying
from .life import Life
from .options import Options
from .phases import Phase, compile_phases, examples_of, phases_of, whole_of
from .pieces_capture import capture_pieces
from .policy import Choice, Plan, key_of, measured, remember, remembered, ruled, unmatched, unmeasured
from .progress import captures
from .proposals import Proposal, propose
from .race import Racing
from .source import warn_user
from .split_ops import keep_whole, ops_of, refuse_unknown
from .state import preserved
from .switches import adopt_switches
from .trace import TracedGraph, trace
from .uncaptured import order_of_runs, run_once


def compile(
    model: nn.Module,
    example_inputs: Any,
    options: Options | None = None,
    *,
    prefill: Any = None,
    name: str = "model",
) -> CompiledModel:
    """Compile a model for the shapes of `example_inputs`; with `options.buckets`, for several numbers of rows.

    Args:
        model: the module, on the device it will run on.
        example_inputs: positional arguments as a tuple or list, keyword arguments as a dict, or one tensor. With
            buckets, of the largest, and with rows that differ.
        options: see `Options`; the environment overrides them.
        prefill: example inputs of a second phase, whose calls have another structure or other fixed sizes; or a pair of
            a module that runs it, over the same weights and caches, and its example inputs.
        name: for messages and profiles.

    Returns:
        a `CompiledModel`; with buckets, a `BucketedModel`; with two phases, a `PhasedModel`.

    Raises:
        SettingsError: `options` are no `Options`.
        TraceError: the model cannot become one graph (data-dependent control flow, tensors on several devices).
        RaceError: the captured graph is not proved free of races, and `options.verify` is `error`.
        CaptureError: a mode of two phases where one is given; names in `split_ops` that no op has; or with buckets, if
            it is not to be found which dimensions count tokens, or if padding would show in results or in what the
            model writes.
    """
    phases = phases_of(model, example_inputs, prefill, Options.of(options).in_force())
    device = _device(whole_of(phases), [leaf for phase in phases for leaf in phase.static.tensors()])

    def make(pool: Any) -> tuple[CompiledModel, str]:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # what is measured runs there
            return make_there(pool)

    def make_there(pool: Any) -> tuple[CompiledModel, str]:
        ops: dict[str, str] = {}
        pieces = [phase for phase in phases if phase.options is not None and phase.options.mode == "piecewise"]

        def make_phase(phase: Phase, pool: Any) -> tuple[CompiledModel, str]:
            options, static = phase.options, phase.static
            assert options is not None
            if phase in pieces:
                pieces.remove(phase)
            pipeline = _Pipeline(options, device, phase.named(name), ops, () if pieces else options.split_ops)
            with captures(pipeline.name, device, options.progress) as progress:
                if options.buckets:
                    made = compile_buckets(phase.model, static, options, device, pipeline.compile, progress, pool)
                else:
                    with progress.capturing():
                        made = pipeline.compile(static, trace(phase.model, static.args, static.kwargs), pool=pool)
            return made, progress.summary(made)

        return compile_phases(phases, make_phase, device, pool)

    return Life(whole_of(phases), make, examples_of(phases)).made()


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """From a traced graph to a compiled one; what its graphs share."""

    options: Options
    device: torch.device
    name: str
    ops: dict[str, str]
    """Of all graphs that are split, also of other phases, by every name."""
    asked: tuple[str, ...]
    """Names of ops to split at, of which each must be known by now."""
    constants: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What fusion computed ahead, by name."""

    def compile(
        self, static: StaticInputs, traced: TracedGraph, padding: Padding | None = None, pool: Any = None
    ) -> CompiledModel:
        """One graph of one shape. `pool`: what it shares with others: memory; in mode `none`, the order of runs."""
        options = self.options
        dump = _Dump(options.dump_dir, "" if padding is None else f"bucket-{padding.size}")
        dump.write("1-traced", traced.graph_module.print_readable(print_output=False))
        _adopt(traced.graph_module)
        if options.mode == "piecewise":
            self.ops.update(ops_of(traced.graph_module))
            refuse_unknown(self.asked, self.ops)
            keep_whole(traced.graph_module, options.split_ops)
        laying = Laying(traced, options, self.device.type == "cuda", self.constants)
        written = [*traced.written_tensors(), *static.written(traced)]
        choice = self._choose(static, traced, laying)
        dump.write("2-overlap", "\n\n".join([str(choice), *laying.notes]))

        for trial in laying.trials(choice.plan):
            laid = laying.lay(choice.plan, trial)
            fusion = laid.fusion
            dump.write("3-fused", f"{fusion}\n\n{fusion.mlir}" if fusion else "fusion is off")
            dump.write("4-regions", laid.module.print_readable(print_output=False))
            try:
                captured, outputs = self._capture(
                    laid.module,
                    static,
                    written,
                    self.name if padding is None else f"{self.name}[{padding.size}]",
                    verify="error" if trial else options.verify,
                    warmup=options.warmup if fusion is None else max(1, options.warmup),  # kernels compile in the first
                    pool=pool,
                )
            except RaceError as error:
                if not trial:
                    raise
                _give_up_trial(fusion, error)
                continue
            if trial and fusion is not None:
                fusion = replace(fusion, proved=True)
            if options.mode != "none":
                dump.write("5-program", str(captured.program))
                dump.write("6-report", str(captured.report))
            calls = Calls(static, traced, outputs, padding=padding, copied=options.copy_outputs)
            return CompiledModel(captured, laid.regions, fusion, calls, choice)
        raise AssertionError("the last trial returns or raises")

    def _choose(self, static: StaticInputs, traced: TracedGraph, laying: Laying) -> Choice:
        """What runs on lanes: what rules demand, and what is measured to pay."""
        options = self.options
        if not options.multi_stream_moe or not _within(options.token_threshold, static.tensors()):
            return Choice(Plan(), "rules")
        rules = (*parse_overlap(options.overlap), *SETTINGS.overlap)
        proposals = propose(laying.graph)
        self._say_unmatched(proposals, rules)
        if not proposals:
            return Choice(Plan(), "no branches")
        demanded, left = ruled(proposals, rules)
        if SETTINGS.disable:
            return replace(unmeasured(demanded, left), source="rules; AUXSTREAM_DISABLE")
        if not left or self.device.type != "cuda" or options.mode == "none":
            return unmeasured(demanded, left)
        unseen = replace(options, dump_dir=None, progress=None)
        outside = (rules, SETTINGS.fusion_safe, SETTINGS.fusion_safe_regions)
        rest = (torch.__version__, torch.cuda.get_device_name(self.device), self.name, unseen, outside)
        key = key_of(laying.graph, proposals, rest)
        choice = remembered(key, demanded, left)
        if choice is None:
            racing = self._racing(static, traced, laying)
            choice = measured(demanded, left, racing)
            if not racing.starved:
                remember(key, demanded, choice)
        return choice

    def _say_unmatched(self, proposals: Sequence[Proposal], rules: OverlapRules) -> None:
        """Rules that name nothing here: misspelt, or meant for another model of the process. So it is a warning, and
        none for a model without branches."""
        safety = (*parse_safety(self.options.fusion_safe), *SETTINGS.fusion_safe)
        regions = [region.name for part in proposals for region in part.regions]
        said = [f"the overlap rule {glob!r}" for glob in unmatched(proposals, rules)]
        said += [f"the fusion_safe rule {glob!r}" for glob in unmatched(proposals, safety)]
        said += [f"AUXSTREAM_FUSION_SAFE_{name}" for name in unknown_regions(regions, SETTINGS)]
        if said and regions:
            names = ", ".join(dict.fromkeys(regions))
            warn_user(f"{', '.join(said)} matches no branch of {self.name}, which has {names[:500]}")

    def _racing(self, static: StaticInputs, traced: TracedGraph, laying: Laying) -> Racing:
        """Plans captured as they will be, unproved and in memory of their own."""
        written = [*traced.written_tensors(), *static.written(traced)]
        pool = torch.cuda.graph_pool_handle()

        def build(plan: Plan) -> CapturedGraph:
            module = laying.lay(plan, laying.trials(plan)[0]).module
            captured, _ = self._capture(
                module,
                static,
                written,
                f"{self.name}, {plan}",
                verify="off",
                warmup=max(1, self.options.warmup),
                pool=pool,
            )
            return captured

        return Racing(build, written, self.device)

    def _capture(
        self,
        module: GraphModule,
        static: StaticInputs,
        mutated: Sequence[Tensor],
        name: str,
        *,
        verify: Verify,
        warmup: int,
        pool: Any,
    ) -> tuple[CapturedGraph, Any]:
        def run() -> Any:
            return module(*static.args, **static.kwargs)

        if self.options.mode == "none":
            order = order_of_runs(self.device) if pool is None else pool
            return run_once(run, mutated, self.device, name=name, order=order)
        if self.options.mode == "piecewise":
            ops = self.options.split_ops
            how: dict[str, Any] = {"name": name, "verify": verify, "warmup": warmup, "pool": pool, "split_ops": ops}
            return capture_pieces(module, static, mutated, self.device, **how)
        return warm_up_and_capture(run, (), mutated, self.device, name=name, verify=verify, warmup=warmup, pool=pool)


def _adopt(module: GraphModule) -> None:
    """Hand-written stream switches become marks; what cannot is said, and stays as it is."""
    for adoption in adopt_switches(module):
        if not adoption.adopted:
            warn_user(f"hand-written stream switches stay: {adoption}")


def _give_up_trial(fusion: FusionReport | None, error: RaceError) -> None:
    names = ", ".join(name for name, value in (fusion.safety if fusion else {}).items() if value == "auto")
    warn_user(
        f"the proof failed with fused kernels on the aux branches of {names}, so they stay unfused there.\n{error}",
    )


def warm_up_and_capture(
    run: Callable[..., Any],
    inputs: Sequence[Any],
    mutated: Sequence[Tensor],
    device: torch.device,
    *,
    name: str,
    verify: Verify,
    warmup: int = 2,
    pool: Any = None,
) -> tuple[CapturedGraph, Any]:
    """Rehearse `run(*inputs)`, and capture it, into a pool of its own or the one given. Returns the graph and what
    `run` returned in the capture: tensors that every replay updates in place."""
    with (
        rehearsed(run, inputs, mutated, device, warmup, name) as stream,
        graph(name, verify=verify, device=device, pool=pool, stream=stream) as captured,
    ):
        returned = run(*inputs)
    return captured, returned


@contextmanager
def rehearsed(
    run: Callable[..., Any],
    inputs: Sequence[Any],
    mutated: Sequence[Tensor],
    device: torch.device,
    warmup: int = 2,
    name: str = "step",
) -> Generator[torch.cuda.Stream | None]:
    """Run `run(*inputs)` a few times on the stream to capture it on, which the block gets. Each run finds `mutated` and
    the RNG as they were, and leaves them so: steps that count positions must not count past the end of a cache."""

    def rehearse() -> None:
        with preserved(mutated, device):
            run(*inputs)

    with torch.no_grad(), ExitStack() as stack:
        stream = None
        if device.type == "cuda":
            from .cuda_capture import CaptureStream

            own = stack.enter_context(CaptureStream(device))
            with ranges.span(f"rehearse {name}"):
                own.warm_up(rehearse, warmup)
            stream = own.torch_stream
        yield stream


def _device(model: nn.Module, inputs: Sequence[Tensor]) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), *inputs)}
    if len(devices) > 1:
        raise TraceError(
            "the model and its example inputs lie on several devices",
            expected="one device",
            came=", ".join(sorted(map(str, devices))),
            remedy="move the model and the inputs to the device they will run on",
        )
    return devices.pop() if devices else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _within(threshold: int | None, inputs: Sequence[Tensor]) -> bool:
    """Whether the step's tokens (elements of the first integer input) stay within the threshold."""
    if threshold is None:
        return True
    tokens = next((leaf for leaf in inputs if leaf.dtype in (torch.int64, torch.int32)), None)
    return tokens is None or tokens.numel() <= threshold


class _Dump:
    """Writes stages as text, if asked to."""

    def __init__(self, folder: str | Path | None, part: str = "") -> None:
        self._folder = None if folder is None else Path(folder) / part
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, text: str) -> None:
        if self._folder is not None:
            (self._folder / f"{stage}.txt").write_text(text + "\n")
