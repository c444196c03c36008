"""What a recording must not miss: reads that dispatch no op, modes of the replay, writes schemas hide, late joins."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import auxstream
from auxstream.capture.allocator import AllocatorModel
from auxstream.capture.graphs import SimulatedGraph
from auxstream.capture.program import Op, Wait
from auxstream.capture.proof import verify
from auxstream.capture.record import Recorder
from auxstream.runtime.errors import CaptureError, HostReadError, RaceError
from auxstream.runtime.regions import open_region

# --- reads on the host ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda x: torch.tensor([x[0, 0], 1.0]),
        lambda x: torch.as_tensor([[x[0, 0]], [x[0, 1]]]),
        lambda x: torch.asarray((x[0, 0],)),
        lambda x: x.new_tensor([x[0, 0]]),
        lambda x: torch.tensor(data=[x[0, 0]]),
        lambda x: x.__dlpack__(),
    ],
)
def test_values_taken_without_an_op_are_refused(read: Callable[[Tensor], Any]) -> None:
    x = torch.ones(2, 2)
    with pytest.raises(HostReadError, match=r"test_recording\.py"), auxstream.graph(device="cpu"):
        read(x * 2)


def test_new_tensors_of_python_values_are_made_by_every_replay() -> None:
    x = torch.ones(2)
    with auxstream.graph(device="cpu") as g:
        out = x * torch.tensor([1.0, 2.0]) + torch.as_tensor([3.0]) + x.new_tensor([0.0, 0.0])
    x.fill_(2)
    g.replay()
    assert out.tolist() == [5.0, 7.0]


def test_an_op_over_functions_is_refused_by_name() -> None:
    with (
        pytest.raises(CaptureError, match=r"(?s)cond.*test_recording\.py.*torch\.where"),
        auxstream.graph(device="cpu"),
    ):
        torch.cond(torch.ones(()) > 0, torch.sin, torch.cos, (torch.ones(2),))
    torch._dynamo.reset()  # Dynamo would remember that it met the recorder here


# --- inside custom ops ------------------------------------------------------------------------------------------------


@cache
def library() -> torch.library.Library:
    """`lies` writes its argument and does not say so; `calls` calls it; each device has a kernel of its own."""
    made = torch.library.Library("test_recording", "DEF")
    for name in ("lies", "calls", "sparse", "device"):
        made.define(f"{name}(Tensor x) -> Tensor")
    made.impl("lies", lambda x: x.add_(1) * 2, "CPU")
    made.impl("calls", lambda x: torch.ops.test_recording.lies(x) + 1, "CPU")
    made.impl("sparse", lambda x: torch.sparse.mm(x.to_sparse_coo(), x), "CPU")
    made.impl("device", lambda x: x + 1, "CPU")
    made.impl("device", lambda x: x + 100, "CUDA")
    return made


def beside_a_product(x: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
    region = auxstream.fork("aux", x)
    y = x * 3
    with region:
        s = region.returns(op(x))
    region.join()
    return y + s


@pytest.mark.parametrize("op", ["lies", "calls"])
def test_a_write_that_a_schema_hides_is_seen_however_deep(op: str) -> None:
    library()
    x = torch.ones(64)
    with pytest.raises(RaceError, match=op), auxstream.graph(device="cpu"):
        beside_a_product(x, getattr(torch.ops.test_recording, op))
    with auxstream.graph(device="cpu"):
        beside_a_product(x, torch.ops.test_recording.device)


def test_a_layout_inside_a_custom_op_is_refused_by_name() -> None:
    library()
    with pytest.raises(CaptureError, match="plain strided memory"), auxstream.graph(device="cpu"):
        torch.ops.test_recording.sparse(torch.ones(2, 2))


def test_a_custom_op_on_the_host_runs_its_kernel_for_the_host() -> None:
    """While CUDA captures, tensors of the host go where they always go."""
    library()
    with Recorder(allocator=None, watch="off"):
        assert torch.ops.test_recording.device(torch.ones(2)).tolist() == [2, 2]


# --- captures of somebody else ----------------------------------------------------------------------------------------


def onlooker(noted: dict[str, None]) -> Recorder:
    """As under a CUDA capture: the addresses are the tensors' own."""
    recorder = Recorder(allocator=None, watch="off", noted=noted)
    recorder.device_type = "cpu"
    return recorder


class Bytes(np.ndarray[Any, Any]):
    """Memory that weak references can point to."""


@pytest.mark.parametrize("own", [True, False])
def test_a_capture_of_somebody_else_keeps_nothing_alive(own: bool) -> None:
    """Else memory that its code hands out again would not be handed out again, and what is proved be another graph."""
    recorder = Recorder(allocator=AllocatorModel(), watch="off") if own else onlooker({})
    memory = np.ones(64, np.float32).view(Bytes)
    alive = weakref.ref(memory)
    with recorder:
        _ = torch.from_numpy(memory) + 1  # made by no op: to the recorder it comes from outside
        del memory
        assert (alive() is not None) is own


