"""A whole FX graph as an MLIR module, and back.

Enters: a graph and its fusions (none is fine). Leaves: a `Translation` - an MLIR module whose `@main` has one
`func.call` per node and one per fusion - and, from it, an FX graph. Invariant: with no fusions the way there and back
is the identity: names, targets, arguments with all their nesting, users, order and metadata.

What MLIR knows of a node is its operands, in order, and its type; the rest of its arguments is Python, and is kept
beside the module under the node's name. Values that are no tensors travel as `none`, or as `index` if they are numbers.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
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
from .sizes import Sizes
from .steps import steps

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


_ODD = re.compile(r'[^ -~]|["\\]')


@dataclass(frozen=True, slots=True)
class Translation:
    """A graph in MLIR. `nodes` and `fusions` hold, by name, what MLIR does not carry."""

    module: Any
    nodes: Mapping[str, Node]
    fusions: Mapping[str, Fusion]

    def __str__(self) -> str:
        """The module, and behind it each kernel's own."""
        kernels = {fusion.spec.name: fusion.spec.mlir for fusion in self.fusions.values()}
        return "\n".join([str(self.module), *(f"// {name}\n{text}" for name, text in kernels.items())])


def to_mlir(gm: GraphModule, fusions: Sequence[Fusion] = (), flow: Dataflow | None = None) -> Translation:
    """The graph as a module: groups as calls of their kernels, every other node as a call of itself.

    Raises LoweringError for a graph that is no graph: two nodes of one name, or nodes behind its output.
    """
    writer = _Writer()
    for step in steps(flow or Dataflow.of(gm), fusions) if fusions else gm.graph.nodes:
        if isinstance(step, Node):
            writer.node(step)
        else:
            writer.fusion(step)
    return Translation(mlir.parse(writer.text()), writer.nodes, writer.fusions)


def to_fx(translation: Translation, owner: GraphModule) -> Graph:
    """The module as a graph for `owner`, every node made anew."""
    return _Reader(translation, owner).graph()


