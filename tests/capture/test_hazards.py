"""The race checker against an independent brute force: reachability by search, races byte by byte.

Besides the agreement: hand-written races and their clean look-alikes, twins that lose one edge, and time at scale.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auxstream.capture import hazards
from auxstream.capture.clocks import Order
from auxstream.capture.hazards import Access, Graph, Hazard, find_hazards

Edge = tuple[int, int]
Range = tuple[int, int]


def node(reads: list[Range] | None = None, writes: list[Range] | None = None) -> tuple[Access, ...]:
    return (*(Access(*r, False) for r in reads or []), *(Access(*w, True) for w in writes or []))


# --- brute force ------------------------------------------------------------------------------------------------------


def reachable(nodes: int, edges: tuple[Edge, ...]) -> list[set[int]]:
    """Per node, all that a path leads to; by depth-first search from each."""
    successors: list[list[int]] = [[] for _ in range(nodes)]
    for a, b in edges:
        successors[a].append(b)
    result: list[set[int]] = []
    for start in range(nodes):
        seen: set[int] = set()
        stack = list(successors[start])
        while stack:
            n = stack.pop()
            if n not in seen:
                seen.add(n)
                stack.extend(successors[n])
        result.append(seen)
    return result


def racing(graph: Graph) -> set[tuple[int, int, int, bool, bool]]:
    """All (a, b, byte, a writes, b writes), both ways round, that no path orders."""
    reach = reachable(len(graph.accesses), graph.edges)
    touched = [{(byte, a.writes) for a in accesses for byte in range(a.start, a.stop)} for accesses in graph.accesses]
    found: set[tuple[int, int, int, bool, bool]] = set()
    for a, b in combinations(range(len(touched)), 2):
        if b in reach[a] or a in reach[b]:
            continue
        for byte, a_writes in touched[a]:
            for b_writes in (False, True):
                if (a_writes or b_writes) and (byte, b_writes) in touched[b]:
                    found |= {(a, b, byte, a_writes, b_writes), (b, a, byte, b_writes, a_writes)}
    return found


def check(graph: Graph) -> list[Hazard]:
    """Run the checker and hold it to its contract: sound, complete per byte, merged, in order, repeatable."""
    found = find_hazards(graph)
    truth = racing(graph)
    rank = {n: place for place, n in enumerate(Order(len(graph.accesses), graph.edges).topological)}
    covered: set[int] = set()
    for h in found:
        assert h.start < h.stop
        assert rank[h.first] < rank[h.second]
        for byte in range(h.start, h.stop):
            assert (h.first, h.second, byte, h.first_writes, h.second_writes) in truth, f"not a race: {h} at {byte}"
        covered.update(range(h.start, h.stop))
    assert covered == {byte for _, _, byte, _, _ in truth}, f"bytes {covered} reported"
    for x, y in combinations(found, 2):
        if (x.first, x.second, x.kind) == (y.first, y.second, y.kind):
            assert x.stop < y.start, "adjacent bytes of one pair belong in one hazard"
    assert found == sorted(found, key=lambda h: (rank[h.second], rank[h.first])), "ordered by the later node"
    assert found == find_hazards(graph)
    return found


# --- properties -------------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any DAG of up to 9 nodes over 12 bytes, numbered in any order."""
    size = draw(st.integers(1, 9))
    names = draw(st.permutations(range(size)))
    places = st.integers(0, size - 1)
    pairs = draw(st.lists(st.tuples(places, places), max_size=14))
    edges = tuple((names[min(p)], names[max(p)]) for p in pairs if p[0] != p[1])
    access = st.builds(
        lambda a, b, writes: Access(min(a, b), max(a, b), writes), st.integers(0, 12), st.integers(0, 12), st.booleans()
    )
    return Graph(tuple(tuple(draw(st.lists(access, max_size=3))) for _ in range(size)), edges)


