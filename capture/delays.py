"""Delays that stay adjustable inside a captured graph: how races are provoked on a GPU without sleeping on the host.

Enters: a graph with regions, and a tensor of nanoseconds. Leaves: the same graph with one `auxstream::delay` on each
side of each region. A delay is a one-thread kernel that spins for the time it reads from device memory, so a replay's
delays are drawn by writing that tensor. On CPU it does nothing: there the simulator's orders take its place.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import has_side_effect

from ..kernels.on_device import on_its_device
from ..runtime.handoff_ops import region_enter, region_fork


@functools.cache
def _spin_kernel() -> Any:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import globaltimer

    @triton.jit(do_not_specialize=["slot"])  # one kernel for all slots: none compiles inside a capture
    def spin(nanoseconds, slot):  # type: ignore[no-untyped-def]
        limit = tl.load(nanoseconds + slot)
        start = globaltimer()
        while globaltimer() - start < limit:  # pyright: ignore[reportOperatorIssue]
            pass

    return spin


@torch.library.custom_op("auxstream::delay", mutates_args=())
def delay(nanoseconds: Tensor, slot: int) -> None:
    """Hold the current stream for `nanoseconds[slot]` (int64, at most 1e9 is sensible) of device time."""
    if nanoseconds.is_cuda:
        on_its_device(_spin)(nanoseconds, slot)


def _spin(nanoseconds: Tensor, slot: int) -> None:
    _spin_kernel()[(1,)](nanoseconds, slot, num_warps=1)


@delay.register_fake
def _(nanoseconds: Tensor, slot: int) -> None: ...


has_side_effect(torch.ops.auxstream.delay.default)


def insert_delays(module: GraphModule, nanoseconds: Tensor) -> None:
    """Add two delays per region: slot 2i on the caller's side, right after fork i; slot 2i + 1 on the lane.

    Args:
        module: a graph after `insert_regions`; edited in place and recompiled.
        nanoseconds: int64 [2 * regions], on the graph's device; becomes the buffer `delays` of the module.
    """
    module.register_buffer("delays", nanoseconds, persistent=False)
    graph = module.graph
    forks = [node for node in graph.nodes if node.target is region_fork]
    slots = {fork: 2 * index for index, fork in enumerate(forks)}
    for node in list(graph.nodes):
        if node.target is region_fork:
            slot = slots[node]
        elif node.target is region_enter:
            slot = slots[node.args[0]] + 1
        else:
            continue
        with graph.inserting_after(node):
            times = graph.get_attr("delays")
            times.meta["val"] = nanoseconds
        with graph.inserting_after(times):
            held = graph.call_function(torch.ops.auxstream.delay.default, (times, slot))
            held.meta["val"] = None
    module.recompile()
