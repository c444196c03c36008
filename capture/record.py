"""Recording: every dispatched op, its stream, its bytes, its line, while a graph is being captured.

Enters: a thread's torch ops (a dispatch mode) and its regions' steps (a machine). Leaves: a `Program`. The same
recorder serves both machines: over CPU tensors it places buffers with the allocator model and undoes, at the end,
whatever the recorded ops did to outside tensors; under a CUDA capture it notes the addresses the real allocator
chose. Invariant: the recorder never keeps a tensor of the program alive, or the lifetimes it records would be its own.

Note "who may read what". A stream reads a block safely, as far as its lifetime goes, if it allocated the block, was
handed it (declared at fork, returned at join), or if the block comes from outside and the graph keeps it alive. Any
other read gets the lifetime handoff and a warning when it is at least ordered behind the block's last write; when it
is not, it is an error. Ordering edges are never added behind the user's back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ..kernels.accesses import hidden_writes
from ..runtime.errors import AuxstreamWarning, CaptureError, UndeclaredAccessError
from ..runtime.settings import Verify
from .allocator import AllocatorModel
from .program import Buffer, Op, Program, Record, Step, TensorRef, Wait
from .source import host_read, source_line

# In-place ops that overwrite without reading; every other written argument counts as read too.
_OVERWRITES: Final = frozenset(
    {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "exponential_", "bernoulli_"}
)

_aten: Final = torch.ops.aten
_COPIES: Final = (_aten.copy_.default, _aten._to_copy.default)

# Writing through a mask counts its elements on the host, unless one value goes everywhere.
_MASKED_WRITES: Final = frozenset({_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default})


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


class Recorder(TorchDispatchMode):
    """Fills a program. `allocator` None: the addresses are the device's own (a CUDA capture is under way)."""

    supports_higher_order_operators = True  # that is, they come here to be refused

    def __init__(self, *, allocator: AllocatorModel | None, watch: Verify) -> None:
        super().__init__()
        self.allocator = allocator
        self.device_type = "cpu" if allocator is not None else "cuda"
        self.watch: Verify = watch
        self.current: Any = lambda: 0  # the current stream's id; the recording machine puts the real one here
        self.record_use: Any = lambda tensor, stream: None  # likewise: the real `record_stream`
        self.region: str | None = None
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.stream_names: dict[int, str] = {}
        self.outside: dict[int, Tensor] = {}  # buffer -> a byte view that keeps outside memory alive
        self._storages: dict[int, _Storage] = {}
        self._inside_live: dict[int, _Storage] = {}
        self._handed: dict[int, set[int]] = {}  # buffer -> streams it was handed to
        self._written: dict[int, tuple[int, int]] = {}  # buffer -> (stream, position) of its last write
        self._clocks: dict[int, dict[int, int]] = {}
        self._marks: dict[int, dict[int, int]] = {}  # record step -> clock
        self._saved: dict[int, Tensor] = {}  # outside buffer -> its bytes before the recording
        self._generators: dict[torch.Generator, Tensor] = {}  # the user's own generators -> their states before

    # -- ordering ------------------------------------------------------------------------------------------------

    def _append(self, step: Step) -> int:
        index = len(self.steps)
        self.steps.append(step)
        clock = self._clocks.setdefault(step.stream, {})
        clock[step.stream] = clock.get(step.stream, 0) + 1
        return index

    def mark(self, stream: int, what: str) -> int:
        """Note an event record; returns the step to wait for."""
        index = self._append(Record(stream, what))
        self._marks[index] = dict(self._clocks[stream])
        return index

    def wait(self, stream: int, source: int, what: str) -> None:
        """Note that `stream` waits for the record at step `source`."""
        self._append(Wait(stream, source, what))
        clock = self._clocks[stream]
        for other, position in self._marks[source].items():
            clock[other] = max(clock.get(other, 0), position)

    def hand(self, tensors: Sequence[Tensor], stream: int, *, recorded: bool) -> None:
        """Note that `stream` was handed `tensors`; `recorded` ones had `record_stream` called on them."""
        for tensor in tensors:
            buffer = self.buffer_of(tensor)
            self._handed.setdefault(buffer, set()).add(stream)
            if recorded and self.allocator is not None and self.buffers[buffer].stream is not None:
                self.allocator.record_use(self.buffers[buffer].address, stream)

    # -- memory --------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Give the blocks of storages that died since the last step back to the allocator model."""
        dead = [key for key, storage in self._inside_live.items() if storage.expired()]
        for key in dead:
            storage = self._inside_live.pop(key)
            del self._storages[key]
            if self.allocator is not None:
                self.allocator.free(self.buffers[storage.buffer].address)

    def buffer_of(self, tensor: Tensor, label: str = "") -> int:
        """The buffer of a tensor's storage. One not seen before comes from outside and is kept alive from now on."""
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is not None:
            return known.buffer
        buffer = len(self.buffers)
        self.buffers.append(
            Buffer(storage.data_ptr(), storage.nbytes(), None, label or f"outside tensor {tuple(tensor.shape)}")
        )
        self._storages[storage._cdata] = _Storage(storage, buffer)
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
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if isinstance(func, HigherOrderOperator):
            raise CaptureError(
                f"{func} takes functions as arguments, and cannot be recorded, at {source_line()}",
                expected="ops on tensors",
                came="an op whose work is known when it runs",
                remedy="call the function it would call; torch.where in place of torch.cond",
            )
        if func is _aten.record_stream.default:
            return func(*args, **kwargs)
        if any(map(is_traceable_wrapper_subclass, tensors)):
            return NotImplemented  # the subclass unwraps itself, and its inner ops come here
        with self:  # in inference mode ops arrive whole that elsewhere arrive in parts
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func is _aten.lift_fresh.default and self.allocator is not None:
            with self:  # torch.tensor(...): made anew by every replay, as if the block ran again
                return args[0].clone()
        self._refuse_host_traffic(func, args, kwargs, tensors)
        self._refuse_layouts(func, tensors)
        self.sweep()
        mine = [tensor for tensor in tensors if tensor.device.type == self.device_type]
        reads, writes = self._split(func, args, kwargs)
        stream = self.current()
        views = func.is_view or torch.Tag.inplace_view in func.tags  # such ops look at metadata alone
        if not views:
            self._watch_reads(func, mine, stream)
        if self.allocator is not None:
            self._save(() if views else writes, kwargs)
        read_refs = tuple(self.ref(tensor) for tensor in reads)
        write_refs = tuple(self.ref(tensor) for tensor in writes)
        plain_args, plain_kwargs = pytree.tree_map_only(
            Tensor, lambda leaf: self.ref(leaf) if leaf.device.type == self.device_type else leaf, (args, kwargs)
        )
        result = func(*args, **kwargs)
        self._refuse_resizing(func, writes)
        fresh = self._fresh(result, stream, func)
        made = tuple(ref for ref in fresh if ref is not None)
        if not made and (views or not (write_refs or (read_refs and result is None))):
            return result  # a view, or an op on the host: it touches no byte of the program
        self._append(
            Op(
                stream,
                func,
                plain_args,
                plain_kwargs,
                fresh,
                read_refs,
                (*made, *write_refs),
                source_line(),
                self.region,
            )
        )
        for ref in (*made, *write_refs):
            self._written[ref.buffer] = (stream, self._clocks[stream][stream])
        return result

    def _split(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        schema = func._schema
        hidden = hidden_writes(func, args)
        overwrites = schema.name.rpartition("::")[2] in _OVERWRITES
        for position, argument in enumerate(schema.arguments):
            value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
            found = [
                leaf
                for leaf in pytree.tree_leaves(value)
                if isinstance(leaf, Tensor) and leaf.device.type == self.device_type
            ]
            written = (argument.alias_info is not None and argument.alias_info.is_write) or position in hidden
            if written:
                writes.extend(found)
            if not written or not (argument.is_out or overwrites):
                reads.extend(found)
        return reads, writes

    def _fresh(self, result: Any, stream: int, func: Any) -> tuple[TensorRef | None, ...]:
        fresh: list[TensorRef | None] = []
        label = str(func).removeprefix("aten.")
        leaves = pytree.tree_leaves(result)
        self._refuse_layouts(func, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.device.type != self.device_type:
                fresh.append(None)
                continue
            known = leaf.untyped_storage()._cdata in self._storages
            if not known:
                self._allocate(leaf, stream, label)
            fresh.append(None if known else self.ref(leaf))
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
            if buffer.stream is None or buffer.stream == stream:
                continue
            if stream in self._handed.get(known.buffer, ()):
                continue
            writer, position = self._written.get(known.buffer, (stream, 0))
            here = self.stream_names.get(stream, str(stream))
            if self._clocks.get(stream, {}).get(writer, 0) < position:
                raise UndeclaredAccessError(
                    f"{func} on {here} touches a tensor it was never handed, of shape {tuple(tensor.shape)} made by "
                    f"`{buffer.label}`, at {source_line()}",
                    expected="a tensor declared in fork(), or returned by a region that was joined",
                    came=f"one last written on {self.stream_names.get(writer, str(writer))}, unordered with this op",
                    remedy="declare it: fork(name, ..., tensor), after the op that writes it; or join its region first",
                )
            self._handed.setdefault(known.buffer, set()).add(stream)
            self.record_use(tensor, stream)
            if self.allocator is not None:
                self.allocator.record_use(buffer.address, stream)
            warnings.warn(
                f"{func} on {here} reads an undeclared tensor made by `{buffer.label}`, at {source_line()}; it was "
                "recorded for that stream. Declare it in fork(), or hand it over with region.returns().",
                AuxstreamWarning,
                stacklevel=3,
            )

    def _refuse_layouts(self, func: Any, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise CaptureError(
                    f"{func} takes or makes a tensor that is not plain strided memory, at {source_line()}",
                    expected="dense strided tensors",
                    came=f"layout {tensor.layout}, dtype {tensor.dtype}",
                    remedy="convert it before the capture (to_dense, dequantize)",
                )

    def _refuse_resizing(self, func: Any, written: Sequence[Tensor]) -> None:
        for tensor in written:
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is not None and storage.nbytes() != self.buffers[known.buffer].nbytes:
                before, after = self.buffers[known.buffer].nbytes, storage.nbytes()
                raise CaptureError(
                    f"{func} resizes a tensor's memory inside a capture, at {source_line()}",
                    expected="tensors that keep the size they were made with",
                    came=f"{before} bytes that became {after}",
                    remedy="make it at its final size, or use the op's result in place of out=",
                )

    def _refuse_host_traffic(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
    ) -> None:
        if _reads_values(func, args) and any(tensor.device.type == self.device_type for tensor in tensors):
            raise host_read(str(func))
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if self.device_type == "cpu":
            if on_gpu or target == "cuda":
                raise CaptureError(
                    f"{func} works on the GPU inside a capture of the simulated machine, at {source_line()}",
                    expected="CPU tensors",
                    came="CUDA tensors, whose work would not be replayed",
                    remedy="capture with device='cuda', or move them to the CPU",
                )
            return
        if on_gpu and target == "cpu":
            raise host_read(str(func))
        if not (on_gpu or target == "cuda"):
            return
        copies = func in _COPIES
        for tensor in tensors:
            if tensor.device.type != "cpu" or (tensor.dim() == 0 and not copies):  # a number is read at the call
                continue
            if not tensor.is_pinned() or (copies and not (kwargs.get("non_blocking") or args[2:3] == (True,))):
                raise CaptureError(
                    f"{func} uses a CPU tensor of shape {tuple(tensor.shape)} inside a GPU capture, at {source_line()}",
                    expected="tensors on the GPU, or pinned host memory, copied with non_blocking=True",
                    came="pinned memory, and the host would wait" if tensor.is_pinned() else "pageable host memory",
                    remedy="move it to the GPU before the capture, and copy new values into it between replays",
                )

    def finish(self) -> Program:
        """Close the recording."""
        self.sweep()
        arena = self.allocator.reserved if self.allocator is not None else 0
        return Program(tuple(self.steps), tuple(self.buffers), dict(self.stream_names), arena)


def _reads_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host must know values to launch `func`. Indexing is tagged so for the sake of masks alone."""
    if func is _aten.index.Tensor or func in _MASKED_WRITES:
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masked and (func is _aten.index.Tensor or args[2].numel() != 1)
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
