"""What one handoff costs: on the host in eager, and on the device inside a graph.

    python -m auxstream.bench.handoff [--json PATH]

Measures: host time to enqueue fork + one small kernel + join, per iteration, for each way of writing it; device time
per region inside a captured graph against straight-line kernels; on how many streams a replay runs. Does not measure:
overlap, the allocator's work when a recorded block is freed, contention with other threads. Needs a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..capture.graphs import graph
from ..runtime import driver
from ..runtime.regions import fork, open_region
from .command import CommandLine
from .harness import device_time, interleave, write
from .replay_streams import streams_used

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

    side_ids = side.stream_id, side.device_index, side.device_type
    caller_ids = caller.stream_id, caller.device_index, caller.device_type
    event_record, event_wait = torch._C._CudaEventBase.record, torch._C._CudaEventBase.wait

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

    def torch_event_calls_set_stream() -> None:
        event_record(forked, caller)
        x.record_stream(side)
        event_wait(forked, side)
        set_stream(*side_ids)
        kernel()
        event_record(joined, side)
        set_stream(*caller_ids)
        event_wait(joined, caller)
        y.record_stream(caller)

    def raw_driver() -> None:
        record(driver_fork, cu_caller)
        wait(cu_side, driver_fork, 0)
        switch(side)
        kernel()
        record(driver_join, cu_side)
        switch(caller)
        wait(cu_caller, driver_join, 0)

    def raw_driver_recorded() -> None:
        record(driver_fork, cu_caller)
        x.record_stream(side)
        wait(cu_side, driver_fork, 0)
        set_stream(*side_ids)
        kernel()
        record(driver_join, cu_side)
        set_stream(*caller_ids)
        wait(cu_caller, driver_join, 0)
        y.record_stream(caller)

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
        "raw driver calls, both recorded": raw_driver_recorded,
        "torch's bare event calls, both recorded": torch_event_calls_set_stream,
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


def replay_streams(regions: int) -> dict[str, dict[str, int]]:
    """On how many streams a replay of so many regions runs, and on how many it was captured."""
    x = torch.zeros(256, device="cuda")
    streams_used(lambda: x * 2)  # the profiler attaches before anything is captured
    side = torch.cuda.Stream()
    kept: list[Tensor] = []  # by hand, nothing else keeps the graph's memory from being used twice

    def in_regions(h: Tensor) -> Tensor:
        branch = fork("bench", h)
        left = h * 2
        with branch:
            right = branch.returns(h + 1)
        branch.join()
        return left + right

    def by_hand(h: Tensor, aux_first: bool) -> Tensor:
        caller = torch.cuda.current_stream()
        side.wait_stream(caller)
        left = None if aux_first else h * 2
        with torch.cuda.stream(side):
            right = h + 1
        left = h * 2 if left is None else left
        caller.wait_stream(side)
        kept.extend((h, left, right))
        return left + right

    def chain(step: Callable[[Tensor], Tensor]) -> None:
        h = x
        for _ in range(regions):
            h = step(h)

    with graph("bench") as g:
        chain(in_regions)
    found = {"auxstream regions": {"streams": len(streams_used(g.replay)), "captured": len(g.program.stream_names)}}
    for name, aux_first in (("by hand, caller first", False), ("by hand, aux first", True)):
        raw = torch.cuda.CUDAGraph()
        with torch.cuda.graph(raw):
            chain(lambda h, aux_first=aux_first: by_hand(h, aux_first))
        found[name] = {"streams": len(streams_used(raw.replay)), "captured": 2}
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = CommandLine(__doc__, rounds=200, limit=100, quick={"rounds": 50}).options(arguments)
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
    write(options.json, "handoff", results)
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
    print("streams used by a replay of 30 regions, and streams it was captured on (lanes declared, and the caller)")
    results["streams used by a replay"] = counted = replay_streams(30)
    for name, count in counted.items():
        print(f"  {name:48} {count['streams']:8d} {count['captured']:8d}")
    write(options.json, "handoff", results)
    return results


if __name__ == "__main__":
    main()
