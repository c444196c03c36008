"""`compile`: a model and example inputs become a `CompiledModel`.

Enters: a module, example inputs (static shapes), `Options`. Leaves: a callable that copies its inputs in, replays one
graph and hands the outputs out. The function below reads as the pipeline: trace, mark, fuse, insert, capture.
Invariant: compiling is not a call: caches, positions and RNG are as before it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..kernels.fuse import FusionReport, fuse_elementwise
from ..kernels.launch import compile_ahead
from ..kernels.reach import regions_of
from ..kernels.routing import MARKED
from ..kernels.safety import fusion_safety
from ..runtime.errors import AuxstreamWarning, RaceError, TraceError
from ..runtime.settings import Verify, parse_safety
from .graphs import CapturedGraph, graph
from .inputs import Calls, StaticInputs
from .mark import mark_multi_stream_moe_shared_experts
from .options import Options
from .proof import Report
from .schedule import RegionPlan, insert_regions
from .state import preserved
from .trace import trace


class CompiledModel:
    """A captured model of one static shape. Call it like the model; no gradients are recorded.

    Outputs live in the graph's own memory: the next call overwrites them, so clone what must last longer. They may be
    inputs of that next call. A buffer or parameter that the model returns is the model's own, as in eager; an input it
    returns is the caller's own tensor; a view of an input becomes a copy. Inputs the model mutates are copied back.

    Calls may come from any stream and any thread. They run one at a time, and each waits, on the GPU, for what was
    given to the stream of the last one. Another stream that reads outputs calls `wait` first; another thread's call
    overwrites them, so threads hold a lock of their own around a call and their use of its outputs.

    Raises:
        InputError: arguments of another structure, shape, dtype or device than the captured ones, or which share memory
            with something the model writes. Nothing was copied and nothing ran.

    Attributes:
        regions: the regions that were inserted, in graph order.
        fusion: what was fused; None with fusion off.
        graph: the captured graph, with its `report` and `memory`.
    """

    def __init__(
        self, captured: CapturedGraph, regions: tuple[RegionPlan, ...], fusion: FusionReport | None, calls: Calls
    ) -> None:
        self.regions = regions
        self.fusion = fusion
        self.graph = captured
        self._calls = calls

    @property
    def report(self) -> Report:
        """What was proved about the graph."""
        return self.graph.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self.graph.order:
            given = self._calls.enter(args, kwargs)
            self.graph.replay()
            return self._calls.leave(given)

    def wait(self) -> None:
        """The current stream waits, on the GPU, for the last call: now it may read its outputs. The next call waits for
        what that stream does with them."""
        self.graph.wait()


def compile(
    model: nn.Module, example_inputs: Any, options: Options | None = None, *, name: str = "model"
) -> CompiledModel:
    """Compile a model for the shapes of `example_inputs`.

    Args:
        model: the module, on the device it will run on.
        example_inputs: positional arguments as a tuple or list, keyword arguments as a dict, or one tensor.
        options: see `Options`; the environment overrides them.
        name: for messages and profiles.

    Raises:
        TraceError: the model cannot become one graph (data-dependent control flow, tensors on several devices).
        RaceError: the captured graph is not proved free of races, and `options.verify` is `error`.
    """
    options = (options or Options()).in_force()
    static = StaticInputs(example_inputs)
    device = _device(model, static.tensors())
    dump = _Dump(options.dump_dir)

    traced = trace(model, static.args, static.kwargs)
    dump.write("1-traced", traced.graph_module.print_readable(print_output=False))
    _mark(traced.graph_module, options, static)

    for trial in _trials(traced.graph_module, options):
        module, fusion = _fused(traced.graph_module, options, trial, dump)
        regions = insert_regions(module, handoff=options.handoff)
        dump.write("3-regions", module.print_readable(print_output=False))
        try:
            captured, outputs = warm_up_and_capture(
                lambda module=module: static.apart(module(*static.args, **static.kwargs)),
                (),
                [*traced.written_tensors(), *static.written(traced)],
                device,
                name=name,
                verify="error" if trial else options.verify,
                warmup=options.warmup if fusion is None else max(1, options.warmup),  # kernels compile in the first run
            )
        except RaceError as error:
            if not trial:
                raise
            _give_up_trial(fusion, error)
            continue
        if trial and fusion is not None:
            fusion = replace(fusion, proved=True)
        dump.write("4-program", str(captured.program))
        dump.write("5-report", str(captured.report))
        return CompiledModel(captured, regions, fusion, Calls(static, traced, outputs))
    raise AssertionError("the last trial returns or raises")


def _mark(module: GraphModule, options: Options, static: StaticInputs) -> None:
    """Annotate the shared experts; without overlap there is no branch to keep fused kernels off."""
    if options.multi_stream_moe and _within(options.token_threshold, static.tensors()):
        mark_multi_stream_moe_shared_experts(module)
    else:
        module.meta[MARKED] = True


def _trials(module: GraphModule, options: Options) -> tuple[bool, ...]:
    """Whether to fuse regions on `auto` as if they were safe: first so, then not, if any region is."""
    if not options.mlir_elementwise_fusion:
        return (False,)
    safety = fusion_safety(regions_of(module), parse_safety(options.fusion_safe))
    return (True, False) if "auto" in safety.values() else (False,)


def _fused(module: GraphModule, options: Options, trial: bool, dump: _Dump) -> tuple[GraphModule, FusionReport | None]:
    """The marked graph, fused; a copy of it where there may be another trial."""
    if not options.mlir_elementwise_fusion:
        return module, None
    if trial:
        meta, module = module.meta, GraphModule(module, copy.deepcopy(module.graph))
        module.meta = dict(meta)
    report = fuse_elementwise(module, safe=parse_safety(options.fusion_safe), trial=trial)
    compile_ahead(report.fusions)
    dump.write("2-fused", f"{report}\n\n{report.mlir}")
    return module, report


def _give_up_trial(fusion: FusionReport | None, error: RaceError) -> None:
    names = ", ".join(name for name, value in (fusion.safety if fusion else {}).items() if value == "auto")
    warnings.warn(
        f"the proof failed with fused kernels on the aux branches of {names}, so they stay unfused there.\n{error}",
        AuxstreamWarning,
        stacklevel=3,
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
) -> tuple[CapturedGraph, Any]:
    """Rehearse `run(*inputs)`, and capture it. Returns the graph and what `run` returned in the capture: tensors that
    every replay updates in place."""
    with (
        rehearsed(run, inputs, mutated, device, warmup) as stream,
        graph(name, verify=verify, device=device, stream=stream) as captured,
    ):
        returned = run(*inputs)
    return captured, returned


@contextmanager
def rehearsed(
    run: Callable[..., Any], inputs: Sequence[Any], mutated: Sequence[Tensor], device: torch.device, warmup: int = 2
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

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, text: str) -> None:
        if self._folder is not None:
            (self._folder / f"{stage}.txt").write_text(text + "\n")
