"""The life of a compiled model: weights that change, weights that are replaced, recapture, eager calls, the end."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture import bindings, graphs
from auxstream.capture.allocator import AllocatorModel
from auxstream.capture.bindings import Bindings
from auxstream.runtime.errors import CaptureError

Change = Callable[["Model"], None]


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (1 + self.weight.double())).to(x.dtype)


class Model(nn.Module):
    """What could be computed ahead of weights, is: casts, sums, products, tables, of parameters and of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.linear.weight
        self.register_buffer("scale", torch.rand(8))
        self.register_buffer("hidden", torch.rand(8), persistent=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * (self.scale.double() * 2 + 1).float()
        return self.head(self.linear(x).relu()) * torch.cumsum(self.hidden.exp(), 0) + torch.arange(8, device=x.device)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8)


def assert_equal(fast: auxstream.CompiledModel, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs))


def other(tensor: Tensor) -> Tensor:
    return torch.rand_like(tensor) + 1


# --- values that change in place --------------------------------------------------------------------------------------


def through_data(model: nn.Module) -> None:
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data.copy_(other(tensor))


def through_hidden_buffers(model: nn.Module) -> None:
    for tensor in model.buffers():
        tensor.data.copy_(other(tensor))


def through_an_optimizer(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def through_load_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: other(value) for name, value in model.state_dict().items()})


IN_PLACE = (through_data, through_hidden_buffers, through_an_optimizer, through_load_state_dict)


@pytest.mark.parametrize(
    ("change", "options"),
    [*((change, {}) for change in IN_PLACE), (through_data, {"buckets": (1, 4)}), (through_data, {"mode": "none"})],
)
def test_values_changed_in_place_are_used_at_once(change: Callable[[nn.Module], None], options: Any, x: Tensor) -> None:
    model = Model()
    fast = auxstream.compile(model, x, auxstream.Options(**options))
    before = fast(x).clone()
    change(model)
    assert_equal(fast, model, x)
    assert not torch.equal(fast(x), before)


def test_every_weight_and_buffer_of_a_decode_step_is_read_anew() -> None:
    """One by one: what a step computes ahead of a weight would show as a change that has no effect."""
    from auxstream.capture.huggingface import DecodeStep, build

    step = DecodeStep(build(tiny_models._config("gemma4")), 1, tiny_models.CONTEXT)
    inputs = tiny_models.inputs()
    fast = auxstream.compile(step, inputs)
    used = set(fast._lives().known()._addresses)
    caches = {name for name, _ in step.named_buffers() if "cache" in name or "keys" in name or "values" in name}
    assert len(used - caches) > 40
    for name, tensor in [*step.named_parameters(), *step.named_buffers()]:
        if name in used - caches and tensor.is_floating_point():
            tensor.data.mul_(1.25).add_(0.125)
    assert_equal(fast, step, *inputs)


# --- tensors that are replaced ----------------------------------------------------------------------------------------


def set_parameter(model: Model) -> None:
    model.linear.weight = nn.Parameter(other(model.linear.weight))


def set_the_other_name(model: Model) -> None:
    model.head.weight = nn.Parameter(other(model.linear.weight))


def set_data(model: Model) -> None:
    model.linear.bias.data = other(model.linear.bias)


def set_buffer(model: Model) -> None:
    model.scale = other(model.scale)


def set_submodule(model: Model) -> None:
    model.norm = Norm()


def assign_state(model: Model) -> None:
    model.load_state_dict({name: other(value) for name, value in model.state_dict().items()}, assign=True)


def convert(model: Model) -> None:
    model.double().float()


def write_a_table(model: Model) -> None:
    model.linear._parameters["bias"] = nn.Parameter(other(model.linear.bias))


REPLACED: dict[Change, str] = {
    set_parameter: "linear.weight",
    set_the_other_name: "head.weight",
    set_data: "linear.bias",
    set_buffer: "scale",
    set_submodule: "norm.weight",
    assign_state: "linear.weight",
    convert: "norm.weight",
    write_a_table: "linear.bias",
}


@pytest.mark.parametrize(
    ("change", "options"),
    [*((change, {}) for change in REPLACED), (set_data, {"buckets": (1, 4)}), (set_data, {"mode": "none"})],
)
def test_a_replaced_tensor_is_named_and_recapture_takes_it(change: Change, options: Any, x: Tensor) -> None:
    model = Model()
    fast = auxstream.compile(model, x, auxstream.Options(**options))
    assert_equal(fast, model, x)
    change(model)
    for ask in (lambda: fast(x), fast.check):
        with pytest.raises(CaptureError, match=r"recapture\(\)") as refused:
            ask()
        assert f"'{REPLACED[change]}'" in str(refused.value)
    torch.testing.assert_close(fast.eager(x), model(x).detach())
    fast.recapture()
    assert_equal(fast, model, x)


