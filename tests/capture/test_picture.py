"""The picture of a report: everything in it, nothing over anything else, and the layout's promises on random graphs.

The picture is read back as XML. What texts cover is worked out from their letters, and that reckoning has its own
control.
"""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import combinations

import pytest
import torch

import auxstream
from auxstream.capture import Report, verify
from auxstream.capture.evidence import Evidence, Node, span
from auxstream.capture.graphs import CapturedGraph
from auxstream.capture.picture_layout import BAND_WIDTH, Item, lay_out
from auxstream.capture.program import Buffer, Wait
from auxstream.runtime.regions import open_region

RED = "#d0021b"
TAG = "{http://www.w3.org/2000/svg}"
WIDEST = {"l": 6.7, "n": 5.5, "t": 6.7}  # a letter of a monospaced font, per class, in pixels
Rectangle = tuple[float, float, float, float]


def early_free() -> Report:
    x = torch.ones(256)
    with auxstream.graph("early free", device="cpu", verify="off") as g:
        h = x * 2
        region = open_region("aux")
        with region:
            s = region.returns(h * 3)
        del h
        z = x + 5
        region.join()
        z.add_(s)
    return verify(g)


def layers(count: int, racy: tuple[int, ...] = ()) -> CapturedGraph:
    """Many layers of 80 ops beside 30; in racy ones the branch's input is freed early."""
    x = torch.ones(256)
    with auxstream.graph("layers", device="cpu", verify="off") as g:
        for layer in range(count):
            n = x.repeat(4)  # of a size of its own: who reuses it is certain
            region = open_region(f"layers.{layer}.shared", recorded=[] if layer in racy else [n])
            a = x
            for _ in range(40):
                a = torch.relu(a) + 1
            with region:
                s = n.tanh()
                for _ in range(29):
                    s = s.tanh()
                region.returns(s)
            del n
            b = x.repeat(4)
            region.join()
            x = a + s[:256] + b[:256]
    return g


def chaos(seed: int, count: int, lanes: int, buffers: int) -> Evidence:
    """A graph of kernels with waits, missing waits, races, strange names; some edges lead back."""
    draw = random.Random(seed)
    nodes: list[Node] = []
    edges: dict[tuple[int, int], None] = {}
    last: dict[int, int] = {}
    lane = 0
    for n in range(count):
        lane = draw.randrange(lanes) if draw.random() < 0.2 else lane
        touches = tuple((span(draw.randrange(buffers), 0, 8), draw.random() < 0.3) for _ in range(draw.randrange(3)))
        name = draw.choice(["add.Tensor", "mm.default", "mine.a_rather_long_name_of_an_op.default"])
        region = f"layers.{n // 20}.shared" if lane else None
        nodes.append(Node(name, f"stream {lane:#x}", region, f"model.py:{n}: y", touches, "void k<float, 4>(T*)"))
        if lane in last and draw.random() < 0.97:
            edges[last[lane], n] = None
        if n and draw.random() < 0.15:
            edges[draw.randrange(max(0, n - 12), n), n] = None
        last[lane] = n
    renamed = list(range(count))
    if seed % 2:
        a = draw.randrange(count - 1)
        renamed[a], renamed[a + 1] = a + 1, a
    nodes = [nodes[renamed[n]] for n in range(count)]
    memory = tuple(Buffer(8 * n, 8, 0, draw.choice(["mul.Tensor", "outside tensor (4, 256)"])) for n in range(buffers))
    return Evidence(tuple(nodes), tuple((renamed[a], renamed[b]) for a, b in edges), memory, (), ("a", "b"))


CHAOS = [(1, 40, 3, 20), (2, 46, 2, 4), (3, 300, 4, 200), (4, 300, 7, 30), (5, 900, 3, 2000), (6, 120, 1, 10)]


def parse(report: Report, name: str = "graph") -> ET.Element:
    return ET.fromstring(report.picture(name))


def texts(svg: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in svg.iter(f"{TAG}text")]


