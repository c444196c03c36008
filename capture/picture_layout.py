"""Where things go in the picture of a report: streams as rows, time to the right, long graphs in several bands.

Enters: a `Report`. Leaves: a `Layout`: boxes, dots, arrows and races with their places, no drawing. Invariant: an item
stands to the right of all it waits for, band by band; ops that no wait and no race concerns may share one box, all
others have their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Final, Literal

from .evidence import Node
from .report import Report, is_work, place, short

CHAR: Final = 7.1  # a letter of a box's label, at its widest
SMALL_CHAR: Final = 5.9  # a letter of its note
BAND_WIDTH: Final = 1400.0
MOST_ALONE: Final = 48  # a graph of no more nodes shows each
LONGEST_RUN_ALONE: Final = 3
_LABEL_CHARS: Final = 18
_NEXT: Final = 10.0  # between neighbours on one stream
_CROSS: Final = 34.0  # between an item and one on another stream that waits for it
_DOT: Final = 12.0


@dataclass(frozen=True, slots=True)
class Item:
    """What is drawn for one node, or for a run of uneventful ones. `x` counts from the left end of its band."""

    nodes: tuple[int, ...]
    lane: int
    kind: Literal["op", "event", "run"]
    label: str
    note: str
    band: int
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Arrow:
    """Item `target` waits for item `source`."""

    source: int
    target: int
    label: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """Items between which there are races: their positions in the report."""

    first: int
    second: int
    races: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Lanes by first use; items in the order they were enqueued; `links`: items that follow each other on one stream;
    arrows for all other waits; races."""

    lanes: tuple[str, ...]
    items: tuple[Item, ...]
    links: tuple[tuple[int, int], ...]
    arrows: tuple[Arrow, ...]
    conflicts: tuple[Conflict, ...]


def lay_out(report: Report) -> Layout:
    """Place everything a report speaks of."""
    nodes = report.nodes
    order = _enqueued(len(nodes), report.edges)
    streams = {stream: lane for lane, stream in enumerate(dict.fromkeys(nodes[node].stream for node in order))}
    lanes = [streams[node.stream] for node in nodes]
    linked, crossing = _split(order, lanes, report.edges)
    eventful = {end for edge in crossing for end in edge}
    eventful |= {party.node for race in report.races for party in (race.first, race.second)}
    groups = _groups(nodes, order, linked, eventful)
    item_of = {node: number for number, group in enumerate(groups) for node in group}
    links = tuple((item_of[a], item_of[b]) for b, a in linked.items() if item_of[a] != item_of[b])
    arrows = tuple(Arrow(item_of[a], item_of[b], _wait(nodes[a], nodes[b])) for a, b in crossing)
    notes = _notes(report)
    texts = [_text(nodes, group, notes) for group in groups]
    widths = [_width(label, note) for _, label, note in texts]
    places = _places(widths, [lanes[group[0]] for group in groups], [(a.source, a.target) for a in arrows])
    items = tuple(
        Item(group, lanes[group[0]], *text, *spot, width)
        for group, text, spot, width in zip(groups, texts, places, widths, strict=True)
    )
    pairs: dict[tuple[int, int], list[int]] = {}
    for number, race in enumerate(report.races):
        pairs.setdefault((item_of[race.first.node], item_of[race.second.node]), []).append(number)
    conflicts = tuple(Conflict(first, second, tuple(races)) for (first, second), races in pairs.items())
    return Layout(tuple(streams), items, links, arrows, conflicts)


