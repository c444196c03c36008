"""One model, several numbers of rows: calls of any size, on the simulated machine and on a GPU."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from bucket_steps import DecodeStep, serving_step
from moe_blocks import HIDDEN, Layer
from torch import Tensor, nn

import auxstream
from auxstream.capture import graphs
from auxstream.capture.buckets import BucketedModel
from auxstream.capture.options import Options
from auxstream.runtime.errors import AuxstreamWarning, CaptureError, InputError

BUCKETS = (2, 3, 6)


class Body(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def compiled(body: Callable[..., Any], *example: Any, **options: Any) -> tuple[Body, BucketedModel]:
    torch.manual_seed(0)
    model = Body(body)
    options = {"buckets": BUCKETS, **options}
    fast = auxstream.compile(model, example or (draw(6),), Options(**options), name="model")
    assert isinstance(fast, BucketedModel)
    return model, fast


def draw(rows: int, width: int = 8) -> Tensor:
    return torch.randn(rows, width)


def replays(fast: BucketedModel) -> dict[int, int]:
    """Replays of each bucket."""
    counts: dict[int, int] = {}
    for size, bucket in fast.buckets.items():
        assert isinstance(bucket.graph, graphs.SimulatedGraph)
        counts[size] = bucket.graph.replays
    return counts


# --- calls ------------------------------------------------------------------------------------------------------------


def test_a_call_gets_its_own_rows_of_everything() -> None:
    def body(m: Body, x: Tensor, scale: Tensor, weight: Tensor) -> Any:
        return {"rows": m.linear(x) * scale, "columns": (x.t() * 2, weight + 1, 3, None), "counted": m.steps.add_(1)}

    example = draw(6), draw(6, 1), draw(8)
    model, fast = compiled(body, *example, token_dims={"args_2": None})
    reference = copy.deepcopy(model)
    for rows in (1, 6, 2, 5, 3, 4, 1):
        given = draw(rows), draw(rows, 1), draw(8)
        found, expected = fast(*given), reference(*given)
        torch.testing.assert_close(found, expected)
        assert found["rows"].shape == (rows, 8)
        assert found["columns"][0].shape == (8, rows)
        assert found["counted"] is model.steps, "a buffer that is returned is the model's own"


def test_the_smallest_bucket_that_holds_a_call_runs_it() -> None:
    model, fast = compiled(lambda m, x: m.linear(x))
    before = replays(fast)
    for rows in range(1, 7):
        x = draw(rows)
        torch.testing.assert_close(fast(x), model(x))
    assert {size: count - before[size] for size, count in replays(fast).items()} == {2: 2, 3: 1, 6: 3}


def test_what_no_bucket_holds_runs_eagerly_and_says_so_once() -> None:
    model, fast = compiled(lambda m, x: (m.steps.add_(1), m.linear(x))[1])
    before = replays(fast)
    with pytest.warns(AuxstreamWarning, match="a call of 7 rows runs eagerly: the buckets are 2, 3, 6") as caught:
        out = fast(draw(7))
    assert caught[0].filename == __file__
    assert not out.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error", AuxstreamWarning)
        for rows in (9, 0):
            x = draw(rows)
            assert torch.equal(fast(x), model.linear(x))
    assert replays(fast) == before
    assert model.steps.item() == 3
    fast(draw(2))
    assert model.steps.item() == 4


def test_rows_in_another_dimension() -> None:
    model, fast = compiled(lambda m, x: m.linear.weight @ x, torch.randn(8, 6))
    for rows in (4, 6, 1):
        x = torch.randn(8, rows)
        torch.testing.assert_close(fast(x), model(x))


def test_keywords_and_nests() -> None:
    def body(m: Body, x: Tensor, more: Any) -> Tensor:
        return m.linear(x) + more["bias"][0]

    model, fast = compiled(body, draw(6), {"bias": [draw(6), None]})
    for rows in (5, 2):
        given = draw(rows), {"bias": [draw(rows), None]}
        torch.testing.assert_close(fast(*given), model(*given))


def test_inputs_that_are_written_are_written_in_the_callers_rows() -> None:
    _, fast = compiled(lambda m, x, y: (x.mul_(2), y.add_(x), y)[2], draw(6), draw(6))
    for rows in (4, 2, 6, 1):
        whole = torch.ones(8, 8)
        x, y = whole[:rows], torch.full((rows, 8), 3.0)
        assert fast(x, y) is y
        assert y.tolist() == [[5.0] * 8] * rows
        assert whole.tolist() == [[2.0] * 8] * rows + [[1.0] * 8] * (8 - rows)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_last_until_the_next_call_of_their_bucket_and_may_be_its_inputs() -> None:
    model, fast = compiled(lambda m, x: m.linear(x))
    x = draw(5)
    first = fast(x)
    expected = model(x)
    assert torch.equal(fast(first), model(expected))
    assert not torch.equal(first, expected), "overwritten by the next call"
    one = fast(draw(5))[:2]
    same = one.clone()
    assert torch.equal(fast(one), model(same)), "and of another bucket"


@pytest.mark.parametrize("buckets", [BUCKETS, ()])
def test_outputs_can_be_copied(buckets: tuple[int, ...]) -> None:
    def body(m: Body, x: Tensor) -> Any:
        return m.linear(x), m.steps, x

    torch.manual_seed(0)
    model = Body(body)
    fast = auxstream.compile(model, (draw(6),), Options(buckets=buckets, copy_outputs=True))
    given = [draw(6) for _ in range(3)]
    found = [fast(x) for x in given]
    for x, (out, steps, same) in zip(given, found, strict=True):
        torch.testing.assert_close(out, model.linear(x))
        assert steps is model.steps
        assert same is x


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused_and_nothing_runs() -> None:
    _, fast = compiled(lambda m, x, y: (m.steps.add_(1), m.linear(x) + y)[1], draw(6), draw(6, 1))
    before = replays(fast)
    with pytest.raises(InputError, match=r"(?s)'args_1' differs.*\(4, 1\).*as 'args_0' has these rows") as caught:
        fast(draw(4), draw(3, 1))
    assert "(3, 1)" in caught.value.came
    for given in (
        (draw(4, 9), draw(4, 1)),
        (draw(4)[None], draw(4, 1)),
        (draw(4).double(), draw(4, 1)),
        (draw(4), 3),
        (3, draw(4, 1)),
        (draw(7), draw(8, 1)),
        (draw(4),),
    ):
        with pytest.raises(InputError):
            fast(*given)
    assert replays(fast) == before
    assert fast.graph.name == "model[6]"


def test_an_output_of_any_bucket_cannot_be_written_by_another() -> None:
    _, fast = compiled(lambda m, x: (m.linear(x), x.add_(1))[0])
    small = fast(draw(2))
    with pytest.raises(InputError, match="an output of an earlier call"):
        fast(small)
    with pytest.raises(InputError, match="an output of an earlier call"):
        fast(torch.as_strided(small, (6, 8), (0, 1)))


# --- what buckets share -----------------------------------------------------------------------------------------------


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(pre_norm=True, merge="norm_behind") for _ in range(2))).eval()


def test_buckets_share_regions_kernels_weights_and_constants(layers: nn.Module) -> None:
    example = torch.randn(6, HIDDEN)
    fast = auxstream.compile(layers, example, Options(buckets=BUCKETS, fusion_safe="*"))
    assert isinstance(fast, BucketedModel)
    names = [[region.name for region in bucket.regions] for bucket in fast.buckets.values()]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 2
    kernels = [sorted(f.spec.mlir for f in bucket.fusion.fusions) for bucket in fast.buckets.values() if bucket.fusion]
    assert kernels[0] == kernels[1] == kernels[2] != []
    outside = [
        {tensor.data_ptr() for tensor in graph._outside.values() if tensor.data_ptr() != x.data_ptr()}
        for graph, x in ((bucket.graph, bucket.calls.static.leaves[0]) for bucket in fast.buckets.values())
    ]
    assert outside[0] == outside[1] == outside[2] != set()
    for rows in (1, 2, 4, 6):
        x = torch.randn(rows, HIDDEN)
        torch.testing.assert_close(fast(x), layers(x))


def test_the_largest_is_captured_first_and_the_others_fit_into_its_memory(layers: nn.Module) -> None:
    captured: list[str] = []

    def note(graph: graphs.CapturedGraph) -> None:
        captured.append(graph.name)

    graphs.OBSERVERS.append(note)
    try:
        fast = auxstream.compile(layers, torch.randn(6, HIDDEN), Options(buckets=BUCKETS), name="moe")
    finally:
        graphs.OBSERVERS.remove(note)
    assert captured == ["moe[6]", "moe[3]", "moe[2]"]
    assert [graph.name for graph in fast.graphs] == ["moe[2]", "moe[3]", "moe[6]"]
    alone = [auxstream.compile(layers, torch.randn(rows, HIDDEN)).memory for rows in BUCKETS]
    memory = fast.memory
    assert memory.pool < sum(one.pool for one in alone)
    assert memory.buckets[0].added == alone[-1].pool
    assert memory.pool == sum(entry.added for entry in memory.buckets)
    assert [entry.bucket for entry in memory.buckets] == [6, 3, 2]


def test_the_ledger_adds_up(layers: nn.Module) -> None:
    """Against a count of every byte that some buffer of the programs lies on."""
    fast = auxstream.compile(layers, torch.randn(6, HIDDEN), Options(buckets=BUCKETS))
    assert isinstance(fast, BucketedModel)
    memory = fast.memory
    everything: dict[str, set[int]] = {}
    for entry in memory.buckets:
        assert entry.bucket is not None
        program = fast.buckets[entry.bucket].graph.program
        own: dict[str, set[int]] = {}
        for buffer in program.buffers:
            if buffer.stream is not None:
                own.setdefault(program.stream_names[buffer.stream], set()).update(
                    range(buffer.address, buffer.address + buffer.nbytes)
                )
        assert {name: len(found) for name, found in own.items()} == entry.streams
        for name, found in own.items():
            everything.setdefault(name, set()).update(found)
    assert {name: len(found) for name, found in everything.items()} == memory.streams
    assert set(memory.streams) == {"caller", "lane0"}
    assert sum(memory.streams.values()) <= memory.pool
    assert memory.inputs == 6 * HIDDEN * 4
    assert memory.total == memory.pool + memory.inputs
    lines = str(memory).splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [["bucket", "6"], ["bucket", "3"], ["bucket", "2"]]
    assert f"{memory.pool:,} reserved" in lines[5]


def test_every_stage_of_every_bucket_can_be_read(tmp_path: Path, layers: nn.Module) -> None:
    auxstream.compile(layers, torch.randn(6, HIDDEN), Options(buckets=(3, 6), dump_dir=tmp_path))
    stages = ["1-traced", "2-overlap", "3-fused", "4-regions", "5-program", "6-report"]
    found = sorted(path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.txt"))
    assert found == [f"bucket-{size}/{stage}" for size in (3, 6) for stage in stages]


def test_compiling_is_not_a_call() -> None:
    torch.manual_seed(0)
    model = Body(lambda m, x: nn.functional.dropout(m.linear(x) * m.steps.add_(1), 0.5))
    x = draw(6)
    before = copy.deepcopy((x, model.state_dict())), torch.get_rng_state()
    fast = auxstream.compile(model, (x,), Options(buckets=BUCKETS))
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(x, before[0][0])
    assert all(torch.equal(value, before[0][1][name]) for name, value in model.state_dict().items())
    torch.manual_seed(1)
    found = fast(x)
    torch.manual_seed(1)
    with torch.no_grad():
        model.steps.zero_()
        torch.testing.assert_close(found, model(x))


# --- mode none --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [BUCKETS, ()])
def test_nothing_captured_is_the_same_to_its_callers(buckets: tuple[int, ...]) -> None:
    def body(m: Body, x: Tensor) -> Any:
        return m.linear(x), m.steps.add_(1), x[:], x.add_(1)

    torch.manual_seed(0)
    model = Body(body)
    reference = copy.deepcopy(model)
    fast = auxstream.compile(model, (draw(6),), Options(mode="none", buckets=buckets))
    assert model.steps.item() == 0
    for rows in (6, 2, 5) if buckets else (6, 6):
        x = draw(rows)
        same = x.clone()
        found, expected = fast(x), reference(same)
        torch.testing.assert_close(found, expected)
        assert found[3] is x
        assert found[1] is model.steps
    fast.wait()
    assert fast.memory.pool == 0
    with pytest.raises(CaptureError, match="nothing to prove"):
        _ = fast.report


# --- threads ----------------------------------------------------------------------------------------------------------


def test_calls_of_all_sizes_from_several_threads() -> None:
    model, fast = compiled(lambda m, x: (m.steps.add_(1), x.mul_(3).add_(m.steps * 0))[1])
    failures: list[BaseException] = []

    def run(thread: int) -> None:
        try:
            for turn in range(20):
                x = torch.full((1 + (thread + turn) % 6, 8), float(100 * thread + turn))
                fast(x)
                assert x.unique().tolist() == [3.0 * (100 * thread + turn)]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.steps.item() == 60


# --- decode steps -----------------------------------------------------------------------------------------------------

CONTEXT, BATCH = tiny_models.CONTEXT, 8


def bucketed(step: DecodeStep, buckets: tuple[int, ...], **options: Any) -> BucketedModel:
    device = next(step.parameters()).device
    example = torch.arange(step.batch, device=device)[:, None], torch.arange(step.batch, device=device)
    options = {"pad": {"position": step.context - 1}, **options}
    fast = auxstream.compile(step, example, Options(buckets=buckets, **options))
    assert isinstance(fast, BucketedModel)
    return fast


def tokens(rows: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids, and positions short of the scratch one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (rows, 1), generator=generator)
    return ids.to(device), torch.randint(0, CONTEXT - 1, (rows,), generator=generator).to(device)


def padded(step: DecodeStep, buckets: tuple[int, ...], ids: Tensor, position: Tensor) -> Tensor:
    """The reference: the model, eagerly, on rows padded by hand to the size of the bucket."""
    rows = len(ids)
    size = min(bucket for bucket in buckets if bucket >= rows)
    with torch.no_grad():
        ids = torch.cat([ids, ids[-1:].expand(size - rows, 1)])
        return step(ids, torch.cat([position, position.new_full((size - rows,), step.context - 1)]))[:rows]


def same_caches(one: DecodeStep, other: DecodeStep) -> bool:
    """All but the scratch position."""
    pairs = zip(one.caches(), other.caches(), strict=True)
    return all(torch.equal(mine[kind][:, :, :-1], theirs[kind][:, :, :-1]) for mine, theirs in pairs for kind in mine)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_decode_steps_of_every_batch(name: str) -> None:
    step, reference = serving_step(name, batch=BATCH), serving_step(name, batch=BATCH)
    places = [cache.data_ptr() for state in step.caches() for cache in state.values()]
    buckets = (1, 2, 4, 8)
    fast = bucketed(step, buckets, mlir_elementwise_fusion=False)
    assert [verdict.how for verdict in fast.padding] == ["unpadded", "unpadded", "checked", "checked"]
    assert all(bucket.report.ok for bucket in fast.buckets.values())
    assert all(bucket.regions for bucket in fast.buckets.values())
    for seed, rows in enumerate((1, 8, 3, 5, 2, 7, 4, 6, 8, 1)):
        given = tokens(rows, seed)
        assert torch.equal(fast(*given), padded(reference, buckets, *given)), rows
        assert same_caches(step, reference), rows
    assert places == [cache.data_ptr() for state in step.caches() for cache in state.values()]


def test_a_row_that_is_not_in_a_call_keeps_its_cache() -> None:
    """And with padded rows sent to a live position it would not: the twin, compiled unchecked."""
    kept: dict[int, bool] = {}
    for pad in (CONTEXT - 1, 3):
        step = serving_step("qwen2_moe", batch=4)
        fast = bucketed(step, (4,), pad={"position": pad}, verify="off")
        fast(*tokens(4, 0)[:1], torch.full((4,), 3))
        before = [cache[2:, :, :-1].clone() for state in step.caches() for cache in state.values()]
        fast(*tokens(2, 1)[:1], torch.full((2,), 4))
        after = [cache[2:, :, :-1] for state in step.caches() for cache in state.values()]
        kept[pad] = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert kept == {CONTEXT - 1: True, 3: False}


def test_a_decode_step_without_a_scratch_position_is_refused() -> None:
    with pytest.raises(CaptureError, match="would write 'keys_0'"):
        bucketed(serving_step("qwen2_moe", batch=4), (4,), pad={})
    with pytest.raises(CaptureError, match="would write 'keys_0'"):
        bucketed(serving_step("qwen2_moe", batch=4), (4,), pad={"position": 3})


def test_a_step_with_one_position_for_all_rows_is_refused() -> None:
    step = serving_step("qwen2_moe", batch=4)
    with pytest.raises(CaptureError, match="would write 'keys_0'"):
        auxstream.compile(
            step, (torch.arange(4)[:, None], torch.tensor([5])), Options(buckets=(4,), pad={"input_ids": 0})
        )


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic() -> Generator[None]:
    """cuDNN's attention does not give the same bits twice."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


