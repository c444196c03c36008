"""`BucketedModel`: one model captured for several numbers of rows, and calls of any number between them.

Enters: a compiled model per bucket, all of one pool, and the model itself. Leaves: a callable. Invariant: a call of n
rows runs the smallest bucket that has n, padded, and gets its own n rows of the outputs; where no bucket has n, or the
one that has was dropped for want of memory, the model itself runs, in the same order among calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..runtime import ranges
from .arguments import Arguments
from .compiled import CompiledModel
from .graphs import CapturedGraph
from .ledger import Ledger, ledger
from .padding import PaddingVerdict
from .source import warn_user


class BucketedModel(CompiledModel):
    """A model captured for several numbers of rows (tokens, or the batch of a decode step).

    As `CompiledModel`, with these differences. Outputs are the first rows of the bucket's memory, until the next call
    of whatever size. Random numbers are those of the bucket's size. A size that no bucket has runs eagerly, with a
    warning the first time.

    Attributes:
        buckets: the compiled model of each size, smallest first. They share memory: call them through this model.
        padding: per bucket, what padded rows were shown to leave alone, and how.
    """

    def __init__(
        self,
        model: nn.Module,
        buckets: Mapping[int, CompiledModel],
        arguments: Arguments,
        padding: tuple[PaddingVerdict, ...],
    ) -> None:
        self.buckets = dict(sorted(buckets.items()))
        self.padding = padding
        self._sizes = tuple(self.buckets)
        largest = self.buckets[self._sizes[-1]]
        super().__init__(largest.graph, largest.regions, largest.fusion, largest.calls, largest.choice)
        self._model = model
        self._arguments = arguments
        self._told = False
        self._by_rows: list[CompiledModel | None] = [None] * (self._sizes[-1] + 1)
        for verdict in padding:
            for rows in range(verdict.fewest, verdict.size + 1):
                self._by_rows[rows] = self.buckets[verdict.size]
        live = frozenset[int]().union(*(bucket.calls.live_storages for bucket in self.buckets.values()))
        for bucket in self.buckets.values():
            bucket.calls.live_storages = live

    @property
    def name(self) -> str:
        return self.graph.name.removesuffix(f"[{self._sizes[-1]}]")

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        return tuple(bucket.graph for bucket in self.buckets.values())

    @property
    def memory(self) -> Ledger:
        graphs: dict[int | None, CapturedGraph] = {size: b.graph for size, b in reversed(self.buckets.items())}
        return ledger(graphs, self._calls.static.tensors())

    @ranges.around(lambda model: f"call {model.name}")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._life is not None:
            self._life.glance()
        with torch.no_grad(), self.graph.order:
            given = self._arguments.leaves(args, kwargs)
            rows = self._arguments.rows(given)
            assert rows is not None
            bucket = self._by_rows[rows] if rows < len(self._by_rows) else None
            if bucket is None:
                return self._eagerly(rows, args, kwargs)
            bucket.calls.load(given, rows)
            bucket.graph.replay()
            return bucket.calls.leave(given, rows)

    @ranges.around(lambda model: f"eager {model.name}")
    def _eagerly(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._told:
            self._told = True
            warn_user(
                f"a call of {rows} rows runs eagerly: the buckets are {', '.join(map(str, self._sizes))}. "
                "This is said once.",
            )
        return self._model(*args, **kwargs)
