"""Races planted on purpose, each with its clean twin: what the proof must find, and what it must not.

A case is one function of a device and `broken`. Broken, it plants the race that `finds` describes by the comments at
the ends of the two lines that race; whole, it is what a careful author writes, and must be proved. The same code runs
on the simulated machine and on a GPU. Memory that both sides of a race share mostly comes from outside of the capture,
because the recorder refuses at once to read what a stream was never handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import auxstream
from auxstream.capture import CapturedGraph, Report, verify
from auxstream.capture.allocator import AllocatorModel
from auxstream.capture.program import Buffer, Op, Program, Record, Step, TensorRef, Wait
from auxstream.capture.steps import Piece, verify_step
from auxstream.runtime.machine import thread_state
from auxstream.runtime.regions import fork, open_region

Work = CapturedGraph | Program | list[Piece]
Found = tuple[str, str, bool]
"""Comments at the lines of the two ops, in the order they are enqueued, and whether the block changed hands."""


@dataclass(frozen=True, slots=True)
class Case:
    """`build(device, broken)` records the work; `finds` is all that the proof must say of it when broken."""

    build: Callable[[str, bool], Work]
    finds: frozenset[Found]
    where: Literal["both", "gpu", "simulator"]

    @property
    def name(self) -> str:
        return self.build.__name__


CASES: list[Case] = []


def planted(
    *finds: Found, where: Literal["both", "gpu", "simulator"] = "both"
) -> Callable[[Callable[[str, bool], Work]], Callable[[str, bool], Work]]:
    def add(build: Callable[[str, bool], Work]) -> Callable[[str, bool], Work]:
        CASES.append(Case(build, frozenset(finds), where))
        return build

    return add


def report_of(work: Work) -> Report:
    if isinstance(work, list):
        return verify_step(work)
    return verify(work) if isinstance(work, Program) else work.report


def found_in(report: Report) -> frozenset[Found]:
    """What a report says, in the form of `Case.finds`."""
    return frozenset((_comment(race.first.line), _comment(race.second.line), race.reuse) for race in report.races)


def _comment(line: str) -> str:
    return line.rpartition("# ")[2]


def capture(device: str, **options: Any) -> AbstractContextManager[CapturedGraph]:
    return auxstream.graph("planted", verify="warn", device=device, **options)


SHARED, REUSED = ("early", "late", False), ("early", "late", True)
SIZE = 1024  # floats: a block of the small pool on a GPU, and of its own size on the simulated machine


def floats(device: str, *size: int) -> Tensor:
    return torch.ones(size or (SIZE,), device=device)


# --- order: something is not waited for -------------------------------------------------------------------------------


@planted(SHARED)
def aux_output_read_before_the_join(device: str, broken: bool) -> Work:
    x, out, y = floats(device), floats(device), floats(device)
    with capture(device) as g:
        region = fork("aux", x, writes=out)
        with region:
            out.copy_(x)  # early
        if not broken:
            region.join()
        y.copy_(out)  # late
        region.join()
    return g


@planted(SHARED)
def fork_event_recorded_too_early(device: str, broken: bool) -> Work:
    x, h, out = floats(device), floats(device), floats(device)
    with capture(device) as g:
        region = fork("aux", h, writes=out) if broken else None
        h.copy_(x)  # early
        region = region or fork("aux", h, writes=out)
        with region:
            out.copy_(h)  # late
        region.join()
    return g


@planted(SHARED)
def in_place_write_on_aux_while_the_caller_reads(device: str, broken: bool) -> Work:
    h, y = floats(device), floats(device)
    with capture(device) as g:
        if not broken:
            y.copy_(h)
        region = fork("aux", writes=h)
        if broken:
            y.copy_(h)  # early
        with region:
            h.add_(1)  # late
        region.join()
    return g


@planted(SHARED)
def output_copied_out_before_the_join(device: str, broken: bool) -> Work:
    """On a stream for copies, forked before the work is joined."""
    x, out, result = floats(device), floats(device), floats(device)
    with capture(device) as g:
        work = fork("work", x, writes=out)
        with work:
            torch.mul(x, 2, out=out)  # early
        if not broken:
            work.join()
        copies = fork("copies", out, writes=result)
        with copies:
            result.copy_(out)  # late
        work.join()
        copies.join()
    return g


@planted(SHARED)
def nested_region_joined_out_of_order(device: str, broken: bool) -> Work:
    """The outer region's end says nothing of the inner one, which it never waited for."""
    x, a, b, y = floats(device), floats(device), floats(device), floats(device)
    with capture(device) as g:
        outer = fork("outer", x, writes=(a, b))
        with outer:
            a.copy_(x)
            inner = fork("inner", a, writes=b)
            with inner:
                b.copy_(a)  # early
            if not broken:
                inner.join()
        outer.join()
        y.copy_(b)  # late
        inner.join()
    return g


