"""How fast the race checker is: nodes per second, on graphs of several shapes.

    python -m auxstream.bench.verify [--json PATH]

Measures: `find_conflicts` on work that is free of races, as proved graphs are: order, byte ranges, strided tensors.
Does not measure: recording the work or reading a CUDA graph back; reports of races. Runs without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..capture.conflicts import Touch, find_conflicts
from ..capture.extents import Extent, strided
from .command import CommandLine
from .harness import interleave, write

KIB = 1024


@dataclass(slots=True)
class Work:
    """Nodes on streams: each follows the one before it on its stream, and those it waits for. Each stream has a pool of
    blocks that are used again at once, last freed first, as the caching allocator does."""

    nodes: list[list[Touch]] = field(default_factory=list[list[Touch]])
    edges: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    _last: dict[int, int] = field(default_factory=dict[int, int])
    _free: dict[tuple[int, int], list[int]] = field(default_factory=dict[tuple[int, int], list[int]])
    _top: int = 0

    def run(self, stream: int, reads: Sequence[Extent], writes: Sequence[Extent], after: Sequence[int] = ()) -> int:
        """Enqueue a node; its number."""
        node = len(self.nodes)
        self.nodes.append([*((extent, True) for extent in writes), *((extent, False) for extent in reads)])
        if stream in self._last:
            self.edges.append((self._last[stream], node))
        self.edges += [(other, node) for other in after]
        self._last[stream] = node
        return node

    def take(self, stream: int, size: int) -> Extent:
        """A block from the stream's pool."""
        free = self._free.get((stream, size))
        if free:
            return Extent(free.pop(), size)
        self._top += size
        return Extent(self._top - size, size)

    def give(self, stream: int, block: Extent) -> None:
        """Back to its pool."""
        self._free.setdefault((stream, block.length), []).append(block.start)


def decoder(nodes: int, lanes: int = 1) -> Work:
    """Layers of a decoder: a row of each of two caches written and all rows read, a fork behind attention, a branch on
    each lane, a join. Projections come as columns of one tensor; all weights are read by everyone."""
    work, batch, rows = Work(), 32, 256
    weights = [work.take(-1, 512 * KIB) for _ in range(64)]
    caches = [work.take(-1, batch * rows * KIB) for _ in range(64)]
    x = work.take(0, 64 * KIB)
    work.run(0, [], [x])
    layer = 0
    while len(work.nodes) < nodes:
        w, (keys, values) = weights[layer % 64], (caches[layer % 64], caches[(layer + 1) % 64])
        qkv = work.take(0, batch * 3 * KIB)
        q, k, v = (strided(qkv.start + part * KIB, 1, (batch, KIB), (3 * KIB, 1)) for part in range(3))
        work.run(0, [x, w], [qkv])
        row = layer % rows
        for source, cache in ((k, keys), (v, values)):
            target = strided(cache.start + row * KIB, 1, (batch, KIB), (rows * KIB, 1))
            work.run(0, [source], [target])
        attended = work.take(0, 64 * KIB)
        work.run(0, [q, keys, values], [attended])
        work.give(0, qkv)
        forked = work.run(0, [attended, w], [x])
        work.give(0, attended)
        results: list[Extent] = []
        joined: list[int] = []
        for stream in (*range(1, lanes + 1), 0):
            h, end = x, forked
            for step in range(4):
                out = work.take(stream, 64 * KIB)
                end = work.run(stream, [h, w], [out], (forked,) if stream and step == 0 else ())
                if h is not x:
                    work.give(stream, h)
                h = out
            results.append(h)
            joined += [end] if stream else []
        work.run(0, [x, *results], [x], joined)
        for stream, block in zip((*range(1, lanes + 1), 0), results, strict=True):
            work.give(stream, block)
        layer += 1
    return work


def experts(nodes: int) -> Work:
    """A lane for each of 64 experts, all joined at once."""
    return decoder(nodes, lanes=64)


def cache_rows(nodes: int) -> Work:
    """One cache, written a row at a time and read as a whole after each, by two streams in turn."""
    work, rows = Work(), nodes // 2
    cache = work.take(-1, rows * KIB)
    read = 0
    for row in range(rows):
        written = work.run(row % 2, [], [Extent(cache.start + row * KIB, KIB)], (read,) if row else ())
        read = work.run(1 - row % 2, [cache], [], (written,))
    return work


def carved(nodes: int) -> Work:
    """A large block written whole, then as a thousand small ones, then read whole; again and again."""
    work = Work()
    block = work.take(0, 1000 * KIB)
    while len(work.nodes) < nodes:
        work.run(0, [], [block])
        for piece in range(1000):
            work.run(0, [], [Extent(block.start + piece * KIB, KIB)])
        work.run(1, [block], [], (work.run(0, [block], []),))
        work.run(0, [], [], (len(work.nodes) - 1,))
    return work


def columns(nodes: int) -> Work:
    """Tensors of 2,048 rows whose halves two streams update side by side: hulls overlap, bytes do not."""
    work, rows = Work(), 2048
    while len(work.nodes) < nodes:
        whole = work.take(0, rows * 2 * KIB)
        left, right = (strided(whole.start + half * KIB, 1, (rows, KIB), (2 * KIB, 1)) for half in range(2))
        made = work.run(0, [], [whole])
        other = work.run(1, [right], [right], (made,))
        work.run(0, [left], [left])
        work.run(0, [whole], [], (other,))
        work.give(0, whole)
    return work


SHAPES: dict[str, Callable[[int], Work]] = {
    "decoder": decoder,
    "experts": experts,
    "cache rows": cache_rows,
    "carved": carved,
    "columns": columns,
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    quick = {"rounds": 2, "nodes": [10_000]}
    parser = CommandLine(__doc__, rounds=5, limit=120, quick=quick, devices=("cpu",))
    parser.add_argument("--nodes", type=int, nargs="+", default=[10_000, 100_000], help="of each graph, about")
    options = parser.options(arguments)
    left_out: list[str] = []
    results: dict[str, Any] = {"left out": left_out}
    for size in options.clock.in_time(options.nodes, left_out, "{:,} nodes".format):
        works = {name: make(size) for name, make in SHAPES.items()}
        samples = {name: checking(work) for name, work in works.items()}
        print(f"checking {size:,} nodes")
        for name, value in interleave(samples, options.rounds, "ms").items():
            nodes = len(works[name].nodes)
            results[f"{name}, {size:,} nodes"] = value
            print(f"  {name:12} {value}   {nodes / value.median * 1000:12,.0f} nodes/s")
        write(options.json, "verify", results)
    write(options.json, "verify", results)
    return results


def checking(work: Work) -> Callable[[], float]:
    """Milliseconds to find that there are no races."""

    def sample() -> float:
        start = time.perf_counter()
        findings = find_conflicts(work.nodes, work.edges)
        elapsed = time.perf_counter() - start
        assert not findings.conflicts, findings.conflicts[0]
        return elapsed * 1000

    return sample


if __name__ == "__main__":
    main()
