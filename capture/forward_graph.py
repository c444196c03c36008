"""A module's forward as an FX graph of ATen ops, by one run on fake tensors.

Enters: a module and its arguments. Leaves: a GraphModule over the module's own tensors that is called like the module.
Its nodes: `get_attr` of the parameters, buffers and constants in use, by their qualified names; placeholders, one for
each leaf of the arguments, named after those of forward; then the ops as forward calls them, in-place ones among them,
each with `val`, the lines that led to it and the modules it is in. Invariant: no parameter, buffer or argument is
computed with, and those of the module are in their places afterwards.

Note "as torch.export". A model does here what it does under `torch.export.export(strict=False)`: the same modes and
patches are in force, and nodes have the same targets in the same order. What export does for programs that are saved is
left out: parameters made inputs and back, signatures, verifiers, code generated again after each pass.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Generator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._export.non_strict_utils import _NonStrictTorchFunctionHandler, _override_builtin_ops
from torch._export.utils import _compiling_state_context
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.frontend_utils import _detect_attribute_assignment
from torch._functorch._aot_autograd.utils import register_buffer_assignment_hook
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.export._trace import _ignore_backend_decomps
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx._symbolic_trace import PH
from torch.fx.experimental.proxy_tensor import (
    PreDispatchTorchFunctionMode,
    ProxyTorchDispatchMode,
    _ModuleStackTracer,
    _set_make_fx_tracer,
    disable_autocast_cache,
    fake_signature,
    make_fx,
    wrap_key,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

aten = torch.ops.aten
_FRESH = frozenset((aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.detach.default, aten.detach_.default))
"""What `torch.tensor` does to the constant it makes."""
_KNOWN = (Tensor, int, float, bool, str, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)


class ForwardGraph:
    """What one run of `model(*args, **kwargs)` leaves.

    Attributes:
        graph: its nodes, over a placeholder for every parameter, buffer and leaf of the arguments. Nodes may be taken
            out of it before `module` puts names in the place of these placeholders.

    Raises whatever keeps the model from being run so, TypeError for arguments and results of unknown types among it.
    """

    _out_spec: pytree.TreeSpec

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = model
        self._arguments, self._leaf_names = _names(model, args, kwargs)
        leaves, self._in_spec = pytree.tree_flatten((args, kwargs))
        _refuse_unknown(leaves, "argument")
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        self._tensors = dict(model.named_parameters(remove_duplicate=False)) | self._buffers
        with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
            self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, export=True)
        self._leaves = [self._fake(leaf) for leaf in leaves]
        fakes = {name: self._fake(tensor) for name, tensor in self._tensors.items()}
        tracer, assigned = _Tracer(model), dict[str, str]()
        with _as_exported(model, self._mode, fakes, tracer, assigned):
            self.graph = self._follow(tracer, (*fakes.values(), *self._leaves))
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self._inputs = placeholders[len(fakes) :]
        self._named = dict[Node, str](zip(placeholders, fakes, strict=False))
        self._write_back(assigned)
        self._name_constants(tracer.root)

    def module(self) -> GraphModule:
        """`graph` over the model's own tensors, called like the model."""
        module, graph = GraphModule(nn.Module(), Graph()), self._over_names()
        for node in graph.nodes:
            if node.op == "get_attr":
                self._hold(module, node.target)
        graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(self._arguments, self._in_spec, self._out_spec)))
        module.graph = graph
        return module

    def _fake(self, leaf: Any) -> Any:
        return self._mode.from_tensor(leaf, static_shapes=True) if isinstance(leaf, Tensor) else leaf

    def _follow(self, tracer: _Tracer, leaves: tuple[Any, ...]) -> Graph:
        def called(*leaves: Any) -> tuple[Any, ...]:
            args, kwargs = pytree.tree_unflatten(leaves[len(leaves) - len(self._leaves) :], self._in_spec)
            if isinstance(self._model, GraphModule):
                with preserve_node_meta():
                    returned = Interpreter(self._model).run(*args, *kwargs.values())
            else:
                returned = self._model(*args, **kwargs)
            flat, self._out_spec = pytree.tree_flatten(returned)
            _refuse_unknown(flat, "result")
            return tuple(flat)

        holes: Any = (PH,) * len(leaves)
        return tracer.trace(wrap_key(fake_signature(called, len(leaves)), leaves, tracer, True), holes)

    def _write_back(self, assigned: dict[str, str]) -> None:
        """What forward assigns to a buffer of the model's own is copied into the buffer at the end."""
        nodes = {node.name: node for node in self.graph.nodes}
        buffers = {name: node for node, name in self._named.items()}
        with self.graph.inserting_before(nodes["output"]):
            for buffer, name in assigned.items():
                written = self.graph.call_function(aten.copy_.default, (buffers[buffer], nodes[name]))
                written.meta = dict(nodes[name].meta)

    def _name_constants(self, root: nn.Module) -> None:
        """Tensors that are no parameters or buffers have the name of the attribute they are, or else one of their own
        in the module that reads them. Each is read once."""
        held = {id(tensor) for tensor in self._tensors.values()}
        attributes = dict[int, str]()
        for path, module in self._model.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and id(value) not in held:
                    attributes.setdefault(id(value), f"{path}.{name}" if path else name)
        known, number = dict[int, Node](), 0
        for node in [node for node in self.graph.nodes if node.op == "get_attr"]:
            value = getattr(root, node.target)
            if not isinstance(value, Tensor) or self._unused(node):
                continue
            if id(value) in known:
                node.replace_all_uses_with(known[id(value)])
                self.graph.erase_node(node)
                continue
            known[id(value)] = node
            name = attributes.get(id(value))
            if name is None:
                path = next(reversed(node.meta["nn_module_stack"].values()), ("",))[0]
                while (name := f"{path}.lifted_tensor_{number}".removeprefix(".")) in self._tensors:
                    number += 1
                number += 1
            self._named[node] = name
            self._tensors[name] = value.data if isinstance(value, nn.Parameter) else value
            node.meta = {"val": self._fake(self._tensors[name])}

    def _unused(self, node: Node) -> bool:
        """Whether nothing reads a constant; it is erased then, with what `torch.tensor` does to it."""
        chain = [node]
        while len(chain[-1].users) == 1 and (user := next(iter(chain[-1].users))).target in _FRESH:
            chain.append(user)
        if chain[-1].users:
            return False
        for link in reversed(chain):
            self.graph.erase_node(link)
        return True

    def _over_names(self) -> Graph:
        """A copy of `graph` in which the model's tensors come first, by name, and then the inputs."""
        graph, new = Graph(), dict[Node, Node]()
        for node, name, leaf in zip(self._inputs, self._leaf_names, self._leaves, strict=True):
            new[node] = graph.placeholder(name)
            new[node].meta = _meta_of(node, leaf)
        with graph.inserting_before(new[self._inputs[0]]) if self._inputs else contextlib.nullcontext():
            for node, name in self._named.items():
                if node.users:
                    new[node] = graph.get_attr(name)
                    new[node].meta = _meta_of(node, self._tensors[name])
        for node in self.graph.nodes:
            if node not in new and node.op != "placeholder":
                new[node] = graph.node_copy(node, new.__getitem__)
                if stack := node.meta.get("nn_module_stack"):
                    new[node].meta["nn_module_stack"] = {f"L__self__{key}": value for key, value in stack.items()}
        return graph

    def _hold(self, module: nn.Module, name: str) -> None:
        """The tensor of this name becomes what it is in the model: a parameter, a buffer, or an attribute."""
        path, _, leaf = name.rpartition(".")
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if name in self._buffers:
            persistent = leaf not in self._model.get_submodule(path)._non_persistent_buffers_set
            module.register_buffer(leaf, self._tensors[name], persistent)
        else:
            setattr(module, leaf, self._tensors[name])


