"""Recording: every dispatched op, its stream, its bytes, its line, while a graph is being captured.

Enters: a thread's torch ops (a dispatch mode) and its regions' steps (a machine). Leaves: a `Program`. The same
recorder serves both machines: over CPU tensors it places buffers with the allocator model and undoes, at the end,
whatever the recorded ops did to outside tensors; under a CUDA capture it notes the addresses the real allocator
chose. Invariant: the recorder never keeps a tensor of the program alive, or the lifetimes it records would be its own.

Note "inside custom ops". An op from outside torch is one step, but the ops it is made of are watched: what they touch
and the schema hides is added to what the op touches.

Note "the host". Under a CUDA capture the host runs at once what replays repeat later: a write to pinned memory follows
nothing, so the stream `host` has edges to the copies enqueued after it and none back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ..kernels.accesses import hidden_writes
from ..runtime.errors import UndeclaredAccessError
from ..runtime.settings import Verify
from .allocator import AllocatorModel
from .handing import Handing, Verdict
from .program import Buffer, Op, Program, Record, Step, TensorRef, Wait
from .refusals import Refusals, refuse_functions, refuse_host_traffic, refuse_layouts, refuse_resizing
from .signatures import arguments, in_parts, is_view, replaced, tensors_in
from .source import source_line, warn_user

HOST: Final = -1
"""The stream of what the host does to pinned memory during a CUDA capture."""

OWN_NAMESPACES: Final = frozenset({"aten", "prims", "prim", "auxstream", "auxstream_fused"})
"""Ops whose schemas hold, or that the proof looks into by other means."""

_PLAIN: Final = (Tensor, torch.nn.Parameter)
_aten: Final = torch.ops.aten
_has_kernel: Final = torch._C._dispatch_has_computed_kernel_for_dispatch_key


class _Storage:
    """A live storage of the recording, by weak reference."""

    __slots__ = ("buffer", "weak")

    def __init__(self, storage: torch.UntypedStorage, buffer: int) -> None:
        self.buffer = buffer
        self.weak: Any = storage._weak_ref()

    def expired(self) -> bool:
        return bool(torch.UntypedStorage._expired(self.weak))

    def __del__(self) -> None:
        torch.UntypedStorage._free_weak_ref(self.weak)


@dataclass(slots=True)
class _Inside:
    """What the ops inside a custom op touch; `own`: storages of tensors that they made."""

    reads: list[TensorRef] = field(default_factory=list)
    writes: list[TensorRef] = field(default_factory=list)
    own: dict[int, _Storage] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Fills a program. `allocator` None: the addresses are the device's own (a CUDA capture is under way). `noted`: the
    capture is somebody else's. Nothing is refused but noted here, and nothing is kept alive."""

    supports_higher_order_operators = True  # that is, they come here to be refused

    def __init__(
        self, *, allocator: AllocatorModel | None, watch: Verify, noted: dict[str, None] | None = None
    ) -> None:
        super().__init__()
        self.refusals = Refusals(noted)
        self._keeps = noted is None
        self.allocator = allocator
        self.device_type = "cpu" if allocator is not None else "cuda"
        self.watch: Verify = watch
        self.current: Any = lambda: 0  # the current stream's id; the recording machine puts the real one here
        self.record_use: Any = lambda tensor, stream: None  # likewise: the real `record_stream`
        self.before_op: Any = lambda step, stream: None  # told of each op, and the step it will be, before it runs
        self.after_op: Any = lambda step, stream: None  # and after; step None: it made none
        self.region: str | None = None
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.stream_names: dict[int, str] = {}
        self.outside: dict[int, Tensor] = {}  # buffer -> a byte view that keeps outside memory alive
        self._storages: dict[int, _Storage] = {}
        self._inside_live: dict[int, _Storage] = {}
        self._handing = Handing()
        self._saved: dict[int, Tensor] = {}  # outside buffer -> its bytes before the recording
        self._inside: _Inside | None = None
        self._generators: dict[torch.Generator, Tensor] = {}  # the user's own generators -> their states before

    # -- ordering ------------------------------------------------------------------------------------------------

    def _append(self, step: Step) -> int:
        index = len(self.steps)
        self.steps.append(step)
        self._handing.step(step.stream)
        return index

    def mark(self, stream: int, what: str) -> int:
        """Note an event record; returns the step to wait for."""
        index = self._append(Record(stream, what))
        self._handing.mark(index, stream)
        return index

    def wait(self, stream: int, source: int, what: str) -> None:
        """Note that `stream` waits for the record at step `source`."""
        self._append(Wait(stream, source, what))
        self._handing.wait(stream, source)

    def hand(self, tensors: Sequence[Tensor], stream: int, *, recorded: bool) -> None:
        """Note that `stream` was handed `tensors`; `recorded` ones had `record_stream` called on them."""
        for tensor in tensors:
            buffer = self.buffer_of(tensor)
            self._handing.hand(buffer, stream)
            if recorded and self.allocator is not None and self.buffers[buffer].stream is not None:
                self.allocator.record_use(self.buffers[buffer].address, stream)

    def _name(self, stream: int) -> str:
        return self.stream_names.get(stream, str(stream))

    # -- memory --------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Give the blocks of storages that died since the last step back to the allocator model."""
        dead = [key for key, storage in self._inside_live.items() if storage.expired()]
        for key in dead:
            storage = self._inside_live.pop(key)
            del self._storages[key]
            if self.allocator is not None:
                self.allocator.free(self.buffers[storage.buffer].address)

    def buffer_of(self, tensor: Tensor) -> int:
        """The buffer of a tensor's storage. One not seen before comes from outside and is kept alive from now on; not
        in a capture of somebody else's, where memory must be used again as it would have been."""
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is not None:
            return known.buffer
        buffer = len(self.buffers)
        label = f"outside tensor {tuple(tensor.shape)}"
        self.buffers.append(Buffer(storage.data_ptr(), storage.nbytes(), None, label))
        self._storages[storage._cdata] = _Storage(storage, buffer)
        if self._keeps:
            with torch.inference_mode(False):  # or replays outside of it could not write there
                self.outside[buffer] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        return buffer

    def _allocate(self, tensor: Tensor, stream: int, label: str) -> int:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        address = storage.data_ptr() if self.allocator is None else self.allocator.allocate(stream, nbytes)
        buffer = len(self.buffers)
        self.buffers.append(Buffer(address, nbytes, stream, label))
        self._storages[storage._cdata] = self._inside_live[storage._cdata] = _Storage(storage, buffer)
        return buffer

    def ref(self, tensor: Tensor) -> TensorRef:
        """The plain form of a tensor the recording knows, or of an outside one."""
        return TensorRef(
            self.buffer_of(tensor),
            int(tensor.storage_offset()),
            tuple(tensor.size()),
            tuple(tensor.stride()),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )

    def live_storages(self) -> Iterator[tuple[int, torch.UntypedStorage]]:
        """Buffers of the program whose storages are alive now: what the user can still see."""
        for storage in self._inside_live.values():
            alive: Any = torch.UntypedStorage._new_with_weak_ptr(storage.weak)
            if alive is not None:
                yield storage.buffer, alive

    # -- ops -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        if isinstance(func, HigherOrderOperator):
            self.refusals.meets(refuse_functions, func)
            return func(*args, **kwargs)
        if func is _aten.record_stream.default:
            return func(*args, **kwargs)
        if any(type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor) for tensor in tensors):
            return NotImplemented  # the subclass unwraps itself, and its inner ops come here
        parts = in_parts(self, func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        if func is _aten.lift_fresh.default and self.allocator is not None:
            with self:  # torch.tensor(...): made anew by every replay, as if the block ran again
                return args[0].clone()
        if self._inside is not None:
            return self._look_inside(self._inside, func, args, kwargs)
        if self.refusals.meets(refuse_host_traffic, self.device_type, func, args, kwargs, tensors):
            return func(*args, **kwargs)
        if self.refusals.meets(refuse_layouts, func, tensors):
            return func(*args, **kwargs)
        self.sweep()
        mine = [tensor for tensor in tensors if tensor.device.type == self.device_type]
        here = self._works_here(tensors, kwargs)
        reads, writes = self._split(func, args, kwargs, here)
        stream = self.current()
        if self.device_type == "cuda" and any(tensor.device.type == "cpu" for tensor in tensors):
            stream = self._meet_host(here, (*reads, *writes), stream)
        views = is_view(func)
        if not views:
            self._watch_reads(func, mine, stream)
        if self.allocator is not None:
            self._save(() if views else writes, kwargs)
        refs = {id(tensor): self.ref(tensor) for tensor in (*mine, *reads, *writes)}
        read_refs = tuple(refs[id(tensor)] for tensor in reads)
        write_refs = tuple(refs[id(tensor)] for tensor in writes)
        plain_args, plain_kwargs = replaced((args, kwargs), lambda tensor: refs.get(id(tensor), tensor))
        self.before_op(len(self.steps), stream)
        self._inside = inside = _Inside()
        try:
            result = self._run(func, args, kwargs, here or not tensors)
        finally:
            self._inside = None
        read_refs += tuple(ref for ref in inside.reads if ref not in read_refs)
        write_refs += tuple(ref for ref in inside.writes if ref not in write_refs)
        for tensor in writes:
            storage = tensor.untyped_storage()
            if storage._cdata in self._storages:
                before = self.buffers[self.buffer_of(tensor)].nbytes
                self.refusals.meets(refuse_resizing, func, before, storage.nbytes())
        fresh = self._fresh(result, stream, func)
        made = tuple(ref for ref in fresh if ref is not None)
        if not made and (views or not (write_refs or (read_refs and result is None))):
            self.after_op(None, stream)
            return result  # a view, or an op on the host: it touches no byte of the program
        touched = (*made, *write_refs)
        line = source_line()
        self._append(Op(stream, func, plain_args, plain_kwargs, fresh, read_refs, touched, line, self.region))
        self.after_op(len(self.steps) - 1, stream)
        for ref in touched:
            self._handing.wrote(ref.buffer, stream)
        return result

    def _works_here(self, tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> bool:
        """Whether an op works on the device that is captured: on tensors there, or to make some there."""
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        return target == self.device_type or any(tensor.device.type == self.device_type for tensor in tensors)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], here: bool) -> Any:
        """Call an op; one from outside torch, at work on the device, with its insides watched."""
        key = self.device_type.upper()
        if func.namespace in OWN_NAMESPACES or not here or not _has_kernel(func.name(), key):
            return func(*args, **kwargs)
        with self:
            return func.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *args, **kwargs)

    def _look_inside(self, inside: _Inside, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An op that a custom op is made of, or one that those are made of."""
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        if self.refusals.meets(refuse_layouts, func, tensors):
            return func(*args, **kwargs)
        here = self._works_here(tensors, kwargs)
        reads, writes = ([], []) if is_view(func) else self._split(func, args, kwargs, here)
        own = {key for key, storage in inside.own.items() if not storage.expired()}
        reads, writes = (
            [tensor for tensor in found if tensor.untyped_storage()._cdata not in own] for found in (reads, writes)
        )
        if self.allocator is not None:
            self._save(writes, kwargs)
        inside.reads += [self.ref(tensor) for tensor in reads]
        inside.writes += [self.ref(tensor) for tensor in writes]
        result = self._run(func, args, kwargs, here or not tensors)
        for leaf in tensors_in(result):
            if leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._storages:
                    inside.own[storage._cdata] = _Storage(storage, -1)
        return result

    def _meet_host(self, here: bool, touched: Sequence[Tensor], stream: int) -> int:
        """The stream of an op that touches host memory. One on the host alone counts if a captured copy knows it."""
        if not here:
            self.stream_names.setdefault(HOST, "host")
            return HOST
        if self._handing.used(HOST) and any(tensor.device.type == "cpu" for tensor in touched):
            self.wait(stream, self.mark(HOST, "host work so far"), "host work so far")
        return stream

    def _is_mine(self, leaf: Tensor, here: bool) -> bool:
        """Whether a tensor is memory of the program: on its device; pinned, in an op of the device; or known."""
        if leaf.device.type == self.device_type:
            return True
        if self.device_type != "cuda" or leaf.device.type != "cpu" or leaf.layout is not torch.strided:
            return False
        return leaf.is_pinned() if here else leaf.untyped_storage()._cdata in self._storages

    def _split(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], here: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        hidden = hidden_writes(func, args)
        for argument in arguments(func):
            found = [leaf for leaf in tensors_in(argument.of(args, kwargs)) if self._is_mine(leaf, here)]
            if found and (argument.writes or argument.position in hidden):
                writes += found
            if found and argument.reads:
                reads += found
        return reads, writes

    def _fresh(self, result: Any, stream: int, func: Any) -> tuple[TensorRef | None, ...]:
        """Per leaf of the result: the memory allocated for it, or None."""
        fresh: list[TensorRef | None] = []
        if self.refusals.meets(refuse_layouts, func, list(tensors_in(result))):
            return ()
        for leaf in [result] if isinstance(result, Tensor) else pytree.tree_leaves(result):
            mine = isinstance(leaf, Tensor) and leaf.device.type == self.device_type
            if not mine or leaf.untyped_storage()._cdata in self._storages:
                fresh.append(None)
            else:
                self._allocate(leaf, stream, str(func).removeprefix("aten."))
                fresh.append(self.ref(leaf))
        return tuple(fresh)

    def _save(self, writes: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
        """Recording on CPU computes for real: keep the bytes of outside memory before its first write."""
        generator = kwargs.get("generator")
        if generator is not None and generator not in self._generators:
            self._generators[generator] = generator.get_state()
        for tensor in writes:
            buffer = self.buffer_of(tensor)
            if self.buffers[buffer].stream is None and buffer not in self._saved:
                self._saved[buffer] = self.outside[buffer].clone()

    def restore_outside(self) -> None:
        """Undo what recording did to outside memory: a capture runs nothing."""
        for buffer, before in reversed(self._saved.items()):  # two storages may share memory, as numpy's can
            self.outside[buffer].copy_(before)
        for generator, state in self._generators.items():
            generator.set_state(state)
        self._saved.clear()
        self._generators.clear()

    # -- rules ---------------------------------------------------------------------------------------------------

    def _watch_reads(self, func: Any, tensors: Sequence[Tensor], stream: int) -> None:
        if self.watch == "off":
            return
        for tensor in tensors:
            known = self._storages.get(tensor.untyped_storage()._cdata)
            if known is None:
                continue
            buffer = self.buffers[known.buffer]
            verdict = self._handing.judge(known.buffer, buffer.stream, stream)
            if verdict is Verdict.FINE:
                continue
            here = self._name(stream)
            if verdict is Verdict.UNORDERED:
                writer = self._handing.last_writer(known.buffer)
                raise UndeclaredAccessError(
                    f"{func} on {here} touches a tensor it was never handed, of shape {tuple(tensor.shape)} made by "
                    f"`{buffer.label}`, at {source_line()}",
                    expected="a tensor declared in fork(), or returned by a region that was joined",
                    came=f"one last written on {self._name(writer)}, unordered with this op",
                    remedy="declare it: fork(name, ..., tensor), after the op that writes it; or join its region first",
                )
            self._handing.hand(known.buffer, stream)
            self.record_use(tensor, stream)
            if self.allocator is not None:
                self.allocator.record_use(buffer.address, stream)
            warn_user(
                f"{func} on {here} reads an undeclared tensor made by `{buffer.label}`, at {source_line()}; it was "
                "recorded for that stream. Declare it in fork(), or hand it over with region.returns()."
            )

    def finish(self) -> Program:
        """Close the recording."""
        self.sweep()
        arena = 0
        if self.allocator is not None:
            self.allocator.end_recording()
            arena = self.allocator.reserved
        return Program(tuple(self.steps), tuple(self.buffers), dict(self.stream_names), arena, self.allocator)