def _operands(node: Node) -> list[Node]:
    """Every mention of a node among the arguments, in order, repeats included."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), lambda other: found.append(other) or other)
    return found


def _type(value: Any) -> str:
    match value:
        case Tensor():
            element = MLIR_TYPE.get(value.dtype) or _OTHER_TYPES.get(value.dtype)
            if element is None or value.layout != torch.strided or value.is_nested:
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
        self.nodes: dict[str, Node] = {}
        self.fusions: dict[str, Fusion] = {}
        self.values: dict[Node, tuple[str, str]] = {}  # the name and type of each node's value
        self.arguments: list[str] = []
        self.lines: list[str] = []
        self.declared: dict[tuple[str, str], str] = {}
        self.ends: list[Node] | None = None

    def node(self, node: Node) -> None:
        if node.name in self.nodes or self.ends is not None:
            raise mlir.LoweringError(
                "this graph cannot be run as it is",
                expected="node names that are unique, and the output last",
                came=f"{node.format_node()}",
            )
        self.nodes[node.name] = node
        if node.op == "output":
            self.ends = _operands(node)
            return
        value = self._value(node)
        if node.op == "placeholder":
            # Inputs need not come first in a graph: `fx.place` is how many calls stand ahead of this one.
            attributes = f"fx.name = {_quoted(node.name)}, fx.place = {len(self.lines)} : i64"
            self.arguments.append(f"{value[0]}: {value[1]} {{{attributes}}}")
            return
        target = node.target if isinstance(node.target, str) else _target_name(node.target)
        self._call(f"{node.op} {target}", _operands(node), [node], f"fx.name = {_quoted(node.name)}")

    def fusion(self, fusion: Fusion) -> None:
        key = f"{fusion.spec.name}.{len(self.fusions)}"
        self.fusions[key] = fusion
        for node in fusion.group.outputs:
            self._value(node)
        self._call(f"fused {fusion.spec.name}", fusion.inputs, fusion.group.outputs, f"fx.fusion = {_quoted(key)}")

    def _value(self, node: Node) -> tuple[str, str]:
        self.values[node] = f"%{len(self.values)}", _type(node.meta.get("val"))
        return self.values[node]

    def _names(self, nodes: Sequence[Node]) -> str:
        return ", ".join(self.values[node][0] for node in nodes)

    def _types(self, nodes: Sequence[Node]) -> str:
        return ", ".join(self.values[node][1] for node in nodes)

    def _call(self, target: str, given: Sequence[Node], results: Sequence[Node], attribute: str) -> None:
        signature = f"({self._types(given)}) -> ({self._types(results)})"
        symbol = self.declared.setdefault((target, signature), _quoted(f"{target} #{len(self.declared)}"))
        call = f"func.call @{symbol}({self._names(given)}) {{{attribute}}} : {signature}"
        self.lines.append(f"{self._names(results)} = {call}")

    def text(self) -> str:
        ends = self.ends or []
        output = " attributes {fx.output}" if self.ends is not None else ""
        lines = [f"  func.func @main({', '.join(self.arguments)}) -> ({self._types(ends)}){output} {{"]
        lines += [f"    {line}" for line in self.lines]
        lines.append(f"    return {self._names(ends)} : {self._types(ends)}" if ends else "    return")
        lines.append("  }")
        lines += [f"  func.func private @{symbol}{signature}" for (_, signature), symbol in self.declared.items()]
        return "\n".join(["module {", *lines, "}"])


def _quoted(text: str) -> str:
    """An MLIR string literal; whatever is no plain printable character goes as hexadecimal bytes."""
    return '"' + _ODD.sub(lambda found: "".join(f"\\{byte:02X}" for byte in found[0].encode()), text) + '"'


def _target_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


class _Reader:
    def __init__(self, translation: Translation, owner: GraphModule) -> None:
        old = owner.graph
        self.translation = translation
        self.new = Graph(owner, old._tracer_cls, old._tracer_extras)
        self.new.set_codegen(old._codegen)
        self.new._co_fields = dict(old._co_fields)
        # What is made besides must leave the names of nodes still to come alone.
        self.reserved = self.new._graph_namespace._used_names
        self.reserved.update(translation.nodes)
        self.reserved.update(node.name for fusion in translation.fusions.values() for node in fusion.group.outputs)
        self.made: dict[Any, Node] = {}
        self.sizes = Sizes(self.new)

    def graph(self) -> Graph:
        main = next(op.operation for op in self.translation.module.body.operations if _symbol(op) == "main")
        block = main.regions[0].blocks[0]
        described = main.attributes["arg_attrs"] if len(block.arguments) else ()
        inputs = [(facts["fx.place"].value, facts["fx.name"].value) for facts in described]
        waiting = list(zip(block.arguments, inputs, strict=True))
        for number, op in enumerate(block.operations):
            while waiting and waiting[0][1][0] <= number:
                argument, (_, name) = waiting.pop(0)
                self.made[argument] = self._remade(self.translation.nodes[name], [])
            call = op.operation
            given = [self.made[operand] for operand in call.operands]
            if "fx.fusion" in call.attributes:
                self._fused(self.translation.fusions[call.attributes["fx.fusion"].value], given, call.results)
            elif "fx.name" in call.attributes:
                node = self.translation.nodes[call.attributes["fx.name"].value]
                self.made[call.results[0]] = self._remade(node, given)
            elif "fx.output" in main.attributes:
                output = next(node for node in self.translation.nodes.values() if node.op == "output")
                self._remade(output, given)
        return self.new

    def _remade(self, node: Node, given: list[Node]) -> Node:
        """The same node, with `given` for the nodes among its arguments, in order."""
        assert len(given) == len(_operands(node)), f"{node} lost or gained an operand on its way through MLIR"
        rest = iter(given)
        args, kwargs = map_arg((node.args, node.kwargs), lambda _: next(rest))
        return self._named(node, node.op, node.target, args, kwargs)

    def _named(self, node: Node, op: str, target: Any, args: Any, kwargs: Any = None) -> Node:
        """A new node under the name and with the metadata of `node`."""
        self.reserved.discard(node.name)
        new = self.new.create_node(op, target, args, kwargs, node.name, node.type)
        if new.name != node.name:  # export names inputs as the model does, `input` and `max` too
            new.name = node.name
            self.new._graph_namespace._rename_object(new, node.name)
        new.meta = dict(node.meta)
        self.sizes.see(new)
        return new

    def _fused(self, fusion: Fusion, given: list[Node], results: Any) -> None:
        """A call of the kernel, and under each member's own name the result that was that member's."""
        from .launch import operator as kernel_operator

        sizes = [self.sizes.node(size) for size in fusion.sizes]
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
            self.made[result] = self._named(node, "call_function", operator.getitem, (kernel, number))


def _symbol(op: Any) -> str:
    return op.operation.attributes["sym_name"].value
