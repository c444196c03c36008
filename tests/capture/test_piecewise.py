"""Steps captured in pieces: values, memory, order and proof, with a twin for each thing that could be left out.

The reference is the module itself, run eagerly on one stream: the ops are the same, so every bit must be.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from attention_blocks import HIDDEN, MODELS, Paged, Parallel, Stack, mark_paths, shared_expert_block
from torch import Tensor, nn

import auxstream
from auxstream.capture import graphs, pieces_capture, steps
from auxstream.capture.allocator import AllocatorModel
from auxstream.capture.inputs import StaticInputs
from auxstream.capture.options import Options
from auxstream.capture.pieces import PiecewiseGraph, SimulatedPieces
from auxstream.capture.pieces_capture import capture_pieces
from auxstream.capture.pieces_machines import Simulated
from auxstream.capture.proof import verify
from auxstream.capture.schedule import insert_regions
from auxstream.capture.simulate import ShadowMemory
from auxstream.capture.splitting import Split
from auxstream.capture.steps import compose, one_program, simulate_step
from auxstream.capture.trace import TracedGraph, trace
from auxstream.runtime.errors import AuxstreamWarning, CaptureError, RaceError

ROWS = 5
ORDERS = ("caller_first", "aux_first")


class Step:
    """A model captured in pieces on the simulated machine, beside a copy of it that stays eager."""

    def __init__(
        self, model: nn.Module, traced: TracedGraph, rows: int = ROWS, *, split_ops: Sequence[str] = (), **options: Any
    ) -> None:
        self.reference = copy.deepcopy(model)
        self.static = StaticInputs((torch.randn(rows, HIDDEN),))
        self.traced = traced
        self.split_ops = split_ops
        self.capture(**options)

    def capture(self, *, verify: Any = "error", pool: AllocatorModel | None = None) -> None:
        graph, self.outputs = capture_pieces(
            self.traced.graph_module,
            self.static,
            self.traced.written_tensors(),
            torch.device("cpu"),
            name="step",
            verify=verify,
            pool=pool,
            split_ops=self.split_ops,
        )
        assert isinstance(graph, SimulatedPieces)
        self.graph = graph

    def is_right(self) -> bool:
        """Whether a replay on new inputs gives what the model does, outputs and buffers alike."""
        (x,) = self.static.leaves
        x.copy_(torch.randn(x.shape))
        self.graph.replay()
        with torch.no_grad():
            found, expected = self.outputs, self.reference(x)
        buffers = zip(self.traced.graph_module.buffers(), self.reference.buffers(), strict=True)
        leaves = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
        return all(torch.equal(a, b) for a, b in [*leaves, *buffers])

    def goes_wrong(self) -> bool:
        """Whether it does in one of the orders that the proof names."""
        return not all(self.is_right() for _ in self.graph.hazards)


def traced(model: nn.Module, ends: Sequence[str] = (), order: Any = "caller_first", rows: int = ROWS) -> TracedGraph:
    made = trace(model, (torch.randn(rows, HIDDEN),))
    mark_paths(made.graph_module, ends)
    insert_regions(made.graph_module, order=order)
    return made


@functools.cache
def known(name: str, order: str, rows: int) -> tuple[nn.Module, TracedGraph]:
    """These models write nothing, and capturing leaves their graphs as they are."""
    torch.manual_seed(0)
    make, ends = MODELS[name]
    model = make()
    return model, traced(model, ends, order, rows)


def step_of(name: str, order: str = "caller_first", rows: int = ROWS, **options: Any) -> Step:
    return Step(*known(name, order, rows), rows, **options)


def step_with(model: nn.Module, **options: Any) -> Step:
    return Step(model, traced(model), **options)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_replays_in_adversarial_orders_give_the_models_bits(name: str, order: Any) -> None:
    step = step_of(name, order=order)
    assert all(step.is_right() for _ in range(8))
    assert step.graph.report.ok
    assert ShadowMemory(step.graph.program).first_violation(step.graph.simulation.orders.program_order()) is None


@pytest.mark.parametrize("name", ["beside attention", "attention beside", "both sides", "beside a block"])
def test_lanes_between_launches_really_run_beside_the_caller(name: str) -> None:
    """Else every order would be the same, and the test above would show nothing."""
    step = step_of(name)
    orders = step.graph.simulation.orders
    assert len({tuple(orders.adversarial(seed)) for seed in range(8)}) > 1


def test_ops_that_write_their_arguments_and_return_tuples() -> None:
    step = step_with(Stack(Paged(), Paged()), split_ops=("auxstream_test.paged_attention",))
    assert sum(piece.eager for piece in step.graph.pieces) == 2
    assert all(step.is_right() for _ in range(6))
    assert (step.traced.graph_module.get_buffer("blocks.0.cache")[:ROWS] != 0).all()


@torch.library.custom_op("auxstream_test::attention_into", mutates_args=("out", "cache"))
def attention_into(q: Tensor, cache: Tensor, out: Tensor) -> None:
    """As serving engines have it: nothing is returned."""
    cache[: q.shape[0]] = q
    out.copy_(torch.softmax(q @ cache.t(), -1) @ cache)


@attention_into.register_fake
def _(q: Tensor, cache: Tensor, out: Tensor) -> None: ...


@pytest.mark.parametrize("mode", ["full", "piecewise", "none"])
@pytest.mark.parametrize("fused", [True, False])
def test_an_op_that_returns_nothing(mode: Any, fused: bool) -> None:
    class Serving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)
            self.register_buffer("cache", torch.randn(12, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            q = self.linear(x)
            out = torch.empty_like(q)
            attention_into(q, self.cache, out)
            return self.linear(out).relu() + x

    torch.manual_seed(0)
    model = Serving()
    reference = copy.deepcopy(model)
    splits = ("auxstream_test.attention_into",) if mode == "piecewise" else ()
    options = Options(mode=mode, split_ops=splits, mlir_elementwise_fusion=fused)
    fast = auxstream.compile(model, torch.randn(ROWS, HIDDEN), options)
    for _ in range(3):
        x = torch.randn(ROWS, HIDDEN)
        torch.testing.assert_close(fast(x), reference(x))
        torch.testing.assert_close(model.cache, reference.cache)
    assert mode == "none" or fast.report.ok


def test_capturing_is_not_a_call() -> None:
    model = Stack(Paged())
    graph = traced(model)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    static = StaticInputs((torch.randn(ROWS, HIDDEN),))
    given, state = static.leaves[0].clone(), torch.get_rng_state()
    names = ("auxstream_test.paged_attention",)
    written, cpu = graph.written_tensors(), torch.device("cpu")
    capture_pieces(graph.graph_module, static, written, cpu, name="s", verify="error", split_ops=names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(static.leaves[0], given)


def test_outputs_that_are_inputs_or_views_of_them_or_results_of_eager_ops() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            q = x.view(1, 1, *x.shape)
            return {"in": x, "view": x[1:], "eager": nn.functional.scaled_dot_product_attention(q, q, q)}

    step = step_with(Odd())
    assert all(step.is_right() for _ in range(3))
    (x,) = step.static.leaves
    assert step.outputs["in"] is x
    assert step.outputs["view"].data_ptr() == x[1:].data_ptr()  # calls make it one of the caller's own


def test_random_numbers_are_drawn_as_eagerly() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Parallel()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.block(nn.functional.dropout(x, 0.5)), 0.5)

    step = step_with(Drops())
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            step.graph.replay()
            torch.manual_seed(seed)
            assert torch.equal(step.outputs, step.reference(*step.static.args))


def test_a_region_that_draws_is_not_launched_beside_others() -> None:
    model = Parallel()
    model.mlp = nn.Sequential(model.mlp, nn.Dropout(0.5))
    graph = traced(model, (".mlp", "mlp"))
    with pytest.warns(AuxstreamWarning, match="may not run side by side: mlp would"):
        step = Step(model, graph)
    assert {piece.stream for piece in step.graph.pieces} == {"caller"}
    quiet = Step(model.eval(), traced(model.eval(), (".mlp", "mlp")))
    assert {piece.stream for piece in quiet.graph.pieces} == {"caller", "launch lane0"}


# --- what keeps it right, and what goes wrong without -----------------------------------------------------------------


CROSSING = ("beside attention", "attention beside", "both sides", "read late")


@pytest.mark.parametrize("name", CROSSING)
def test_without_a_wait_between_launches_the_proof_fails_and_so_do_values(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wait there is, one at a time."""
    whole = pieces_capture.split_graph
    step = step_of(name)
    waits = [(n, other) for n, piece in enumerate(step.graph.pieces) for other in piece.after]
    assert len(waits) >= 4
    wrong = 0
    for number, other in waits:

        def without(gm: Any, names: Any, number: int = number, other: int = other) -> Split:
            split = whole(gm, names)
            parts = list(split.parts)
            parts[number] = replace(parts[number], after=tuple(n for n in parts[number].after if n != other))
            return replace(split, parts=tuple(parts))

        monkeypatch.setattr(pieces_capture, "split_graph", without)
        with pytest.warns(AuxstreamWarning, match="not proved free of races"):
            step.capture(verify="warn")
        assert not step.graph.report.ok
        wrong += step.goes_wrong()
    assert wrong >= len(waits) / 2, "values are corrupted too, but where luck leaves them equal"
    with pytest.raises(RaceError, match="not proved free of races"):
        step.capture()


