"""`torch.compile(model, backend="auxstream")`: what Dynamo finds, compiled as `compile` does.

Enters: an FX graph of torch calls, in which weights and buffers are inputs like all others, and sizes may be symbols.
Leaves: a function that runs a `CompiledModel`. Invariant: a graph reads the weights it was captured with; other weights
get a graph of their own.

Note "weights are bound again". Inputs that are a module's own (parameters, buffers, what `mark_static_address` was
called for) become parameters and buffers of the traced module: nothing of them is copied at a call, and what the model
writes to them it writes in place. Dynamo uses one graph for all modules of the same code, and goes on using it when a
weight is replaced; so a call whose weights lie elsewhere than in any capture is captured anew, and what was captured
for weights that are gone goes with them.
"""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch._guards import CompileContext
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..runtime.errors import CaptureError, InputError, SettingsError
from .arguments import exact
from .compiled import CompiledModel
from .compiler import compile
from .options import Options
from .source import warn_user

MANY_SIZES: Final = 8
"""So many graphs of one code, each for other sizes or numbers, are made before a warning."""

_Key = tuple[tuple[Any, ...], tuple[int, ...]]
"""Sizes and numbers; where the module's own tensors lie."""


def auxstream(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend. Compiles at the first call, and for other weights or sizes when they come.

    Args:
        gm: Dynamo's graph.
        example_inputs: Dynamo's; not read, for a call's own come soon.
        options: fields of `Options`, and `config`: a YAML file that has them. Outputs are copies unless `copy_outputs`
            is False here, not in the file: Dynamo may run one graph several times in a step.
        mode: of torch's own backend; not taken.

    Returns:
        what Dynamo calls in place of the graph.

    Raises:
        SettingsError: options that are none.
    """
    if mode is not None:
        raise SettingsError(
            "backend 'auxstream' takes no mode",
            expected="options={...}, as of auxstream.Options",
            came=f"mode={mode!r}",
        )
    return _Subgraph(gm, _options(dict(options or {})))


def _options(given: dict[str, Any]) -> Options:
    config = given.pop("config", None)
    base = Options() if config is None else Options.from_yaml(Path(config))
    try:
        return replace(base, **{"copy_outputs": True, **given})
    except TypeError as error:
        raise SettingsError(
            "unknown option of backend 'auxstream'",
            expected="config, or one of " + ", ".join(Options.__dataclass_fields__),
            came=", ".join(set(given) - set(Options.__dataclass_fields__)) or str(error),
        ) from error


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What Dynamo's inputs are, by position."""

    names: tuple[str, ...]
    bound: tuple[int, ...]
    """A module's own tensors."""
    given: tuple[int, ...]
    """Tensors of each call."""
    sizes: Mapping[int, tuple[int, int]]
    """Symbols: of which input they are which dimension."""
    constants: tuple[int, ...]
    """Other numbers."""
    floats: tuple[int, ...]
    """Numbers that came as tensors of one element, as Dynamo passes floats that vary."""
    symbolic: bool


def _read(gm: GraphModule) -> _Inputs:
    nodes = gm.graph.find_nodes(op="placeholder")
    values = [node.meta.get("example_value") for node in nodes]
    bound = [p for p, node in enumerate(nodes) if isinstance(values[p], Tensor) and _is_modules_own(node, values[p])]
    floats = [p for p, node in enumerate(nodes) if isinstance(values[p], Tensor) and _is_float(node, values[p])]
    given = [p for p, value in enumerate(values) if isinstance(value, Tensor) and p not in (*bound, *floats)]
    dims = {
        str(size): (p, dim)
        for p in reversed(given)
        for dim, size in reversed(list(enumerate(values[p].shape)))
        if isinstance(size, torch.SymInt)
    }
    rest = [p for p, value in enumerate(values) if not isinstance(value, Tensor)]
    sizes = {p: dims[str(values[p])] for p in rest if isinstance(values[p], torch.SymInt) and str(values[p]) in dims}
    constants = [p for p in rest if p not in sizes]
    return _Inputs(_named(nodes), tuple(bound), tuple(given), sizes, tuple(constants), tuple(floats), bool(dims))


def _is_float(node: Node, value: Tensor) -> bool:
    plain = value.dtype is torch.float64 and not value.dim() and value.device.type == "cpu"
    return plain and all((user.op, user.target) == ("call_method", "item") for user in node.users)


def _is_modules_own(node: Node, value: Tensor) -> bool:
    if isinstance(value, nn.Parameter) or "_dynamo_static_input_type" in node.meta:
        return True
    source = getattr(node, "_dynamo_source", None)
    kind: Any = getattr(source, "guard_source", None)
    kind = kind() if callable(kind) else kind
    return kind is not None and (kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module())


def _named(nodes: Sequence[Node]) -> tuple[str, ...]:
    """The names of forward's own arguments where these are inputs; elsewhere Dynamo's."""
    names: list[str] = []
    for node in nodes:
        source: Any = getattr(getattr(node, "_dynamo_source", None), "name", "")
        found = re.fullmatch(r"L\['([A-Za-z_]\w*)'\]", str(source() if callable(source) else source))
        name = found[1] if found else node.name
        names.append(node.name if name in names else name)
    return tuple(names)


class _Subgraph:
    """One graph of Dynamo's, and what was compiled of it: per weights, numbers and sizes."""

    def __init__(self, gm: GraphModule, options: Options) -> None:
        self._gm = gm
        self._options = options
        self._inputs = _read(gm)
        self._made: dict[_Key, CompiledModel] = {}
        self._objects: dict[_Key, tuple[int, ...]] = {}
        self._gone: list[Any] = []
        self._name = f"torch.compile {CompileContext.current_compile_id() or ''}".strip()
        self._bucketed = bool(options.buckets) and self._inputs.symbolic
        self._wants_gradients = any(
            isinstance(leaf, Node) and getattr(leaf.meta.get("example_value"), "requires_grad", False)
            for leaf in pytree.tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args)
        )

    def __call__(self, *args: Any) -> Any:
        inputs = self._inputs
        if self._wants_gradients:
            raise CaptureError(
                "backend 'auxstream' records no gradients",
                expected="a call under torch.no_grad() or torch.inference_mode()",
                came="one whose results require gradients",
                remedy="wrap the call, or compile for training with another backend",
            )
        given = [args[p] for p in inputs.given]
        shapes = () if self._bucketed or not inputs.symbolic else tuple(tensor.shape for tensor in given)
        numbers = (*(exact(args[p]) for p in inputs.constants), *(exact(args[p].item()) for p in inputs.floats))
        key = (shapes, *numbers), tuple(args[p].data_ptr() for p in inputs.bound)
        compiled = self._made.get(key)
        if compiled is None:
            compiled = self._compile(key, args, given)
        return compiled(*given)

    def _compile(self, key: _Key, args: Sequence[Any], given: list[Tensor]) -> CompiledModel:
        options = self._options if self._bucketed else replace(self._options, buckets=(), token_dims={}, pad={})
        if self._bucketed:
            self._refuse_other_size(given)
        owners = [args[p] for p in self._inputs.bound]
        objects = tuple(map(id, owners))
        for other in [one for one, those in self._objects.items() if those == objects and one[1] != key[1]]:
            self._forget(other)  # the same parameters, which lie elsewhere by now
        compiled = compile(_bound(self._gm, self._inputs, args), tuple(given), options, name=self._name)
        self._made[key], self._objects[key] = compiled, objects
        myself = weakref.ref(self)

        def forget(_: object) -> None:
            if (subgraph := myself()) is not None:
                subgraph._forget(key)

        self._gone = [gone for gone in self._gone if gone() is not None]
        self._gone += [weakref.ref(owner, forget) for owner in owners]
        if len({form for form, _ in self._made}) == MANY_SIZES + 1:
            warn_user(
                f"{self._name} has captured more than {MANY_SIZES} graphs, one for each size and each number that "
                "came. Give options={'buckets': [...]} to capture some sizes and pad the others; pass numbers as "
                "tensors.",
            )
        return compiled

    def _refuse_other_size(self, given: Sequence[Tensor]) -> None:
        largest = self._options.buckets[-1]
        named = dict(zip((self._inputs.names[p] for p in self._inputs.given), given, strict=True))
        if not any(largest in tensor.shape for tensor in given):
            raise InputError(
                f"{self._name} compiles for buckets, and its first call is not of the largest",
                expected=f"a call with {largest} rows first: its inputs are the example that padding is checked with",
                came=", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items()),
                remedy=f"warm up with {largest} rows that differ",
            )

    def _forget(self, key: _Key) -> None:
        self._made.pop(key, None)
        self._objects.pop(key, None)


