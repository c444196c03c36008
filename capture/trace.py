"""From a module to one ATen FX graph.

Enters: a module and example inputs on the device they will run on. Leaves: `TracedGraph`: a GraphModule over the
module's own parameters and buffers, in which cache writes are still in-place ops, every node has `meta["val"]`, and no
assertions, guards or dead nodes are left. Invariant: the module, its buffers and the RNG are as they were, and running
the graph mutates the module's own buffers, as the module's forward does.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..kernels.dataflow import Dataflow
from ..runtime.errors import AuxstreamError, TraceError
from ..runtime.machine import INLINE, using_machine

# Checks that export leaves behind. They compute nothing the graph needs, and an assertion on the device is a kernel.
_CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "_functional_assert_scalar",
    "_functional_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
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
    meanwhile: `torch.export` patches `nn.Module` for the whole process. Regions written by hand in the model leave no
    mark: their work is traced as if on one stream.

    Raises TraceError for control flow that depends on values, for values that become shapes, and for whatever else
    keeps `torch.export` from making one graph.
    """
    arguments, keywords = tuple(args), dict(kwargs or {})
    with torch.no_grad(), using_machine(INLINE), _attributes_kept(model):
        program = _exported(model, arguments, keywords)
        gm = _module_of(program)
    _strip_checks(gm)
    _refuse_nested_graphs(gm)
    _refuse_symbols(gm)
    flow = Dataflow.of(gm)
    names = tuple(node.name for node in gm.graph.nodes if node.op == "placeholder")
    return TracedGraph(gm, names, flow.mutated("get_attr"), flow.mutated("placeholder"))


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Generator[None]:
    """Export executes writes to tensors that are plain attributes, neither parameters nor buffers: undo them."""
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


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Non-strict export: training IR, in which in-place ops stay in-place ops."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            program = torch.export.export(model, args, kwargs, strict=False)
    except AuxstreamError:
        raise  # from a compiled model within this one
    except Exception as error:
        # On failure export prints all of the graph it had so far. The error we raise names the line instead.
        sys.stderr.write(said.getvalue().replace(str(getattr(error, "partial_fx_graph", "\0")), "").lstrip())
        raise _explain(model, error) from error
    sys.stderr.write(said.getvalue())
    return program


def _module_of(program: ExportedProgram) -> GraphModule:
    """The exported graph over the model's own tensors; guards only repeat what static shapes already say."""
    try:
        gm = program.module(check_guards=False)
    except TypeError:
        gm = program.module()
    assert isinstance(gm, GraphModule)
    return gm


def _strip_checks(gm: GraphModule) -> None:
    for node in reversed(list(gm.graph.nodes)):
        if node.users:
            continue
        guard = node.op == "call_module" and "guard" in str(node.target)
        check = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.split("::")[-1] in _CHECKS
        if guard or check:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    gm.graph.lint()


def _refuse_nested_graphs(gm: GraphModule) -> None:
    """Contexts entered and branches taken inside forward stay graphs within the graph, which the rest cannot read."""
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise TraceError(
                f"the model holds a {node.target} that stays a graph of its own",
                expected="one flat graph of tensor ops",
                came=f"{node.name} at {where(node)}",
                remedy="enter autocast or grad modes around compile() in place of inside forward; use torch.where in "
                "place of torch.cond",
            )


def _refuse_symbols(gm: GraphModule) -> None:
    """Shapes are static, so a symbol left in the graph stands for a value read from a tensor."""
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        assert "val" in node.meta, f"{node.name} lost its value in export"
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
        f"torch.export could not turn {name} into one graph",
        expected="a forward of tensor ops over static shapes",
        came=_first_line(text),
        remedy="the exception this one was raised from has torch.export's own account",
    )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), text)


def _blamed_line(text: str) -> str:
    """The line of the user's that export holds responsible, with its code, where it says so."""
    _, found, rest = text.partition("The following call raised this error:")
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    return f", at {lines[0]}: {lines[1]}" if found and len(lines) > 1 else ""
