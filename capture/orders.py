"""Orders: the ways a machine may legally execute a recorded program.

Enters: a program's steps and ordering edges. Leaves: permutations of its step numbers, each a linear extension of
the edges. `program_order` is the reference, `adversarial` prefers orders that hurt, `exhaustive` yields all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from .hazards import Hazard

Edges = Sequence[tuple[int, int]]


def _nothing() -> None: ...


class _Constraints:
    """Successors and predecessor counts, built once per program."""

    def __init__(self, nodes: int, edges: Edges) -> None:
        self.after: list[list[int]] = [[] for _ in range(nodes)]
        self.before: list[list[int]] = [[] for _ in range(nodes)]
        for source, target in set(edges):
            self.after[source].append(target)
            self.before[target].append(source)
        self.blockers = [len(before) for before in self.before]

    def ancestors(self, node: int) -> set[int]:
        found: set[int] = set()
        stack = [node]
        while stack:
            for source in self.before[stack.pop()]:
                if source not in found:
                    found.add(source)
                    stack.append(source)
        return found


class Orders:
    """Linear extensions of one program.

    Args:
        streams: the stream of each step.
        edges: ordering edges; must include stream order.
    """

    def __init__(self, streams: Sequence[int], edges: Edges) -> None:
        self._streams = list(streams)
        self._constraints = _Constraints(len(streams), edges)

    def program_order(self) -> list[int]:
        """The order of recording."""
        return list(range(len(self._streams)))

    def adversarial(self, seed: int, hazards: Sequence[Hazard] = ()) -> list[int]:
        """An order that hurts. With known hazards, seed k turns the k-th around: its later step runs before its
        earlier one.
        Without, the first seeds starve and then rush each stream in turn, and later ones draw stream priorities that
        change at random points."""
        if hazards:
            hazard = hazards[seed % len(hazards)]
            late = max(hazard.first, hazard.second)  # in program order
            early = self._constraints.ancestors(late) | {late}
            return self._extend(lambda step: (step not in early, step))
        streams = sorted(set(self._streams))
        if seed < 2 * len(streams):
            victim = streams[seed // 2]
            starve = seed % 2 == 0
            return self._extend(lambda step: ((self._streams[step] == victim) == starve, step))
        draw = random.Random(seed)
        priorities = {stream: draw.random() for stream in streams}
        changes = {draw.randrange(len(self._streams)) for _ in range(3)} if self._streams else set[int]()
        taken = 0

        def rank(step: int) -> tuple[float, int]:
            return priorities[self._streams[step]], step

        def tick() -> None:
            nonlocal taken
            taken += 1
            if taken in changes:
                priorities.update({stream: draw.random() for stream in streams})

        return self._extend(rank, tick)

    def _extend(self, rank: Callable[[int], tuple[float, int]], tick: Callable[[], None] = _nothing) -> list[int]:
        blockers = list(self._constraints.blockers)
        ready = [step for step, count in enumerate(blockers) if not count]
        order: list[int] = []
        while ready:
            step = min(ready, key=rank)
            ready.remove(step)
            order.append(step)
            tick()
            for target in self._constraints.after[step]:
                blockers[target] -= 1
                if not blockers[target]:
                    ready.append(target)
        assert len(order) == len(self._streams), "the ordering edges hold a cycle"
        return order

    def exhaustive(self, limit: int = 100_000) -> Iterator[list[int]]:
        """Every legal order; raises ValueError past `limit`, so that "all" is never silently "some"."""
        blockers = list(self._constraints.blockers)
        order: list[int] = []
        count = 0

        def walk(ready: list[int]) -> Iterator[list[int]]:
            nonlocal count
            if not ready:
                count += 1
                if count > limit:
                    raise ValueError(f"more than {limit} legal orders; raise `limit` or shrink the program")
                yield list(order)
                return
            for step in ready:
                order.append(step)
                freed: list[int] = []
                for target in self._constraints.after[step]:
                    blockers[target] -= 1
                    if not blockers[target]:
                        freed.append(target)
                yield from walk([other for other in ready if other != step] + freed)
                for target in self._constraints.after[step]:
                    blockers[target] += 1
                order.pop()

        yield from walk([step for step, blocked in enumerate(blockers) if not blocked])