@planted(SHARED)
def transitive_join(device: str, broken: bool) -> Work:
    """The caller joins the second lane alone, which joined the first; or did not."""
    x, a, b, y = floats(device), floats(device), floats(device), floats(device)
    with capture(device) as g:
        first = fork("first", x, writes=a)
        with first:
            a.copy_(x)  # early
        second = fork("second", x, writes=b)
        with second:
            if not broken:
                first.join()
            b.copy_(x)
        second.join()
        torch.add(a, b, out=y)  # late
        first.join()
    return g


@planted(SHARED)
def kv_append_against_attention_read(device: str, broken: bool) -> Work:
    q, k = floats(device, 1, 2, 1, 16), floats(device, 1, 2, 1, 16)
    cache, position = floats(device, 1, 2, 32, 16), torch.tensor([3], device=device)
    with capture(device) as g:
        region = fork("append", k, position, writes=cache)
        with region:
            cache.index_copy_(2, position, k)  # early
        if not broken:
            region.join()
        F.scaled_dot_product_attention(q, cache, cache)  # late
        region.join()
    return g


@planted(SHARED)
def two_writers_of_one_out(device: str, broken: bool) -> Work:
    x, out = floats(device), floats(device)
    with capture(device) as g:
        region = fork("aux", x, writes=out)
        with region:
            torch.add(x, 1, out=out)  # early
        if not broken:
            region.join()
        torch.mul(x, 2, out=out)  # late
        region.join()
    return g


@planted(SHARED)
def fused_group_straddling_two_branches(device: str, broken: bool) -> Work:
    """One launch on the caller's stream does a part of the branch's work, which the branch goes on with."""
    mine, branch_s, out = floats(device), floats(device), floats(device)
    with capture(device) as g:
        region = fork("aux", branch_s, writes=out) if broken else None
        torch._foreach_add_([mine, branch_s], 1.0)  # early
        region = region or fork("aux", branch_s, writes=out)
        with region:
            out.copy_(branch_s)  # late
        region.join()
    return g


@planted(SHARED)
def kernel_launched_on_a_stale_stream(device: str, broken: bool) -> Work:
    """Inside the region, work goes to the stream that was current when somebody looked last."""
    x, h, out = floats(device), floats(device), floats(device)
    with capture(device) as g:
        stale = torch.cuda.current_stream() if device == "cuda" else 0
        region = fork("aux", x, writes=(h, out))
        with region:
            h.copy_(x)  # early
            with _on(stale) if broken else _here():
                out.copy_(h)  # late
        region.join()
    return g


@contextmanager
def _here() -> Iterator[None]:
    yield


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    if not isinstance(stream, int):
        with torch.cuda.stream(stream):
            yield
        return
    streams: Any = thread_state.machine.below  # type: ignore[union-attr]
    current, streams._current = streams._current, stream
    yield
    streams._current = current


# --- lifetime: a block changes hands too early ------------------------------------------------------------------------


@planted(REUSED)
def caller_temporary_reused_while_aux_reads(device: str, broken: bool) -> Work:
    """The region was promised that `h` lives until the join."""
    x, out = floats(device), floats(device)
    with capture(device) as g:
        h = x * 2
        region = open_region("aux", held=(h,))
        with region:
            out.copy_(h)  # early
        if broken:
            del h
            region.held = ()
        z = x + 5  # late
        region.join()
        h = z
    return g


@planted(REUSED)
def aux_temporary_reused_by_the_next_region(device: str, broken: bool) -> Work:
    """The caller still reads the first region's result when the lane's second region forks."""
    x, y, out = floats(device), floats(device), floats(device)
    with capture(device) as g:
        first = open_region("first")
        with first:
            s = x * 3
            first.held_returns = (s,)
        first.join()
        second = open_region("second")
        y.copy_(s)  # early
        if broken:
            del s
            first.held_returns = ()
        with second:
            t = x * 5  # late
            out.copy_(t)
        second.join()
        s = t
    return g


