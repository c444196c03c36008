"""Symbolic sizes as nodes of a graph.

Enters: a graph under construction and the sizes that kernels need. Leaves: for each size a node that holds it: one
there is, the size of a dimension that has it, or arithmetic over these. Invariant: every node made here has
`meta["val"]`, and a size that does not depend on the inputs' shapes is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .mlir import LoweringError


class Sizes:
    """What is known of sizes, node by node."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes: dict[Any, Node] = {}  # by sympy expression
        self._dims: dict[Any, tuple[Node, int]] = {}

    def see(self, node: Node) -> None:
        """Remember which sizes a node of the graph holds, or has among its dimensions."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self._nodes.setdefault(value.node.expr, node)
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) and not value.is_nested else ()):
            if isinstance(size, torch.SymInt):
                self._dims.setdefault(size.node.expr, (node, dim))

    def node(self, size: torch.SymInt) -> Node:
        """The node that holds `size`, made at the end of the graph if there is none."""
        expression = size.node.expr
        if expression not in self._nodes:
            if expression in self._dims:
                made = self._graph.call_function(torch.ops.aten.sym_size.int, self._dims[expression])
                made.meta["val"] = size
            else:
                made = self._computed(expression)
            self._nodes[expression] = made
        return self._nodes[expression]

    def _computed(self, expression: Any) -> Node:
        tracer = GraphAppendingTracer(self._graph)
        symbols = {symbol: Proxy(self._of_symbol(symbol), tracer) for symbol in expression.free_symbols}
        count = len(self._graph.nodes)
        result = sympy_interp(PythonReferenceAnalysis, symbols, expression).node
        for node in list(self._graph.nodes)[count:]:
            args, kwargs = map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)
        return result

    def _of_symbol(self, symbol: Any) -> Node:
        if symbol in self._nodes:
            return self._nodes[symbol]
        if symbol not in self._dims:
            raise LoweringError(
                f"no value of the graph has the size {symbol}",
                expected="sizes that follow from the shapes of the graph's inputs",
                came=str(symbol),
            )
        node, dim = self._dims[symbol]
        return self.node(node.meta["val"].shape[dim])
