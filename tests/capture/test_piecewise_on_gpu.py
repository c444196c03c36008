"""Steps in pieces on a GPU: bits, memory, and that the host waits for nothing between the first launch and the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from attention_blocks import HIDDEN, MODELS, Paged, Parallel, Stack, mark_paths
from torch import Tensor, nn

import auxstream
from auxstream.capture.graphs import CapturedGraph
from auxstream.capture.inputs import StaticInputs
from auxstream.capture.options import Options
from auxstream.capture.pieces import CudaPieces
from auxstream.capture.pieces_capture import capture_pieces
from auxstream.capture.schedule import insert_regions
from auxstream.capture.trace import trace

pytestmark = pytest.mark.gpu

ROWS = 64


@pytest.fixture(autouse=True)
def attention_of_the_same_bits() -> Iterator[None]:
    """cuDNN's attention does not give the same bits twice everywhere."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@torch.library.custom_op("auxstream_test::peeking_attention", mutates_args=())
def peeking_attention(q: Tensor) -> Tensor:
    """Looks at a value on the host: what no op between launches may do."""
    return q * float(q.sum().item() > 0)


@peeking_attention.register_fake
def _(q: Tensor) -> Tensor:
    return torch.empty_like(q)


class Peeks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(peeking_attention(self.before(x)))


class Step:
    """A model on the GPU, in pieces, and whole on one stream."""

    def __init__(
        self, model: nn.Module, ends: Sequence[str] = (), *, order: Any = "caller_first", rows: int = ROWS, **how: Any
    ) -> None:
        self.device = torch.device("cuda")
        self.static = StaticInputs((torch.randn(rows, HIDDEN, device=self.device),))
        traced = trace(model.to(self.device), self.static.args)
        self.written = traced.written_tensors()
        self.plain = traced.graph_module
        gm = trace(model, self.static.args).graph_module
        mark_paths(gm, ends)
        insert_regions(gm, order=order)
        graph, self.outputs = capture_pieces(
            gm, self.static, self.written, self.device, name="step", verify=how.pop("verify", "error"), **how
        )
        assert isinstance(graph, CudaPieces)
        self.graph = graph

    def whole(self) -> tuple[CapturedGraph, Any]:
        with torch.no_grad(), auxstream.graph("whole", verify="off") as graph:
            outputs = self.plain(*self.static.args)
        return graph, outputs

    def set_input(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        (x,) = self.static.leaves
        x.copy_(torch.randn(x.shape, generator=generator))


def step_of(name: str, **how: Any) -> Step:
    torch.manual_seed(0)
    make, ends = MODELS[name]
    return Step(make(), ends, **how)


@pytest.mark.parametrize("order", ["caller_first", "aux_first"])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_give_the_bits_of_one_graph_on_one_stream(name: str, order: Any) -> None:
    step = step_of(name, order=order)
    graph, outputs = step.whole()
    assert step.graph.report.ok, str(step.graph.report)
    streams = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(2))]
    for seed in range(30):
        with torch.cuda.stream(streams[seed % 3]):
            step.graph.wait()
            step.set_input(seed)
            graph.replay()
            expected = outputs.clone()
            step.outputs.fill_(float("nan"))
            step.graph.replay()
            assert torch.equal(step.outputs, expected), f"replay {seed}"


def test_an_op_that_writes_its_cache_runs_between_launches() -> None:
    torch.manual_seed(0)
    step = Step(Stack(Paged(), Paged()), rows=5, split_ops=("auxstream_test.paged_attention",))
    (cache, _) = step.written
    before = cache.clone()
    expected = step.plain(*step.static.args)
    written = cache.clone()
    cache.copy_(before)
    step.graph.replay()
    assert torch.equal(step.outputs, expected)
    assert torch.equal(cache, written)


# --- the host waits for nothing ---------------------------------------------------------------------------------------

BLOCKING = ("cudaMemcpy", "cudaMemcpy2D", "cudaMalloc", "cudaFree", "cudaMallocHost", "cudaHostAlloc")


