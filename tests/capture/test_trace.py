"""Tracing keeps cache writes in place, shares the model's tensors, and refuses what depends on values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

import auxstream
from auxstream.capture.trace import trace
from auxstream.runtime.errors import TraceError


class Cached(nn.Module):
    """Writes its cache in the four ways models do, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(8, 4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("untouched", torch.ones(4))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        states = self.lin(x)
        self.cache.index_copy_(0, position, states)
        self.cache[0].copy_(states[0])
        self.cache.index_put_((position + 1,), states * 2)
        self.cache[7:] = states.sum(0, keepdim=True)
        self.steps.add_(1)
        return self.cache.sum(0) * self.untouched + self.steps


def call(model: nn.Module, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [model(torch.randn(1, 4), torch.tensor([i])) for i in range(steps)]


def test_the_graph_mutates_the_models_own_buffers() -> None:
    model, reference = Cached(), Cached()
    reference.load_state_dict(model.state_dict())
    traced = trace(model, (torch.randn(1, 4), torch.tensor([0])))
    expected = call(reference)
    assert all(torch.equal(a, b) for a, b in zip(call(traced.graph_module), expected, strict=True))
    for name, buffer in reference.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    own = dict(traced.graph_module.named_buffers()) | dict(traced.graph_module.named_parameters())
    for name, tensor in own.items():
        assert tensor is dict([*model.named_buffers(), *model.named_parameters()])[name], name
    assert traced.mutated_buffers == ("cache", "steps")
    assert traced.mutated_inputs == ()
    assert "writes buffer cache" in str(traced)


def test_a_copied_graph_does_not_touch_the_model() -> None:
    """The twin of the test above: what it asserts is a property of sharing, not of every graph."""
    model = Cached()
    traced = trace(model, (torch.randn(1, 4), torch.tensor([0])))
    call(copy.deepcopy(traced.graph_module))
    assert not model.get_buffer("cache").any()


def test_tracing_changes_nothing() -> None:
    model = Cached().train()
    before = {name: value.clone() for name, value in model.state_dict(keep_vars=True).items()}
    tensors = [*model.parameters(), *model.buffers()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trace(model, (torch.randn(1, 4, generator=torch.Generator()), torch.tensor([0])))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


class Casts(nn.Module):
    def forward(self, x: Tensor, *, scale: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        unused = x.sin()
        del unused
        y = x.to(torch.float64).mul(2).to(torch.float32)
        x.mul_(2)
        values, indices = torch.topk(y * scale["by"], 2)
        return values, [indices]


def test_no_checks_or_dead_nodes_remain_and_every_node_has_its_value() -> None:
    x, scale = torch.randn(3, 4), {"by": torch.ones(4)}
    traced = trace(Casts(), (x,), {"scale": scale})
    nodes = list(traced.graph_module.graph.nodes)
    assert all("val" in node.meta for node in nodes if node.op != "output")
    assert not any(
        "assert" in str(node.target) or "guard" in str(node.target) or "sin" in str(node.target) for node in nodes
    )
    assert traced.mutated_inputs == ("x",)
    assert traced.input_names == tuple(node.name for node in nodes if node.op == "placeholder")
    values, [indices] = traced.graph_module(x.clone(), scale=scale)
    expected, [expected_indices] = Casts()(x.clone(), scale=scale)
    assert torch.equal(values, expected)
    assert torch.equal(indices, expected_indices)


def test_running_statistics_count_as_written_in_training_alone() -> None:
    norm = nn.BatchNorm1d(4)
    assert trace(norm, (torch.randn(3, 4),)).mutated_buffers == ("running_mean", "running_var", "num_batches_tracked")
    assert trace(norm.eval(), (torch.randn(3, 4),)).mutated_buffers == ()


class KeepsPlainTensors(nn.Module):
    """Its state is in attributes that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(2)
        self.rows = [torch.zeros(2)]

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.rows[0].copy_(x)
        return x + self.count


def test_tensors_that_are_plain_attributes_are_as_before_and_the_graph_writes_them() -> None:
    model = KeepsPlainTensors()
    traced = trace(model, (torch.ones(2),))
    assert model.count.tolist() == model.rows[0].tolist() == [0.0, 0.0]
    assert traced.graph_module(torch.ones(2)).tolist() == [2.0, 2.0]
    assert model.count.tolist() == model.rows[0].tolist() == [1.0, 1.0]


class ForksByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with auxstream.aux_region("by_hand", x) as region:
            y = region.returns(x + 1)
        region.join()
        return x * y


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_regions_by_hand_leave_no_mark(device: str) -> None:
    x = torch.randn(4, device=device)
    gm = trace(ForksByHand(), (x,)).graph_module
    assert [str(node.target) for node in gm.graph.nodes if node.op == "call_function"] == [
        "aten.add.Tensor",
        "aten.mul.Tensor",
    ]
    assert torch.equal(gm(x), x * (x + 1))


class EntersAutocast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x


class TakesBranches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


@pytest.mark.parametrize("model", [EntersAutocast(), TakesBranches()], ids=lambda model: type(model).__name__)
def test_graphs_within_the_graph_are_refused(model: nn.Module) -> None:
    with pytest.raises(TraceError, match=r"(?s)graph of its own.*remedy"):
        trace(model, (torch.ones(2, 2),))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class HitExperts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for index in (x.sum(-1) > 0).nonzero():
            x = x + index
        return x


class Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class ReadsHost(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


@pytest.mark.parametrize("model", [Branches(), HitExperts(), Selects(), ReadsHost()], ids=lambda m: type(m).__name__)
def test_dependence_on_values_is_refused_with_cause_and_remedy(
    model: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TraceError) as caught:
        trace(model, (torch.randn(3, 4),))
    text = str(caught.value)
    assert "values" in text
    assert "grouped_mm" in caught.value.remedy
    assert "test_trace.py" in caught.value.came, text
    assert "def forward" not in capfd.readouterr().err, "export's dump of its partial graph buries the message"


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(7, 7)


def test_other_failures_name_the_model_and_keep_the_cause() -> None:
    with pytest.raises(TraceError, match="Breaks") as caught:
        trace(Breaks(), (torch.randn(3, 4),))
    assert caught.value.__cause__ is not None


# --- the graph is the one torch.export makes --------------------------------------------------------------------------


class Shares(nn.Module):
    """Weights tied under two names, a module in two places, a tensor behind two buffers, one that is in no table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.inner = nn.Linear(4, 4)
        self.twice = nn.Sequential(self.inner, nn.Sequential(nn.Sequential(self.inner)))
        self.register_buffer("one", torch.ones(6), persistent=False)
        self.register_buffer("other", self.one)
        self.plain = torch.full((6,), 3.0)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.twice(self.embed(ids)).relu_()
        return self.head(states) + self.one * self.other + self.plain, torch.tensor([2.0, 3.0])


class Nests(nn.Module):
    """Arguments of every kind, named like an op and like a parameter; results in a tree."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(
        self, mul: Tensor, weight: dict[str, Any], *rest: Tensor, scale: int = 2, **more: Tensor
    ) -> dict[str, Any]:
        with torch.no_grad():
            first = mul * weight["A b"][0] * scale
        return {"first": first, "second": (self.weight + rest[0] * more["bias"], None, 3)}


class TakesNothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return self.weight * 2


class Assigns(nn.Module):
    """Its buffer gets another tensor, its attribute another number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.state = self.state * 2 + x
        return self.state + self.calls


def nested() -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaf = torch.randn(3)
    return (torch.randn(3), {"A b": [leaf, 5]}, leaf, torch.ones(1)), {"scale": 3, "bias": torch.randn(3)}


CASES: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "writes": (Cached(), (torch.randn(1, 4), torch.tensor([0])), {}),
    "casts": (Casts(), (torch.randn(3, 4),), {"scale": {"by": torch.ones(4)}}),
    "shares": (Shares(), (torch.tensor([1, 2]),), {}),
    "nests": (Nests(), *nested()),
    "plain": (KeepsPlainTensors(), (torch.ones(2),), {}),
    "attends": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(2, 5, 8),), {}),
    "convolves": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (torch.randn(2, 3, 8, 8),), {}),
    "draws": (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), (torch.randn(2, 3),), {}),
    "no inputs": (TakesNothing(), (), {}),
    "graph": (torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), (torch.randn(2, 3),), {}),
}


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    """By torch.export, without its checks."""
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False)
        gm = program.module(check_guards=False)
    for node in list(gm.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    return gm


def described(gm: GraphModule, model: nn.Module) -> list[Any]:
    """All of a graph but the names of its ops. Lines of this file are those of the model alone."""
    number = {node: k for k, node in enumerate(gm.graph.nodes)}
    own = {id(value): name for name, value in [*model.named_parameters(), *model.named_buffers()]}
    found: list[Any] = []
    for node in number:
        args = pytree.tree_map_only(Node, lambda n: f"node {number[n]}", (node.args, node.kwargs))
        values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        shapes = [(tuple(v.shape), v.stride(), v.dtype, v.device, v.requires_grad) for v in values]
        meta = [node.meta.get(key) for key in ("stack_trace", "nn_module_stack", "tensor_meta")]
        tensor = None
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            module = gm.get_submodule(path)
            value = getattr(module, leaf)
            tables = leaf in module._parameters, leaf in module._buffers, leaf in module._non_persistent_buffers_set
            tensor = (own.get(id(value), value.tolist()), tables)
        name = node.name if node.op == "placeholder" else None
        found.append((node.op, name, str(node.target), args, shapes, meta, tensor))
    info = gm.graph._codegen.pytree_info  # pyright: ignore
    return [*found, info.orig_args, info.in_spec, info.out_spec]


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_the_one_torch_export_makes(name: str) -> None:
    model, args, kwargs = CASES[name]
    own, reference = trace(model, args, kwargs).graph_module, exported(model, args, kwargs)
    assert described(own, model) == described(reference, model)


def test_graphs_that_differ_in_an_order_or_a_line_are_told_apart() -> None:
    """The twin of the test above, of its description."""
    model, args, kwargs = CASES["nests"]
    graphs = [trace(model, args, kwargs).graph_module for _ in range(3)]
    calls = [node for node in graphs[1].graph.nodes if node.op == "call_function"]
    calls[0].meta["stack_trace"] += " "
    calls = [node for node in graphs[2].graph.nodes if node.op == "call_function"]
    calls[1].append(calls[2])
    calls[2].append(calls[1])
    assert [described(gm, model) == described(graphs[0], model) for gm in graphs] == [True, False, False]


@pytest.mark.parametrize("name", ["gemma4", "qwen2_moe"])
def test_the_graph_of_a_language_model_is_the_one_torch_export_makes(name: str) -> None:
    pytest.importorskip("transformers")
    from auxstream.bench.architectures import MODELS
    from auxstream.capture.huggingface import DecodeStep

    step = DecodeStep(MODELS[name].build(), 2, 32)
    args = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([3, 5])
    assert described(trace(step, args).graph_module, step) == described(exported(step, args, {}), step)


def test_the_graph_computes_what_the_module_does() -> None:
    model, args, kwargs = CASES["nests"]
    own, expected = trace(model, args, kwargs).graph_module(*args, **kwargs), model(*args, **kwargs)
    assert torch.equal(own["first"], expected["first"])
    assert torch.equal(own["second"][0], expected["second"][0])
    assert own["second"][1:] == expected["second"][1:] == (None, 3)


def test_a_buffer_that_is_assigned_is_written_and_attributes_are_as_before() -> None:
    model, reference, x = Assigns(), Assigns(), torch.ones(3)
    buffer = model.get_buffer("state")
    traced = trace(model, (x,))
    assert (model.calls, buffer.tolist()) == (0, [0.0] * 3)
    assert model.get_buffer("state") is buffer
    assert traced.mutated_buffers == ("state",)
    for _ in range(2):
        reference.calls = 0
        assert torch.equal(traced.graph_module(x), reference(x))
    assert torch.equal(buffer, reference.get_buffer("state"))


def test_code_is_generated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the greater part of what tracing would cost beyond the run of forward."""
    generated: list[int] = []
    recompile = GraphModule.recompile

    def counted(self: GraphModule) -> Any:
        generated.append(len(self.graph.nodes))
        return recompile(self)

    monkeypatch.setattr(GraphModule, "recompile", counted)
    traced = trace(Cached(), (torch.randn(1, 4), torch.tensor([0])))
    assert [count for count in generated if count] == [len(traced.graph_module.graph.nodes)]


class Enters(nn.Module):
    """Contexts that change nothing: one for a profiler, one that is empty, one that holds while tracing anyway."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            unused = x.sin()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            del unused
        with torch.profiler.record_function("named"), torch.no_grad():
            return x + 1


def test_contexts_that_nothing_is_done_under_leave_no_mark() -> None:
    gm = trace(Enters(), (torch.ones(2),)).graph_module
    assert [str(node.target) for node in gm.graph.nodes if node.op == "call_function"] == ["aten.add.Tensor"]


class EnablesGradients(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x + 1


@pytest.mark.parametrize("model", [EntersAutocast(), EnablesGradients()], ids=lambda model: type(model).__name__)
def test_a_context_that_work_is_done_under_is_refused_with_its_line(model: nn.Module) -> None:
    with pytest.raises(TraceError, match="graph of its own") as caught:
        trace(model, (torch.ones(2, 2),))
    assert "test_trace.py" in caught.value.came


class Boxed:
    """A result that no pytree knows."""

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner


class Boxes(nn.Module):
    def forward(self, x: Tensor, box: Any = None) -> Any:
        return Boxed(x + 1)


@pytest.mark.parametrize(("args", "says"), [((), "result of type Boxed"), ((object(),), "argument of type object")])
def test_trees_of_unknown_types_are_refused(args: tuple[Any, ...], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        trace(Boxes(), (torch.ones(2), *args))