def boxes(svg: ET.Element) -> list[tuple[str, Rectangle]]:
    """What each text covers. Legend entries lie in a moved group."""
    found: list[tuple[str, Rectangle]] = []
    moved = {child: group for group in svg.iter(f"{TAG}g") for child in group if group.get("transform")}
    for text in svg.iter(f"{TAG}text"):
        content = "".join(text.itertext())
        size = re.search(r"font-size:(\d+)px", text.get("style", ""))
        letter = 0.61 * int(size[1]) if size else WIDEST[text.get("class", "")]
        x, y, width = float(text.get("x", 0)), float(text.get("y", 0)), letter * len(content)
        if text in moved:
            dx, dy = re.findall(r"[\d.]+", moved[text].get("transform", ""))
            x, y = x + float(dx), y + float(dy)
        left = x if text.get("class") not in ("l", "n") else x - width / 2
        found.append((content, (left, y - letter * 1.35, left + width, y + 1)))
    return found


def overlaps(svg: ET.Element) -> list[tuple[str, str]]:
    return [
        (one, other)
        for (one, a), (other, b) in combinations(boxes(svg), 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


def connectors(svg: ET.Element) -> int:
    """Red lines between boxes; one between bands has two parts."""
    groups = [group for group in svg.iter(f"{TAG}g") if not group.get("transform")]
    return sum(any(path.get("stroke") == RED for path in group.findall(f"{TAG}path")) for group in groups)


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_an_early_free_is_seen_at_once() -> None:
    report = early_free()
    (race,) = report.races
    svg = parse(report, "early free")
    shown = texts(svg)
    assert shown[0] == "early free"
    assert shown[1].endswith("not proved: 1 race(s), 0 unattributed")
    assert [text for text in shown if text in ("caller", "lane0")] == ["caller", "lane0"], "rows by first use"
    assert shown.count("fork") == shown.count("join") == 1
    assert shown.count("race 1") == 1
    number = race.first.line.split(":")[1]
    assert f"reads :{number}" in shown
    listed = " ".join(text.strip() for text in shown[shown.index("race: no order between them") + 1 :])
    assert listed.startswith(f"race 1: {race.headline}")
    titles = [title.text or "" for title in svg.iter(f"{TAG}title")]
    assert any(race.first.line in title and race.first.op in title and "region aux" in title for title in titles)
    assert sum(title == race.headline for title in titles) == 2, "on the connector and on its label"
    assert any(title == "lane0 waits for caller: fork of aux" for title in titles)
    outlined = [rect for rect in svg.iter(f"{TAG}rect") if rect.get("stroke") == RED]
    assert len(outlined) == 2


def test_red_means_race() -> None:
    g = layers(1)
    assert connectors(parse(verify(g))) == 0
    assert RED not in verify(g).picture()
    assert "no race" in texts(parse(verify(g)))[1]
    waits = [n for n, step in enumerate(g.program.steps) if isinstance(step, Wait)]
    for wait in waits:
        twin = verify(g.program.without(wait))
        assert connectors(parse(twin)) == len({(race.first.node, race.second.node) for race in twin.races}) > 0
        assert "no race" not in twin.picture()


def test_what_was_not_checked_is_not_shown_as_proved() -> None:
    report = layers(1).report
    shown = texts(parse(report))
    assert "not proved" in shown[1]
    assert "no race" not in report.picture()
    assert "unattributed: the whole graph: captured with verify='off'" in shown


def test_it_stands_alone_and_is_the_same_each_time() -> None:
    report = early_free()
    picture = report.picture("a")
    assert picture == report.picture("a")
    assert re.findall(r"https?://[^\"]*", picture) == ["http://www.w3.org/2000/svg"]
    background = next(ET.fromstring(picture).iter(f"{TAG}rect"))
    assert (background.get("width"), background.get("fill")) == ("100%", "#fcfcfd")


def test_names_that_xml_cannot_hold() -> None:
    node = Node("<&>\0'\"", "\x1b[31m", "a<b", "f.py:1: x < y & z", (), "void k<T, (E)1>(\x07)")
    report = Report((), ("kernel <&>\x00",), (), (node,), ())
    svg = parse(report, "<graph> & \x01")
    assert texts(svg)[0] == "<graph> & ?"
    assert "unattributed: kernel <&>?" in texts(svg)
    assert any("void k<T, (E)1>" in (title.text or "") for title in svg.iter(f"{TAG}title"))


def test_nothing_at_all() -> None:
    svg = parse(Report((), (), (), (), ()))
    assert "0 ops, 0 ordering edges, 0 streams: no race" in texts(svg)


# --- long graphs ------------------------------------------------------------------------------------------------------


def test_a_long_graph_stays_short() -> None:
    report = verify(layers(45, racy=(3, 20)))
    assert len(report.nodes) > 5000
    assert len(report.races) == 2
    layout = lay_out(report)
    assert len(layout.items) < len(report.nodes) / 8
    assert "30 ops" in texts(parse(report))
    assert len(report.picture()) < 250_000
    single = {item.nodes for item in layout.items if len(item.nodes) == 1}
    for race in report.races:
        assert {(race.first.node,), (race.second.node,)} <= single
    assert connectors(parse(report)) == 2
    assert not overlaps(parse(report))


def test_a_short_graph_shows_every_op() -> None:
    report = early_free()
    assert all(item.kind != "run" for item in lay_out(report).items)


# --- promises of the layout -------------------------------------------------------------------------------------------


def position(item: Item) -> float:
    return item.band * BAND_WIDTH + item.x


@pytest.mark.parametrize("case", CHAOS)
def test_every_node_has_one_place_to_the_right_of_what_it_waits_for(case: tuple[int, int, int, int]) -> None:
    report = verify(chaos(*case))
    layout = lay_out(report)
    assert Counter(node for item in layout.items for node in item.nodes) == Counter(range(len(report.nodes)))
    item_of = {node: item for item in layout.items for node in item.nodes}
    for a, b in report.edges:
        first, second = item_of[a], item_of[b]
        assert first is second or position(first) + first.width < position(second)
    for item in layout.items:
        assert item.x + item.width <= BAND_WIDTH
        assert len({(report.nodes[node].stream, report.nodes[node].region) for node in item.nodes}) == 1
    # What is neither in one box, nor joined by a line, nor by an arrow, is not ordered: the picture shows every edge.
    drawn = {(layout.items[a].nodes[0], layout.items[b].nodes[0]) for a, b in layout.links}
    drawn |= {(layout.items[a.source].nodes[0], layout.items[a.target].nodes[0]) for a in layout.arrows}
    reach: dict[int, set[int]] = {}
    for item in reversed(layout.items):
        start = item.nodes[0]
        reach[start] = {start}.union(*(reach[b] for a, b in drawn if a == start))
    for a, b in report.edges:
        assert item_of[b].nodes[0] in reach[item_of[a].nodes[0]]
    given = {(item_of[a].nodes[0], item_of[b].nodes[0]) for a, b in report.edges}
    assert drawn <= given, "and no line or arrow that no edge stands for"


@pytest.mark.parametrize("case", CHAOS)
def test_texts_do_not_overlap(case: tuple[int, int, int, int]) -> None:
    report = verify(chaos(*case))
    svg = parse(report)
    assert not overlaps(svg)
    width, height = float(svg.get("width", 0)), float(svg.get("height", 0))
    for text, (left, top, right, bottom) in boxes(svg):
        assert 0 <= left < right <= width, text
        assert 0 <= top < bottom <= height, text
    pairs = {(race.first.node, race.second.node) for race in report.races}
    assert connectors(svg) == len(pairs), "however many, every race is drawn"


def test_the_reckoning_sees_an_overlap() -> None:
    svg = parse(early_free())
    label = next(text for text in svg.iter(f"{TAG}text") if text.text == "fork")
    copy = ET.SubElement(svg, f"{TAG}text", {**label.attrib, "x": str(float(label.get("x", 0)) + 8)})
    copy.text = "join"
    assert overlaps(svg) == [("fork", "join")]
