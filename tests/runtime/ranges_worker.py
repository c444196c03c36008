# ruff: noqa: E402
"""A process in which a tool listens (recording_nvtx.py): what the library does there, and which ranges that gave.

Prints one JSON object: scenario -> its ranges, nested. Whatever is left open fails its scenario.
"""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import recording_nvtx

DOMAIN = recording_nvtx.install()

import torch
from attention_blocks import HIDDEN, Block, Paged, Stack
from torch import Tensor, nn

import auxstream
from auxstream.capture import pieces
from auxstream.capture.graphs import CudaGraph
from auxstream.capture.options import Options
from auxstream.capture.pieces import Launch
from auxstream.capture.program import Program
from auxstream.capture.steps import Piece
from auxstream.runtime import ranges
from auxstream.runtime.regions import fork

X = torch.ones(2)
NOTHING = Program((), (), {0: "caller"}, 0)
QUIET = Options(mlir_elementwise_fusion=False)


class Stop(Exception):
    """What the scenarios fail with."""


class Order:
    stream = 7

    def __enter__(self) -> Order:
        return self

    def __exit__(self, *_: object) -> None: ...


def stop() -> None:
    raise Stop


def stopped(run: Callable[[], object], kind: type[Exception] = Stop) -> None:
    try:
        run()
    except kind:
        return
    raise AssertionError("it was to fail")


def captured() -> None:
    with auxstream.graph("g", device="cpu") as graph:
        auxstream.parallel(lambda: X + 1, lambda: X + 2, reads=X, name="pair")
    graph.replay()


def unproved() -> None:
    """Without a fork wait: the proof fails."""
    with auxstream.graph("off", device="cpu", verify="off"):
        X.add(1)


def left_open() -> None:
    with auxstream.graph("h", device="cpu"):
        fork("open", X).__enter__()


def fails_in_a_region() -> None:
    with auxstream.graph("f", device="cpu"):
        region = fork("outer", X)
        with region, fork("inner", X):
            stop()


def eager_region_fails() -> None:
    with fork("r", X):
        stop()


def op_fails_in_a_graph_module() -> None:
    """As where a graph module runs: nobody leaves the region."""
    with ranges.span("rehearse m"):
        fork("left behind", X).__enter__()
        stop()


def threads() -> None:
    """Each thread closes its own."""
    inside, go = threading.Event(), threading.Event()

    def other() -> None:
        with ranges.span("other"):
            inside.set()
            go.wait()

    thread = threading.Thread(target=other)
    with ranges.span("mine"):
        thread.start()
        inside.wait()
    go.set()
    thread.join()
    assert not any(DOMAIN.open.values())
    assert DOMAIN.log == ["mine", "other", None, None]


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def made(options: dict[str, Any], model: nn.Module | None = None, example: Tensor | None = None, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auxstream.compile(
            model or Rows(), torch.randn(4, 4) if example is None else example, replace(QUIET, **options), **more
        )


def calls_of(model: Any, *inputs: Tensor) -> Callable[[], None]:
    """Compiled before the scenario: only the calls are in it."""

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for given in inputs:
                model(given)

    return run


def cuda_graph() -> CudaGraph:
    graph = object.__new__(CudaGraph)
    graph.name = "decode[8]"
    graph._order = Order()  # pyright: ignore
    graph.cuda_graph = SimpleNamespace(replay=lambda: None)  # pyright: ignore
    return graph


def cuda_pieces() -> None:
    parts = [Piece(NOTHING, "caller", name="m/0"), Piece(NOTHING, "caller", eager=True, name="m/1 attention")]
    parts += [Piece(NOTHING, "launch lane0", name="m/2 shared"), Piece(NOTHING, "caller", name="m/3")]
    runs = (lambda: None, stop, lambda: None, None)
    launches = [Launch(run, 0 if number == 2 else None, ()) for number, run in enumerate(runs)]
    ranged = list(pieces._ranged(launches, parts))
    assert ranged[3].run is None
    assert [launch.lane for launch in ranged] == [launch.lane for launch in launches]
    ranged[0].run()  # pyright: ignore
    stopped(ranged[1].run)  # pyright: ignore
    ranged[2].run()  # pyright: ignore


def main() -> None:
    assert ranges.ENABLED
    torch.manual_seed(0)
    found: dict[str, Any] = {}

    def scenario(name: str, run: Callable[[], object]) -> None:
        DOMAIN.log.clear()
        run()
        found[name] = DOMAIN.tree()

    scenario("captured", captured)
    scenario("verify off", unproved)
    scenario("left open", lambda: stopped(left_open, auxstream.AuxstreamError))
    scenario("fails in a region", lambda: stopped(fails_in_a_region))
    scenario("eager region fails", lambda: stopped(eager_region_fails))
    scenario("graph module fails", lambda: stopped(op_fails_in_a_graph_module))
    DOMAIN.log.clear()
    threads()
    scenario("compiled", lambda: made({}, name="model"))
    rows = {"buckets": (2, 4)}
    scenario("compiled in buckets", lambda: found.update(kept=made(rows, name="model")))
    bucketed = found.pop("kept")
    scenario("calls", calls_of(made({}, name="model"), torch.randn(4, 4)))
    scenario("calls of buckets", calls_of(bucketed, torch.randn(1, 4), torch.randn(3, 4)))
    scenario("a call of no bucket", calls_of(bucketed, torch.randn(5, 4)))
    scenario("a call refused", lambda: stopped(lambda: bucketed(torch.randn(4, 3)), auxstream.AuxstreamError))
    scenario("eager", lambda: bucketed.eager(torch.randn(2, 4)))
    scenario("mode none", lambda: made({"mode": "none"}, name="plain")(torch.randn(4, 4)))
    stack, example = Stack(Block(attention=Paged())), torch.randn(4, HIDDEN)
    piecewise = {"mode": "piecewise", "split_ops": ("auxstream_test.paged_attention",)}
    scenario("piecewise", lambda: found.update(kept=made(piecewise, stack, example, name="step")))
    scenario("calls of pieces", calls_of(found.pop("kept"), example))
    phases: dict[str, Any] = {"mode": "full_decode_only"}
    phased = made(phases, Tokens(), torch.ones(1, 2), prefill=torch.ones(3, 5), name="lm")
    scenario("calls of phases", calls_of(phased, torch.ones(1, 2), torch.ones(3, 5)))
    scenario("a CUDA graph", lambda: cuda_graph().replay())
    scenario("pieces as CUDA graphs", cuda_pieces)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