class Attributes(nn.Module):
    """Tensors that are neither parameters nor buffers: one it reads, one it sets at every eager call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.shift = torch.rand(8)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x * 2
        return self.linear(x) + self.shift


@pytest.mark.parametrize("options", [{}, {"buckets": (1, 4)}, {"mode": "none"}], ids=["one", "buckets", "none"])
def test_plain_attributes_too_where_graphs_read_them(options: Any, x: Tensor) -> None:
    model = Attributes()
    fast = auxstream.compile(model, x, auxstream.Options(**options))
    model.shift.fill_(2)
    assert_equal(fast, model, x)
    fast.eager(x)
    assert_equal(fast, model, x)
    model.shift = torch.rand(8)
    if options == {"mode": "none"}:
        return  # nobody can tell there which of them are read
    with pytest.raises(CaptureError, match="'shift'"):
        fast(x)
    fast.recapture()
    assert_equal(fast, model, x)


def leave_out(model: Model) -> None:
    model.unused.weight = nn.Parameter(torch.zeros(2, 2))


def put_back(model: Model) -> None:
    model.linear.weight = model.linear.weight


def add(model: Model) -> None:
    model.more = nn.Linear(2, 2)


def convert_to_itself(model: Model) -> None:
    model.to("cpu").float()


@pytest.mark.parametrize("change", [leave_out, put_back, add, convert_to_itself])
def test_what_the_graph_does_not_read_may_be_replaced(change: Change, x: Tensor) -> None:
    model = Model()
    fast = auxstream.compile(model, x)
    change(model)
    assert_equal(fast, model, x)
    fast.check()


def test_replacing_it_within_a_replaced_module_is_seen_too(x: Tensor) -> None:
    model = Model()
    fast = auxstream.compile(model, x)
    same = Norm()
    same.weight = model.norm.weight
    model.norm = same
    assert_equal(fast, model, x)
    same.weight = nn.Parameter(other(same.weight))
    with pytest.raises(CaptureError, match=r"norm\.weight"):
        fast(x)


class Wide(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.rand(2) for _ in range(count))


def test_past_the_interface_of_modules_a_few_calls_see_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "AT_ONCE", 4)
    for place in range(10):
        model = Wide(10)
        bound = Bindings(model, None)
        for _ in range(7):
            bound.glance()
        model.weights[place].data = torch.zeros(2)
        found = [str(error) for error in map(refusal, [bound] * 3) if error is not None]
        assert found
        assert all(f"'weights.{place}'" in text for text in found)


def refusal(bound: Bindings) -> CaptureError | None:
    try:
        bound.glance()
    except CaptureError as error:
        return error
    return None


def test_without_a_look_nothing_is_noticed(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: this is what calls would give."""
    model = Model()
    fast = auxstream.compile(model, x)
    monkeypatch.setattr(Bindings, "glance", lambda self: None)
    set_parameter(model)
    assert not torch.equal(fast(x), model(x))


def test_the_kill_switch_leaves_a_compiled_model_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from auxstream.capture.huggingface import DecodeStep, build

    step = DecodeStep(build(tiny_models._config("gemma4")), 1, tiny_models.CONTEXT)
    options = auxstream.Options(mlir_elementwise_fusion=False)
    assert len(streams_of(auxstream.compile(step, tiny_models.inputs(), options))) == 2
    monkeypatch.setattr(graphs, "SETTINGS", replace(graphs.SETTINGS, disable=True))
    fast = auxstream.compile(step, tiny_models.inputs(), options)
    assert len(streams_of(fast)) == 1
    assert fast.report.ok
    assert_equal(fast, step, *tiny_models.inputs())


def streams_of(fast: auxstream.CompiledModel) -> set[int]:
    return {step.stream for step in fast.graph.program.steps}


# --- recapture --------------------------------------------------------------------------------------------------------


def test_recapture_into_a_pool_of_the_callers(x: Tensor) -> None:
    model = Model()
    fast = auxstream.compile(model, x)
    pool = AllocatorModel()
    fast.recapture(pool)
    assert fast.graph.program.pool is pool
    assert_equal(fast, model, x)


def test_a_recapture_that_fails_leaves_no_graphs_and_may_be_tried_again(x: Tensor) -> None:
    model = Model()
    fast = auxstream.compile(model, x)
    model.linear = nn.Linear(8, 3)
    model.head.weight = nn.Parameter(torch.rand(8, 4))
    with pytest.raises(auxstream.AuxstreamError):
        fast.recapture()
    with pytest.raises(CaptureError, match="no graphs"):
        fast(x)
    model.head = nn.Linear(3, 8)
    fast.recapture()
    assert_equal(fast, model, x)