@pytest.fixture(params=[1, 128], ids=["one_segment_blocks", "default_blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs never fill a block, so the paths across blocks are walked with tiny ones."""
    monkeypatch.setattr(hazards, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graphs())
def test_agrees_with_brute_force(graph: Graph) -> None:
    check(graph)


def random_graph(rng: random.Random) -> Graph:
    """Larger than hypothesis draws: up to 40 nodes on a few streams, big ranges over many small ones, missing edges."""
    size, streams, memory = rng.randint(10, 40), rng.randint(1, 4), 64
    names = rng.sample(range(size), size)
    edges: list[Edge] = []
    last: dict[int, int] = {}
    accesses: list[tuple[Access, ...]] = [()] * size
    sparse = rng.choice([0.02, 0.2, 0.6])
    for place in range(size):
        stream = rng.randrange(streams)
        if stream in last and rng.random() < 0.97:
            edges.append((last[stream], names[place]))
        edges += [(other, names[place]) for s, other in last.items() if s != stream and rng.random() < 1 - sparse]
        last[stream] = names[place]
        mine: list[Access] = []
        for _ in range(rng.randint(0, 3)):
            width = rng.choice([1, 2, 4, 16, memory])
            start = rng.randrange(0, memory - width + 1, max(1, width // 2))
            mine.append(Access(start, start + width, rng.random() < 0.3))
        accesses[names[place]] = tuple(mine)
    rng.shuffle(edges)
    return Graph(tuple(accesses), tuple(edges))


@pytest.mark.usefixtures("block")
def test_agrees_with_brute_force_on_streams() -> None:
    rng = random.Random(7)
    racy = sum(bool(check(random_graph(rng))) for _ in range(400))
    assert 100 < racy < 390, f"{racy} of 400 graphs race: the generator must yield clean ones and racy ones"


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_before_is_reachability(graph: Graph) -> None:
    size = len(graph.accesses)
    order, reach = Order(size, graph.edges), reachable(size, graph.edges)
    assert sorted(order.topological) == list(range(size))
    assert 0 <= order.chains <= size
    assert all(order.before(a, b) == (b in reach[a]) for a in range(size) for b in range(size))


def test_before_on_wide_graphs() -> None:
    """Clocks of more chains than are compared one by one."""
    rng = random.Random(3)
    size, width = 300, 40
    edges = tuple((rng.randrange((n - 1) // width * width), n) for n in range(width + 1, size) for _ in range(2))
    order, reach = Order(size, edges), reachable(size, edges)
    assert order.chains > 16
    assert all(order.before(a, b) == (b in reach[a]) for a in range(size) for b in range(size))


# --- hand-written races and look-alikes -------------------------------------------------------------------------------

FORK = ((0, 1), (0, 2))  # 0 forks into 1 and 2, which run side by side


@pytest.mark.parametrize(
    ("left", "right", "kind"),
    [
        (node(reads=[(0, 8)]), node(writes=[(4, 12)]), "read/write"),
        (node(writes=[(0, 8)]), node(reads=[(4, 12)]), "write/read"),
        (node(writes=[(0, 8)]), node(writes=[(4, 12)]), "write/write"),
    ],
)
def test_planted_race(left: tuple[Access, ...], right: tuple[Access, ...], kind: str) -> None:
    (hazard,) = check(Graph((node(writes=[(0, 16)]), left, right), FORK))
    assert (hazard.first, hazard.second, hazard.start, hazard.stop, hazard.kind) == (1, 2, 4, 8, kind)
    assert not check(Graph((node(writes=[(0, 16)]), left, right), (*FORK, (1, 2))))


def test_early_free_races() -> None:
    """A block that an aux stream still reads is reused on the main stream: the hazard record_stream exists for."""
    program = (node(writes=[(0, 64)]), node(reads=[(0, 64)], writes=[(64, 128)]), node(writes=[(0, 32)]))
    (hazard,) = check(Graph((*program, node(reads=[(64, 128)])), (*FORK, (1, 3), (2, 3))))
    assert (hazard.first, hazard.second, hazard.start, hazard.stop, hazard.kind) == (1, 2, 0, 32, "read/write")


COLUMNS = 50  # interleaved: branch 1 writes even columns of 4 bytes, branch 2 odd ones
EVEN = [(8 * i, 8 * i + 4) for i in range(COLUMNS)]
ODD = [(8 * i + 4, 8 * i + 8) for i in range(COLUMNS)]


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(
            Graph((node(writes=[(0, 8)]), *[node(reads=[(100, 200)]) for _ in range(9)]), ()), id="weight_read_by_many"
        ),
        pytest.param(
            Graph(
                (node(writes=[(0, 8)]), *[node(reads=[(0, 8)]) for _ in range(5)]), tuple((0, n) for n in range(1, 6))
            ),
            id="written_once_then_read_by_many",
        ),
        pytest.param(Graph((node(), node(writes=[(0, 8)]), node(writes=[(8, 16)])), FORK), id="disjoint_halves"),
        pytest.param(Graph((node(), node(reads=[(0, 8)]), node(writes=[(8, 9)])), FORK), id="touching_intervals"),
        pytest.param(
            Graph(
                (node(), node(writes=EVEN), node(writes=ODD), node(reads=[(0, 8 * COLUMNS)])), (*FORK, (1, 3), (2, 3))
            ),
            id="interleaved_columns",
        ),
        pytest.param(
            Graph(
                (node(writes=[(0, 8)]), node(), node(), node(), node(writes=[(0, 8)])), ((0, 1), (1, 2), (2, 3), (3, 4))
            ),
            id="transitive_join",
        ),
        pytest.param(Graph((node(), node(writes=[(4, 4)]), node(writes=[(0, 8)])), FORK), id="zero_size"),
        pytest.param(Graph((node(reads=[(0, 8)], writes=[(0, 8), (4, 12)]),), ()), id="node_against_itself"),
        pytest.param(Graph((), ()), id="empty"),
    ],
)
def test_clean_look_alike(graph: Graph) -> None:
    assert check(graph) == []


def test_column_overlap_is_one_hazard_per_column() -> None:
    shifted = [(start - 2, stop) for start, stop in ODD]
    found = check(Graph((node(), node(writes=EVEN), node(writes=shifted)), FORK))
    assert [(h.start, h.stop) for h in found] == [(stop - 2, stop) for _, stop in EVEN]


def test_race_across_segments_is_one_hazard() -> None:
    program = (node(writes=[(0, 3)]), node(writes=[(3, 8)]), node(reads=[(0, 8)]), node(writes=[(0, 8)]))
    found = check(Graph(program, ((0, 1), (1, 2), (1, 3))))
    assert found == [Hazard(2, 3, 0, 8, False, True)]


@pytest.mark.parametrize(("edges", "named"), [(((0, 1), (1, 2), (2, 1), (2, 3)), "1 -> 2 -> 1"), (((3, 3),), "3 -> 3")])
def test_cycle_raises(edges: tuple[Edge, ...], named: str) -> None:
    with pytest.raises(ValueError, match=f"without a cycle, got {named}:"):
        Order(4, edges)


def test_malformed_graphs_raise() -> None:
    with pytest.raises(ValueError, match="got the edge 0 -> 4"):
        Order(4, ((0, 4),))
    with pytest.raises(ValueError, match=r"start <= stop.*in node 0"):
        find_hazards(Graph((node(reads=[(8, 0)]),), ()))


# --- twins that lose one edge -----------------------------------------------------------------------------------------


class Pool:
    """First fit with coalescing: blocks of mixed sizes carved from one range and reused at once, as streams' pools."""

    def __init__(self, start: int, size: int) -> None:
        self.free = [(start, start + size)]

    def take(self, size: int) -> Range:
        at, (start, stop) = next((i, f) for i, f in enumerate(self.free) if f[1] - f[0] >= size)
        self.free[at : at + 1] = [(start + size, stop)] if start + size < stop else []
        return start, start + size

    def give(self, block: Range) -> None:
        merged: list[Range] = []
        for start, stop in sorted([*self.free, block]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        self.free = merged


def fork_join_program(nodes: int, rng: random.Random, lanes: int = 3, unit: int = 1) -> Graph:
    """A clean program: a main stream that forks to lanes and joins them every few nodes, each stream with its pool.

    A lane reads the main stream's value and weights; its temporaries return to its own pool at once, its result once
    the main stream has read it, and what it reads is kept until the join.
    """
    weights = [(-(i + 1) * 20 * unit, -i * 20 * unit) for i in range(20)]
    pools = [Pool(stream * 400 * unit, 400 * unit) for stream in range(lanes + 1)]
    last = [-1] * (lanes + 1)
    accesses: list[tuple[Access, ...]] = []
    edges: list[Edge] = []

    def launch(stream: int, reads: list[Range]) -> Range:
        out = pools[stream].take(rng.choice([1, 2, 3, 8, 20]) * unit)
        if last[stream] >= 0:
            edges.append((last[stream], len(accesses)))
        last[stream] = len(accesses)
        accesses.append(node(reads=[*reads, *rng.sample(weights, rng.randint(1, 2))], writes=[out]))
        return out

    value = launch(0, [])
    while len(accesses) < nodes:
        forked, results, held = last[0], list[Range](), [value]
        width = rng.randint(1, lanes)
        for stream in [*range(1, width + 1), 0]:
            x = value
            for step in range(rng.randint(1, 4)):
                if stream and step == 0:
                    edges.append((forked, len(accesses)))  # the lane waits for the fork event
                y = launch(stream, [x])
                if x != value:
                    pools[stream].give(x)
                x = y
            results.append(x)
        edges += [(last[stream], len(accesses)) for stream in range(1, width + 1)]  # join: the next node waits
        value = launch(0, results)
        for stream, block in zip([*range(1, width + 1), 0, 0], results + held, strict=True):
            pools[stream].give(block)
    return Graph(tuple(accesses), tuple(dict.fromkeys(edges)))


def without(graph: Graph, edge: Edge) -> Graph:
    return Graph(graph.accesses, tuple(e for e in graph.edges if e != edge))


@pytest.mark.parametrize("seed", range(3))
def test_every_missing_edge_is_found(seed: int) -> None:
    """`check` demands a report wherever the two sides share bytes; stream order may carry none, waits always do."""
    graph = fork_join_program(40, random.Random(seed))
    assert check(graph) == []
    size = len(graph.accesses)
    needed = [(a, b) for a, b in graph.edges if b not in reachable(size, without(graph, (a, b)).edges)[a]]
    waits = [(a, b) for a, b in needed if a + 1 != b]
    assert len(waits) >= 10
    caught = {edge for edge in needed if check(without(graph, edge))}
    assert caught.issuperset(waits), "a wait without which nothing races is no wait"


# --- scale ------------------------------------------------------------------------------------------------------------


def carved(rounds: int, pieces: int) -> Graph:
    """A large block written whole, carved into small ones, read whole; again and again on one stream."""
    size, accesses = 1024, list[tuple[Access, ...]]()
    for _ in range(rounds):
        accesses.append(node(writes=[(0, pieces * size)]))
        accesses += [node(writes=[(i * size, (i + 1) * size)]) for i in range(pieces)]
        accesses.append(node(reads=[(0, pieces * size)]))
    return Graph(tuple(accesses), tuple((n, n + 1) for n in range(len(accesses) - 1)))


def cache(rows: int) -> Graph:
    """A cache written a row at a time and read whole after each: rows x rows bytes of reads, over two streams."""
    accesses = [a for i in range(rows) for a in (node(writes=[(i * 64, i * 64 + 64)]), node(reads=[(0, rows * 64)]))]
    skip = tuple((n, n + 2) for n in range(len(accesses) - 2))
    return Graph(tuple(accesses), (*skip, *((n, n + 1) for n in range(len(accesses) - 1))))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: fork_join_program(10_000, random.Random(1), unit=8192), id="fork_join"),
        pytest.param(lambda: carved(rounds=5, pieces=2_000), id="carved"),
        pytest.param(lambda: cache(rows=5_000), id="cache"),
    ],
)
def test_ten_thousand_nodes(make: Callable[[], Graph]) -> None:
    graph = make()
    started = time.perf_counter()
    assert find_hazards(graph) == []
    assert time.perf_counter() - started < 2.0, "the cost must stay near-linear; typical is a tenth of a second"