def resized(x: Tensor) -> Tensor:
    out = torch.empty(0)
    torch.add(x, x, out=out.resize_(0))
    return out


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda x: torch.sparse.mm(x.to_sparse_coo(), x), "plain strided memory"),
        (lambda x: torch.ops.test_recording.sparse(x), "plain strided memory"),
        (lambda x: torch.ops.higher_order.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "functions as arguments"),
        (lambda x: x * float(x.sum()), "values on the host"),
        (resized, "resizes"),
    ],
)
def test_what_cannot_be_recorded_runs_all_the_same(run: Callable[[Tensor], Tensor], said: str) -> None:
    """Once: an op that was half recorded is not run again."""
    library()
    x = torch.ones(2, 2)
    noted: dict[str, None] = {}
    with onlooker(noted):
        result = run(x).clone()
        x.add_(1)
    assert torch.equal(result, run(torch.ones(2, 2)))
    assert x.eq(2).all()
    assert any(said in line for line in noted), noted
    with pytest.raises(CaptureError, match=said), Recorder(allocator=AllocatorModel(), watch="off"):
        run(torch.ones(2, 2))


# --- host memory under a CUDA capture ---------------------------------------------------------------------------------


def test_an_upload_that_makes_its_tensor_is_work_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pinned.to("cuda", non_blocking=True)`: its only argument lies on the host, and yet it is no work of the host."""
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    recorder = Recorder(allocator=AllocatorModel(), watch="error")
    recorder.device_type, recorder.current, recorder.stream_names = "cuda", lambda: 7, {7: "caller"}
    told: list[int] = []
    recorder.before_op = lambda step, stream: told.append(stream)
    pinned = torch.ones(4)
    source = recorder.buffer_of(pinned)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        cuda = torch.device("cuda")
        x = torch.ops.aten._to_copy.default(pinned, device=cuda, non_blocking=True)
        _ = x + 1
    upload, add = recorder.steps
    assert isinstance(upload, Op)
    assert isinstance(add, Op)
    assert (upload.stream, add.stream, told) == (7, 7, [7, 7])
    assert [ref.buffer for ref in upload.reads] == [source]
    assert add.reads == upload.fresh


# --- modes ------------------------------------------------------------------------------------------------------------


def test_a_replay_under_autocast_computes_as_recorded() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(4, 8)
    with torch.no_grad():
        with auxstream.graph(device="cpu") as g:
            out = linear(x)
        expected = linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            g.replay()
    assert torch.equal(out, expected)


# --- accesses ---------------------------------------------------------------------------------------------------------


def shared_norm(norm: nn.Module, x: Tensor) -> Tensor:
    region = auxstream.fork("aux", x)
    one = norm(x)
    with region:
        two = region.returns(norm(x + 1))
    region.join()
    return one + two


def test_running_statistics_of_two_branches_race_in_training_alone() -> None:
    x = torch.randn(8, 4)
    norm = nn.BatchNorm1d(4)
    with pytest.raises(RaceError, match="native_batch_norm"), auxstream.graph(device="cpu"), torch.no_grad():
        shared_norm(norm, x)
    norm.eval()
    with torch.no_grad(), auxstream.graph(device="cpu") as g:
        out = shared_norm(norm, x)
    g.replay()
    assert torch.equal(out, norm(x) + norm(x + 1))


def test_a_value_read_before_it_is_written_is_poison_even_where_an_earlier_replay_left_it() -> None:
    x = torch.ones(4)
    with auxstream.graph(device="cpu") as g:
        with auxstream.aux_region("aux", x) as region:
            y = region.returns(x + 1)
        region.join()
        out = y * 1
    assert isinstance(g, SimulatedGraph)
    g.replay()
    assert out.tolist() == [2.0] * 4
    (join,) = [i for i, step in enumerate(g.program.steps) if isinstance(step, Wait) and step.stream == 0]
    twin = g.program.without(join)
    hazards = tuple(race.hazard for race in verify(twin).races)
    simulation = g.simulation.of(twin)
    simulation.run(simulation.orders.adversarial(0, hazards))
    assert out.isnan().all()


# --- joined first by another lane -------------------------------------------------------------------------------------


def joined_elsewhere_first(x: Tensor, region_of: Callable[[Tensor], auxstream.Region]) -> Tensor:
    h = x * 2
    region, other = region_of(h), auxstream.fork("other", x)
    with region:
        s = region.returns(h * 3)
    with other:
        region.join()  # the region lets go of h here, and the stream h came from has not waited
        t = other.returns(s + 1)
    del h
    z = x + 5
    other.join()
    return z + t


def test_a_read_is_recorded_for_its_lane_not_only_held_until_the_first_join() -> None:
    x = torch.ones(256)
    with auxstream.graph(device="cpu") as g:
        out = joined_elsewhere_first(x, lambda h: auxstream.fork("aux", h))
    for k in range(20):
        x.fill_(float(k))
        g.replay()
        assert torch.equal(out, x + 5 + x * 6 + 1)
    with pytest.raises(RaceError, match="reused block"), auxstream.graph(device="cpu"):
        joined_elsewhere_first(x, lambda h: open_region("aux", held=[h]))
