"""Fusing changes no number: random programs, exact in any order of summation, against the graphs they came from."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from exact_programs import ExactProgram, GrowingProgram, draw, draw_growing
from random_programs import RandomProgram
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, symbolic_trace
from torch.utils import _pytree as pytree

from auxstream.capture.trace import trace
from auxstream.kernels import FusionError, FusionReport, fuse, fuse_elementwise, mlir
from auxstream.kernels.grouping import MOST_OPERANDS
from auxstream.runtime.errors import MissingDependencyError
from auxstream.runtime.settings import SETTINGS

pytestmark = pytest.mark.usefixtures("by_torch")


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, up to the sign of zero; NaN equals NaN."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    )


def check(gm: GraphModule, calls: Sequence[tuple[Tensor, ...]]) -> FusionReport:
    """Fuse `gm`, and compare results, inputs and buffers with those of the graph it was, call by call."""
    reference, state = copy.deepcopy(gm), {name: id(value) for name, value in gm.state_dict(keep_vars=True).items()}
    report = fuse_elementwise(gm)
    for number, call in enumerate(calls):
        one, other = copy.deepcopy(call), copy.deepcopy(call)
        with torch.no_grad():
            torch.manual_seed(number)
            expected = reference(*one)
            torch.manual_seed(number)
            got = gm(*other)
        assert equal(got, expected), f"call {number}\n{report}"
        assert equal(other, one), f"inputs of call {number}\n{report}"
        buffers = dict(gm.named_buffers())
        assert all(equal(buffers[name], value) for name, value in reference.named_buffers() if name in buffers)
    assert {name: id(value) for name, value in gm.state_dict(keep_vars=True).items()} == state
    return report


# --- random programs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(8))
def test_exact_programs(block: int) -> None:
    fused = 0
    for seed in range(8 * block, 8 * block + 8):
        generator = torch.Generator().manual_seed(seed)
        gm = trace(ExactProgram(seed, length=30), draw(generator)).graph_module
        report = check(gm, [draw(generator) for _ in range(3)])
        fused += len(report.fusions)
        again = fuse_elementwise(gm)
        assert not again.fusions, f"seed {seed}: fusing what is fused\n{again}"
        assert not again.folded
    assert fused > 8


@pytest.mark.parametrize("block", range(2))
def test_programs_with_other_names_of_memory(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        check(trace(RandomProgram(seed), (x,)).graph_module, [(x,), (x + 1,)])


# --- shapes -----------------------------------------------------------------------------------------------------------


class Shapes(nn.Module):
    """Norms, slices, a softmax, rows and columns, over a batch and a sequence that may be of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(8.0))
        self.register_buffer("table", torch.arange(40.0).reshape(5, 8))

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        flat = (x + self.table[ids]).reshape(-1, 8) * 2
        top = flat.amax(-1, keepdim=True)
        folded = (flat - top).view(x.shape[0], x.shape[1] * 2, 4) + self.weight[:4]
        return {
            "rows": (flat - top).sum(-1) + 1,
            "halves": flat[:, :4] * flat[:, 4:] + self.weight[4:],
            "folded": folded.relu(),
            "outer": x.sum(-1)[:, :, None] + x,
            "count": x.new_ones(x.shape[0], 8) * 2 + self.weight,
        }


