"""A whole FX graph as an MLIR module, and back.

Enters: a graph and its fusions (none is fine). Leaves: `GraphModuleText` - an MLIR module whose `@main` has one
`func.call` per node and one per fusion - and, from it, an FX graph. Invariant: with no fusions the way there and back
is the identity: names, targets, arguments with all their nesting, users, order and metadata.

What MLIR knows of a node is its operands, in order, and its type; the rest of its arguments is Python, and is kept
beside the module under the node's name. Values that are no tensors travel as `none`, or as `index` if they are numbers.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from . import mlir
from .body import MLIR_TYPE
from .dataflow import Dataflow
from .emit import Fusion

_OTHER_TYPES = {
    torch.float64: "f64",
    torch.uint8: "ui8",
    torch.uint16: "ui16",
    torch.uint32: "ui32",
    torch.uint64: "ui64",
    torch.complex64: "complex<f32>",
    torch.complex128: "complex<f64>",
    torch.complex32: "complex<f16>",
    torch.float8_e4m3fn: "f8E4M3FN",
    torch.float8_e5m2: "f8E5M2",
    torch.float8_e4m3fnuz: "f8E4M3FNUZ",
    torch.float8_e5m2fnuz: "f8E5M2FNUZ",
}


@dataclass(frozen=True, slots=True)
class Translation:
    """A graph in MLIR. `nodes` and `fusions` hold, by name, what MLIR does not carry."""

    module: Any
    nodes: Mapping[str, Node]
    fusions: Mapping[str, Fusion]

    def __str__(self) -> str:
        return str(self.module)


def to_mlir(gm: GraphModule, fusions: Sequence[Fusion] = (), flow: Dataflow | None = None) -> Translation:
    """The graph as a module: groups as calls of their kernels, every other node as a call of itself."""
    nodes = list(gm.graph.nodes)
    steps: list[Node | Fusion] = list(nodes)
    if fusions:
        steps = list(_contracted(flow or Dataflow.of(gm), fusions))
    writer = _Writer()
    for step in steps:
        if isinstance(step, Node):
            writer.node(step)
        else:
            writer.fusion(step)
    return Translation(mlir.parse(writer.text()), {node.name: node for node in nodes}, writer.fusions)


def to_fx(translation: Translation, owner: GraphModule) -> Graph:
    """The module as a graph, every node made anew."""
    return _Reader(translation, owner).graph()


def _contracted(flow: Dataflow, fusions: Sequence[Fusion]) -> Iterator[Node | Fusion]:
    """Nodes and fusions in an order the dataflow allows, as near to the graph's own as it can be."""
    home = {node: fusion for fusion in fusions for node in (*fusion.group.nodes, *fusion.group.hidden)}
    step_of: list[Node | Fusion] = [home.get(node, node) for node in flow.nodes]
    place: dict[Node | Fusion, int] = {}
    for position, step in enumerate(step_of):
        place[step] = position  # a fusion stands where its last member stood
    before: dict[Node | Fusion, set[Node | Fusion]] = {step: set() for step in place}
    after: dict[Node | Fusion, list[Node | Fusion]] = {step: [] for step in place}
    for position, step in enumerate(step_of):
        for other in flow.predecessors[position]:
            if step_of[other] is not step and step_of[other] not in before[step]:
                before[step].add(step_of[other])
                after[step_of[other]].append(step)
    waiting = {step: len(others) for step, others in before.items()}
    ready = [(place[step], step) for step, count in waiting.items() if not count]
    heapq.heapify(ready)
    done = 0
    while ready:
        _, step = heapq.heappop(ready)
        done += 1
        yield step
        for other in after[step]:
            waiting[other] -= 1
            if not waiting[other]:
                heapq.heappush(ready, (place[other], other))
    assert done == len(place), "the groups wait for each other"


