"""From a module to one ATen FX graph.

Enters: a module and example inputs on the device they will run on. Leaves: `TracedGraph`: a GraphModule over the
module's own parameters and buffers, in which cache writes are still in-place ops, every node has `meta["val"]`, and no
assertions, guards or dead nodes are left. Invariant: the module, its buffers and the RNG are as they were, and running
the graph mutates the module's own buffers, as the module's forward does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..kernels.dataflow import Dataflow
from ..runtime.errors import AuxstreamError, TraceError
from ..runtime.machine import INLINE, using_machine
from .forward_graph import ForwardGraph

# Checks that tracing leaves behind, and profilers' marks. They compute nothing, and a check on the device is a kernel.
_CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "_functional_assert_scalar",
    "_functional_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_record_function_enter",
    "_record_function_enter_new",
    "_record_function_exit",
)
_CONTEXTS = (torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast)
_TABLES = frozenset(vars(nn.Module()))
_DATA_DEPENDENT = ("data-dependent", "data dependent", "guardondatadependent", "unbacked", "_local_scalar_dense")


@dataclass(frozen=True, slots=True)
class TracedGraph:
    """A model as one graph. `graph_module` is called like the model and returns what it returns."""

    graph_module: GraphModule
    input_names: tuple[str, ...]
    """Of the placeholders: the leaves of `(args, kwargs)`, in order."""
    mutated_buffers: tuple[str, ...]
    """Qualified names of the parameters and buffers the graph writes in place."""
    mutated_inputs: tuple[str, ...]
    """Names of the placeholders the graph writes in place."""

    def written_tensors(self) -> list[Tensor]:
        """The tensors of `mutated_buffers`."""
        owners = [name.rpartition(".") for name in self.mutated_buffers]
        return [getattr(self.graph_module.get_submodule(owner), leaf) for owner, _, leaf in owners]

    def __str__(self) -> str:
        calls = sum(node.op == "call_function" for node in self.graph_module.graph.nodes)
        lines = [f"traced graph: {calls} ops, inputs {', '.join(self.input_names)}"]
        lines += [f"  writes buffer {name}" for name in self.mutated_buffers]
        lines += [f"  writes input {name}" for name in self.mutated_inputs]
        return "\n".join(lines)


def trace(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> TracedGraph:
    """Trace `model(*args, **kwargs)` without running it on values. Shapes are static. No other thread may run modules
    meanwhile: tracing patches `nn.Module` for the whole process. Regions written by hand in the model leave no
    mark: their work is traced as if on one stream.

    Raises TraceError for control flow that depends on values, for values that become shapes, and for whatever else
    keeps forward from being one graph.
    """
    arguments, keywords = tuple(args), dict(kwargs or {})
    with torch.no_grad(), using_machine(INLINE), _attributes_kept(model):
        forward = _followed(model, arguments, keywords)
        _strip_checks(forward.graph)
        _refuse_nested_graphs(forward.graph)
        gm = forward.module()
    gm.graph.lint()
    _value_nothing(gm)
    _refuse_symbols(gm)
    flow = Dataflow.of(gm)
    names = tuple(node.name for node in gm.graph.nodes if node.op == "placeholder")
    return TracedGraph(gm, names, flow.mutated("get_attr"), flow.mutated("placeholder"))


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Generator[None]:
    """Tracing executes writes to tensors that are plain attributes, neither parameters nor buffers: undo them."""
    attributes = [leaf for module in model.modules() for leaf in pytree.tree_leaves(_plain(module))]
    before = [(tensor, tensor.detach().clone()) for tensor in attributes if isinstance(tensor, Tensor)]
    try:
        yield
    finally:
        for tensor, values in before:
            tensor.copy_(values)


def _plain(module: nn.Module) -> list[Any]:
    """The module's attributes, without torch's own tables of parameters, buffers, submodules and hooks."""
    return [value for name, value in vars(module).items() if name not in _TABLES]


def _followed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardGraph:
    try:
        return ForwardGraph(model, args, kwargs)
    except AuxstreamError:
        raise  # from a compiled model within this one
    except Exception as error:
        raise _explain(model, error) from error


def _strip_checks(graph: Graph) -> None:
    """Take out checks, marks for profilers, dead nodes, and grad modes and autocast that nothing is done under."""
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        guard = node.op == "call_module" and "guard" in str(node.target)
        check = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.split("::")[-1] in _CHECKS
        if guard or check:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        entered = node.prev
        if node.target is torch.amp.autocast_mode._exit_autocast and entered in node.args:
            graph.erase_node(node)
            graph.erase_node(entered)
        if node.target is torch._C._set_grad_enabled:
            if entered.target is node.target:
                graph.erase_node(entered)
            if node.args == (False,):  # as it is while tracing
                graph.erase_node(node)


def _refuse_nested_graphs(graph: Graph) -> None:
    """Contexts entered and branches taken inside forward stay graphs within the graph, which the rest cannot read."""
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator) or node.target in _CONTEXTS:
            raise TraceError(
                f"the model holds a {getattr(node.target, '__name__', node.target)} that stays a graph of its own",
                expected="one flat graph of tensor ops",
                came=f"{node.name} at {where(node)}",
                remedy="enter autocast or grad modes around compile() in place of inside forward; use torch.where in "
                "place of torch.cond",
            )


def _value_nothing(gm: GraphModule) -> None:
    """What an op gives that returns nothing, and writes into what it is given: None."""
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
            node.meta.setdefault("val", None)


def _refuse_symbols(gm: GraphModule) -> None:
    """Shapes are static, so a symbol left in the graph stands for a value read from a tensor."""
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        assert "val" in node.meta, f"{node.name} has no value"
        for leaf in pytree.tree_leaves(node.meta["val"]):
            sizes: tuple[Any, ...] = tuple(leaf.shape) if isinstance(leaf, Tensor) else (leaf,)
            if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
                raise TraceError(
                    f"the result of {node.target} ({node.name}) depends on values of tensors",
                    expected="shapes and scalars that are known before the model runs",
                    came=f"{leaf} at {where(node)}",
                    remedy="replace the op by one with a static result; for Hugging Face experts build the model "
                    "with experts_implementation='grouped_mm'",
                )


def where(node: Node) -> str:
    """The innermost line of the model that `node` comes from, or "an unknown line"."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ")]
    return frames[-1] if frames else "an unknown line"


def _explain(model: nn.Module, error: Exception) -> TraceError:
    text = f"{type(error).__name__}: {error}"
    name = type(model).__name__
    if any(sign in text.lower() for sign in _DATA_DEPENDENT):
        return TraceError(
            f"{name} has control flow that depends on the values of tensors",
            expected="the same ops for every input of this shape",
            came=f"{_first_line(text)}{_blamed_line(text)}",
            remedy="for a Hugging Face mixture of experts build it with experts_implementation='grouped_mm' "
            "(the eager expert loop visits only the experts that were hit); elsewhere use torch.where or masking",
        )
    return TraceError(
        f"torch could not turn {name} into one graph",
        expected="a forward of tensor ops over static shapes",
        came=_first_line(text),
        remedy="the exception this one was raised from has torch's own account",
    )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), text)


def _blamed_line(text: str) -> str:
    """The line of the user's that torch holds responsible, with its code, where it says so."""
    _, found, rest = text.partition("The following call raised this error:")
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    return f", at {lines[0]}: {lines[1]}" if found and len(lines) > 1 else ""