class _Tracer(_ModuleStackTracer):
    """Its nodes know the modules they are in, and the lines of the forwards that led to them."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)  # pyright: ignore[reportArgumentType]
        self.record_stack_traces = False  # of all frames there are: reading off the few that count costs a tenth
        self._foreign = uninteresting_files()
        self._texts = dict[tuple[tuple[CodeType, int], ...], str]()

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        if node.op not in ("placeholder", "output") and not node.stack_trace and (lines := self._lines()):
            node.stack_trace = lines
        return node

    def trace_subgraph(self, function: Callable[..., Any], *args: Any) -> GraphModule:
        """The body of an op that branches or loops."""
        return make_fx(function, pre_dispatch=True)(*args)

    def _lines(self) -> str:
        frames, frame = list[tuple[CodeType, int]](), sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and code.co_filename not in self._foreign:
                frames.append((code, frame.f_lineno))
            frame = frame.f_back
        key = tuple(reversed(frames))
        if key not in self._texts:
            summaries = [traceback.FrameSummary(code.co_filename, line, code.co_name) for code, line in key]
            self._texts[key] = "".join(traceback.StackSummary.from_list(summaries).format()).strip()
        return self._texts[key]


@contextlib.contextmanager
def _as_exported(
    model: nn.Module, mode: FakeTensorMode, fakes: dict[str, Any], tracer: _Tracer, assigned: dict[str, str]
) -> Generator[None]:
    """See the note "as torch.export". `assigned` takes the nodes assigned to buffers of the model."""
    hook: Any = None
    bodies: Any = tracer
    try:
        with (
            unset_fake_temporarily(),
            mode,
            _NonStrictTorchFunctionHandler(),
            tracing(TracingContext(mode)),
            _override_builtin_ops(),
            _reparametrize_module(model, fakes, tie_weights=True, strict=True, stack_weights=True),
            _ignore_backend_decomps(),
            _compiling_state_context(),
            enable_python_dispatcher(),
            _detect_attribute_assignment(model),
            PreDispatchTorchFunctionMode(tracer),
            ProxyTorchDispatchMode(tracer, "real", pre_dispatch=True),
            disable_autocast_cache(),
            _set_make_fx_tracer(bodies),
        ):
            hook = register_buffer_assignment_hook(model, assigned)
            yield
    finally:
        if hook is not None:
            hook.remove()


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the arguments, those of forward, and of their leaves, which say the way to them."""
    signature = inspect.signature(model.forward)
    bound = signature.bind_partial(*args).arguments
    names = list[str]()
    for name, value in bound.items():
        several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}_{i}" for i in range(len(value))] if several else [name]
    paths = [path for path, _ in pytree.tree_flatten_with_path({**bound, **kwargs})[0]]
    return [*names, *kwargs], ["_".join(_step(entry).lower() for entry in path) for path in paths]


def _step(entry: Any) -> str:
    if isinstance(entry, pytree.MappingKey):
        return re.sub(r"[^a-zA-Z0-9]", "_", str(entry.key))
    return entry.name if isinstance(entry, pytree.GetAttrKey) else str(entry.idx)


def _refuse_unknown(leaves: list[Any], what: str) -> None:
    for leaf in leaves:
        if not isinstance(leaf, _KNOWN):
            raise TypeError(f"{what} of type {type(leaf).__name__}, which is no tensor, plain value or pytree of these")


def _meta_of(node: Node, own: Any) -> dict[str, Any]:
    """The value of a node needs a gradient where `own`, what it stands for, does."""
    if not isinstance(own, Tensor):
        return {**node.meta, "val": own}
    node.meta["val"].requires_grad = own.requires_grad
    return dict(node.meta)