def _bound(gm: GraphModule, inputs: _Inputs, args: Sequence[Any]) -> GraphModule:
    """Dynamo's graph as a function of each call's tensors alone: see the note "weights are bound again"."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    nodes = [copies[node] for node in gm.graph.find_nodes(op="placeholder")]
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            attributes[str(node.target)] = operator.attrgetter(str(node.target))(gm)
    for position in inputs.given:
        nodes[position].target = inputs.names[position]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for position, node in enumerate(nodes):
        if position in inputs.given:
            continue
        with graph.inserting_before(first):
            if position in inputs.bound:
                tensor = args[position].detach()  # whatever becomes of the parameter, this is the memory it had
                own = isinstance(args[position], nn.Parameter)
                attributes[f"bound_{node.name}"] = nn.Parameter(tensor, requires_grad=False) if own else tensor
                node.replace_all_uses_with(graph.get_attr(f"bound_{node.name}"))
            elif position in inputs.sizes:
                source, dim = inputs.sizes[position]
                node.replace_all_uses_with(graph.call_function(torch.ops.aten.sym_size.int, (nodes[source], dim)))
            elif position in inputs.floats:
                for item in list(node.users):
                    _substitute(item, args[position].item())
                    graph.erase_node(item)
            else:
                _substitute(node, args[position])
        graph.erase_node(node)
    bound = GraphModule(cast("Any", attributes), graph)
    bound.graph._owning_module = None  # they would hold one another, and the weights
    return bound


def _substitute(node: Node, value: Any) -> None:
    """A literal in place of an input."""
    for user in list(node.users):
        args, kwargs = map_arg((user.args, user.kwargs), lambda used: value if used is node else used)
        user.args, user.kwargs = args, kwargs
