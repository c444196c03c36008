"""Regions: a branch on an auxiliary stream, handed off and back by events.

    region = fork("shared_expert", x)      FORKED    the fork point is marked on the caller's stream
    with region:                           RUNNING   a lane, which waits for the fork point
        y = region.returns(mlp(x))
                                           LEFT      the done point is marked on the lane
    region.join()                          JOINED    the current stream waits for the done point

Enters: tensors (any pytree) the branch will read or write. Leaves: the same Python values, safe to use on every
stream that joined. Invariant: the host never waits, and a region's steps happen in the order above or raise.
No environment and no logging here. The usual eager region has its own, quicker form of the steps (runtime/quick.py).
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import torch.utils._pytree as pytree
from torch import Tensor

from . import ranges
from .errors import AuxstreamError, AuxstreamWarning, RegionError, UndeclaredAccessError
from .machine import INLINE, Machine, adopt_machine, thread_state

T = TypeVar("T")


class State(enum.Enum):
    """A region's life."""

    FORKED = "forked"  # fork(): the lane is taken, the fork point marked
    RUNNING = "running"  # __enter__: the lane is current
    LEFT = "left"  # __exit__: the caller's stream is current again, the done point marked
    JOINED = "joined"  # first join(): the lane may serve another region; further streams may still join


_FORKED: Final = State.FORKED
_RUNNING: Final = State.RUNNING
_LEFT: Final = State.LEFT
_JOINED: Final = State.JOINED
NOTHING: Final[tuple[Any, ...]] = ()
Versions = int | None | tuple[int | None, ...]
"""One tensor's version, or one for each of several; None: not compared."""


class Region:
    """One branch on an auxiliary stream. Made by `fork`, entered once by `with`, joined at least once.

    Attributes:
        name: as given to `fork`.
        state: where in its life it is: forked, running, left, joined.
    """

    __slots__ = (
        "__weakref__",
        "_returned",
        "_versions",  # of `recorded`, at the fork
        "held",  # reads that a compiled graph keeps alive until the join
        "held_returns",  # results whose lifetime a compiled graph has proved
        "joined_by",  # the machine's: streams that have waited
        "lane",  # the machine's: the stream the branch runs on; None: the caller's
        "machine",
        "name",
        "outer",  # the machine's: the stream that was current at enter
        "priority",
        "recorded",  # tensors that get `record_stream`
        "state",
    )

    def __init__(self, name: str, machine: Machine, recorded: Sequence[Tensor], priority: int = 0) -> None:
        self.name = name
        self.machine = machine
        self.recorded: Sequence[Tensor] = recorded
        self.priority = priority
        self.state = _FORKED
        self.lane: Any = None
        self.outer: Any = None
        self.joined_by: tuple[int, ...] = NOTHING
        self.held: Sequence[Tensor] = NOTHING
        self.held_returns: Sequence[Tensor] = NOTHING
        self._returned: tuple[Tensor, ...] = NOTHING
        self._versions: Versions = None

    def __repr__(self) -> str:
        return f"<auxstream region {self.name!r}, {self.state.value}>"

    def __enter__(self) -> Region:
        if self.state is not _FORKED:
            raise self._illegal("entered", "a freshly forked region", "fork a new region for each branch")
        self.machine.enter(self)
        self.state = _RUNNING
        if ranges.ENABLED:
            ranges.push(self.name if self.lane is None else f"{self.name} [{self.lane.name}]")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.state is not _RUNNING:
            raise self._illegal("left", "a running region", "leave a region once, by ending its `with` block")
        if ranges.ENABLED:
            ranges.pop()
        try:
            self.machine.leave(self)
            if error is not None:
                # Unwinding drops the tensors the branch was reading: wait first. Versions are not compared here,
                # or a second error would hide the user's.
                self.machine.join(self, self._returned)
        except AuxstreamError as refusal:  # as in a capture that the user's own error has invalidated
            if error is None:
                raise
            error.add_note(f"while closing region {self.name!r}: {refusal}")
            self._drop()
        finally:
            self.state = _LEFT
        if error is not None:
            self._close()

    def returns(self, values: T) -> T:
        """Declare what the branch hands back to the streams that join.

        Args:
            values: any pytree of tensors and other leaves. Several calls add up.

        Returns:
            `values`, unchanged.

        Raises:
            RegionError: the region is not running.
        """
        if self.state is not _RUNNING:
            raise self._illegal("asked to return values", "a running region", "call returns() inside the `with` block")
        if isinstance(values, Tensor):
            self._returned = (*self._returned, values) if self._returned else (values,)
        else:
            found = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
            self._returned = (*self._returned, *found)
        return values

    def join(self) -> None:
        """Make the current stream wait, on the device, until the branch is done. Again on the same stream: no-op.

        Where another device is current, it is the current stream of the region's device that waits.

        Raises:
            RegionError: the region was not left yet.
            UndeclaredAccessError: a tensor the branch reads was written between fork and join (eager only).
        """
        if self.state is not _LEFT and self.state is not _JOINED:
            raise self._illegal("joined", "a region whose branch has run", "join after its `with` block")
        self.machine.join(self, self._returned)
        if self.state is _LEFT:
            declared, versions = self.recorded, self._versions
            self._close()
            if versions is not None and (index := _first_written(declared, versions)) is not None:
                raise self._undeclared_write(index)

    def abandon(self) -> None:
        """Give up a region on the way out of an error: wait for its branch if it ran, forget it if it did not."""
        try:
            if self.state is _RUNNING:
                if ranges.ENABLED:
                    ranges.pop()
                self.machine.leave(self)
                self.state = _LEFT
            if self.state is _LEFT:
                self.machine.join(self, self._returned)
            else:
                self._drop()
        except BaseException:
            self._drop()
            raise
        finally:
            self._close()

    def _drop(self) -> None:
        """Nobody will wait for the branch: the machine takes back what it lent, once."""
        if self.state is not _JOINED:
            self.machine.drop(self)
            self.lane = None

    def _close(self) -> None:
        self.state = _JOINED
        self.recorded = self.held = NOTHING

    def _undeclared_write(self, index: int) -> UndeclaredAccessError:
        return UndeclaredAccessError(
            f"region {self.name!r}: the tensor declared as read #{index} was written between fork and join",
            expected="tensors a branch reads stay unwritten until the region is joined",
            came="an in-place write, on the branch or on the caller's stream",
            remedy=f"declare it: fork({self.name!r}, ..., writes=tensor), and touch it on one side only until join()",
        )

    def _illegal(self, step: str, expected: str, remedy: str) -> RegionError:
        return RegionError(
            f"region {self.name!r} cannot be {step}", expected=expected, came=f"{self.state.value}", remedy=remedy
        )

    def __del__(self) -> None:
        if self.state is _JOINED:
            return
        self._drop()
        warnings.warn(
            f"region {self.name!r} was dropped while {self.state.value}: nobody waited for its branch. "
            "Call join() before its results are used.",
            AuxstreamWarning,
            stacklevel=2,
        )


