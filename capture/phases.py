"""Modes, as serving users know them: which phase of a model is captured how, and calls of either phase.

Enters: a model, example inputs of its decode phase and maybe of its prefill phase, `Options`. Leaves: one `Phase` for
each, with options of its own; and once each is compiled, a `PhasedModel`. Invariants: phases share one pool, the one
with the most tokens captured first; a call runs the phase whose structure and fixed sizes it has, or is refused by the
nearer one.

    mode                  decode          prefill
    none                  op by op        op by op
    piecewise             pieces          pieces
    full                  whole graphs    whole graphs
    full_decode_only      whole graphs    the model itself
    full_and_piecewise    whole graphs    pieces
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..runtime import ranges
from ..runtime.errors import CaptureError, InputError
from .arguments import Dims
from .bucketing import new_pool
from .buckets import BucketedModel
from .compiled import CompiledModel
from .graphs import CapturedGraph
from .inputs import Calls, StaticInputs
from .ledger import Ledger, ledger
from .options import Mode, Options

_PHASES: Final[Mapping[Mode, tuple[Mode, Mode | None]]] = {
    "none": ("none", "none"),
    "piecewise": ("piecewise", "piecewise"),
    "full": ("full", "full"),
    "full_decode_only": ("full", None),
    "full_and_piecewise": ("full", "piecewise"),
}
"""Per mode, the modes of decode and of prefill; None: the model itself."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Phase:
    """What is compiled on its own.

    Attributes:
        title: "decode" or "prefill"; "" for a model of one phase.
        options: its own: mode, buckets, and what is said of its inputs. None: it is not compiled.
    """

    title: str
    model: nn.Module
    static: StaticInputs
    options: Options | None

    @property
    def tokens(self) -> int:
        """A measure of its largest graph."""
        if self.options is not None and self.options.buckets:
            return self.options.buckets[-1]
        return max((leaf.numel() for leaf in self.static.tensors()), default=0)

    def named(self, name: str) -> str:
        return f"{name} {self.title}".rstrip()


def phases_of(model: nn.Module, example_inputs: Any, prefill: Any, options: Options) -> tuple[Phase, ...]:
    """One phase, or decode and prefill. `prefill`: example inputs, or a pair of a module and its example inputs.

    Raises CaptureError for a mode that names a phase which is not given.
    """
    modes = _PHASES[options.mode]
    static = StaticInputs(example_inputs)
    if prefill is None:
        if modes[0] != modes[1] or options.prefill_buckets:
            asks = "prefill_buckets" if modes[0] == modes[1] else f"mode {options.mode!r}"
            raise CaptureError(
                f"{asks} is of two phases, and only one is given",
                expected="example inputs of the prefill phase too",
                came="example inputs of one phase",
                remedy="compile(model, decode_inputs, options, prefill=prefill_inputs), or prefill=(module, inputs); "
                "or mode 'full' or 'piecewise', and buckets",
            )
        return (Phase("", model, static, options),)
    module, inputs = model, prefill
    pair = cast("tuple[Any, ...]", prefill) if isinstance(prefill, tuple) else ()
    if len(pair) == 2 and isinstance(pair[0], nn.Module):
        module, inputs = pair
    others = StaticInputs(inputs)
    decode = Phase("decode", model, static, replace(options, mode=modes[0], prefill_buckets=()))
    eager = modes[1] is None
    own = replace(options, mode=modes[1] or "none", buckets=options.prefill_buckets, prefill_buckets=())
    return _with_names(decode, Phase("prefill", module, others, own), eager)


def whole_of(phases: Sequence[Phase]) -> nn.Module:
    """One module that has the tensors of all phases."""
    models = {phase.title: phase.model for phase in phases}
    first = phases[0].model
    return first if all(model is first for model in models.values()) else nn.ModuleDict(models)


def examples_of(phases: Sequence[Phase]) -> list[Tensor]:
    """What phases with buckets look at the values of."""
    bucketed = [phase for phase in phases if phase.options is not None and phase.options.buckets]
    return [leaf for phase in bucketed for leaf in phase.static.tensors()]


def _with_names(decode: Phase, prefill: Phase, eager: bool) -> tuple[Phase, ...]:
    """What `pad` and `token_dims` say of inputs that only one phase has is said to that phase alone."""
    names = [_parameters(phase) for phase in (decode, prefill)]

    def of(phase: Phase, own: set[str], other: set[str]) -> Phase:
        def kept(said: Mapping[str, _T]) -> dict[str, _T]:
            return {name: value for name, value in said.items() if _among(name, own) or not _among(name, other)}

        assert phase.options is not None
        options = phase.options
        folder = None if options.dump_dir is None else Path(options.dump_dir) / phase.title
        own_options = replace(options, pad=kept(options.pad), token_dims=kept(options.token_dims), dump_dir=folder)
        return replace(phase, options=own_options)

    last = of(prefill, names[1], names[0])
    return of(decode, names[0], names[1]), replace(last, options=None) if eager else last


def _parameters(phase: Phase) -> set[str]:
    """The parameters of `forward` that a call of this phase fills; a leaf's name begins with one of them."""
    try:
        return set(inspect.signature(phase.model.forward).bind(*phase.static.args, **phase.static.kwargs).arguments)
    except TypeError:  # inputs that `forward` does not take: the trace says so, and of which phase
        return set()


def _among(name: str, parameters: set[str]) -> bool:
    return any(name == parameter or name.startswith(f"{parameter}_") for parameter in parameters)


CompilePhase = Callable[[Phase, Any], tuple[CompiledModel, str]]
"""How one phase is compiled, into a pool or one of its own, and a line about it."""