def _operands(node: Node) -> list[Node]:
    """Every mention of a node among the arguments, in order, repeats included."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), lambda other: found.append(other) or other)
    return found


def _type(value: Any) -> str:
    match value:
        case Tensor():
            element = MLIR_TYPE.get(value.dtype) or _OTHER_TYPES.get(value.dtype)
            if element is None or value.layout != torch.strided:
                return "none"
            dims = "".join(f"{'?' if isinstance(size, torch.SymInt) else int(size)}x" for size in value.shape)
            return f"tensor<{dims}{element}>"
        case tuple() | list():
            return f"tuple<{', '.join(map(_type, value))}>"
        case bool():
            return "i1"
        case int() | torch.SymInt():
            return "index"
        case float() | torch.SymFloat():
            return "f64"
        case _:
            return "none"


class _Writer:
    def __init__(self) -> None:
        self.types: dict[Node, str] = {}
        self.names: dict[Node, str] = {}
        self.arguments: list[str] = []
        self.lines: list[str] = []
        self.declared: dict[tuple[str, str], str] = {}
        self.kernels: dict[str, str] = {}
        self.fusions: dict[str, Fusion] = {}
        self.ends = ("", "")

    def node(self, node: Node) -> None:
        given = _operands(node)
        if node.op == "output":
            self.ends = (", ".join(self.names[a] for a in given), ", ".join(self.types[a] for a in given))
            return
        type = self.types[node] = _type(node.meta.get("val"))
        name = self.names[node] = f"%{node.name}"
        if node.op == "placeholder":
            self.arguments.append(f'{name}: {type} {{fx.name = "{node.name}"}}')
            return
        target = node.target if isinstance(node.target, str) else _target_name(node.target)
        self._call(f"{node.op} {target}", given, [type], [name], f'fx.name = "{node.name}"')

    def fusion(self, fusion: Fusion) -> None:
        key = f"{fusion.spec.name}.{len(self.fusions)}"
        self.fusions[key] = fusion
        self.kernels.setdefault(fusion.spec.name, fusion.spec.mlir)
        for node in fusion.group.outputs:
            self.types[node], self.names[node] = _type(node.meta["val"]), f"%{node.name}"
        results = [self.types[node] for node in fusion.group.outputs]
        names = [self.names[node] for node in fusion.group.outputs]
        self._call(f"fused {fusion.spec.name}", fusion.inputs, results, names, f'fx.fusion = "{key}"')

    def _call(
        self, target: str, given: Sequence[Node], types: Sequence[str], names: Sequence[str], attribute: str
    ) -> None:
        signature = f"({', '.join(self.types[a] for a in given)}) -> ({', '.join(types)})"
        symbol = self.declared.setdefault((target, signature), f"{target} #{len(self.declared)}".replace('"', "'"))
        operands = ", ".join(self.names[a] for a in given)
        self.lines.append(f'{", ".join(names)} = func.call @"{symbol}"({operands}) {{{attribute}}} : {signature}')

    def text(self) -> str:
        results, types = self.ends
        lines = [f"  func.func @main({', '.join(self.arguments)}) -> ({types}) {{"]
        lines += [f"    {line}" for line in self.lines]
        lines.append(f"    return {results} : {types}" if results else "    return")
        lines.append("  }")
        lines += [f'  func.func private @"{symbol}"{sig}' for (_, sig), symbol in self.declared.items()]
        return "\n".join(["module {", *lines, "}"])


def _target_name(target: Any) -> str:
    name = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return name.replace("\\", "/")


class _Reader:
    def __init__(self, translation: Translation, owner: GraphModule) -> None:
        self.translation = translation
        self.owner = owner
        self.new = Graph(owner)
        self.made: dict[Any, Node] = {}

    def graph(self) -> Graph:
        main = next(op.operation for op in self.translation.module.body.operations if _symbol(op) == "main")
        block = main.regions[0].blocks[0]
        names = [attribute["fx.name"].value for attribute in main.attributes["arg_attrs"]] if block.arguments else []
        for argument, name in zip(block.arguments, names, strict=True):
            self.made[argument] = self._remade(self.translation.nodes[name], [])
        for op in block.operations:
            call = op.operation
            given = [self.made[operand] for operand in call.operands]
            if call.name == "func.return":
                output = next(node for node in self.translation.nodes.values() if node.op == "output")
                self._remade(output, given)
            elif "fx.fusion" in call.attributes:
                self._fused(self.translation.fusions[call.attributes["fx.fusion"].value], given, call.results)
            else:
                node = self.translation.nodes[call.attributes["fx.name"].value]
                self.made[call.results[0]] = self._remade(node, given)
        self.new.set_codegen(self.owner.graph._codegen)
        return self.new

    def _remade(self, node: Node, given: list[Node]) -> Node:
        """The same node, with `given` for the nodes among its arguments, in order."""
        rest = iter(given)
        args, kwargs = map_arg((node.args, node.kwargs), lambda _: next(rest))
        new = self.new.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        new.meta = dict(node.meta)
        return new

    def _fused(self, fusion: Fusion, given: list[Node], results: Any) -> None:
        """A call of the kernel, and under each member's own name the result that was that member's."""
        from .launch import operator as kernel_operator

        sizes = [self._size(size) for size in fusion.sizes]
        kernel = self.new.call_function(kernel_operator(fusion.spec), (given, sizes))
        members = fusion.group.nodes
        kernel.meta = {"val": [node.meta["val"] for node in fusion.group.outputs], "auxstream_fused": fusion.spec.name}
        for key in ("stack_trace", "nn_module_stack"):
            found = next((node.meta[key] for node in members if node.meta.get(key)), None)
            if found is not None:
                kernel.meta[key] = found
        if fusion.group.region is not None:
            kernel.meta |= {"auxstream": fusion.group.region, "skip_mlir_fusion": True}
        for number, (node, result) in enumerate(zip(fusion.group.outputs, results, strict=True)):
            element = self.new.create_node("call_function", operator.getitem, (kernel, number), {}, node.name)
            element.meta = dict(node.meta)
            self.made[result] = element

    def _size(self, size: Any) -> Node:
        """A node that holds a symbolic size: one there is, or the size of a dimension that has it."""
        for node in self.new.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
                return node
        for node in list(self.new.nodes):
            value = node.meta.get("val")
            for dim, other in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                    found = self.new.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    found.meta["val"] = size
                    return found
        raise mlir.LoweringError(f"no node of the graph has the size {size}")


def _symbol(op: Any) -> str:
    return op.operation.attributes["sym_name"].value
