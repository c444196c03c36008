"""One model at several token counts: which dimensions count tokens, and a graph for each count.

Enters: a module, example inputs of the largest count, what the user says of dimensions. Leaves: per input the dimension
that counts tokens (or None), and for any count a `TracedGraph` of static shapes. Invariant: a graph computes what
`trace` at that count would.

Note "found, not guessed". The model is exported once with every dimension of the largest count left open. The tracer
ties open dimensions that must agree, and closes those the model fixes. One class of open dimensions left: these count
tokens. Several, and no `token_dims` to choose: refused.

Note "one trace for all counts". The same export, with numbers for its symbols, is the graph of each count for which its
guards hold. The others (a count of one is always among them) are traced on their own.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from ..kernels.dataflow import Dataflow
from ..runtime.errors import AuxstreamError, CaptureError, InputError
from ..runtime.machine import INLINE, using_machine
from .arguments import Dims
from .inputs import StaticInputs, repeating
from .trace import TracedGraph, _attributes_kept, _refuse_nested_graphs, _strip_checks, trace

_Class = tuple[tuple[str, int], ...]
"""Dimensions, as (input, dimension), that always have one size."""


class Sizes:
    """A model, its example inputs at the largest count, and its graphs at any count.

    Attributes:
        largest: the largest count, that of the example inputs.
        names: of the input leaves.
        dims: per input leaf, the dimension that counts tokens.

    Raises InputError or CaptureError if the token dimensions are not to be found.
    """

    def __init__(self, model: nn.Module, static: StaticInputs, largest: int, said: Mapping[str, int | None]) -> None:
        self.largest = largest
        self._model = model
        self._static = static
        self._traces: dict[int, TracedGraph] = {}
        self._shared, failure = _open(model, static, largest)
        if self._shared is not None:
            self.names = self._shared.names
        else:
            self._traces[largest] = _traced(model, static)
            self.names = self._traces[largest].input_names
        self._check(said)
        found = self._found(said, failure)
        self.dims: Dims = tuple(found.get(name) for name in self.names)
        if self._shared is not None and not self._shared.opens(found):
            self._shared = None

    def inputs(self, size: int) -> StaticInputs:
        """The example inputs at another count: their first rows, in the same memory."""
        return self._static.with_rows(self.dims, lambda leaf, dim: leaf.narrow(dim, 0, size))

    def trace(self, size: int) -> TracedGraph:
        """The model's graph at this count, which may be one more than the largest."""
        if size not in self._traces:
            inputs = self.inputs(size) if size <= self.largest else self._grown(size)
            found = None if self._shared is None else self._shared.at(size, self.dims, inputs)
            self._traces[size] = found or _traced(self._model, inputs)
        return self._traces[size]

    def first_unlike(self, sizes: Iterable[int]) -> int | None:
        """The first of these counts that has a trace of its own: there the model may do something else."""
        shared = self._shared
        return None if shared is None else next((n for n in sizes if not shared.holds(n, self.dims)), None)

    def _grown(self, size: int) -> StaticInputs:
        """Inputs of more rows than the largest count."""

        def grown(leaf: Tensor, dim: int) -> Tensor:
            return leaf.index_select(dim, repeating(self.largest, size, leaf.device))

        return self._static.with_rows(self.dims, grown)

    def _check(self, said: Mapping[str, int | None]) -> None:
        """Names and dimensions given by hand exist, and have the largest count."""
        leaves = dict(zip(self.names, self._static.leaves, strict=True))
        for name, dim in said.items():
            shape = tuple(getattr(leaves.get(name), "shape", ()))
            if name not in leaves or (dim is not None and not (0 <= dim < len(shape) and shape[dim] == self.largest)):
                raise InputError(
                    f"token_dims has {name!r}: {dim}",
                    expected=f"an input, and a dimension of it that has {self.largest} elements in the example, the "
                    "largest bucket",
                    came=f"shape {shape}" if name in leaves else f"a name that is not among {', '.join(leaves)}",
                    remedy="correct the name or the dimension; give example inputs of the largest bucket",
                )

    def _found(self, said: Mapping[str, int | None], failure: str) -> dict[str, int]:
        """See the note "found, not guessed"."""
        found = {name: dim for name, dim in said.items() if dim is not None}
        if self._shared is None:
            unsaid = [
                name
                for name, leaf in zip(self.names, self._static.leaves, strict=True)
                if isinstance(leaf, Tensor) and self.largest in leaf.shape and name not in said
            ]
            if unsaid:
                raise self._not_found(unsaid, f"no trace with open dimensions: {failure}")
        else:
            classes = self._shared.classes()
            tokens = [one for one in classes if any(found.get(name) == dim for name, dim in one)]
            unsaid = [one for one in classes if one not in tokens and any(name not in said for name, _ in one)]
            if not found and len(unsaid) == 1:
                tokens, unsaid = unsaid, []
            if unsaid:
                listed = ", or ".join(" with ".join(f"{name}[{dim}]" for name, dim in one) for one in unsaid)
                raise self._not_found((name for one in unsaid for name, _ in one), listed)
            for name, dim in itertools.chain(*tokens):
                if said.get(name, dim) == dim and found.setdefault(name, dim) != dim:
                    raise CaptureError(
                        f"input {name!r} counts tokens in two dimensions",
                        expected="rows, which can be padded in one dimension",
                        came=f"dimensions {found[name]} and {dim}, always of one size",
                        remedy="build it inside the model from an input with one row per token",
                    )
        if not found:
            raise self._not_found((), "the model fixes the size of every dimension")
        return found

    def _not_found(self, names: Iterable[str], came: str) -> CaptureError:
        example = ", ".join(f"{name!r}: 0" for name in dict.fromkeys(names)) or "'input': 0"
        return CaptureError(
            "which dimensions of the inputs count tokens is not to be found",
            expected=f"dimensions of {self.largest}, the largest bucket, that vary together",
            came=came,
            remedy="give example inputs of the largest bucket (2 or more), in which no other dimension has this size; "
            f"or say it, as in Options(token_dims={{{example}}}), with None for an input that has none",
        )