def compile_phases(
    phases: Sequence[Phase], compile_phase: CompilePhase, device: torch.device, pool: Any
) -> tuple[CompiledModel, str]:
    """Compile each phase that is to be, the one with the most tokens first."""
    if len(phases) == 1:
        return compile_phase(phases[0], pool)
    captured = [phase for phase in phases if phase.options is not None]
    if pool is None and captured[0].options is not None:
        pool = new_pool(captured[0].options, device)
    made: dict[str, CompiledModel] = {}
    lines: list[str] = []
    for phase in sorted(captured, key=lambda phase: -phase.tokens):
        made[phase.title], line = compile_phase(phase, pool)
        lines.append(line)
    return PhasedModel(phases, made), "; ".join(lines)


class _Form:
    """What calls of one phase look like."""

    def __init__(self, phase: Phase, compiled: CompiledModel | None) -> None:
        static = phase.static
        self.title = phase.title
        self.model = phase.model
        self.compiled = compiled
        self.positional = len(static.args)
        self.keywords = set(static.kwargs)
        self._static = static
        self._dims: Dims = (None,) * len(static.leaves)
        if compiled is not None and compiled.calls.padding is not None:
            self._dims = compiled.calls.padding.inputs

    def distance(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """How far a call is from one of this phase: another structure, leaves that do not fit."""
        leaves = self._static.leaves
        order = self._static.kwargs if self.keywords == set(kwargs) else kwargs  # keywords come in any order
        given, spec = pytree.tree_flatten((args, {name: kwargs[name] for name in order}))
        if spec != self._static.spec:
            return 1, abs(len(given) - len(leaves))
        return 0, sum(not fit for fit in map(self._fits, given, leaves, self._dims))

    def _fits(self, value: Any, leaf: Any, dim: int | None) -> bool:
        if not isinstance(leaf, Tensor) or not isinstance(value, Tensor):
            return type(value) is type(leaf) and not isinstance(leaf, Tensor) and bool(value == leaf)
        if value.dtype != leaf.dtype or value.dim() != leaf.dim():
            return False
        fixed = [d for d in range(leaf.dim()) if d != dim] if self.compiled is not None else []
        return all(value.shape[d] == leaf.shape[d] for d in fixed)

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises InputError for a call that is not of this phase; sizes are the model's business."""
        if any(self.distance(args, kwargs)):
            raise InputError(
                f"the arguments are not those of {self.title}, nor of another phase",
                expected=_described(self._static.args, self._static.kwargs),
                came=_described(args, kwargs),
                remedy="call it as in the example inputs of one of its phases",
            )


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def shown(leaf: Any) -> Any:
        return f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else leaf

    return str(pytree.tree_map(shown, (args, dict(kwargs))))


class PhasedModel(CompiledModel):
    """A model captured for two phases of serving: each call is a step of one of them.

    As `CompiledModel`, and for a phase with buckets `BucketedModel`, with these differences. A call's structure, and
    the sizes that its phase fixes, say which phase it is; where both fit (one token), it is decode. Outputs last until
    the next call of either.

    Attributes:
        decode: the compiled decode phase. The phases share memory: call them through this model.
        prefill: likewise; None where the model itself runs it.
    """

    def __init__(self, phases: Sequence[Phase], compiled: Mapping[str, CompiledModel]) -> None:
        self.decode = first = compiled["decode"]
        self.prefill = compiled.get("prefill")
        super().__init__(first.graph, first.regions, first.fusion, first.calls, first.choice)
        self._compiled = dict(compiled)
        self._forms = tuple(_Form(phase, compiled.get(phase.title)) for phase in phases)
        self._settled: dict[tuple[Any, ...], _Form] = {}
        calls = [calls for model in compiled.values() for calls in _calls(model)]
        live = frozenset[int]().union(*(one.live_storages for one in calls))
        for one in calls:
            one.live_storages = live

    @property
    def name(self) -> str:
        return self.decode.name.removesuffix(" decode")

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        return tuple(graph for model in self._compiled.values() for graph in model.graphs)

    @property
    def memory(self) -> Ledger:
        graphs: dict[int | str | None, CapturedGraph] = {}
        for title, model in self._compiled.items():
            for bucket, graph in _by_bucket(model).items():
                graphs[title if bucket is None else f"{title} {bucket}"] = graph
        return ledger(graphs, [leaf for model in self._compiled.values() for leaf in model.calls.static.tensors()])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._life is not None:
            self._life.glance()
        form = self._settled.get((len(args), *kwargs)) or self._form(args, kwargs)
        if form.compiled is not None:
            return form.compiled(*args, **kwargs)
        form.check(args, kwargs)
        with ranges.span(f"eager {self.name} {form.title}"), torch.no_grad(), self.graph.order:
            return form.model(*args, **kwargs)

    @ranges.around(lambda model: f"eager {model.name}")
    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """The model of the call's phase itself, op by op; in the same order among calls."""
        with torch.no_grad(), self.graph.order:
            return self._form(args, kwargs).model(*args, **kwargs)

    def _form(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Form:
        """The phase of a call, or the one that is nearest."""
        alike = [form for form in self._forms if form.positional == len(args) and form.keywords == set(kwargs)]
        if len(alike) == 1:
            self._settled[len(args), *kwargs] = alike[0]
            return alike[0]
        return min(alike or self._forms, key=lambda form: form.distance(args, kwargs))


def _calls(model: CompiledModel) -> list[Calls]:
    return [one.calls for one in model.buckets.values()] if isinstance(model, BucketedModel) else [model.calls]


def _by_bucket(model: CompiledModel) -> dict[int | None, CapturedGraph]:
    """In the order of their captures."""
    if isinstance(model, BucketedModel):
        return {size: bucket.graph for size, bucket in reversed(model.buckets.items())}
    return {None: model.graph}
