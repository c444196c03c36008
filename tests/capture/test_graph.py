"""`auxstream.graph` as a context: its arguments, what an unfinished graph says, and how it nests."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import auxstream
from auxstream.runtime.errors import AuxstreamWarning, CaptureError, RaceError, UndeclaredAccessError
from auxstream.runtime.machine import thread_state


def racy(x: torch.Tensor) -> None:
    with auxstream.aux_region("racy", x) as region:
        x.mul_(2)
    x.add_(1)
    region.join()


USES: dict[str, Callable[[Any], object]] = {
    "replay it": lambda g: g.replay(),
    "wait for its replay": lambda g: g.wait(),
    "read its program": lambda g: g.program,
    "read its report": lambda g: g.report,
    "use its simulation": lambda g: g.simulation,
}


def test_an_unfinished_graph_says_so() -> None:
    with auxstream.graph("half", device="cpu") as g:
        for do, use in USES.items():
            with pytest.raises(CaptureError, match="'half': its capture has not ended") as caught:
                use(g)
            assert caught.value.came == f"an attempt to {do} inside the block"
            assert caught.value.remedy == f"{do} after the `with auxstream.graph(...)` block"
    for use in USES.values():
        use(g)


def test_a_graph_whose_block_failed_says_so() -> None:
    with pytest.raises(ZeroDivisionError), auxstream.graph("half", device="cpu") as g:
        raise ZeroDivisionError
    for do, use in USES.items():
        with pytest.raises(CaptureError, match="'half': its capture has failed") as caught:
            use(g)
        assert caught.value.remedy == f"capture it again, then {do}"


def test_a_graph_whose_proof_failed_has_a_report_and_no_replay() -> None:
    with pytest.raises(RaceError), auxstream.graph("racing", device="cpu") as g:
        racy(torch.ones(4))
    assert not g.report.ok
    with pytest.raises(CaptureError, match="'racing': its capture has failed"):
        g.replay()


@pytest.mark.parametrize("use", ["replay", "report", "memory", "regions", "wait"])
def test_a_graph_that_was_not_entered_says_so(use: str) -> None:
    g: Any = auxstream.graph("a", device="cpu")
    with pytest.raises(CaptureError, match=r"graph 'a' was not entered") as caught:
        getattr(g, use)
    assert caught.value.came == f".{use} of its context manager"
    assert "with auxstream.graph(...) as g" in caught.value.remedy
    with g as captured:
        out = torch.ones(2) * 2
    with pytest.raises(CaptureError, match=r"graph 'a' is not what auxstream\.graph\(\.\.\.\) returns"):
        getattr(g, use)
    captured.replay()
    assert out.tolist() == [2.0, 2.0]
    assert not hasattr(g, "__len__")


def test_one_context_captures_once() -> None:
    context = auxstream.graph(name="twice", device="cpu")
    with context as g:
        out = torch.ones(2) * 2
    with pytest.raises(CaptureError, match="'twice' is entered twice") as caught, context:
        raise AssertionError("the block ran")
    assert "auxstream.graph(...) again" in caught.value.remedy
    g.replay()
    assert out.tolist() == [2.0, 2.0]


def test_an_unknown_verify_says_what_there_is() -> None:
    mode: Any = "strict"
    with pytest.raises(CaptureError, match="unknown verify") as caught, auxstream.graph(device="cpu", verify=mode):
        raise AssertionError("the block ran")
    error = caught.value
    assert (error.expected, error.came) == ("off, warn, error", "'strict'")
    assert "the default, 'error', raises" in error.remedy


def test_verify_modes() -> None:
    x = torch.ones(4)
    with pytest.raises(RaceError) as caught, auxstream.graph("strict", device="cpu"):
        racy(x)
    assert "'strict'" in str(caught.value)
    assert not caught.value.report.ok
    with (
        pytest.warns(AuxstreamWarning, match="'lenient' is not proved"),
        auxstream.graph("lenient", device="cpu", verify="warn") as g,
    ):
        racy(x)
    assert len(g.report.races) > 0
    g.replay()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with auxstream.graph("blind", device="cpu", verify="off") as g:
            racy(x)
    assert not g.report.ok, "an unchecked graph is not a proved one"
    assert "verify='off'" in str(g.report)
    g.replay()


@pytest.mark.parametrize(
    ("arguments", "text"), [({"verify": "loud"}, "off, warn, error"), ({"device": "meta"}, "'cpu'")]
)
def test_bad_arguments(arguments: dict[str, str], text: str) -> None:
    with pytest.raises(CaptureError, match=text), auxstream.graph("odd", **arguments):  # type: ignore[arg-type]
        pytest.fail("the block must not run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(CaptureError, match="'cuda'"), auxstream.graph(device="cuda"):
        pytest.fail("the block must not run")
    with auxstream.graph() as g:
        out = torch.ones(2) * 3
    g.replay()
    assert out.tolist() == [3.0, 3.0]


def test_captures_do_not_nest() -> None:
    x = torch.ones(2)
    with auxstream.graph("outer", device="cpu") as outer:
        machine = thread_state.machine
        with pytest.raises(CaptureError, match="'inner' begins inside another capture"), auxstream.graph("inner"):
            pytest.fail("the block must not run")
        assert thread_state.machine is machine
        out = x + 1
    outer.replay()
    assert out.tolist() == [2.0, 2.0]


def test_no_replay_inside_a_capture() -> None:
    x = torch.ones(2)
    with auxstream.graph("inner", device="cpu") as inner:
        x * 2
    with auxstream.graph("outer", device="cpu") as outer:
        with pytest.raises(CaptureError, match="'inner' is replayed inside a capture"):
            inner.replay()
        out = x + 1
    inner.replay()
    outer.replay()
    assert out.tolist() == [2.0, 2.0]


def test_one_after_another_over_the_same_tensors() -> None:
    x = torch.zeros(2)
    graphs = []
    for k in range(3):
        with auxstream.graph(f"g{k}", device="cpu") as g:
            x.add_(10**k)
        graphs.append(g)
    assert x.tolist() == [0.0, 0.0]
    for k in (2, 0, 1, 0):
        graphs[k].replay()
    assert x.tolist() == [112.0, 112.0]


def test_an_empty_block() -> None:
    with auxstream.graph(device="cpu") as g:
        pass
    g.replay()
    assert g.report.ok
    assert g.regions == ()
    assert g.memory.reserved == 0
    assert str(g.program) == ""


def test_no_pickle() -> None:
    with auxstream.graph(device="cpu") as g:
        torch.ones(1)
    with pytest.raises(CaptureError, match="cannot be pickled"):
        pickle.dumps(g)


# --- undeclared reads -------------------------------------------------------------------------------------------------


def test_an_undeclared_read_that_is_ordered_is_made_good_with_a_warning() -> None:
    x = torch.arange(256.0)
    with pytest.warns(AuxstreamWarning) as caught, auxstream.graph(device="cpu") as g:  # noqa: PT031
        h = x * 2
        with auxstream.aux_region("aux") as region:
            s = region.returns(h + 1)
        del h
        z = x + 5  # would take h's block, had the read not been recorded
        region.join()
        out = s + z
    (warning,) = caught
    assert "add.Tensor on lane0 reads an undeclared tensor made by `mul.Tensor`" in str(warning.message)
    assert "test_graph.py:" in str(warning.message)
    assert "s = region.returns(h + 1)" in str(warning.message)
    labels = {buffer.label: buffer for buffer in g.program.buffers}
    assert labels["mul.Tensor"].address not in [b.address for b in g.program.buffers if b.label == "add.Tensor"]
    for k in range(50):
        x.fill_(float(k))
        g.replay()
        assert torch.equal(out, x * 3 + 6)


def test_an_undeclared_read_that_is_not_ordered_is_an_error() -> None:
    x = torch.ones(4)
    with pytest.raises(UndeclaredAccessError) as caught, auxstream.graph(device="cpu"):  # noqa: PT012
        region = auxstream.fork("aux", x)
        h = x * 2  # after the fork point
        with region:
            h + 1
    text = str(caught.value)
    assert "add.Tensor on lane0" in text
    assert "made by `mul.Tensor`" in text
    assert "test_graph.py:" in text
    assert "remedy:" in text


def test_a_result_used_before_the_join_is_an_error() -> None:
    x = torch.ones(4)
    with pytest.raises(UndeclaredAccessError, match="on caller"), auxstream.graph(device="cpu"):  # noqa: PT012
        with auxstream.aux_region("aux", x) as region:
            y = region.returns(x + 1)
        y * 2
        region.join()


def test_a_result_not_returned_is_made_good_with_a_warning() -> None:
    x = torch.ones(256)
    with (  # noqa: PT031
        pytest.warns(AuxstreamWarning, match=r"mul\.Tensor on caller reads an undeclared"),
        auxstream.graph(device="cpu") as g,
    ):
        with auxstream.aux_region("aux", x) as region:
            y = x + 1
        region.join()
        out = y * 2
    g.replay()
    assert torch.equal(out, torch.full((256,), 4.0))


def test_a_tensor_from_outside_needs_no_declaration() -> None:
    x, weight = torch.ones(4), torch.full((4,), 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with auxstream.graph(device="cpu") as g:
            with auxstream.aux_region("aux") as region:
                y = region.returns(x * weight)
            region.join()
    g.replay()
    assert y.tolist() == [3.0] * 4


def test_one_warning_per_tensor_and_lane() -> None:
    x = torch.ones(4)
    with pytest.warns(AuxstreamWarning) as caught, auxstream.graph(device="cpu"):  # noqa: PT031
        h = x * 2
        with auxstream.aux_region("aux") as region:
            region.returns(h + 1 + h)
        region.join()
    assert len(caught) == 1