@planted(REUSED)
def recorded_then_freed(device: str, broken: bool) -> Work:
    """`fork` records what it is given; without, the block goes to the caller's next tensor."""
    x, out = floats(device), floats(device)
    with capture(device) as g:
        h = x * 2
        region = open_region("aux", held=(h,)) if broken else fork("aux", h)
        with region:
            out.copy_(h)  # early
        region.held = ()
        del h
        z = x + 5  # late
        region.join()
        out.add_(z)
    return g


@planted(REUSED)
def freed_after_the_join_and_reused(device: str, broken: bool) -> Work:
    """The reuse itself is no crime: after the join it is right, and saves memory."""
    x, out = floats(device), floats(device)
    with capture(device) as g:
        h = x * 2
        region = open_region("aux", held=(h,))
        with region:
            out.copy_(h)  # early
        if not broken:
            region.join()
        region.held = ()
        del h
        z = x + 5  # late
        region.join()
        out.add_(z)
    old, new = (b for b in g.program.buffers if b.stream is not None)
    assert old.address == new.address, "nothing is shown unless the block is reused"
    return g


# --- bytes: who touches what ------------------------------------------------------------------------------------------


@planted(SHARED)
def shared_weight(device: str, broken: bool) -> Work:
    """Both streams read it; one that writes it is another matter."""
    x, w, y, out = floats(device, 8, 8), floats(device, 8, 8), floats(device, 8, 8), floats(device, 8, 8)
    _warm(device)
    with capture(device) as g:
        region = fork("aux", x, writes=(w, out))
        torch.mm(x, w, out=y)  # early
        with region:
            torch.mm(x, w, out=out)
            if broken:
                w.mul_(2)  # late
        region.join()
    return g


