"""What a recording must not miss: reads that dispatch no op, modes of the replay, writes schemas hide, late joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture.graphs import SimulatedGraph
from auxstream.capture.program import Wait
from auxstream.capture.proof import verify
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
