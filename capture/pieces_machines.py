"""What capturing in pieces asks of the machine it is done on: a GPU, or the simulated one.

Enters: the lanes of a split, a pool. Leaves: streams to rehearse and capture on, the pool's memory back, and the whole
step. Invariant: the caller's pieces and those of each lane have a stream of their own, the same at every capture.

Note "addresses of other pieces". Arguments of CUDA kernels hold stale words, which are told from workspaces by what
they point at: a tensor. The tensors of other pieces, of which a capture would not hear, are therefore named to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..runtime.machine import thread_state
from .allocator import AllocatorModel
from .graphs import CapturedGraph, CudaGraph, GraphMemory, SimulatedGraph
from .pieces import CudaPieces, Launch, PiecewiseGraph, SimulatedPieces
from .pieces_eager import EagerCall, address_of
from .program import Program
from .simulate import Simulation
from .state import preserved, storage_of
from .steps import Piece
from .streams import RecordingMachine

LANE: Final = 1 << 20
"""The first stream number of lanes between launches, on the simulated machine."""


class Machine(Protocol):
    """What differs between a GPU and the simulated machine."""

    pool: Any

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...

    def rehearse(self, run: Callable[[], object], times: int) -> None:
        """Run the step eagerly, so often if that is of use, and once at least."""
        ...

    def keeping(self, mutated: Sequence[Tensor], device: torch.device) -> AbstractContextManager[Any]:
        """Put back what capturing runs and writes."""
        ...

    def stream(self, lane: int | None) -> Any:
        """The stream to capture on."""
        ...

    def on(self, lane: int | None) -> AbstractContextManager[Any]:
        """Run the block on that stream, behind all before it."""
        ...

    def name(self, tensors: Iterable[Tensor]) -> None:
        """Tell the capture under way of tensors that it may not meet: see the note "addresses of other pieces"."""
        ...

    def took(self, captured: CapturedGraph) -> None:
        """A piece was captured, and the step sees to the memory it needs."""
        ...

    def free(self, storage: int) -> None:
        """Nobody refers to this storage any more."""
        ...

    def launch(self, call: EagerCall, owned: Collection[int]) -> Callable[[], object] | None:
        """What replays do for an eager op."""
        ...

    def declared(self, name: str, program: Program, outside: dict[int, Tensor]) -> CapturedGraph | Program:
        """A piece that was not captured, in the form the proof takes."""
        ...

    def whole(
        self, name: str, pieces: Sequence[Piece], launches: Sequence[Launch], regions: tuple[str, ...]
    ) -> PiecewiseGraph:
        """The step."""
        ...


class Simulated:
    """One allocator model; recording computes real values, so eager ops are run for what is recorded after them."""

    def __init__(self, pool: AllocatorModel | None) -> None:
        self.pool: Any = AllocatorModel() if pool is None else pool
        self._addresses: dict[int, int] = {}  # storage -> where the model placed it

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: object) -> None: ...

    def rehearse(self, run: Callable[[], object], times: int) -> None:
        run()

    def keeping(self, mutated: Sequence[Tensor], device: torch.device) -> AbstractContextManager[Any]:
        return preserved(mutated, device)

    def stream(self, lane: int | None) -> int | None:
        return None if lane is None else LANE + lane

    def on(self, lane: int | None) -> AbstractContextManager[Any]:
        return nullcontext()

    def name(self, tensors: Iterable[Tensor]) -> None:
        """A recording is told of all it touches."""

    def took(self, captured: CapturedGraph) -> None:
        assert isinstance(captured, SimulatedGraph)
        for buffer, view in captured.simulation.visible.items():
            self._addresses[storage_of(view)] = captured.program.buffers[buffer].address

    def free(self, storage: int) -> None:
        self.pool.free(self._addresses.pop(storage))

    def launch(self, call: EagerCall, owned: Collection[int]) -> None:
        call.launcher()()

    def declared(self, name: str, program: Program, outside: dict[int, Tensor]) -> CapturedGraph:
        made = SimulatedGraph(name)
        made.attach(program, (), outside)
        made.prove(checked=True)
        made.ready(Simulation(program, outside, {}), GraphMemory(0))
        return made

    def whole(
        self, name: str, pieces: Sequence[Piece], launches: Sequence[Launch], regions: tuple[str, ...]
    ) -> PiecewiseGraph:
        return SimulatedPieces(name, pieces, regions, GraphMemory(self.pool.reserved))


class Cuda:
    """Streams to capture on, taken for the while: the same ones every time, so that cuBLAS keeps one workspace each."""

    def __init__(self, device: torch.device, lanes: int, pool: Any) -> None:
        from .cuda_capture import CaptureStream

        self._device = device
        self.pool: Any = torch.cuda.graph_pool_handle() if pool is None else pool
        self._stack = ExitStack()
        self._caller = self._stack.enter_context(CaptureStream(device))
        self._lanes = [self._stack.enter_context(CaptureStream(device)).torch_stream for _ in range(lanes)]
        self._last = self._caller.torch_stream

    def __enter__(self) -> Cuda:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rehearse(self, run: Callable[[], object], times: int) -> None:
        self._caller.warm_up(run, times)

    def keeping(self, mutated: Sequence[Tensor], device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()

    def stream(self, lane: int | None) -> torch.cuda.Stream:
        return self._caller.torch_stream if lane is None else self._lanes[lane]

    @contextmanager
    def on(self, lane: int | None) -> Generator[None]:
        stream = self.stream(lane)
        if stream != self._last:
            stream.wait_stream(self._last)
        self._last = stream
        with torch.cuda.stream(stream):
            yield

    def name(self, tensors: Iterable[Tensor]) -> None:
        machine = thread_state.machine
        assert isinstance(machine, RecordingMachine)
        with _disable_current_modes():
            for tensor in tensors:
                machine.recorder.buffer_of(tensor)

    def took(self, captured: CapturedGraph) -> None:
        captured.let_go()

    def free(self, storage: int) -> None:
        """The last reference to it is gone, and the allocator knows."""

    def launch(self, call: EagerCall, owned: Collection[int]) -> Callable[[], object]:
        def named(tensor: Tensor) -> Tensor:
            return address_of(tensor) if storage_of(tensor) in owned else tensor

        args, kwargs = pytree.tree_map_only(Tensor, named, (call.args, dict(call.kwargs)))
        results = tuple((position, named(place)) for position, place in call.results)
        return EagerCall(call.func, args, kwargs, results).launcher()

    def declared(self, name: str, program: Program, outside: dict[int, Tensor]) -> Program:
        return program

    def whole(
        self, name: str, pieces: Sequence[Piece], launches: Sequence[Launch], regions: tuple[str, ...]
    ) -> PiecewiseGraph:
        graphs = [piece.graph for piece in pieces if isinstance(piece.graph, CudaGraph)]
        memory = GraphMemory(sum(graph.memory.reserved for graph in graphs))
        index = torch.cuda.current_device() if self._device == torch.device("cuda") else self._device.index
        return CudaPieces(name, pieces, regions, memory, launches, graphs[-1].order, index)