@planted(SHARED)
def disjoint_halves(device: str, broken: bool) -> Work:
    h = floats(device)
    with capture(device) as g:
        region = fork("aux", writes=h)
        h[: SIZE // 2 + broken].fill_(1)  # early
        with region:
            h[SIZE // 2 :].fill_(2)  # late
        region.join()
    return g


@planted(SHARED)
def touching_intervals(device: str, broken: bool) -> Work:
    """Odd lengths of bytes, one next to the other."""
    h = torch.zeros(SIZE, dtype=torch.uint8, device=device)
    with capture(device) as g:
        region = fork("aux", writes=h)
        h[: 333 + broken].fill_(1)  # early
        with region:
            h[333:777].fill_(2)  # late
        region.join()
    return g


@planted(SHARED)
def interleaved_columns(device: str, broken: bool) -> Work:
    """Halves of the last dimension, in more rows than anybody lists one by one."""
    x, out = floats(device, 2048, 32), floats(device, 2048, 32)
    with capture(device) as g:
        h = x * 2
        left, right = h.chunk(2, dim=-1)
        region = fork("aux", h)
        left.sigmoid_()  # early
        with region:
            (h[:, 15:] if broken else right).mul_(3)  # late
        region.join()
        torch.add(h, 1, out=out)
    return g


@planted(SHARED)
def partial_overlap_through_different_views(device: str, broken: bool) -> Work:
    """Rows of the transpose against columns of the matrix."""
    h, y = floats(device, 512, 64), floats(device, 512, 31)
    with capture(device) as g:
        region = fork("aux", writes=h)
        y.copy_(h[:, 33:])  # early
        with region:
            h.t()[: 33 + broken].fill_(0)  # late
        region.join()
    return g


@planted(SHARED)
def views_expands_and_empty_writes(device: str, broken: bool) -> Work:
    """Many shapes of one tensor, all read; writes of no bytes."""
    h, y, out = floats(device, 4, 64), floats(device, 3, 4, 64), floats(device, 64, 4)
    with capture(device) as g:
        region = fork("aux", h, writes=(h, out))
        y.copy_(h.expand(3, 4, 64))  # early
        h[2:2].fill_(1)
        with region:
            out.copy_(h.view(64, 4)[:].unsqueeze(0).squeeze(0))
            h[0][64 - broken :].fill_(2)  # late
        region.join()
    return g


@planted(SHARED)
def shared_workspace(device: str, broken: bool) -> Work:
    """Each branch keeps a partial result in scratch memory; in one and the same, if broken."""
    a, b, scratch = floats(device), floats(device), floats(device, 2, SIZE)
    one, other = scratch[0], scratch[0 if broken else 1]
    with capture(device) as g:
        region = fork("aux", b, writes=(b, scratch))
        torch.mul(a, 2, out=one), torch.add(one, 1, out=a)  # early
        with region:
            torch.mul(b, 3, out=other), torch.add(other, 1, out=b)  # late
        region.join()
    return g


@planted(SHARED)
def gemms_on_both_streams(device: str, broken: bool) -> Work:
    """With workspaces and outputs of their own; the library's are its own business, one per stream."""
    x, w, y, z = (floats(device, 64, 64) for _ in range(4))
    _warm(device)
    with capture(device) as g:
        region = fork("aux", x, w, writes=z)
        torch.mm(x, w, out=y)  # early
        with region:
            torch.mm(x, w, out=y if broken else z)  # late
        region.join()
    return g


@planted(("twice", "twice", False))
def same_executable_launched_twice(device: str, broken: bool) -> Work:
    """One kernel, the same code and shapes, on both streams."""
    x, y, z = floats(device), floats(device), floats(device)
    with capture(device) as g:
        region = fork("aux", x, writes=z)
        for target, stream in ((y, _here()), (y if broken else z, region)):
            with stream:
                torch.sin(x, out=target)  # twice
        region.join()
    return g


@planted(SHARED)
def batch_norm_statistics(device: str, broken: bool) -> Work:
    """Training updates running statistics, which the op's schema does not say."""
    x, y = floats(device, 8, 16), floats(device, 8, 16)
    mine = (floats(device, 16), floats(device, 16))
    other = mine if broken else (floats(device, 16), floats(device, 16))
    with capture(device) as g:
        region = fork("aux", y, writes=other)
        F.batch_norm(x, *mine, training=True)  # early
        with region:
            F.batch_norm(y, *other, training=True)  # late
        region.join()
    return g


# --- ops whose word is not to be taken --------------------------------------------------------------------------------


@cache
def _library() -> torch.library.Library:
    """A library's product, and a kernel as fusion registers them. Neither schema speaks of a write."""
    library = torch.library.Library("planted", "DEF")
    library.define("gemm(Tensor a, Tensor b, int handle) -> Tensor")
    library.define("fused(Tensor[] inputs, bool wrong) -> Tensor[]")
    library.impl("gemm", _gemm, "CompositeExplicitAutograd")
    library.impl("fused", _fused_on_cpu, "CPU")
    library.impl("fused", _fused_on_cuda, "CUDA")
    return library


@cache
def _scale() -> Any:
    @torch.library.custom_op("planted_custom::scale", mutates_args=())
    def scale(x: Tensor, in_place: bool) -> Tensor:
        if in_place:
            x.mul_(2)
            return x.clone()
        return x * 2

    return scale


@planted(SHARED)
def custom_op_lies_about_mutates_args(device: str, broken: bool) -> Work:
    scale = _scale()
    h, y = floats(device), floats(device)
    with capture(device) as g:
        region = fork("aux", h)
        y.copy_(h)  # early
        with region:
            region.returns(scale(h, broken))  # late
        region.join()
    return g


def _fused_on_cpu(inputs: list[Tensor], wrong: bool) -> list[Tensor]:
    (x,) = inputs
    out = x * 2
    if wrong:
        x.copy_(out)
    return [out]


def _fused_on_cuda(inputs: list[Tensor], wrong: bool) -> list[Tensor]:
    from planted_kernel import double

    (x,) = inputs
    out = torch.empty_like(x)
    double[(1,)](x, out, x.numel(), WRONG=wrong)
    return [out]


@planted(SHARED)
def fused_kernel_with_a_wrong_access_set(device: str, broken: bool) -> Work:
    """A kernel writes an argument that its op's schema has it read. On a GPU it is Triton's."""
    _library()
    h, y = floats(device), floats(device)
    if device == "cuda":  # compiled before the capture
        for wrong in (False, True):
            _fused_on_cuda([h.clone()], wrong)
    with capture(device) as g:
        region = fork("aux", h)
        y.copy_(h)  # early
        with region:
            region.returns(torch.ops.planted.fused([h], broken))  # late
        region.join()
    return g


_workspaces: dict[tuple[str, int], Tensor] = {}


def _gemm(a: Tensor, b: Tensor, handle: int) -> Tensor:
    """A library's product: it works in memory that its handle holds, and that no schema speaks of."""
    workspace = _workspaces[a.device.type, handle]
    torch.mm(a, b, out=workspace)
    return workspace * 1


@planted(SHARED)
def one_handle_s_workspace_on_two_streams(device: str, broken: bool) -> Work:
    _library()
    x, w = floats(device, 32, 32), floats(device, 32, 32)
    for handle in (0, 1):
        _workspaces[device, handle] = floats(device, 32, 32)
    _warm(device)
    with capture(device) as g:
        region = fork("aux", x, w)
        torch.ops.planted.gemm(x, w, 0)  # early
        with region:
            region.returns(torch.ops.planted.gemm(x, w, 0 if broken else 1))  # late
        region.join()
    return g


def _warm(device: str) -> None:
    """Libraries make their handles outside of captures."""
    torch.mm(floats(device, 8, 8), floats(device, 8, 8))


# --- memory of the host -----------------------------------------------------------------------------------------------


@planted(SHARED)
def pinned_host_buffer_reused(device: str, broken: bool) -> Work:
    """Results go out through a host buffer, and the next inputs come in through the same one."""
    h, out = floats(device), floats(device)
    host, other = (torch.ones(SIZE, pin_memory=device == "cuda") for _ in range(2))
    with capture(device) as g:
        region = fork("copies", h, writes=out)
        host.copy_(h, non_blocking=True)  # early
        with region:
            out.copy_(host if broken else other, non_blocking=True)  # late
        region.join()
    return g


# --- events by hand ---------------------------------------------------------------------------------------------------


def _op(stream: int, line: str, reads: tuple[int, ...] = (), writes: tuple[int, ...] = ()) -> Op:
    def ref(buffer: int) -> TensorRef:
        return TensorRef(buffer, 0, (SIZE,), (1,), torch.float32)

    return Op(stream, "copy", (), {}, (), tuple(map(ref, reads)), tuple(map(ref, writes)), f"model.py:1: {line}", None)


def _program(*steps: Step) -> Program:
    buffers = tuple(Buffer(number << 20, 4 * SIZE, None, name) for number, name in enumerate("xyz", 1))
    return Program(steps, buffers, {0: "caller", 1: "lane0", 2: "lane1"}, 0)


@planted(SHARED, where="simulator")
def event_recorded_again_on_another_stream(device: str, broken: bool) -> Work:
    """A wait binds to the last record before it, whoever made that."""
    return _program(
        _op(0, "x.copy_(...)  # early", writes=(0,)),
        Record(0, "event"),
        _op(2, "z.copy_(...)", writes=(2,)),
        Record(2, "event again"),
        Wait(1, 3 if broken else 1, "event"),
        _op(1, "y.copy_(x)  # late", reads=(0,), writes=(1,)),
    )


@planted(SHARED, where="simulator")
def event_recorded_again_on_the_same_stream(device: str, broken: bool) -> Work:
    """A later point of the same stream serves as well; an earlier one does not."""
    return _program(
        Record(0, "event"),
        _op(0, "x.copy_(...)  # early", writes=(0,)),
        Record(0, "event again"),
        Wait(1, 0 if broken else 2, "event"),
        _op(1, "y.copy_(x)  # late", reads=(0,), writes=(1,)),
        Record(0, "event a third time"),
    )


@planted(SHARED, where="gpu")
def cuda_event_recorded_again_on_another_stream(device: str, broken: bool) -> Work:
    x, h, y, z = (floats(device) for _ in range(4))
    event, start, done = (torch.cuda.Event() for _ in range(3))
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    with capture(device) as g:
        caller = torch.cuda.current_stream()
        start.record(caller)
        for side in (one, other):
            side.wait_event(start)
        h.copy_(x)  # early
        event.record(caller)
        with torch.cuda.stream(other):
            z.copy_(x)
        if broken:
            event.record(other)
        with torch.cuda.stream(one):
            one.wait_event(event)
            y.copy_(h)  # late
        for side in (one, other):
            done.record(side)
            caller.wait_event(done)
    return g


@planted(SHARED, where="gpu")
def cuda_event_recorded_again_on_the_same_stream(device: str, broken: bool) -> Work:
    x, h, y = (floats(device) for _ in range(3))
    event, done = torch.cuda.Event(), torch.cuda.Event()
    side = torch.cuda.Stream()
    with capture(device) as g:
        caller = torch.cuda.current_stream()
        event.record(caller)
        if broken:
            side.wait_event(event)
        h.copy_(x)  # early
        event.record(caller)
        if not broken:
            side.wait_event(event)
        with torch.cuda.stream(side):
            y.copy_(h)  # late
        done.record(side)
        caller.wait_event(done)
    return g


# --- launches: several graphs -----------------------------------------------------------------------------------------


def new_pool(device: str) -> Any:
    return torch.cuda.graph_pool_handle() if device == "cuda" else AllocatorModel()


@planted(REUSED)
def two_graphs_in_one_pool(device: str, broken: bool) -> Work:
    """Their temporaries are the same memory: fine one after the other, on one stream."""
    x, a, b = floats(device), floats(device), floats(device)
    pool = new_pool(device)
    with capture(device, pool=pool) as first:
        h = x * 2  # early
        a.copy_(h)  # early
        del h
    with capture(device, pool=pool) as second:
        h = x * 3  # late
        b.copy_(h)  # late
        del h
    return [Piece(first, 0, name="first"), Piece(second, 1 if broken else 0, name="second")]


@planted(SHARED)
def input_rewritten_during_replay(device: str, broken: bool) -> Work:
    x, fresh, y = floats(device), floats(device), floats(device)
    with capture(device) as model:
        torch.sin(x, out=y)  # early
    with capture(device) as feed:
        x.copy_(fresh)  # late
    return [Piece(model, 0, name="model"), Piece(feed, 1, () if broken else (0,), name="feed")]


@planted(SHARED)
def output_read_on_an_unordered_stream(device: str, broken: bool) -> Work:
    """The graph's own output: memory of its pool, which the second graph reads as if from outside."""
    x, result = floats(device), floats(device)
    with capture(device) as model:
        out = x * 2  # early
    with capture(device) as copy:
        result.copy_(out)  # late
    return [Piece(model, 0, name="model"), Piece(copy, 1, () if broken else (0,), name="copy")]


@planted(REUSED)
def later_piece_reuses_what_an_open_region_reads(device: str, broken: bool) -> Work:
    """The region is a graph of its own, on a stream of its own. Between its launch and its join the caller's next piece
    takes the block of its input, which nobody holds any more: no `record_stream` can stop a replay."""
    x, out, y = floats(device), floats(device), floats(device)
    pool = new_pool(device)
    with capture(device, pool=pool) as before:
        h = x * 2
    with capture(device, pool=pool) as region:
        out.copy_(h)  # early
    if broken:
        _forget(h, before, region, pool)
    with capture(device, pool=pool) as beside:
        z = x + 5  # late
        y.copy_(z)
        del z
    with capture(device) as after:
        y.add_(out)
    return [
        Piece(before, "caller", name="before"),
        Piece(region, "lane", (0,), name="region"),
        Piece(beside, "caller", name="beside"),
        Piece(after, "caller", (1,), name="after"),
    ]


def _forget(h: Tensor, made_by: CapturedGraph, read_by: CapturedGraph, pool: Any) -> None:
    """Let `h` go as if nobody held it; a captured graph keeps what it reads, and the simulated one what it makes."""
    if isinstance(pool, AllocatorModel):
        pool.free(next(buffer.address for buffer in made_by.program.buffers if buffer.stream is not None))
        return
    read_by._outside = {}
    h.set_(torch.empty(0, device=h.device).untyped_storage(), 0, (0,), (1,))


@planted(SHARED, where="gpu")
def two_graphs_with_one_library_workspace(device: str, broken: bool) -> Work:
    """cuBLAS keeps one workspace per stream, and both graphs were captured on the same."""
    a, b = (torch.ones(16, 1 << 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    y, z = (torch.ones(16, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.mm(a, b.t(), out=y)
    torch.cuda.synchronize()
    with capture(device, stream=stream) as first:
        torch.mm(a, b.t(), out=y)  # early
    with capture(device, stream=stream) as second:
        torch.mm(a, b.t(), out=z)  # late
    return [Piece(first, 0, name="first"), Piece(second, 1 if broken else 0, name="second")]
