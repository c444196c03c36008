"""Two streams by hand: the feed-forward of Gemma-4 with its shared branch beside the routed one, as users write it.

Enters: decoder layers, and a way to hand over. Leaves: a module that computes what the model's own code does.
Invariant: whatever the way, the same kernels are enqueued in the same order; streams, waits and lifetimes differ.

Note "as users write it". The branch is enqueued first, its norm stays on the caller's stream, and the norm's result
goes out of scope as soon as the branch is enqueued: models' own code binds that name anew. Events order the streams,
and still the caller may be handed that memory while the branch reads it. That is what `record_stream` is for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from ..capture.delays import delay
from ..runtime.regions import Region, fork
from .blocks import merged, routed_branch


class Handoff(Protocol):
    """The steps of a handoff, in order."""

    def fork(self, x: Tensor) -> None:
        """What the caller has enqueued is done before the branch begins, which reads `x`."""
        ...

    def lane(self) -> AbstractContextManager[object]:
        """What is enqueued inside is the branch."""
        ...

    def returns(self, y: Tensor) -> Tensor:
        """Inside: `y` goes to the caller."""
        ...

    def join(self) -> None:
        """The branch is done before what the caller enqueues next."""
        ...


class OneStream:
    """No handoff: what the others are compared with."""

    def fork(self, x: Tensor) -> None:
        pass

    def lane(self) -> AbstractContextManager[object]:
        return nullcontext()

    def returns(self, y: Tensor) -> Tensor:
        return y

    def join(self) -> None:
        pass


class TorchStreams:
    """torch's own calls.

    Args:
        events: waits are the device's, for events; or the host's, in `synchronize`, which no capture allows.
        recorded: whether the allocator is told of both streams (`record_stream`) of what crosses.
    """

    def __init__(self, *, events: bool = True, recorded: bool = False) -> None:
        self._events, self._recorded = events, recorded
        self._side = torch.cuda.Stream()
        self._forked, self._left = torch.cuda.Event(), torch.cuda.Event()
        self._result: Tensor | None = None

    def fork(self, x: Tensor) -> None:
        caller = torch.cuda.current_stream()
        if self._side == caller:  # torch hands the same few streams out again and again
            self._side = torch.cuda.Stream()
        if self._events:
            self._forked.record(caller)
            self._side.wait_event(self._forked)
        else:
            caller.synchronize()
        if self._recorded:
            x.record_stream(self._side)

    def lane(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side)

    def returns(self, y: Tensor) -> Tensor:
        if self._events:
            self._left.record(self._side)
        self._result = y
        return y

    def join(self) -> None:
        caller = torch.cuda.current_stream()
        if self._events:
            caller.wait_event(self._left)
        else:
            self._side.synchronize()
        result, self._result = self._result, None
        if self._recorded and result is not None:
            result.record_stream(caller)


class Regions:
    """This library's regions."""

    def __init__(self) -> None:
        self._region: Region | None = None

    @property
    def _open(self) -> Region:
        assert self._region is not None
        return self._region

    def fork(self, x: Tensor) -> None:
        self._region = fork("shared", x)

    def lane(self) -> AbstractContextManager[object]:
        return self._open

    def returns(self, y: Tensor) -> Tensor:
        return self._open.returns(y)

    def join(self) -> None:
        self._open.join()
        self._region = None


SYNCHRONIZED, EVENTS, RECORDED, REGIONS = (
    "synchronize both ways",
    "torch events only",
    "torch events, record_stream",
    "auxstream regions",
)
WAYS: Final[dict[str, Callable[[], Handoff]]] = {
    SYNCHRONIZED: lambda: TorchStreams(events=False),
    EVENTS: TorchStreams,
    RECORDED: lambda: TorchStreams(recorded=True),
    REGIONS: Regions,
}
"""By name. Those of torch need a GPU."""


class ByHand(nn.Module):
    """Feed-forward blocks, their shared branch handed over in one of these ways.

    Args:
        layers: of the decoder.
        handoff: the way.
        held_up: nanoseconds, int64 [1]: the branch is held up so long before it begins, so that what could happen does.
    """

    def __init__(self, layers: Any, handoff: Handoff, held_up: Tensor | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.handoff = handoff
        self.held_up = held_up

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        layers: Any = self.layers
        handoff = self.handoff
        for layer in layers:
            normed = layer.pre_feedforward_layernorm(hidden)
            handoff.fork(normed)
            with handoff.lane():
                if self.held_up is not None:
                    delay(self.held_up, 0)
                shared = handoff.returns(layer.post_feedforward_layernorm_1(layer.mlp(normed)))
            del normed
            routed = routed_branch(layer, hidden)
            handoff.join()
            hidden = merged(layer, hidden, shared, routed)
        return hidden


def differing(run: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor], like: Tensor, runs: int) -> int:
    """In how many of so many runs, each on inputs of its own, the bits are not the right ones."""
    count = 0
    for _ in range(runs):
        hidden = torch.randn_like(like)
        expected = right(hidden).clone()
        count += not torch.equal(run(hidden).view(torch.int16), expected.view(torch.int16))
    return count
