"""Tracing keeps cache writes in place, shares the model's tensors, and refuses what depends on values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

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
