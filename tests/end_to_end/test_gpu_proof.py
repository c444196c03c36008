"""The proof of real captured graphs, node by node: the Gemma-4 decode step, and small graphs for each source."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import auxstream
from auxstream.bench.lab import Fusion, Lab, gemma4_lab
from auxstream.capture.clocks import Order
from auxstream.capture.evidence import Evidence
from auxstream.capture.graphs import CapturedGraph
from auxstream.capture.proof import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def lab() -> Generator[Lab]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.no_grad():
        yield gemma4_lab("tiny", 2, 1, 64, torch.device("cuda"))
    torch.backends.cuda.enable_cudnn_sdp(before)


def graph_of(lab: Lab, fusion: Fusion) -> CapturedGraph:
    from auxstream.capture.compiler import warm_up_and_capture

    module, caches, _ = lab.module(fusion, aux=True)
    inputs = (lab.ids.clone(), lab.position.clone())
    return warm_up_and_capture(module, inputs, caches, lab.device, name=fusion, verify="error")[0]


@pytest.mark.parametrize("fusion", ["unfused", "caller", "everywhere"])
def test_the_decode_graph_is_proved(lab: Lab, fusion: Fusion) -> None:
    report = graph_of(lab, fusion).report
    assert report.ok, str(report)
    assert {node.stream for node in report.nodes if node.kernel} == {"caller", "lane0"}
    assert all(node.kernel for node in report.nodes)


def test_every_ordering_edge_between_streams_matters(lab: Lab) -> None:
    """Each edge that no path replaces: without it there is a race, if its two sides share memory that is written."""
    evidence = graph_of(lab, "unfused").evidence
    order = Order(len(evidence.nodes), evidence.edges)
    crossing = [(a, b) for a, b in evidence.edges if evidence.nodes[a].stream != evidence.nodes[b].stream]
    assert len(crossing) >= 4
    for edge in crossing:
        cut = replace(evidence, edges=tuple(e for e in evidence.edges if e != edge))
        left = Order(len(cut.nodes), cut.edges)
        if left.before(*edge):
            continue
        assert bool(verify(cut).races) == lost_and_shared(evidence, order, left), edge


def lost_and_shared(evidence: Evidence, order: Order, left: Order) -> bool:
    """By brute force: whether two nodes that are no longer ordered touch the same bytes, one of them writing."""
    nodes = range(len(evidence.nodes))
    spans = [
        [(r.extent(evidence.buffers[r.buffer].address).spans(), w) for r, w in node.touches] for node in evidence.nodes
    ]
    return any(
        order.before(a, b) and not left.before(a, b) and not left.before(b, a)
        and any(
            (w or v) and any(s < y and x < t for s, t in one for x, y in other)
            for one, w in spans[a] for other, v in spans[b]
        )
        for a in nodes for b in nodes
    )  # fmt: skip


# --- hand-written graphs ----------------------------------------------------------------------------------------------


def shown(work: Callable[[], object]) -> CapturedGraph:
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    with warnings.catch_warnings(), auxstream.graph(work.__name__, verify="warn") as g:
        warnings.simplefilter("ignore")
        work()
    return g


def test_scratch_inside_ops_is_attributed() -> None:
    x = torch.randn(1 << 16, device="cuda")

    def sorts() -> Tensor:
        region = auxstream.fork("aux", x)
        a = torch.sort(x)[0] + torch.cumsum(x, 0)
        with region:
            b = region.returns(torch.sort(x, descending=True)[0])
        region.join()
        return a + b

    report = shown(sorts).report
    assert report.ok, str(report)
    scratch = [ref for node in report.nodes for ref, _ in node.touches]
    labels = {shown(sorts).evidence.buffers[ref.buffer].label for ref in scratch}
    assert any(label.startswith("scratch of sort") for label in labels), labels


def test_products_on_two_streams_have_workspaces_of_their_own() -> None:
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(4096, 64, device="cuda", dtype=torch.bfloat16)

    def products() -> Tensor:
        region = auxstream.fork("aux", x)
        a = x @ w
        with region:
            b = region.returns(x @ w)
        region.join()
        return a + b

    report = shown(products).report
    assert report.ok, str(report)


def test_random_numbers_on_both_streams() -> None:
    x = torch.ones(1024, device="cuda")

    def drops() -> Tensor:
        region = auxstream.fork("aux", x)
        a = torch.nn.functional.dropout(x, 0.5)
        with region:
            b = region.returns(torch.nn.functional.dropout(x, 0.5))
        region.join()
        return a + b

    report = shown(drops).report
    assert report.ok, str(report)


def test_a_pinned_buffer_rewritten_in_mid_capture() -> None:
    pinned = torch.ones(256, pin_memory=True)
    x = torch.zeros(256, device="cuda")

    def uploads(again: bool) -> CapturedGraph:
        with warnings.catch_warnings(), auxstream.graph("uploads", verify="warn") as g:
            warnings.simplefilter("ignore")
            x.copy_(pinned, non_blocking=True)
            if again:
                pinned.fill_(2)
        return g

    assert uploads(again=False).report.ok
    (race,) = uploads(again=True).report.races
    assert {race.first.stream, race.second.stream} == {"caller", "host"}


def test_an_upload_may_make_its_tensor() -> None:
    pinned = torch.ones(256, pin_memory=True)
    with auxstream.graph("uploads") as g:
        y = pinned.to("cuda", non_blocking=True) + 1
    pinned.fill_(5)
    g.replay()
    torch.cuda.synchronize()
    assert bool((y == 6).all())
    with warnings.catch_warnings(), auxstream.graph("again", verify="warn") as again:
        warnings.simplefilter("ignore")
        y = pinned.to("cuda", non_blocking=True) + 1
        pinned.fill_(2)
    (race,) = again.report.races
    assert {race.first.stream, race.second.stream} == {"caller", "host"}


def test_a_launch_behind_torch_s_back_is_unattributed() -> None:
    x = torch.ones(256, device="cuda")
    with warnings.catch_warnings(), auxstream.graph("raw", verify="warn") as g:
        warnings.simplefilter("ignore")
        y = x + 1
        torch.cuda._sleep(1000)  # dispatches no op
        y.add_(1)
    assert not g.report.ok
    assert not g.report.races
    (said,) = g.report.unattributed
    assert "no recorded op launched it" in said
