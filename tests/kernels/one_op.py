"""One op as one kernel, run the three ways there are: eager, by torch from its MLIR, and by Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from auxstream.kernels.dataflow import Dataflow
from auxstream.kernels.emit import Fusion, emit
from auxstream.kernels.grouping import find_groups
from auxstream.kernels.launch import interpreting, kernel_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ("kernel",) if DEVICE == "cuda" else ("reference", "kernel")


def graph_of(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> GraphModule:
    """A graph that calls `target` once; tensors among the arguments become its inputs."""
    graph, mode = Graph(), FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Node] = {}

    def node_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = graph.placeholder(f"x{len(made)}")
            made[id(value)].meta["val"] = mode.from_tensor(value)
        return made[id(value)]

    node_args, node_kwargs = map_aggregate(tuple(args), node_of), map_aggregate(kwargs, node_of)
    call = graph.call_function(target, node_args, node_kwargs)
    with mode:
        fake = map_aggregate((tuple(args), kwargs), lambda v: made[id(v)].meta["val"] if isinstance(v, Tensor) else v)
        call.meta["val"] = target(*fake[0], **fake[1])
    graph.output(call)
    return GraphModule(torch.nn.Module(), graph)


def fusion_of(target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Fusion | None:
    """The kernel of a single call; None where the op is opaque."""
    gm = graph_of(target, args, kwargs or {})
    groups = find_groups(Dataflow.of(gm), lambda node: True, least=1)
    return emit(groups[0]) if groups else None


def tensors_of(args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> list[Tensor]:
    """The tensors among arguments, each once, in order."""
    found: dict[int, Tensor] = {}
    map_aggregate((tuple(args), kwargs or {}), lambda v: found.setdefault(id(v), v) if isinstance(v, Tensor) else v)
    return list(found.values())


def results(fusion: Fusion, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """The kernel's result, by way."""
    by_name = {f"x{i}": tensor for i, tensor in enumerate(tensors_of(args, kwargs))}
    inputs = [by_name[node.name] for node in fusion.inputs]
    kernel = kernel_of(fusion.spec)
    ways: dict[str, Callable[..., list[Tensor]]] = {"reference": kernel.reference, "kernel": kernel}
    assert DEVICE == "cuda" or interpreting()
    return {way: ways[way](inputs, ())[0] for way in WAYS}