FORCED: dict[str, Any] = {"mlir_elementwise_fusion": False, "overlap": "*=off,layers.*.shared=on"}
"""Regions, whatever a measurement would say."""
TORCHS_OWN: dict[str, Any] = {**FORCED, "decode_attention": False, "router_kernels": False, "product_kernels": False}
"""The kernels of the eager model, which comparisons bit for bit need."""


class OnGpu:
    """A tiny decode step in four buckets, and a twin to run eagerly."""

    buckets = (1, 2, 4, 8)

    def __init__(self, name: str, **options: Any) -> None:
        self.step, self.reference = (serving_step(name, batch=BATCH).cuda() for _ in range(2))
        self.fast = bucketed(self.step, self.buckets, **options)

    def agrees(self, rows: int, seed: int) -> bool:
        given = tokens(rows, seed, "cuda")
        found = self.fast(*given).clone()
        return torch.equal(found, padded(self.reference, self.buckets, *given))


for_gpu = pytest.mark.parametrize("name", ["gemma4", "qwen2_moe"])


@pytest.mark.gpu
@pytest.mark.timeout(600)
@for_gpu
def test_on_a_gpu_every_batch_equals_eager_bit_for_bit(name: str, deterministic: None) -> None:
    on = OnGpu(name, **TORCHS_OWN)
    assert [verdict.how for verdict in on.fast.padding] == ["unpadded", "unpadded", "checked", "checked"]
    assert all(bucket.report.ok and bucket.regions for bucket in on.fast.buckets.values())
    for turn in range(3):
        for rows in (*range(1, BATCH + 1), 8, 1, 5, 2):
            assert on.agrees(rows, 100 * turn + rows), rows
            assert same_caches(on.step, on.reference), rows


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_fused_buckets_are_near_the_model(deterministic: None) -> None:
    on = OnGpu("gemma4")
    for rows in range(1, BATCH + 1):
        on.step.reset()
        on.reference.reset()
        given = tokens(rows, rows, "cuda")
        with torch.no_grad():
            expected = on.reference(*given).float()
        error = (on.fast(*given).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.median() < 0.05, "rounding may turn a router for some rows, and not for most"


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_one_pool_is_smaller_than_one_for_each(deterministic: None) -> None:
    on = OnGpu("gemma4", **FORCED)
    alone = 0
    for size in on.buckets:
        given = tuple(leaf[:size] for leaf in tokens(BATCH, 0, "cuda"))
        alone += auxstream.compile(on.reference, given, Options(**FORCED)).memory.pool
    memory = on.fast.memory
    assert memory.pool < alone
    assert memory.pool == sum(entry.added for entry in memory.buckets)
    assert set(memory.streams) == {"caller", "lane0"}
    assert 0 < sum(memory.streams.values()) <= memory.pool


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_calls_alternate_among_buckets_and_streams(deterministic: None) -> None:
    on = OnGpu("gemma4", **TORCHS_OWN)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    plan = [(1 + (7 * turn) % BATCH, turn) for turn in range(40)]
    given = [tokens(rows, seed, "cuda") for rows, seed in plan]
    torch.cuda.synchronize()
    found: list[Tensor] = []
    for turn, call in enumerate(given):
        with torch.cuda.stream(streams[turn % 2]):
            found.append(on.fast(*call).clone())
    torch.cuda.synchronize()
    for call, out in zip(given, found, strict=True):
        assert torch.equal(out, padded(on.reference, on.buckets, *call))
    assert same_caches(on.step, on.reference)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("waits", [True, False], ids=["waits", "twin"])
def test_on_a_gpu_inputs_made_on_another_stream(waits: bool, deterministic: None) -> None:
    """That stream calls `wait` before it makes them; then the call is behind it, by events alone."""
    on = OnGpu("qwen2_moe", **TORCHS_OWN)
    side = torch.cuda.Stream()
    ids, position = tokens(5, 0, "cuda")
    late = torch.zeros_like(ids)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        if waits:
            on.fast.wait()
        torch.cuda._sleep(400_000_000)
        late.copy_(ids)
    out = on.fast(late, position)
    torch.cuda.synchronize()
    assert torch.equal(out, padded(on.reference, on.buckets, ids, position)) == waits


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_no_call_waits_on_the_host(deterministic: None) -> None:
    on = OnGpu("gemma4")
    given = [tokens(rows, rows, "cuda") for rows in range(1, BATCH + 1)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in given * 2:
            on.fast(*call)
        with pytest.raises(RuntimeError, match="synchronizing"):
            on.fast(*given[0])[0, 0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_nothing_captured_equals_what_is_captured(deterministic: None) -> None:
    on, plain = (OnGpu("gemma4", mode=mode, **FORCED) for mode in ("full", "none"))
    for rows in (3, 8, 1, 6):
        assert torch.equal(on.fast(*tokens(rows, rows, "cuda")), plain.fast(*tokens(rows, rows, "cuda")))


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_padding_that_leaks_is_refused() -> None:
    x = torch.randn(8, 64, device="cuda")
    for leak in (lambda m, x: x - x.mean(0), lambda m, x: x.softmax(0)):
        with pytest.raises(CaptureError, match="leaks into output 0"):
            auxstream.compile(Body(leak).cuda(), (x,), Options(buckets=(8,)))
        fast = auxstream.compile(Body(leak).cuda(), (x,), Options(buckets=(8,), verify="off"))
        assert not torch.allclose(fast(x[:5]), leak(None, x[:5])), "the twin: unchecked, it is wrong"
