"""Capturing a step in pieces, into one pool.

Enters: a fused graph with regions, the memory of its inputs, the pool of its bucket's model. Leaves: a `PiecewiseGraph`
and what the graph returned. Invariants: pieces are captured in launch order, those of a lane on a stream of their own,
so that no free list of the pool serves two streams that run side by side; and a value's memory goes back to the pool
before the capture of the first piece of its own stream that follows all who use it, no sooner.

Note "when memory goes back". What is freed on a stream is used again by whatever is captured on that stream next. So a
value of the caller's that a lane reads stays until the piece behind the join, and a result of a lane until that lane's
next fork behind its last reader. A replay overwrites memory of the pool whatever was recorded: `record_stream` has no
say here.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..runtime import ranges
from ..runtime.errors import RaceError
from ..runtime.settings import SETTINGS, Verify
from .graphs import OBSERVERS, CapturedGraph, CudaGraph, _checked, graph
from .inputs import StaticInputs
from .pieces import Launch, PiecewiseGraph
from .pieces_eager import EagerCall, Layouts, declared_program
from .pieces_machines import Cuda, Machine, Simulated
from .program import Op, Program
from .signatures import tensors_in
from .source import warn_user
from .splitting import Part, Split, module_of, split_graph
from .state import preserved, storage_of
from .steps import Piece
from .trace import where

_ALLOCATIONS: Final = (torch.ops.aten.empty_strided.default, torch.ops.aten.empty.memory_format)


def capture_pieces(
    module: GraphModule,
    static: StaticInputs,
    mutated: Sequence[Tensor],
    device: torch.device,
    *,
    name: str,
    verify: Verify,
    warmup: int = 2,
    pool: Any = None,
    split_ops: Sequence[str] = (),
) -> tuple[PiecewiseGraph, Any]:
    """Rehearse the step, and capture it piece by piece into `pool`. Returns the step and what the module returned:
    tensors that every replay updates in place.

    Raises RaceError if the step, or a piece of it, is not proved and `verify` is `error`.
    """
    mode = SETTINGS.verify or verify
    split = split_graph(module, split_ops)
    if drawing := split.drawing():
        warn_user(
            f"step {name!r} runs on one stream, as graphs that draw random numbers may not run side by side: "
            f"{', '.join(drawing)} would, in pieces"
        )
    if SETTINGS.disable or drawing:
        split = split.on_one_stream()
    machine: Machine = Cuda(device, split.lanes, pool) if device.type == "cuda" else Simulated(pool)
    with torch.inference_mode(False), torch.no_grad(), machine:
        values = _Values(module, static, split)
        layouts = Layouts()
        with ranges.span(f"rehearse {name}"):
            machine.rehearse(lambda: _rehearse(values, split, machine, layouts, mutated, device), max(1, warmup))
        capture = _Capture(split, layouts, machine, values, device, name, mode)
        with machine.keeping(mutated, device):
            outputs = capture.run()
        captured = machine.whole(name, capture.pieces, capture.launches, tuple(capture.regions))
        captured.keep(dict(enumerate(capture.kept.values())))
    report = captured.prove(checked=_checked(mode))
    for observe in OBSERVERS:
        observe(captured)
    if not report.ok and mode == "error":
        raise RaceError(f"step {name!r} is not proved free of races\n{report}", report)
    if not report.ok and mode == "warn":
        warn_user(f"step {name!r} is not proved free of races\n{report}")
    return captured, outputs


class _Values:
    """What a run of the parts has at hand: values by node."""

    def __init__(self, module: GraphModule, static: StaticInputs, split: Split) -> None:
        self._module = module
        self._split = split
        self.users = split.users()
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._inputs: dict[Node, Any] = dict(zip(inputs, static.leaves, strict=True))
        self.at: dict[Node, Any] = dict(self._inputs)
        self._modules = [module_of(module, split, part) if part.nodes else None for part in split.parts]

    def start(self) -> None:
        """Forget all but the inputs."""
        self.at = dict(self._inputs)

    def outside(self) -> list[Tensor]:
        """Tensors that no part made."""
        attributes = [self.of(node) for node in self._module.graph.nodes if node.op == "get_attr"]
        return list(tensors_in([*attributes, *self._inputs.values()]))

    def of(self, node: Node) -> Any:
        """The value of a node, or of an attribute."""
        node = self._split.value(node)
        if node.op == "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), self._module)
        return self.at[node]

    def run(self, number: int) -> tuple[Any, ...]:
        """Run a part's nodes; returns what it gives."""
        module = self._modules[number]
        return () if module is None else module(*(self.at[node] for node in self._split.parts[number].takes))

    def call(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one op."""
        return map_arg(node.args, self.of), map_arg(node.kwargs, self.of)

    def outputs(self) -> Any:
        """What the module returns, in its own structure."""
        output = next(node for node in self._module.graph.nodes if node.op == "output")
        return self._module.graph.process_outputs(map_arg(output.args[0], self.of))


def _rehearse(
    values: _Values,
    split: Split,
    machine: Machine,
    layouts: Layouts,
    mutated: Sequence[Tensor],
    device: torch.device,
) -> None:
    """Run the parts eagerly, one behind the other, each on the stream it is captured on."""
    last = {node: number for number, part in enumerate(split.parts) for node in part.takes}
    values.start()
    with preserved(mutated, device):
        for number, part in enumerate(split.parts):
            with machine.on(part.lane):
                if part.kind == "eager":
                    args, kwargs = values.call(part.nodes[0])
                    returned = _callable(part)(*args, **kwargs)
                    values.at.update(layouts.note(number, part, (args, kwargs), returned))
                    del args, kwargs, returned
                else:
                    values.at.update(zip(part.gives, values.run(number), strict=True))
            for node in (*part.takes, *part.gives):
                if last.get(node, number) <= number:
                    values.at.pop(node, None)
        with machine.on(None):
            values.start()


def _callable(part: Part) -> Callable[..., Any]:
    target = part.nodes[0].target
    assert callable(target)
    return target


class _Capture:
    """One walk over the parts.

    Attributes:
        pieces, launches: of the parts so far, for the proof and for replays.
        regions: those inside pieces, and those in pieces of their own.
        kept: outside memory that they read and write, by storage.
    """

    def __init__(
        self,
        split: Split,
        layouts: Layouts,
        machine: Machine,
        values: _Values,
        device: torch.device,
        name: str,
        verify: Verify,
    ) -> None:
        self.pieces: list[Piece] = []
        self.launches: list[Launch] = []
        self.regions: dict[str, None] = {}
        self.kept: dict[int, Tensor] = {}
        self._split = split
        self._layouts = layouts
        self._machine = machine
        self._values = values
        self._device = device
        self._name = name
        self._verify: Verify = verify
        self._given = values.outside()
        self._outside = set(map(storage_of, self._given))
        self._ancestors = split.ancestors()
        self._owned: dict[int, tuple[int | None, list[Node]]] = {}  # storage of the pool -> its lane, values in it
        self._places: dict[Node, Tensor] = {}

    def run(self) -> Any:
        """Capture all parts. Returns what the module returned."""
        self._values.start()
        outputs: Any = None
        for number, part in enumerate(self._split.parts):
            self._give_back(number, part)
            if part.region is not None:
                self.regions[part.region] = None
            if part.kind == "eager":
                self._eager(number, part)
            elif part.nodes or number == len(self._split.parts) - 1:
                outputs = self._graph(number, part)
            else:
                nothing = Program((), (), {0: "caller"}, 0)
                self._add(number, part, self._machine.declared(self._title(number), nothing, {}), None)
        kept = {storage_of(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)}
        for storage in [storage for storage in self._owned if storage not in kept]:
            self._drop(storage)
        self._values.start()
        return outputs

    def _title(self, number: int) -> str:
        part = self._split.parts[number]
        what = part.nodes[0].name if part.kind == "eager" else part.region
        return f"{self._name}/{number}" if what is None else f"{self._name}/{number} {what}"

    def _add(self, number: int, part: Part, what: CapturedGraph | Program, launch: Callable[[], object] | None) -> None:
        stream = "caller" if part.lane is None else f"launch lane{part.lane}"
        eager = part.kind == "eager"
        self.pieces.append(Piece(what, stream, part.after, eager=eager, name=self._title(number)))
        self.launches.append(Launch(launch, part.lane, part.after))

    # -- memory --------------------------------------------------------------------------------------------------

    def _give_back(self, number: int, part: Part) -> None:
        """See the note "when memory goes back"."""
        users, above = self._values.users, self._ancestors[number] & ~(1 << number)
        for storage, (lane, nodes) in list(self._owned.items()):
            if lane == part.lane and not any(users[node] & ~above for node in nodes):
                self._drop(storage)

    def _drop(self, storage: int) -> None:
        for node in self._owned.pop(storage)[1]:
            self._values.at.pop(node, None)
            self._places.pop(node, None)
        self._machine.free(storage)

    def _own(self, lane: int | None, node: Node, value: Any) -> None:
        """A part made this value: note whose memory it is, if it is the pool's."""
        self._values.at[node] = value
        for tensor in tensors_in(value):
            if storage_of(tensor) not in self._outside:
                self._owned.setdefault(storage_of(tensor), (lane, []))[1].append(node)

    def _keep(self, outside: Iterable[Tensor]) -> None:
        self.kept.update((storage_of(view), view) for view in outside if storage_of(view) in self._outside)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _graph(self, number: int, part: Part) -> Any:
        outputs: Any = None
        title = self._title(number)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # of views alone
            with graph(
                title,
                verify=self._verify,
                device=self._device,
                pool=self._machine.pool,
                stream=self._machine.stream(part.lane),
            ) as captured:
                self._machine.name([*self._given, *tensors_in(list(self._values.at.values()))])
                made = self._values.run(number)
                places = [
                    (result.node, result.place())
                    for eager in part.places
                    for result in self._layouts.results[eager]
                    if result.shared is None
                ]
                if number == len(self._split.parts) - 1:
                    self._values.at.update(zip(part.gives, made, strict=True))
                    outputs = self._values.outputs()
        for node, value in zip(part.gives, made, strict=True):
            self._own(part.lane, node, value)
        for node, place in places:
            self._places[node] = place
            self._own(part.lane, node, place)
        self._keep(captured._outside.values())
        self._machine.took(captured)
        self.regions.update(dict.fromkeys(captured.regions))
        works = any(isinstance(step, Op) and step.func not in _ALLOCATIONS for step in captured.program.steps)
        launch = captured.cuda_graph.replay if isinstance(captured, CudaGraph) and works else None
        self._add(number, part, captured, launch)
        return outputs

    def _eager(self, number: int, part: Part) -> None:
        args, kwargs = self._values.call(part.nodes[0])
        given = list(tensors_in((args, kwargs)))
        results: list[tuple[int | None, Tensor]] = []
        for result in self._layouts.results[number]:
            if result.shared is not None:
                self._own(part.lane, result.node, result.within(given[result.shared]))
                continue
            place = self._places.get(result.node)
            if place is None:  # no graph comes before it on its stream: memory of its own
                self._values.at[result.node] = place = result.place()
                self._outside.add(storage_of(place))
            results.append((result.position, place))
        self._values.at.update((node, self._layouts.plain[node]) for node in part.gives if node in self._layouts.plain)
        call = EagerCall(_callable(part), args, kwargs, tuple(results))
        program, outside = declared_program(call, self._layouts.leaves[number], where(part.nodes[0]), part.region)
        self._keep(outside.values())
        launch = self._machine.launch(call, self._owned)
        self._add(number, part, self._machine.declared(self._title(number), program, outside), launch)