@pytest.mark.parametrize(
    ("name", "order"),
    [("beside attention", "aux_first"), ("beside two blocks", "aux_first"), ("read late", "caller_first")],
)
def test_memory_that_goes_back_too_early_is_found(name: str, order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed once the last piece that reads it is captured, as if launches followed each other: a lane still reads what
    the caller writes, or ("read late") the caller what the lane writes."""

    def early(self: Any, number: int, part: Any) -> None:
        captured = (1 << number) - 1
        for storage, (_, nodes) in list(self._owned.items()):
            if not any(self._values.users[node] & ~captured for node in nodes):
                self._drop(storage)

    step = step_of(name, order=order)
    assert step.graph.report.ok
    monkeypatch.setattr(pieces_capture._Capture, "_give_back", early)
    with pytest.warns(AuxstreamWarning, match="not proved free of races"):
        step.capture(verify="warn")
    assert any(race.reuse for race in step.graph.report.races)
    assert step.goes_wrong()
    with pytest.raises(RaceError, match="not proved free of races"):
        step.capture()


def test_pieces_of_a_lane_captured_on_the_callers_stream_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One free list for two streams that run side by side."""
    step = step_of("beside attention")
    monkeypatch.setattr(Simulated, "stream", lambda self, lane: None)
    with pytest.raises(RaceError, match="not proved free of races"):
        step.capture()


def test_the_second_of_two_steps_is_proved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that the end of a step does not wait for races with the next step alone."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Parallel()
            self.register_buffer("turn", torch.zeros(1))
            self.register_buffer("kept", torch.zeros(ROWS, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            self.turn.add_(1)
            y = self.block.attention(x)
            self.kept.copy_(self.block.mlp(x + self.turn))
            return y

    step = step_with(Counts())
    for node in (gm := step.traced.graph_module).graph.nodes:
        if node.target is torch.ops.aten.copy_.default or node.name == "add":
            node.meta["auxstream"] = "mlp"
    mark_paths(gm, (".mlp",))
    for node in gm.graph.nodes:
        if node.meta.get("auxstream"):
            node.meta["auxstream"] = "mlp"
    insert_regions(gm)
    step.capture()
    assert step.graph.pieces[-1].after
    assert all(step.is_right() for _ in range(3))
    whole = pieces_capture.split_graph

    def endless(gm: Any, names: Any) -> Split:
        split = whole(gm, names)
        return replace(split, parts=(*split.parts[:-1], replace(split.parts[-1], after=())))

    monkeypatch.setattr(pieces_capture, "split_graph", endless)
    with pytest.warns(AuxstreamWarning, match="not proved free of races"):
        step.capture(verify="warn")
    assert verify(compose(step.graph.pieces)).ok, "one step alone does not show it"
    assert not step.graph.report.ok


# --- memory -----------------------------------------------------------------------------------------------------------


def needed_whole(name: str) -> int:
    """Bytes the graph needs in one capture."""
    _, graph = known(name, "caller_first", ROWS * 64)
    pool = AllocatorModel()
    with torch.no_grad(), auxstream.graph("whole", device="cpu", pool=pool):
        graph.graph_module(torch.randn(ROWS * 64, HIDDEN))
    return pool.reserved


@pytest.mark.parametrize("name", ["no region", "within a piece", "beside attention", "beside a block"])
def test_pieces_need_about_the_memory_of_the_whole(name: str) -> None:
    pool = AllocatorModel()
    step_of(name, rows=ROWS * 64, pool=pool)
    assert pool.reserved <= 1.25 * needed_whole(name)


def test_memory_does_not_grow_with_layers() -> None:
    sizes = []
    for layers in (2, 5):
        pool = AllocatorModel()
        model = Stack(*(Parallel() for _ in range(layers)))
        Step(model, traced(model, (".mlp",), rows=ROWS * 64), ROWS * 64, pool=pool)
        sizes.append(pool.reserved)
    assert sizes[0] == sizes[1]


def test_a_smaller_step_fits_into_the_memory_of_a_larger_one() -> None:
    pool = AllocatorModel()
    large = step_of("beside attention", rows=64, pool=pool)
    reserved = pool.reserved
    small = step_of("beside attention", rows=16, pool=pool)
    assert pool.reserved <= reserved + 16 * HIDDEN * 4 + 1024, "but for its output, which lasts"
    for _ in range(4):
        assert large.is_right()
        assert small.is_right()


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_a_compiled_model_in_pieces_keeps_its_regions_and_its_bits() -> None:
    """Buckets, and calls at their edges, against whole graphs of the same sizes."""
    torch.manual_seed(0)
    model = Stack(shared_expert_block(), Parallel())
    example = torch.randn(6, HIDDEN)
    found: dict[str, list[Tensor]] = {}
    for mode in ("full", "piecewise"):
        wanted = Options(mode=mode, buckets=(2, 4, 6), overlap="*=on", mlir_elementwise_fusion=False)
        fast = auxstream.compile(model, example, wanted)
        assert {graph.regions for graph in fast.graphs} == {("layers.0.shared",)}
        assert {isinstance(graph, PiecewiseGraph) for graph in fast.graphs} == {mode == "piecewise"}
        assert all(graph.report.ok for graph in fast.graphs)
        torch.manual_seed(1)
        found[mode] = [fast(torch.randn(rows, HIDDEN)).clone() for rows in (1, 2, 3, 4, 5, 6, 1)]
    assert all(torch.equal(a, b) for a, b in zip(found["full"], found["piecewise"], strict=True))


# --- standing where a graph stands ------------------------------------------------------------------------------------


def test_it_is_a_captured_graph() -> None:
    step = step_of("both sides")
    graph = step.graph
    assert isinstance(graph, graphs.CapturedGraph)
    assert set(graph.regions) == {f"blocks.{n}.{part}" for n in (0, 1) for part in ("mlp", "attention")}
    assert graph.memory.reserved > 0
    assert "launch of step/0" in str(graph.program)
    assert verify(graph).ok
    assert steps.verify_step([steps.Piece(graph), steps.Piece(graph)]).ok
    with graph.order:
        graph.replay()
    graph.wait()
    assert graph.replays == 1


def test_it_is_not_replayed_inside_a_capture() -> None:
    step = step_of("no region")
    with pytest.raises(CaptureError, match="inside a capture"), auxstream.graph(device="cpu"):
        step.graph.replay()


def test_with_verify_off_nothing_is_proved() -> None:
    graph = step_of("beside attention", verify="off").graph
    assert not graph.report.ok
    assert graph.report.unattributed == ("the whole graph: captured with verify='off'",)


def test_the_step_is_one_program_whose_nodes_are_those_of_its_evidence() -> None:
    graph = step_of("beside a block").graph
    assert len(one_program(graph.pieces).steps) == len(graph.evidence.nodes)
    assert simulate_step(graph.pieces).program.steps == graph.program.steps


def test_the_kill_switch_puts_all_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    off = replace(pieces_capture.SETTINGS, disable=True)
    monkeypatch.setattr(pieces_capture, "SETTINGS", off)
    step = step_of("both sides")
    assert {piece.stream for piece in step.graph.pieces} == {"caller"}
    assert all(step.is_right() for _ in range(3))
