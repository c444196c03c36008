"""From one model to a graph per bucket, in one pool.

Enters: a model, example inputs of the largest bucket, `Options`, and how one shape is compiled. Leaves: a
`BucketedModel`. Invariant: no bucket leaves here whose padding may show in results, or in what the model writes, unless
the user turned verification down.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..runtime.errors import CaptureError, InputError
from .allocator import AllocatorModel
from .arguments import Arguments
from .buckets import BucketedModel
from .compiled import CompiledModel
from .inputs import Padding, StaticInputs
from .options import Options
from .padding import PaddingVerdict, check_padding
from .progress import Progress, free_memory
from .rows import Mixing, find_mixing
from .size_effects import output_rows, refuse_size_effects
from .sizes import Sizes
from .source import warn_user
from .trace import TracedGraph
from .uncaptured import order_of_runs

Values = tuple[bool | int | float | None, ...]


class CompileShape(Protocol):
    """How one graph is made; `pool`: the memory it shares with others."""

    def __call__(self, static: StaticInputs, traced: TracedGraph, padding: Padding, pool: Any) -> CompiledModel: ...


@dataclass(frozen=True, slots=True)
class _Bucket:
    """One bucket before it is compiled."""

    fewest: int
    """The smallest call it serves."""
    traced: TracedGraph
    padding: Padding
    mixing: Mixing | None
    """What is known of its rows; None for a bucket that is never padded, or with verification off."""


def compile_buckets(
    model: nn.Module,
    static: StaticInputs,
    options: Options,
    device: torch.device,
    compile_shape: CompileShape,
    progress: Progress,
    pool: Any = None,
) -> BucketedModel:
    """Trace and judge every bucket, then capture them, the largest first: the others fit into its memory. At last, run
    those whose rows are not proved to keep apart. A bucket for which memory does not suffice is dropped, with a
    warning; if all are, the last one's error is raised, and any other error ends it all: what was captured goes."""
    sizes = Sizes(model, static, options.buckets[-1], options.token_dims)
    values = _pad_values(options, sizes, static)
    example = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in static.leaves]
    smallest = (1, *(size + 1 for size in options.buckets))
    buckets = [_judged(sizes, *pair, values, options) for pair in zip(options.buckets, smallest, strict=False)]

    pool = new_pool(options, device) if pool is None else pool
    compiled: dict[int, CompiledModel] = {}
    progress.expect(len(buckets))
    for bucket in reversed(buckets):
        size = bucket.padding.size
        with progress.capturing(f"bucket {size}"):
            try:
                compiled[size] = compile_shape(sizes.inputs(size), bucket.traced, bucket.padding, pool)
            except torch.OutOfMemoryError as error:
                if bucket is buckets[0] and not compiled:
                    raise
                _say_dropped(size, error, device)
                del error  # its frames hold what the capture had made
        if size not in compiled and device.type == "cuda":
            torch.cuda.empty_cache()

    buckets = [bucket for bucket in buckets if bucket.padding.size in compiled]
    verdicts: list[PaddingVerdict] = []
    for bucket in buckets:
        verdict = PaddingVerdict(bucket.padding.size, bucket.fewest, "not checked")
        with _refusing(options):
            verdict = _checked(model, bucket, compiled[bucket.padding.size], example, device)
        verdicts.append(verdict)
    arguments = Arguments(static.leaves, static.spec, sizes.names, sizes.dims)
    return BucketedModel(model, compiled, arguments, tuple(verdicts))


def _say_dropped(size: int, error: torch.OutOfMemoryError, device: torch.device) -> None:
    left = free_memory(device)
    warn_user(
        f"bucket {size} is dropped: not enough memory to capture it{f' ({left})' if left else ''}. Calls of its sizes "
        f"run eagerly; smaller buckets go on.\n{str(error).strip().partition(chr(10))[0]}",
    )


def new_pool(options: Options, device: torch.device) -> Any:
    """Memory that graphs share; where nothing is captured, the order of their runs."""
    if options.mode == "none":
        return order_of_runs(device)
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else AllocatorModel()


def _judged(sizes: Sizes, size: int, fewest: int, values: Values, options: Options) -> _Bucket:
    """What the graph of this bucket says of its rows, by itself and beside that of another size."""
    traced = sizes.trace(size)
    if fewest == size:
        return _Bucket(fewest, traced, Padding(size, sizes.dims, (), values), None)
    others = _others(sizes, fewest, size)
    outputs = output_rows(traced, sizes.trace(others[0]), (size, others[0]))
    mixing = None
    if options.verify != "off":
        with _refusing(options):
            for other in others:
                refuse_size_effects(traced, sizes.trace(other), (size, other))
        mixing = find_mixing(traced, sizes.dims, outputs)
    return _Bucket(fewest, traced, Padding(size, sizes.dims, outputs, values), mixing)


def _others(sizes: Sizes, fewest: int, size: int) -> list[int]:
    """The sizes whose traces to lay beside that of a bucket: the smallest it serves, and one where the model's own
    Python may do something else. One row comes last: there a model may do what means the same (it broadcasts)."""
    served = range(max(fewest, 2), size)
    if not served:
        return [size + 1 if size < sizes.largest else 1]
    unlike = sizes.first_unlike(served)
    return [served[0]] if unlike in (None, served[0]) else [served[0], unlike]


def _checked(
    model: nn.Module, bucket: _Bucket, compiled: CompiledModel, example: Sequence[Any], device: torch.device
) -> PaddingVerdict:
    size = bucket.padding.size
    if bucket.mixing is None:
        return PaddingVerdict(size, bucket.fewest, "unpadded" if bucket.fewest == size else "not checked")
    pairs = zip(example, bucket.padding.inputs, strict=True)
    rows = [leaf if dim is None else leaf.narrow(dim, 0, size) for leaf, dim in pairs]
    return check_padding(model, compiled, bucket.traced, rows, bucket.fewest, bucket.mixing, device)


@contextmanager
def _refusing(options: Options) -> Generator[None]:
    """Padding that may show is refused; with `verify="warn"`, only said."""
    try:
        yield
    except CaptureError as error:
        if options.verify == "error":
            raise
        warn_user(str(error))


def _pad_values(options: Options, sizes: Sizes, static: StaticInputs) -> Values:
    """Per input what padded rows hold, None for what is not said. Raises InputError for a name or value of no input."""
    rows = {
        name: leaf for name, leaf, dim in zip(sizes.names, static.leaves, sizes.dims, strict=True) if dim is not None
    }
    for name, value in options.pad.items():
        if name not in rows:
            raise InputError(
                f"pad names {name!r}",
                expected="an input with rows: one of " + ", ".join(rows),
                came=f"another of {', '.join(sizes.names)}" if name in sizes.names else "a name that no input has",
                remedy="correct the name, or take it out",
            )
        dtype = rows[name].dtype
        if dtype.is_floating_point or dtype.is_complex:
            fits = not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max
        else:
            bounds = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
            fits = float(value).is_integer() and bounds[0] <= value <= bounds[1]
        if not fits:
            raise InputError(f"pad value of {name!r} does not fit", expected=f"a value of {dtype}", came=repr(value))
    return tuple(options.pad.get(name) for name in sizes.names)