def test_without_graphs_all_but_the_model_itself_says_so(x: Tensor) -> None:
    model = Model()
    expected = model(x)
    fast = auxstream.compile(model, x)
    with pytest.raises(AttributeError, match="no 'speed'"):
        _ = fast.speed
    head, model.head = model.head, nn.Linear(5, 5)
    with pytest.raises(auxstream.AuxstreamError):
        fast.recapture()
    ask: list[Callable[[], object]] = [
        fast.wait, fast.check, lambda: fast.memory, lambda: fast.report, lambda: fast.regions, lambda: fast.calls,
    ]  # fmt: skip
    for question in ask:
        with pytest.raises(CaptureError, match="no graphs"):
            question()
    assert "a graph of a compiled model" in str(fast)
    model.head = head
    assert torch.equal(fast.eager(x), expected)


def test_threads_compile_in_turn(x: Tensor) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            model = Model()
            assert_equal(auxstream.compile(model, x), model, x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_recapture_of_buckets_checks_padding_with_the_first_values() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ij,ik->i", x, x)

    x = torch.randn(4, 8)
    fast = auxstream.compile(Sums(), x, auxstream.Options(buckets=(2, 4)))
    fast(torch.zeros(4, 8))
    fast.recapture()
    assert_equal(fast, Sums(), x)


def test_a_bucket_alone_has_no_life(x: Tensor) -> None:
    fast: Any = auxstream.compile(Model(), x, auxstream.Options(buckets=(2, 4)))
    with pytest.raises(CaptureError, match="whole model"):
        fast.buckets[2].recapture()


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["gemma4 decode", "buckets", "recaptured"])
def test_a_deleted_model_gives_all_back_without_the_collector(make: str, x: Tensor) -> None:
    model: nn.Module = Model()
    if make == "gemma4 decode":
        from auxstream.capture.huggingface import DecodeStep, build

        model = DecodeStep(build(tiny_models._config("gemma4")), 1, tiny_models.CONTEXT)
        fast = auxstream.compile(model, tiny_models.inputs())
        assert fast.regions
    elif make == "buckets":
        fast = auxstream.compile(model, x, auxstream.Options(buckets=(2, 4)))
    else:
        fast = auxstream.compile(model, x)
        fast.recapture()
    gc.collect()
    gc.disable()
    try:
        weights = [weakref.ref(parameter) for parameter in model.parameters()]
        graphs = [weakref.ref(graph) for graph in fast.graphs]
        inputs = weakref.ref(fast.calls.static.leaves[0])
        del fast
        assert [graph() for graph in graphs] == [None] * len(graphs)
        assert inputs() is None
        if make != "gemma4 decode":  # transformers' own modules hold one another
            del model
            assert [weight() for weight in weights] == [None] * len(weights)
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["model", "buckets", "graph", "region"])
def test_copies_are_refused(what: str, x: Tensor) -> None:
    thing: Any
    if what == "region":
        thing = auxstream.capture.insert_regions(tiny_models.decode_step("gemma4").graph_module)[0]
    else:
        options = auxstream.Options(buckets=(2, 4) if what == "buckets" else ())
        thing = auxstream.compile(Model(), x, options)
        thing = thing.graph if what == "graph" else thing
    for copies in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(CaptureError, match="cannot be pickled or copied"):
            copies(thing)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu() -> tuple[Model, Tensor]:
    return Model().cuda(), torch.randn(4, 8, device="cuda")


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("change", IN_PLACE)
def test_on_a_gpu_values_changed_in_place_are_used_at_once(
    change: Callable[[nn.Module], None], on_gpu: tuple[Model, Tensor]
) -> None:
    model, x = on_gpu
    fast = auxstream.compile(model, x)
    change(model)
    assert_equal(fast, model, x)


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("change", REPLACED)
def test_on_a_gpu_a_replaced_tensor_is_named(change: Change, on_gpu: tuple[Model, Tensor]) -> None:
    model, x = on_gpu
    fast = auxstream.compile(model, x)
    change(model)
    with pytest.raises(CaptureError, match="replaced"):
        fast(x)
    model.cuda()  # a submodule of the CPU's came
    fast.recapture()
    assert_equal(fast, model, x)


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("buckets", [(), (1, 2, 4)], ids=["one", "buckets"])
def test_on_a_gpu_a_deleted_model_gives_its_pool_back(buckets: tuple[int, ...], on_gpu: tuple[Model, Tensor]) -> None:
    class Large(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.sum(-1, keepdim=True).expand(-1, 1 << 22).contiguous().cumsum(-1)[:, :8]

    model, x = Large().cuda(), on_gpu[1]
    options = auxstream.Options(buckets=buckets)

    def reserved() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    auxstream.compile(model, x, options)  # cuBLAS keeps workspaces, and kernels are loaded
    before = reserved()
    fast = auxstream.compile(model, x, options)
    fast(x)
    assert reserved() > before + (1 << 25)
    gc.disable()
    try:
        del fast
        assert reserved() == before
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.timeout(240)
def test_on_a_gpu_looking_at_weights_costs_a_call_little() -> None:
    import time

    model = Wide(1000).cuda()
    bound = Bindings(model, None)
    for _ in range(100):
        bound.glance()
    began = time.perf_counter()
    for _ in range(1000):
        bound.glance()
    assert (time.perf_counter() - began) / 1000 < 6e-6