@pytest.mark.parametrize("dynamic", [(0,), (1,), (0, 1)])
def test_leading_dimensions_of_any_size(dynamic: tuple[int, ...]) -> None:
    sizes = {0: Dim("batch", min=2, max=64), 1: Dim("tokens", min=2, max=64)}
    chosen = {dim: sizes[dim] for dim in dynamic}
    example = torch.randint(-3, 4, (3, 4, 8)).float(), torch.randint(0, 5, (3, 4))
    program = torch.export.export(Shapes(), example, dynamic_shapes={"x": chosen, "ids": chosen}, strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    shapes = [tuple(n if dim in dynamic else size for dim, size in enumerate((3, 4))) for n in (3, 2, 7, 50)]
    calls = [(torch.randint(-3, 4, (*shape, 8)).float(), torch.randint(0, 5, shape)) for shape in shapes]
    report = check(gm, calls)
    assert any(fusion.sizes for fusion in report.fusions)
    assert sum(len(fusion.group.nodes) for fusion in report.fusions) >= 10


@pytest.mark.parametrize("block", range(3))
def test_growing_programs(block: int) -> None:
    fused = 0
    for seed in range(6 * block, 6 * block + 6):
        generator, size = torch.Generator().manual_seed(seed), {0: Dim("n", min=2, max=64)}
        shapes = {"x": size, "y": size}
        program = torch.export.export(
            GrowingProgram(seed), draw_growing(generator, 3), dynamic_shapes=shapes, strict=False
        )
        gm = program.module(check_guards=False)
        assert isinstance(gm, GraphModule)
        report = check(gm, [draw_growing(generator, n) for n in (3, 2, 5, 17)])
        fused += sum(bool(fusion.sizes) for fusion in report.fusions)
    assert fused > 8


def test_nothing_to_compute() -> None:
    x = torch.zeros(0, 4)
    check(trace(Function(lambda x: ((x * 2 + 1).sum(-1), x.t() * 2 + 1, x.sum(0) + 1)), (x,)).graph_module, [(x,)])


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


@pytest.mark.parametrize("count", [MOST_OPERANDS - 1, MOST_OPERANDS + 1, 200])
def test_many_inputs_take_several_kernels(count: int) -> None:
    inputs = tuple(torch.full((3, 4), float(i)) for i in range(count))
    summed = trace(Function(lambda *xs: sum(xs[1:], xs[0] * 2) + 1), inputs).graph_module
    report = check(summed, [inputs])
    assert len(report.fusions) >= -(-count // MOST_OPERANDS)
    assert all(len(f.inputs) + len(f.group.outputs) <= MOST_OPERANDS for f in report.fusions)
    joined = trace(Function(lambda *xs: torch.cat(xs, -1) * 2 + 1), inputs).graph_module
    check(joined, [inputs])


def test_many_outputs_take_several_kernels() -> None:
    x = torch.randn(3, 4)
    gm = trace(Function(lambda x: [(x * 2 + i).relu() for i in range(100)]), (x,)).graph_module
    report = check(gm, [(x,)])
    assert all(len(f.inputs) + len(f.group.outputs) <= MOST_OPERANDS for f in report.fusions)


# --- what a fused graph is --------------------------------------------------------------------------------------------


def test_names_metadata_and_copies() -> None:
    traced = tiny_models.decode_step("qwen2_moe")
    gm = traced.graph_module
    before = {node.name: dict(node.meta) for node in gm.graph.nodes}
    report = fuse_elementwise(gm)
    assert report.fusions
    nodes = {node.name: node for node in gm.graph.nodes}
    for fusion in report.fusions:
        for output in fusion.group.outputs:
            assert nodes[output.name].meta == before.get(output.name, output.meta)
        for member in set(fusion.group.nodes) - set(fusion.group.outputs):
            assert member.name not in nodes
    kernels = [node for node in nodes.values() if node.meta.get("auxstream_fused")]
    assert len(kernels) == len(report.fusions)
    assert all(node.meta["stack_trace"] and node.meta["val"] for node in kernels)
    assert all("val" in node.meta for node in nodes.values() if node.op != "output")
    gm.graph.lint()

    copied = copy.deepcopy(gm)
    with torch.no_grad():
        for position in range(3):
            assert equal(copied(*tiny_models.inputs(position=position)), gm(*tiny_models.inputs(position=position)))
    mine, theirs = dict(gm.named_buffers()), dict(copied.named_buffers())
    assert all(mine[name].data_ptr() != theirs[name].data_ptr() for name in mine)
    assert str(len(report.fusions)) in str(report)
    assert all(fusion.spec.name in report.mlir for fusion in report.fusions)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_decode_steps_on_this_machine(name: str) -> None:
    """Routing takes no part in sums, so caches and logits differ by rounding at most."""
    traced = tiny_models.decode_step(name)
    reference = copy.deepcopy(traced.graph_module)
    report = fuse_elementwise(traced.graph_module, safe=(("*", "1"),))
    assert {"1"} == set(report.safety.values())
    with torch.no_grad():
        for position in range(4):
            expected = reference(*tiny_models.inputs(position=position))
            got = traced.graph_module(*tiny_models.inputs(position=position))
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_the_order_of_a_graph_does_not_matter() -> None:
    """Any linear extension of the dataflow gives the same groups and the same numbers."""
    from test_dataflow import shuffled

    from auxstream.kernels.dataflow import Dataflow

    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        gm = trace(ExactProgram(seed, length=30), draw(generator)).graph_module
        other = copy.deepcopy(gm)
        flow = Dataflow.of(other)
        inputs = sum(node.op == "placeholder" for node in flow.nodes)
        order = shuffled(len(flow.nodes), flow.predecessors, random.Random(seed))
        last = None
        for node in [n for n in flow.nodes if n.op == "placeholder"] + [
            flow.nodes[i] for i in order if flow.nodes[i].op not in ("placeholder", "output")
        ]:
            if last is not None:
                last.append(node)
            last = node
        other.graph.lint()
        assert inputs == 2
        one = check(gm, [draw(generator) for _ in range(2)])
        two = check(other, [draw(generator) for _ in range(2)])
        assert members(one) == members(two), f"seed {seed}"


def members(report: FusionReport) -> list[tuple[list[str], str]]:
    """What was fused, in a form to compare: names of members, and the kernel."""
    return sorted(([node.name for node in fusion.group.nodes], fusion.spec.name) for fusion in report.fusions)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_missing_values_are_refused() -> None:
    gm = symbolic_trace(lambda x: x * 2 + 1)
    with pytest.raises(FusionError, match="no traced value") as caught:
        fuse_elementwise(gm)
    assert "FakeTensorProp" in str(caught.value)
    x = torch.randn(3, 4)
    gm = trace(Function(lambda x: (x * 2 + 1).relu()), (x,)).graph_module
    del next(node for node in gm.graph.nodes if node.name == "add").meta["val"]
    code = gm.code
    with pytest.raises(FusionError, match="node add"):
        fuse_elementwise(gm)
    assert gm.code == code


def test_other_dtypes_are_opaque() -> None:
    def mixed(x: Tensor) -> Any:
        wide, pair = x.double(), torch.complex(x, x)
        narrow = (x * 2 + 1).to(torch.float8_e4m3fn)
        whole = (x.abs() * 2).to(torch.uint8)
        return (wide * 2 + 1).float() * 2 + 1, (pair * 2 + 1).real * 2 + 1, narrow.float() * 2 + 1, whole * 2 + 1

    x = torch.arange(12.0).reshape(3, 4)
    report = check(trace(Function(mixed), (x,)).graph_module, [(x,), (x - 5,)])
    known = {torch.float32, torch.bool, torch.int64}
    assert {n.meta["val"].dtype for f in report.fusions for n in (*f.group.nodes, *f.inputs)} <= known


def test_sparse_tensors_are_opaque() -> None:
    x = torch.eye(4)
    report = check(trace(Function(lambda x: (x.to_sparse().to_dense() * 2 + 1).relu()), (x,)).graph_module, [(x,)])
    assert [node.name for node in report.fusions[0].group.nodes] == ["mul", "add", "relu"]


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2 + 1
        chosen = torch.cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos() * 2, (y,))
        return (chosen * 3 + 1).relu() + y.nonzero().shape[0]


def test_graphs_in_the_graph_and_sizes_read_from_values_stay() -> None:
    x = torch.ones(3, 4)
    gm = torch.export.export(Chooses(), (x,)).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    report = check(gm, [(x,), (-x,)])
    assert sum(len(fusion.group.nodes) for fusion in report.fusions) >= 4


def small() -> GraphModule:
    return trace(Function(lambda x: (x * 2 + 1).relu()), (torch.ones(3, 4),)).graph_module


@pytest.fixture
def no_bindings(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """As where `iree-base-compiler` is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "iree"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "iree", None)
    mlir.bindings.cache_clear()
    yield
    monkeypatch.undo()
    mlir.bindings.cache_clear()


@pytest.mark.usefixtures("no_bindings")
def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = small()
    code = gm.code
    with pytest.raises(MissingDependencyError) as caught:
        fuse_elementwise(gm)
    assert "pip install 'iree-base-compiler" in str(caught.value)
    assert "AUXSTREAM_FUSION=off" in str(caught.value)
    assert gm.code == code
    monkeypatch.setattr(fuse, "SETTINGS", replace(SETTINGS, fusion="off"))
    assert not fuse_elementwise(gm).fusions
    assert gm.code == code


@pytest.mark.parametrize(("value", "fusions"), [("off", 0), ("on", 1), (None, 1)])
def test_switched_off_and_on(value: Any, fusions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "SETTINGS", replace(SETTINGS, fusion=value))
    gm = small()
    code = gm.code
    assert len(fuse_elementwise(gm).fusions) == fusions
    assert (gm.code == code) is (not fusions)


def test_no_warnings() -> None:
    gm = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_elementwise(gm).fusions
        assert gm(torch.ones(3, 4)).tolist() == [[3.0] * 4] * 3