def open_region(
    name: str, *, recorded: Sequence[Tensor] = NOTHING, held: Sequence[Tensor] = NOTHING, priority: int = 0
) -> Region:
    """Fork with the lifetimes spelled out, for compiled graphs: `held` tensors are kept alive until the join by the
    caller's own references and need no `record_stream`; `recorded` ones get it."""
    machine = thread_state.machine or thread_state.own or adopt_machine()
    first = recorded or held
    if first and not first[0].is_cuda and machine.compares_versions and _all_on_cpu(recorded, held):
        machine = INLINE
    region = Region(name, machine, recorded, priority)
    region.held = held
    return _forked(region)


def fork(name: str, *reads: Any, writes: Any = NOTHING, priority: int = 0) -> Region:
    """Mark the point on the current stream from which a branch may run on an auxiliary stream.

    Every declared tensor is recorded for the lane with `record_stream`, in eager and while capturing.

    Args:
        name: the region's name, for messages, settings and profiles.
        reads: tensors the branch reads that the caller's stream (or another lane) produced; any pytree, of any shapes
            and dtypes. Weights and other tensors that outlive the branch need not be named.
        writes: tensors the branch mutates; any pytree.
        priority: CUDA stream priority of the lane (0, or negative for more urgent; clamped to the device's range).

    Returns:
        the region, to be entered by `with` and joined behind it.

    Raises:
        RegionError: a name that is no string, a read that is no tensor or on another device than the current one.
    """
    quick_fork = thread_state.quick_fork
    if quick_fork is not None and writes is NOTHING and not priority and type(name) is str:
        region = quick_fork(name, reads)
        if region is not None:
            return region
    _check_name(name)
    read = _tensors(name, reads, "read")
    written = _tensors(name, writes, "write")
    machine = thread_state.machine or thread_state.own or adopt_machine()
    compares = machine.compares_versions
    if compares and (read or written) and _all_on_cpu(read, written):
        machine = INLINE
    region = Region(name, machine, (*read, *written), priority)
    if compares:
        region._versions = versions_of(region.recorded, written)
    return _forked(region)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise RegionError(
            "a region has no name",
            expected="a string: the first argument of fork() and aux_region() is the region's name",
            came=_said(name),
            remedy="name it in front of what it reads: fork('shared_expert', x)",
        )