@dataclass(frozen=True, slots=True)
class _OpenTrace:
    """The model's graph with every dimension of the largest count open."""

    module: GraphModule
    names: tuple[str, ...]
    largest: int

    def symbols(self) -> dict[tuple[str, int], Any]:
        """The symbol of each open dimension; dimensions that must agree have the same."""
        return {
            (node.name, dim): size.node.expr
            for node in _placeholders(self.module)
            for dim, size in enumerate(cast("Sequence[Any]", getattr(node.meta["val"], "shape", ())))
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number
        }

    def classes(self) -> list[_Class]:
        symbols = self.symbols()
        return [
            tuple(place for place, other in symbols.items() if other == symbol)
            for symbol in dict.fromkeys(symbols.values())
        ]

    def opens(self, found: Mapping[str, int]) -> bool:
        """Whether these dimensions are open, and whatever is tied to them is one of them."""
        tied = {place for one in self.classes() if set(one) & set(found.items()) for place in one}
        return tied == set(found.items())

    def at(self, size: int, dims: Dims, inputs: StaticInputs) -> TracedGraph | None:
        """The graph at this count; None where the trace does not hold for it. See "one trace for all counts"."""
        if not self.holds(size, dims):
            return None
        numbers = self._numbers(size, dims)
        module = GraphModule(self.module, copy.deepcopy(self.module.graph))
        try:
            _close(module, numbers)
            _propagate(module, inputs)
        except Exception:  # a symbol is left, or a shape function refuses: the count's own trace says why
            return None
        return _described(module)

    def _numbers(self, size: int, dims: Dims) -> dict[Any, int]:
        tokens = set(zip(self.names, dims, strict=True))
        return {symbol: size if place in tokens else self.largest for place, symbol in self.symbols().items()}

    def holds(self, size: int, dims: Dims) -> bool:
        """Whether the guards of the trace hold for this count; doubt counts as no."""
        numbers = self._numbers(size, dims)
        values = [node.meta["val"] for node in _placeholders(self.module)]
        sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
        environment = next(size.node.shape_env for size in sizes if isinstance(size, torch.SymInt))
        ranges = [(environment.var_to_range.get(symbol), number) for symbol, number in numbers.items()]
        if not all(bounds is not None and bounds.lower <= number <= bounds.upper for bounds, number in ranges):
            return False
        truths = (environment.replace(guard.expr).subs(numbers) for guard in environment.guards)
        return all(str(truth) == "True" for truth in truths)


