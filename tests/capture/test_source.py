"""Warnings are at the user's own line: not at one of torch's, nor at one of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from moe_blocks import HIDDEN, Layer
from torch import Tensor, nn

import auxstream
from auxstream.capture import Options, insert_regions
from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.trace import trace
from auxstream.runtime.handoff_ops import region_fork


def said(run: Callable[[], object]) -> str:
    """The one warning of ours, which must be at a line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    (found,) = (warning for warning in caught if warning.category is auxstream.AuxstreamWarning)
    assert found.filename == __file__, f"{found.filename}:{found.lineno}"
    return str(found.message)


def undeclared() -> None:
    x = torch.randn(8)
    with auxstream.graph(device="cpu"):
        y = x * 2
        region = auxstream.fork("aux")
        with region:
            region.returns(y + 1)
        region.join()


def undeclared_in_a_graph() -> None:
    """As from a pass that forgets to declare what a branch reads."""
    x = torch.randn(6, HIDDEN)
    model = nn.Sequential(Layer(pre_norm=True)).eval()
    gm = trace(model, (x,)).graph_module
    mark_multi_stream_moe_shared_experts(gm)
    insert_regions(gm)
    for node in gm.graph.nodes:
        if node.target is region_fork:
            node.args = (node.args[0], [], [])
    gm.recompile()
    with torch.no_grad(), auxstream.graph(device="cpu", verify="warn"):
        gm(x * 2)


def unproved() -> None:
    x = torch.randn(8)
    with auxstream.graph(device="cpu", verify="warn"):
        y = x * 2
        region = auxstream.fork("aux", y)
        with region:
            region.returns(y + 1)
        y.add_(1)
        region.join()


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def padding_that_shows() -> None:
    auxstream.compile(Centred(), (torch.randn(4, 3),), Options(buckets=(4,), verify="warn"))


def a_size_that_no_bucket_has() -> None:
    fast = auxstream.compile(nn.Linear(3, 3), (torch.randn(4, 3),), Options(buckets=(4,)))
    fast(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (undeclared, "reads an undeclared tensor made by `mul.Tensor`, at test_source.py:"),
        (unproved, "is not proved free of races"),
        (padding_that_shows, "padding leaks into output 0"),
        (a_size_that_no_bucket_has, "a call of 5 rows runs eagerly"),
    ],
)
def test_a_warning_is_at_the_users_line(run: Callable[[], None], text: str) -> None:
    assert text in said(run)


def test_a_warning_about_a_graph_is_at_its_call_and_names_the_node() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        undeclared_in_a_graph()
    found = [warning for warning in caught if "reads an undeclared tensor" in str(warning.message)]
    assert found
    assert {warning.filename for warning in found} == {__file__}
    assert all("at graph: " in str(warning.message) for warning in found)


def test_a_warning_is_shown_once_for_a_line() -> None:
    """As those of Python are: by the filters of whoever runs it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            undeclared()
    assert len([w for w in caught if w.category is auxstream.AuxstreamWarning]) == 1
