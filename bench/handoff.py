"""What one handoff costs: on the host in eager, and on the device inside a graph.

    python -m auxstream.bench.handoff [--json PATH]

Measures: host time to enqueue fork + one small kernel + join, per iteration, for each way of writing it; device time
per region inside a captured graph against straight-line kernels. Does not measure: overlap, the allocator's work when
a recorded block is freed, contention with other threads. Needs a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..capture.graphs import graph
from ..runtime import driver
from ..runtime.errors import AuxstreamError
from ..runtime.regions import fork, open_region
from .harness import device_time, interleave, write

BATCH = 100
"""Iterations per host sample: few enough that the launch queue never fills and blocks the host."""


def host_variants(x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    """Every way of running `y = 2 * x` on a second stream and coming back."""
    side = torch.cuda.Stream()
    forked, joined = torch.cuda.Event(), torch.cuda.Event()
    caller = torch.cuda.current_stream()
    set_stream = torch._C._cuda_setStream
    driver_fork, driver_join = driver.make_event(), driver.make_event()
    cu_side, cu_caller = driver.cuda.CUstream(side.cuda_stream), driver.cuda.CUstream(caller.cuda_stream)
    record, wait = driver.event_record, driver.stream_wait_event

    def switch(stream: torch.cuda.Stream) -> None:
        set_stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)

    def kernel() -> None:
        torch.mul(x, 2, out=y)

    def torch_events(recorded: bool) -> Callable[[], None]:
        def run() -> None:
            forked.record()
            side.wait_event(forked)
            if recorded:
                x.record_stream(side)
            with torch.cuda.stream(side):
                kernel()
                joined.record()
            caller.wait_event(joined)
            if recorded:
                y.record_stream(caller)

        return run

    def torch_events_set_stream() -> None:
        forked.record()
        side.wait_event(forked)
        x.record_stream(side)
        switch(side)
        kernel()
        joined.record(side)
        switch(caller)
        caller.wait_event(joined)
        y.record_stream(caller)

    def raw_driver() -> None:
        record(driver_fork, cu_caller)
        wait(cu_side, driver_fork, 0)
        switch(side)
        kernel()
        record(driver_join, cu_side)
        switch(caller)
        wait(cu_caller, driver_join, 0)

    def synchronize_both_ways() -> None:
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(side):
            kernel()
        side.synchronize()

    def region() -> None:
        branch = fork("bench", x)
        with branch:
            kernel()
            branch.returns(y)
        branch.join()

    def region_held() -> None:
        branch = open_region("bench", held=(x,))
        with branch:
            kernel()
        branch.join()

    return {
        "kernel alone": kernel,
        "raw driver calls, nothing recorded": raw_driver,
        "auxstream region, lifetimes by construction": region_held,
        "auxstream region, read and result recorded": region,
        "torch events + set_stream, both recorded": torch_events_set_stream,
        "torch events + stream context": torch_events(recorded=False),
        "torch events + stream context, both recorded": torch_events(recorded=True),
        "synchronize both ways": synchronize_both_ways,
    }


def host_sample(run: Callable[[], None]) -> Callable[[], float]:
    """Host microseconds per call."""

    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(BATCH):
            run()
        return (time.perf_counter_ns() - start) / 1000 / BATCH

    return sample


def graph_variants(regions: int) -> dict[str, Callable[[], float]]:
    """Device microseconds per region: one kernel or two in a line, and two side by side in a region."""
    x, left, right = (torch.zeros(256, device="cuda") for _ in range(3))

    def line(kernels: int) -> None:
        for _ in range(regions):
            for target in (left, right)[:kernels]:
                torch.mul(x, 2, out=target)

    def forked() -> None:
        for _ in range(regions):
            branch = fork("bench", x)
            torch.mul(x, 2, out=left)
            with branch:
                torch.mul(x, 2, out=right)
                branch.returns(right)
            branch.join()

    def captured(work: Callable[[], None]) -> Callable[[], float]:
        with graph("bench") as g:
            work()
        return lambda: device_time(g.replay, 20) / regions

    return {
        "one kernel, straight line": captured(lambda: line(1)),
        "two kernels, straight line": captured(lambda: line(2)),
        "fork, one kernel on each side, join": captured(forked),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise AuxstreamError(
            "bench.handoff measures CUDA streams", came="no GPU", remedy="run it on a machine with one"
        )
    x, y = torch.zeros(256, device="cuda"), torch.zeros(256, device="cuda")
    results: dict[str, Any] = {}
    host = {name: host_sample(run) for name, run in host_variants(x, y).items()}
    print("host time per iteration")
    for name, value in interleave(host, options.rounds, "us").items():
        results[f"host: {name}"] = value
        print(f"  {name:48} {value}")
    base = results["host: kernel alone"].median
    cost = results["host: auxstream region, read and result recorded"].median - base
    results["handoff over the kernel"] = {"median": cost, "unit": "us"}
    print(f"  handoff on top of the kernel: {cost:.2f} us")
    print("device time per region inside a graph")
    for name, value in interleave(graph_variants(200), 50, "us").items():
        results[f"graph: {name}"] = value
        print(f"  {name:48} {value}")
    added = (
        results["graph: fork, one kernel on each side, join"].median
        - results["graph: one kernel, straight line"].median
    )
    results["fork and join in a graph"] = {"median": added, "unit": "us"}
    print(f"  fork and join add to a kernel: {added:.2f} us")
    write(options.json, "handoff", results)
    return results


if __name__ == "__main__":
    main()
