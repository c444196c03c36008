"""Single ops as kernels, run the three ways there are: eager, by torch from its MLIR, and by Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from auxstream.kernels.build import Kind
from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.emit import Fusion, emit
from auxstream.kernels.grouping import Group, find_groups
from auxstream.kernels.launch import kernel_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ("kernel",) if DEVICE == "cuda" else ("reference", "kernel")
Arguments = tuple[Sequence[Any], dict[str, Any]]
Call = tuple[Any, Arguments]


def graph_of(calls: Sequence[Call]) -> GraphModule:
    """A graph that calls each target once; tensors among the arguments become its inputs, each once."""
    graph, mode = Graph(), FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Node] = {}
    for _, given in calls:
        for tensor in tensors_of(given):
            if id(tensor) not in made:
                made[id(tensor)] = graph.placeholder(f"x{len(made)}")
                made[id(tensor)].meta["val"] = mode.from_tensor(tensor)
    results: list[Node] = []
    for target, given in calls:
        args, kwargs = _mapped(given, lambda tensor: made[id(tensor)])
        results.append(graph.call_function(target, args, kwargs))
        with mode:
            args, kwargs = _mapped(given, lambda tensor: made[id(tensor)].meta["val"])
            results[-1].meta["val"] = target(*args, **kwargs)
    graph.output(tuple(results))
    return GraphModule(torch.nn.Module(), graph)


def _mapped(given: Arguments, change: Callable[[Tensor], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = given
    return map_aggregate((tuple(args), kwargs), lambda value: change(value) if isinstance(value, Tensor) else value)


def tensors_of(given: Arguments) -> list[Tensor]:
    """The tensors among arguments, each once, in order."""
    found: dict[int, Tensor] = {}
    _mapped(given, lambda tensor: found.setdefault(id(tensor), tensor))
    return list(found.values())


def fusion_of(target: Any, given: Arguments) -> Fusion | None:
    """The kernel of a single call; None where the op is opaque."""
    groups = find_groups(Dataflow.of(graph_of([(target, given)])), lambda node: True, least=1)
    return emit(groups[0]) if groups else None


def bundle_of(calls: Sequence[Call]) -> Fusion:
    """One kernel of many calls that have the same rows and columns and nothing else in common."""
    nodes = tuple(node for node in graph_of(calls).graph.nodes if node.op == "call_function")
    rows, width = nodes[0].meta["val"].shape[:-1], nodes[0].meta["val"].shape[-1]
    kinds = dict.fromkeys(nodes, Kind.FULL)
    return emit(Group(nodes, kinds, frozenset(), frozenset(), tuple(rows), width, None, nodes))


def inputs_of(fusion: Fusion, calls: Sequence[Call]) -> list[Tensor]:
    """The tensors among the arguments of calls that a kernel reads, in its order."""
    tensors = {id(tensor): tensor for _, given in calls for tensor in tensors_of(given)}
    by_name = {f"x{i}": tensor for i, tensor in enumerate(tensors.values())}
    return [by_name[node.name] for node in fusion.inputs]


def likeliest(fusion: Fusion, inputs: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """The launch that comes first among a kernel's variants, and outputs for it."""
    kernel = kernel_of(fusion.spec)
    outputs = kernel.fake(list(inputs), ())
    return next(iter(kernel.candidates(inputs, outputs, ()).values())), outputs


def results(fusion: Fusion, calls: Sequence[Call]) -> list[dict[str, Tensor]]:
    """What a kernel of calls gives for each, by way."""
    inputs, kernel = inputs_of(fusion, calls), kernel_of(fusion.spec)
    launch, outputs = likeliest(fusion, inputs)
    launch([*kernel.laid_out(inputs, launch.copied, ()), *outputs])
    if WAYS == ("kernel",):
        return [{"kernel": output} for output in outputs]
    references = kernel.reference(inputs, ())
    return [{"reference": one, "kernel": other} for one, other in zip(references, outputs, strict=True)]
