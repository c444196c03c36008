"""Which tile a product of few rows is launched with, and whether it is faster than cuBLAS: measured, and remembered.

Enters: calls alike but for their weights. Leaves: a `Verdict` per shape class, card and number of rows. Invariant:
nothing is measured or compiled in a capture; weights are not found in a cache while it is measured; what was measured
once is never measured again, so that a class has the same bits in every process.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from ..runtime.errors import CaptureError
from . import store
from .ahead import make_ready
from .launch import device_name
from .products_launch import launches, run
from .products_tiles import likely
from .products_work import Tile, Work
from .tune import measure

_COLD: Final = 3
"""How often the weights that are gone round would fill an L2 cache."""
_MOST_CALLS: Final = 16


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fastest tile; its microseconds per call, and those of cuBLAS.

    Of a gate and an up projection, `cublas` includes one elementwise kernel for what follows them.
    """

    tile: Tile
    ours: float
    cublas: float


class Products:
    """What launches; remembers tiles by the layout of the inputs."""

    def __init__(self) -> None:
        self._tiles: dict[Any, Tile] = {}

    def __call__(self, work: Work) -> list[Tensor]:
        if not work.rows:
            return work.outputs()
        key = (work.x.device, work.x.stride(0), *_facts(work))
        tile = self._tiles.get(key)
        if tile is None:
            tile = self._tiles[key] = _settled(work)
        return run(work, tile)


def _settled(work: Work) -> Tile:
    if not work.x.is_cuda:
        return likely(work)[0]
    if torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            "a product of few rows meets a new layout inside a capture",
            expected="a layout it was launched with before: compiling inside a capture is not safe",
            came=", ".join(f"{tuple(t.shape)} strides {t.stride()}" for t in (work.x, *work.weights)),
            remedy="run the graph once with these shapes before capturing it (auxstream.compile does)",
        )
    return judge([work]).tile


def judge(works: Sequence[Work]) -> Verdict:
    """The verdict on calls of one class on a GPU: a known one, or what measuring says now."""
    known = _read(works[0])
    if known is None:
        known = _measured(works)
        facts = {"tile": str(known.tile), "ours": known.ours, "cublas": known.cublas}
        store.write_choice(_key(works[0]), facts)
    return known


def _read(work: Work) -> Verdict | None:
    found = store.read_choice(_key(work))
    tiles = {str(tile): tile for tile in likely(work)}
    try:
        return Verdict(tiles[found["tile"]], float(found["ours"]), float(found["cublas"]))
    except (KeyError, TypeError, ValueError):  # none yet, a damaged one, or of tiles that are no longer tried
        return None


def compile_unjudged(classes: Sequence[Work]) -> None:
    """Compile, side by side, the tiles of all classes whose verdict is not known. Their calls are on one GPU."""
    todo = [compile for work in classes if _read(work) is None for compile in _compilations(work)]
    if todo:
        make_ready(todo, classes[0].x.device)


def _compilations(work: Work) -> list[Callable[[], Any]]:
    """Of every tile that will be measured."""
    return [launch.compile for tile in likely(work) for launch in launches(work, work.outputs(), tile)]


def _measured(works: Sequence[Work]) -> Verdict:
    cold = _cold(works)
    tiles = likely(cold[0])
    make_ready(_compilations(cold[0]), cold[0].x.device)
    ways: dict[Tile | None, _Round] = {tile: _Round([_by(work, tile) for work in cold]) for tile in tiles}
    ways[None] = _Round([_by_cublas(work) for work in cold])
    with torch.no_grad():
        times = measure(ways, ())
    best = min(tiles, key=lambda tile: times[tile])
    return Verdict(best, times[best], times[None])


class _Round:
    """One call after the other, round and round, as `tune` launches them."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._calls = itertools.cycle(calls)

    def __call__(self, _: Sequence[Tensor]) -> None:
        next(self._calls)()


def _by(work: Work, tile: Tile) -> Callable[[], object]:
    return lambda: run(work, tile)


def _by_cublas(work: Work) -> Callable[[], object]:
    biases = work.biases or [None] * len(work.weights)

    def products() -> object:
        found = [torch.nn.functional.linear(work.x, *pair) for pair in zip(work.weights, biases, strict=True)]
        return found[0] * found[1] if work.activation is not None else found

    return products


def _cold(works: Sequence[Work]) -> list[Work]:
    """Calls whose weights together are several times an L2 cache, copied where there are too few."""
    device = works[0].x.device
    each = sum(weight.nbytes for weight in works[0].weights)
    enough = _COLD * torch.cuda.get_device_properties(device).L2_cache_size
    wanted = max(1, min(_MOST_CALLS, -(-enough // each)))
    found = list(works[:wanted])
    while len(found) < wanted:
        found.append(replace(works[0], weights=tuple(weight.clone() for weight in works[0].weights)))
    return [replace(work, x=torch.randn_like(work.x)) for work in found]


def _facts(work: Work) -> tuple[Any, ...]:
    weights = tuple((tuple(weight.shape), weight.stride()) for weight in work.weights)
    return work.rows, work.x.dtype, weights, bool(work.biases), work.activation


def _key(work: Work) -> str:
    """A file name for the verdict on this class."""
    digest = hashlib.sha256(repr(_facts(work)).encode()).hexdigest()[:16]
    return f"products-{digest}-{device_name(work.x.device)}"