def _said(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"[:120]


def _forked(region: Region) -> Region:
    try:
        region.machine.fork(region)
    except BaseException:
        region.abandon()
        raise
    return region


def versions_of(tensors: Sequence[Tensor], written: Sequence[Tensor] = NOTHING) -> Versions:
    """The versions to compare at the join. An inference tensor keeps none; what shares memory with one of `written`
    may change."""
    allowed = {tensor.untyped_storage()._cdata for tensor in written}
    versions = [
        None if tensor.is_inference() or (allowed and tensor.untyped_storage()._cdata in allowed) else tensor._version
        for tensor in tensors
    ]
    return versions[0] if len(versions) == 1 else tuple(versions)


def _first_written(tensors: Sequence[Tensor], before: Versions) -> int | None:
    """The index of the first of `tensors` whose version differs from the one it had `before`."""
    versions = before if isinstance(before, tuple) else (before,) * len(tensors)
    for index, (tensor, version) in enumerate(zip(tensors, versions, strict=True)):
        if version is not None and version != tensor._version:
            return index
    return None


def _all_on_cpu(*groups: Sequence[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for group in groups for tensor in group)


def _tensors(name: str, tree: Any, role: Literal["read", "write"]) -> list[Tensor]:
    if isinstance(tree, tuple) and all(isinstance(leaf, Tensor) for leaf in tree):
        return list(tree)
    found: list[Tensor] = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif leaf is not None:
            where = pytree.keystr(path)
            raise RegionError(
                f"region {name!r}: a {role}{' at ' + where if where else ''} is no tensor",
                expected="tensors, in any nesting of lists, tuples and dicts; None is skipped",
                came=f"{type(leaf).__name__} {leaf!r}"[:120],
                remedy=f"pass only the tensors the branch {role}s; Python values need no declaration",
            )
    return found


def aux_region(name: str, *reads: Any, writes: Any = NOTHING, priority: int = 0) -> Region:
    """Fork, to be entered at once: `with aux_region("shared", x) as region: ...`; `region.join()` stays explicit.

    Args:
        name: as of `fork`, and so are the others.
        reads: tensors the branch reads.
        writes: tensors the branch mutates.
        priority: CUDA stream priority of the lane.

    Returns:
        the region, forked.

    Raises:
        RegionError: as from `fork`.
    """
    return fork(name, *reads, writes=writes, priority=priority)


def parallel(
    caller: Callable[[], Any],
    *branches: Callable[[], Any],
    reads: Any = (),
    writes: Any = (),
    name: str = "parallel",
) -> tuple[Any, ...]:
    """Run `caller` on the current stream and each of `branches` on an auxiliary stream; join all.

    The caller's work is enqueued first, so a replay of a captured graph needs few streams.

    Args:
        caller: what runs on the current stream.
        branches: what runs beside it, each on a lane of its own.
        reads: tensors that any of the branches reads; any pytree.
        writes: tensors that any of the branches mutates; any pytree.
        name: of the region; several are `name.0`, `name.1` and so on.

    Returns:
        what they returned, in argument order.

    Raises:
        RegionError: as from `fork`, or an argument that is no function.
        UndeclaredAccessError: as from `Region.join`.

    If a function raises, every region already forked is joined before the error leaves.
    """
    _check_name(name)
    for position, function in enumerate((caller, *branches)):
        if not callable(function):
            raise RegionError(
                f"argument {position} of parallel() is no function",
                expected="functions without arguments: the caller's, then the branches'",
                came=_said(function),
                remedy="leave the call to parallel(): parallel(lambda: experts(h), lambda: mlp(h), reads=h)",
            )
    names = [name] if len(branches) == 1 else [f"{name}.{index}" for index in range(len(branches))]
    regions: list[Region] = []
    joined = 0
    try:
        for each in names:
            regions.append(fork(each, reads, writes=writes))
        results = [caller()]
        for region, branch in zip(regions, branches, strict=True):
            with region:
                results.append(region.returns(branch()))
        for region in regions:
            joined += 1
            region.join()
        return tuple(results)
    finally:
        for region in regions[joined:]:
            region.abandon()
