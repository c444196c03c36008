"""`compile`: a model and example inputs become a `CompiledModel`.

Enters: a module, example inputs (static shapes), `Options`. Leaves: a callable that copies its inputs in, replays one
graph and hands the outputs out. The function below reads as the pipeline: trace, mark, insert, warm up, capture.
Invariant: compiling is not a call: caches, positions and RNG are as before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..runtime.errors import InputError, TraceError
from ..runtime.settings import Verify
from .graphs import CapturedGraph, graph
from .mark import mark_multi_stream_moe_shared_experts
from .options import Options
from .proof import Report
from .schedule import RegionPlan, insert_regions
from .state import preserved
from .trace import TracedGraph, trace


class CompiledModel:
    """A captured model of one static shape. Call it like the model.

    Outputs live in the graph's own memory: the next call overwrites them. Inputs the model mutates are copied back.

    Attributes:
        regions: the regions that were inserted, in graph order.
        graph: the captured graph, with its `report` and `memory`.
    """

    def __init__(
        self,
        traced: TracedGraph,
        regions: tuple[RegionPlan, ...],
        inputs: Sequence[Any],
        captured: CapturedGraph,
        outputs: Any,
    ) -> None:
        self.regions = regions
        self.graph = captured
        self._traced = traced
        self._inputs = tuple(inputs)
        self._outputs = outputs
        self._written_back = tuple(
            position for position, name in enumerate(traced.input_names) if name in traced.mutated_inputs
        )

    @property
    def report(self) -> Report:
        """What was proved about the graph."""
        return self.graph.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._traced.in_spec:
            raise InputError(
                "the arguments have another structure than the captured ones",
                expected=str(self._traced.in_spec),
                came=str(spec),
                remedy="call it as in the example inputs, or compile for this structure too",
            )
        for name, static, value in zip(self._traced.input_names, self._inputs, given, strict=True):
            _copy_in(name, static, value)
        self.graph.replay()
        for position in self._written_back:
            given[position].copy_(self._inputs[position])
        return self._outputs


def _copy_in(name: str, static: Any, value: Any) -> None:
    if not isinstance(static, Tensor):
        if static != value or type(static) is not type(value):
            raise InputError(
                f"input {name!r} is a constant of the captured graph",
                expected=repr(static),
                came=repr(value),
                remedy="pass a tensor if it must vary, or compile for this value too",
            )
        return
    if not isinstance(value, Tensor) or (value.shape, value.dtype, value.device) != (
        static.shape,
        static.dtype,
        static.device,
    ):
        came = f"{tuple(value.shape)} {value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)
        raise InputError(
            f"input {name!r} differs from the captured one",
            expected=f"{tuple(static.shape)} {static.dtype} on {static.device}",
            came=came,
            remedy="pad or move it, or compile for this shape too",
        )
    static.copy_(value)


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
    args, kwargs = _arguments(example_inputs)
    device = _device(model, args, kwargs)
    dump = _Dump(options.dump_dir)

    traced = trace(model, args, kwargs)
    dump.write("1-traced", traced.graph_module.print_readable(print_output=False))
    inputs = [_static(leaf) for leaf in traced.flat_inputs(args, kwargs)]

    overlap = options.multi_stream_moe and _within(options.token_threshold, inputs)
    marked = mark_multi_stream_moe_shared_experts(traced.graph_module) if overlap else ()
    regions = insert_regions(traced.graph_module, marked, handoff=options.handoff)
    dump.write("2-regions", traced.graph_module.print_readable(print_output=False))

    captured, leaves = warm_up_and_capture(
        traced.graph_module,
        inputs,
        _mutated(traced, inputs),
        device,
        name=name,
        verify=options.verify,
        warmup=options.warmup,
    )
    dump.write("3-program", str(captured.program))
    dump.write("4-report", str(captured.report))
    outputs = pytree.tree_unflatten(pytree.tree_leaves(leaves), traced.out_spec)
    return CompiledModel(traced, regions, inputs, captured, outputs)


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
    """Run `run(*inputs)` a few times on the capture's own streams, capture it, and put `mutated` and the RNG back.

    Returns the graph and what `run` returned in the capture: tensors that every replay updates in place.
    """
    with torch.no_grad(), preserved(mutated, device), ExitStack() as stack:
        stream = None
        if device.type == "cuda":
            from .cuda_capture import CaptureStream

            own = stack.enter_context(CaptureStream(device))
            own.warm_up(lambda: run(*inputs), warmup)
            stream = own.torch_stream
        with graph(name, verify=verify, device=device, stream=stream) as captured:
            returned = run(*inputs)
    return captured, returned


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    match example_inputs:
        case Tensor():
            return (example_inputs,), {}
        case Mapping():
            return (), dict(example_inputs)
        case tuple() | list():
            return tuple(example_inputs), {}
        case _:
            raise InputError(
                "example_inputs have no form compile() knows",
                expected="a tuple or list (positional), a dict (keyword), or one tensor",
                came=type(example_inputs).__name__,
            )


def _device(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), *tensors)}
    if len(devices) > 1:
        raise TraceError(
            "the model and its example inputs lie on several devices",
            expected="one device",
            came=", ".join(sorted(map(str, devices))),
            remedy="move the model and the inputs to the device they will run on",
        )
    return devices.pop() if devices else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _static(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _within(threshold: int | None, inputs: Sequence[Any]) -> bool:
    """Whether the step's tokens (elements of the first integer input) stay within the threshold."""
    if threshold is None:
        return True
    tokens = next((leaf for leaf in inputs if isinstance(leaf, Tensor) and not leaf.is_floating_point()), None)
    return tokens is None or tokens.numel() <= threshold


def _mutated(traced: TracedGraph, inputs: Sequence[Any]) -> list[Tensor]:
    module = traced.graph_module
    owned = [_attribute(module, name) for name in traced.mutated_buffers]
    given = dict(zip(traced.input_names, inputs, strict=True))
    return owned + [given[name] for name in traced.mutated_inputs]


def _attribute(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


class _Dump:
    """Writes stages as text, if asked to."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, text: str) -> None:
        if self._folder is not None:
            (self._folder / f"{stage}.txt").write_text(text + "\n")