def _open(model: nn.Module, static: StaticInputs, largest: int) -> tuple[_OpenTrace | None, str]:
    """The trace; or why there is none."""
    shapes = ShapesCollection()
    for leaf in static.tensors():
        if spec := {dim: Dim.AUTO for dim, size in enumerate(leaf.shape) if size == largest > 1}:
            shapes[leaf] = spec
    said = io.StringIO()
    try:
        with torch.no_grad(), using_machine(INLINE), _attributes_kept(model), contextlib.redirect_stderr(said):
            dynamic = shapes.dynamic_shapes(model, static.args, static.kwargs)
            program = torch.export.export(model, static.args, static.kwargs, dynamic_shapes=dynamic, strict=False)
            module = _module_of(program)
        _strip_checks(module.graph)
        _refuse_nested_graphs(module.graph)
        module.delete_all_unused_submodules()
        module.recompile()
    except AuxstreamError:
        raise
    except Exception as error:  # whatever the model or export raises; the trace of fixed shapes will say if that fails
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    sys.stderr.write(said.getvalue())
    opened = _OpenTrace(module, tuple(node.name for node in _placeholders(module)), largest)
    return (opened, "") if opened.symbols() else (None, "the model fixes the size of every dimension")


def _module_of(program: ExportedProgram) -> GraphModule:
    """The exported graph over the model's own tensors, without guards: `holds` asks for them."""
    try:
        module = program.module(check_guards=False)
    except TypeError:
        module = program.module()
    assert isinstance(module, GraphModule)
    return module


def _traced(model: nn.Module, inputs: StaticInputs) -> TracedGraph:
    return _described(trace(model, inputs.args, inputs.kwargs).graph_module)


def _described(module: GraphModule) -> TracedGraph:
    _drop_whole_slices(module)
    flow = Dataflow.of(module)
    names = tuple(node.name for node in _placeholders(module))
    return TracedGraph(module, names, flow.mutated("get_attr"), flow.mutated("placeholder"))


def _placeholders(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _close(module: GraphModule, numbers: Mapping[Any, int]) -> None:
    """Put numbers in place of the nodes that compute sizes."""
    scalars: dict[Node, int | float | bool] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        for kind, make in ((torch.SymInt, int), (torch.SymFloat, float), (torch.SymBool, bool)):
            if isinstance(value, kind):
                scalars[node] = make(value.node.expr.subs(dict(numbers)))
    for node in module.graph.nodes:
        node.args = map_arg(node.args, lambda argument: scalars.get(argument, argument))
        node.kwargs = map_arg(node.kwargs, lambda argument: scalars.get(argument, argument))
    for node in reversed(list(scalars)):
        module.graph.erase_node(node)
    module.recompile()


def _drop_whole_slices(module: GraphModule) -> None:
    """`x[:]`, which a trace with open dimensions leaves behind and one without does not."""
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.slice.Tensor or any(user.op == "output" for user in node.users):
            continue
        start, stop, step = (*node.args[2:], *(None, None, None)[len(node.args) - 2 :])
        if not node.kwargs and start in (None, 0) and stop in (None, sys.maxsize) and step in (None, 1):
            source = node.args[0]
            assert isinstance(source, Node)
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.recompile()


class _Shapes(Interpreter):
    """Gives every node its value at new input shapes."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach(), result)
        return result


def _propagate(module: GraphModule, inputs: StaticInputs) -> None:
    mode = FakeTensorMode()
    leaves = [mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in inputs.leaves]
    with torch.no_grad(), mode:
        _Shapes(module, mode).run(*leaves, enable_io_processing=False)