def host_waits(run: Callable[[], object]) -> list[str]:
    """CUDA calls between the first launch and the last that make the host wait, as the profiler saw them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        run()
    found = [(event.time_range.start, event.name) for event in profiled.events()]
    calls = [name for _, name in sorted(found) if name.startswith(("cuda", "cu"))]
    launches = [number for number, name in enumerate(calls) if "Launch" in name]
    assert len(launches) > 2, "the profiler saw no launches"
    between = calls[launches[0] : launches[-1]]
    return [name for name in between if "Synchronize" in name or name in BLOCKING]


@pytest.mark.parametrize("name", MODELS)
def test_no_call_makes_the_host_wait(name: str) -> None:
    step = step_of(name)
    for seed in range(3):  # ops between launches have their memory by then
        step.set_input(seed)
        step.graph.replay()
    assert host_waits(step.graph.replay) == []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step.graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_call_that_does_is_seen_both_ways() -> None:
    step = Step(Peeks(), split_ops=("auxstream_test.peeking_attention",))
    for _ in range(3):
        step.graph.replay()
    assert any("Synchronize" in name or "Memcpy" in name for name in host_waits(step.graph.replay))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            step.graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_model_waits_for_nothing_either() -> None:
    torch.manual_seed(0)
    model = Stack(Parallel(), Parallel()).cuda()
    example = torch.randn(ROWS, HIDDEN, device="cuda")
    fast = auxstream.compile(model, example, Options(mode="piecewise", buckets=(ROWS // 2, ROWS)))
    given = [torch.randn(rows, HIDDEN, device="cuda") for rows in (ROWS, 7, ROWS // 2)]
    for _ in range(3):
        for x in given:
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert host_waits(lambda: [fast(x) for x in given]) == []


# --- memory, failure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["off", "error"])
def test_pieces_need_about_the_memory_of_the_whole(verify: Any) -> None:
    """What watches a capture must let go of its memory, too, before the next one begins."""
    torch.manual_seed(0)
    rows = 1 << 19  # tensors of more than 10 MiB each: smaller ones take 20 MiB of a stream's own, whatever they need
    step = Step(Stack(*(Parallel() for _ in range(6))), (".mlp",), rows=rows, verify=verify)
    graph, _ = step.whole()
    assert 0 < step.graph.memory.reserved <= 1.5 * graph.memory.reserved


def test_an_op_that_raises_leaves_the_stream_current_and_the_next_replay_right() -> None:
    step = step_of("both sides")
    step.set_input(0)
    step.graph.replay()
    expected = step.outputs.clone()
    before = torch.cuda.current_stream()

    def fails() -> None:
        raise RuntimeError("as the test wanted")

    whole = step.graph._steps
    step.graph._steps = (*whole[: len(whole) // 2], fails, *whole[len(whole) // 2 :])
    with pytest.raises(RuntimeError, match="as the test wanted"):
        step.graph.replay()
    assert torch.cuda.current_stream() == before
    step.graph._steps = whole
    step.outputs.zero_()
    step.graph.replay()
    assert torch.equal(step.outputs, expected)


def test_watch_sees_work_that_no_wait_orders_with_a_step() -> None:
    step = step_of("beside attention")
    side = torch.cuda.Stream()
    with auxstream.capture.watch(step.graph):
        step.graph.replay()
        with pytest.raises(auxstream.AuxstreamError, match="wait"), torch.cuda.stream(side):
            step.outputs.add_(1)
        with torch.cuda.stream(side):
            step.graph.wait()
            step.outputs.add_(1)
        step.graph.replay()


@pytest.mark.parametrize("mode", ["piecewise", "full", "full_decode_only", "full_and_piecewise"])
def test_modes_agree_with_the_model(mode: Any) -> None:
    from test_phases import BATCH, CONTEXT, Serving, steps

    torch.manual_seed(0)
    model, reference = Serving(), Serving()
    reference.load_state_dict(model.state_dict())
    model, reference = model.cuda(), reference.cuda()
    wanted = Options(mode=mode, buckets=(1, 2, BATCH), prefill_buckets=(2, 4, 8), pad={"position": CONTEXT - 1})
    example = torch.arange(BATCH, device="cuda")[:, None], torch.arange(BATCH, device="cuda")
    prefill = tuple(t.cuda() for t in (torch.arange(8)[None], torch.arange(8), torch.tensor([1]), torch.tensor([0])))
    fast = auxstream.compile(model, example, wanted, prefill=prefill)
    with torch.no_grad():
        for step in steps():
            given = [leaf.cuda() for leaf in step]
            torch.testing.assert_close(fast(*given), reference(*given), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.keys[:, :-1], reference.keys[:, :-1], rtol=1e-4, atol=1e-4)


def test_a_real_model_in_pieces_gives_the_bits_of_its_whole_graphs() -> None:
    pytest.importorskip("transformers")
    from auxstream.capture import huggingface

    context, batch = 32, 4
    outputs: dict[str, list[Tensor]] = {}
    for mode in ("full", "full_and_piecewise"):
        step = huggingface.DecodeStep(huggingface.build(huggingface.gemma4_config(2, "tiny"), "cuda"), batch, context)
        wanted = Options(
            mode=mode, buckets=(1, batch), prefill_buckets=(8, 16), pad={"position": context - 1}, overlap="*=on"
        )
        decode = torch.arange(batch, device="cuda")[:, None], torch.arange(batch, device="cuda")
        tokens = torch.arange(16, device="cuda")
        place = torch.tensor([1], device="cuda"), torch.tensor([0], device="cuda")
        prefill = huggingface.PrefillStep(step), (tokens[None], tokens, *place)
        fast = auxstream.compile(step, decode, wanted, prefill=prefill)
        assert fast.report.ok
        torch.manual_seed(0)
        found = outputs.setdefault(mode, [])
        for length in (1, 7, 8, 9, 15, 16):
            ids = torch.randint(500, (1, length)).cuda()
            ends = torch.tensor([2], device="cuda"), torch.tensor([length - 1], device="cuda")
            found.append(fast(ids, torch.arange(length, device="cuda"), *ends).clone())
            found.append(fast(torch.randint(500, (3, 1)).cuda(), torch.full((3,), length, device="cuda")).clone())
        found += [buffer.clone() for buffer in step.buffers()]
    for number, (whole, pieces) in enumerate(zip(outputs["full"], outputs["full_and_piecewise"], strict=True)):
        assert torch.equal(whole, pieces), f"output {number}"