def _enqueued(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The order of the nodes: as numbered, unless an edge leads back."""
    if all(a < b for a, b in edges):
        return list(range(count))
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(range(count), ()))
    for a, b in edges:
        sorter.add(b, a)
    return list(sorter.static_order())


def _split(
    order: Sequence[int], lanes: Sequence[int], edges: Sequence[tuple[int, int]]
) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """The node that each follows on its own stream, where an edge says so; and the edges that this does not imply."""
    given = set(edges)
    last: dict[int, int] = {}
    breaks = [0] * len(lanes)  # on its lane so far: neighbours that no edge orders
    linked: dict[int, int] = {}
    for node in order:
        previous = last.get(lanes[node])
        last[lanes[node]] = node
        if previous is None:
            continue
        if (previous, node) in given:
            linked[node] = previous
        breaks[node] = breaks[previous] + (node not in linked)
    implied = {(a, b) for a, b in given if lanes[a] == lanes[b] and breaks[a] == breaks[b]}
    return linked, sorted(given - implied)


def _groups(
    nodes: Sequence[Node], order: Sequence[int], linked: dict[int, int], eventful: set[int]
) -> list[tuple[int, ...]]:
    """Nodes that share an item; a group's place is that of its first node."""
    runs: list[list[int]] = []
    run_of: dict[int, list[int]] = {}
    for node in order:
        previous = linked.get(node)
        joins = previous is not None and node not in eventful and previous not in eventful
        if joins and previous is not None and nodes[node].region == nodes[previous].region:
            run_of[node] = run_of[previous]
            run_of[node].append(node)
        else:
            run_of[node] = [node]
            runs.append(run_of[node])
    if len(nodes) <= MOST_ALONE:
        return [(node,) for node in order]
    groups: list[tuple[int, ...]] = []
    for run in runs:
        groups += [tuple(run)] if sum(is_work(nodes[n]) for n in run) > LONGEST_RUN_ALONE else [(n,) for n in run]
    rank = {node: place for place, node in enumerate(order)}
    return sorted(groups, key=lambda group: rank[group[0]])


def _wait(source: Node, target: Node) -> str:
    """What a wait between two streams is: the fork or the join of a region, as far as is known."""
    if not is_work(source):
        return source.name.removeprefix("record ").replace("end of ", "join of ")
    if target.region and target.region != source.region:
        return f"fork of {target.region}"
    return f"join of {source.region}" if source.region and source.region != target.region else ""


def _notes(report: Report) -> dict[int, str]:
    """Per node that takes part in a race, how it touches the bytes."""
    does: dict[int, set[str]] = {}
    for race in report.races:
        for party in (race.first, race.second):
            does.setdefault(party.node, set()).add(party.does)
    return {node: "+".join(sorted(verbs)) for node, verbs in does.items()}


def _text(
    nodes: Sequence[Node], group: tuple[int, ...], notes: dict[int, str]
) -> tuple[Literal["op", "event", "run"], str, str]:
    start = group[0]
    first = nodes[start]
    work = [node for node in group if is_work(nodes[node])]
    if len(group) > 1:
        what = "nodes" if any(nodes[node].kernel for node in work) else "ops"
        return "run", f"{len(work):,} {what}", shortened(first.region or "", _LABEL_CHARS)
    if not work:
        return "event", "", ""
    file, _, number = place(first.line).rpartition(":")
    where = f":{number}" if file else shortened(number.removeprefix("node "), _LABEL_CHARS)
    label = shortened(short(first.name).rpartition(".")[2], _LABEL_CHARS)
    return "op", label, f"{notes.get(start, '')} {where}".strip()


def _width(label: str, note: str) -> float:
    return max(len(label) * CHAR, len(note) * SMALL_CHAR) + 14 if label else _DOT


def _places(widths: Sequence[float], lanes: Sequence[int], waits: Sequence[tuple[int, int]]) -> list[tuple[int, float]]:
    """Band and x of each item: as far left as what it waits for, and its lane, allow."""
    sources: dict[int, list[int]] = {}
    for a, b in waits:
        sources.setdefault(b, []).append(a)
    ends: list[float] = []
    reached: dict[int, float] = {}
    places: list[tuple[int, float]] = []
    for item, width in enumerate(widths):
        x = max([reached.get(lanes[item], 0.0), *(ends[source] + _CROSS for source in sources.get(item, ()))])
        if x % BAND_WIDTH + width > BAND_WIDTH:
            x = (x // BAND_WIDTH + 1) * BAND_WIDTH
        places.append((int(x // BAND_WIDTH), x % BAND_WIDTH))
        ends.append(x + width)
        reached[lanes[item]] = x + width + _NEXT
    return places


def shortened(text: str, most: int) -> str:
    """At most so many letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def summary(nodes: Sequence[Node]) -> str:
    """What a run consists of, most frequent first."""
    counts = Counter(short(node.name) for node in nodes if is_work(node)).most_common()
    listed = ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in counts[:12])
    return f"{listed}, ..." if len(counts) > 12 else listed
