"""The picture and the Perfetto trace of a trace: all of it there, to scale, and nothing over anything else.

The picture is read back as XML. What texts cover is worked out from their letters.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import pytest
from synthetic_traces import Step, both, mixture, traced

from auxstream.bench.trace_layout import WIDTH, lay_out
from auxstream.bench.trace_perfetto import perfetto
from auxstream.bench.trace_picture import Scene, draw
from auxstream.bench.trace_regions import figures_of, overlaps

TAG = "{http://www.w3.org/2000/svg}"
WIDEST = {"k": 6.1, "a": 6.1, "t": 7.3}  # a letter of a monospaced font, per class, in pixels
AMBER = "#ffc933"
Rectangle = tuple[float, float, float, float]
QKV = [
    Step("norm", "norm", 3.0),
    *(
        Step("mm.default", "mm", us, f"lane{n}", f"layers.3.attention.a_rather_long_name_{part}", after=(0,))
        for n, (part, us) in enumerate((("q", 14.0), ("k", 5.0), ("v", 6.0)))
    ),
    Step("scaled_dot_product_attention.default", "flash", 9.0),
    Step("add<&>.default", "add", 1.2, after=(1, 2, 3)),
]


def picture(steps: list[Step], *, beside_one_stream: bool = True) -> ET.Element:
    here, there, figures = both(steps)
    if not beside_one_stream:
        return ET.fromstring(draw(Scene("a graph <&>", "a card", here, None, figures_of(here))))
    return ET.fromstring(draw(Scene("a graph <&>", "a card", here, there, figures)))


def texts(root: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{TAG}text")]


def shaded(root: ET.Element) -> list[ET.Element]:
    """What is shaded as overlap; the legend's swatch is not."""
    return [rect for rect in root.iter(f"{TAG}rect") if rect.get("fill") == AMBER and rect.get("rx") is None]


def hovers(root: ET.Element) -> list[str]:
    return [title.text or "" for title in root.iter(f"{TAG}title")]


def shown(element: ET.Element) -> str:
    """What a text shows: its title is only for the pointer."""
    parts = [(part.text or "" if part.tag != f"{TAG}title" else "") + (part.tail or "") for part in element]
    return (element.text or "") + "".join(parts)


def places(root: ET.Element) -> list[tuple[str, Rectangle]]:
    """Texts of the sizes that are drawn many times, and what they cover; groups may move theirs."""
    found: list[tuple[str, Rectangle]] = []

    def walk(element: ET.Element, dx: float, dy: float) -> None:
        moved = re.match(r"translate\(([\d.]+) ([\d.]+)\)", element.get("transform", ""))
        if moved:
            dx, dy = dx + float(moved[1]), dy + float(moved[2])
        kinds = (element.get("class") or "").split()
        if element.tag == f"{TAG}text" and kinds and "font-size" not in element.get("style", ""):
            width = len(shown(element)) * WIDEST[kinds[0]]
            x, y = float(element.get("x", 0)) + dx, float(element.get("y", 0)) + dy
            left = x - width / 2 if kinds[0] == "a" or "middle" in element.get("style", "") else x
            found.append((shown(element), (left, y - 8, left + width, y + 2)))
        for child in element:
            walk(child, dx, dy)

    walk(root, 0, 0)
    return found


def collisions(root: ET.Element) -> list[tuple[str, str]]:
    return [
        (one, other)
        for (one, a), (other, b) in combinations(places(root), 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


@pytest.mark.parametrize("steps", [mixture(1), mixture(12), QKV], ids=["one layer", "twelve layers", "three lanes"])
@pytest.mark.parametrize("beside_one_stream", [True, False])
def test_no_text_lies_over_another_or_leaves_the_picture(steps: list[Step], beside_one_stream: bool) -> None:
    root = picture(steps, beside_one_stream=beside_one_stream)
    assert len(places(root)) > 10
    assert not collisions(root)
    for said, (left, _, right, _) in places(root):
        assert left >= 0, said
        assert right <= float(root.get("width", 0)), said


def test_a_text_over_another_would_be_seen() -> None:
    root = picture(mixture(1))
    first = next(text for text in root.iter(f"{TAG}text") if text.get("class") == "k")
    root.append(first)
    assert collisions(root) == [(shown(first), shown(first))]


def test_it_says_what_it_is() -> None:
    said = texts(picture(mixture(2)))
    assert "a graph <&>" in said
    assert any("us saved" in line and "on one stream" in line and "two lanes or more at once" in line for line in said)
    for expected in ("one stream", "caller", "lane0", "the caller's work", "region layers.*.mlp", "0 us"):
        assert any(expected in line for line in said), expected
    assert any(re.fullmatch(r"layers\.0\.mlp: [\d.]+ us, \d+% hidden", line) for line in said)
    assert any(line.startswith("region") and "saved us" in line and "paid" in line for line in said)


def test_without_one_stream_it_does_not_speak_of_it() -> None:
    said = "\n".join(texts(picture(mixture(2), beside_one_stream=False)))
    assert "one stream" not in said
    assert "saved" not in said
    assert "hidden us" in said


def test_every_kernel_is_drawn_to_scale_on_its_row() -> None:
    here, there, _ = both(mixture(2))
    layout = lay_out(here, there)
    assert layout.bands == 1
    assert layout.rows == ("one stream", "caller", "lane0")
    assert Counter(box.row for box in layout.boxes) == {0: 32, 1: 20, 2: 12}
    lanes = [box for box in layout.boxes if box.row]
    for box, kernel in zip(lanes, here.typical.kernels, strict=True):
        assert box.piece.x == pytest.approx((kernel.start - here.typical.start) * layout.scale)
        assert box.piece.width == pytest.approx((kernel.end - kernel.start) * layout.scale)


def test_what_is_shaded_is_the_overlap_and_nothing_else() -> None:
    here, there, _ = both(mixture(2))
    layout = lay_out(here, there)
    drawn = sum(piece.width for piece in layout.overlaps) / layout.scale
    exact = sum(end - start for start, end in overlaps(here.plan, here.typical))
    assert drawn == pytest.approx(exact, rel=0.01)
    assert len(shaded(picture(mixture(2)))) == len(layout.overlaps) > 5


def test_one_stream_has_nothing_shaded() -> None:
    """The control of the test above."""
    alone = traced(mixture(2), one_stream=True)
    root = ET.fromstring(draw(Scene("alone", "a card", alone, None, figures_of(alone))))
    assert not shaded(root)
    assert any("for 0.0 us (0% of the replay)" in line for line in texts(root))


def test_bands_of_a_long_replay_hold_all_of_it() -> None:
    here, there, _ = both(mixture(12))
    layout = lay_out(here, there)
    assert layout.bands > 2
    assert not layout.hidden_us
    for row, replay in ((0, there.typical), (1, here.typical)):
        drawn = sum(box.piece.width for box in layout.boxes if (box.row > 0) == (row > 0)) / layout.scale
        assert drawn == pytest.approx(sum(kernel.end - kernel.start for kernel in replay.kernels), rel=1e-6)
    assert all(box.piece.x >= 0 and box.piece.x + box.piece.width <= WIDTH + 1e-6 for box in layout.boxes)


def test_of_a_replay_that_is_too_long_it_says_what_is_left_out() -> None:
    said = texts(picture(mixture(60)))
    assert any(re.match(r"the last [\d,]+ us are not drawn", line) for line in said)
    assert any(re.match(r"and \d+ more regions", line) for line in said)


def test_the_pointer_finds_op_kernel_region_and_line() -> None:
    found = hovers(picture(QKV, beside_one_stream=False))
    (flash,) = [text for text in found if "flash" in text]
    assert "scaled_dot_product_attention.default: 9.00 us" in flash
    assert "on caller" in flash
    assert "model.py:4" in flash
    assert any("region layers.3.attention.a_rather_long_name_k; stream 21" in text for text in found)


def test_long_names_are_clipped_to_their_boxes() -> None:
    drawn = [text for text in texts(picture(mixture(1))) if text.endswith("…")]
    assert drawn
    assert all(len(text) < 20 for text in drawn)


def test_waits_between_lanes_are_drawn() -> None:
    here, _, _ = both(QKV)
    layout = lay_out(here, None)
    assert Counter((link.source[1], link.target[1]) for link in layout.links) == {
        **{(0, lane): 1 for lane in (1, 2, 3)},
        **{(lane, 0): 1 for lane in (1, 2, 3)},
    }


def test_the_same_trace_gives_the_same_picture() -> None:
    here, there, figures = both(mixture(3))
    scene = Scene("twice", "a card", here, there, figures)
    assert draw(scene) == draw(scene)


# --- Perfetto ---------------------------------------------------------------------------------------------------------


def slices(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event.get("cat") == kind]


def test_perfetto_has_lanes_as_tracks_and_regions_around_their_kernels() -> None:
    here, there, _ = both(mixture(2))
    document = json.loads(json.dumps(perfetto({"g": here, "g, one stream": there})))
    named = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in document["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert named == {(1, 1): "caller", (1, 2): "lane0", (2, 1): "caller"}
    kernels, regions = slices(document, "kernel"), slices(document, "region")
    assert len(kernels) == 5 * 32 * 2
    assert len(regions) == 5 * 2 * 2
    for region in regions:
        own = [
            kernel
            for kernel in kernels
            if (kernel["pid"], kernel["args"]["replay"], kernel["args"]["region"])
            == (region["pid"], region["args"]["replay"], region["name"])
        ]
        assert len(own) == 6
        assert {kernel["tid"] for kernel in own} == {region["tid"]}
        assert region["ts"] == min(kernel["ts"] for kernel in own)
        assert region["ts"] + region["dur"] == pytest.approx(max(kernel["ts"] + kernel["dur"] for kernel in own))
    assert {kernel["name"] for kernel in kernels} >= {"mm", "moe_experts", "fused_rms_norm"}


def test_slices_of_a_track_follow_one_another() -> None:
    here, _, _ = both(mixture(2))
    document = perfetto({"g": here})
    for track in (1, 2):
        own = sorted((event for event in slices(document, "kernel") if event["tid"] == track), key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 2e-3 for a, b in pairwise(own))


def test_the_counter_says_how_many_lanes_are_busy() -> None:
    here, _, figures = both(mixture(2))
    counts = [event for event in perfetto({"g": here})["traceEvents"] if event["ph"] == "C"]
    assert {event["args"]["lanes"] for event in counts} == {0, 1, 2}
    overlapped = sum(b["ts"] - a["ts"] for a, b in pairwise(counts) if a["args"]["lanes"] == 2)
    assert overlapped / len(here.replays) == pytest.approx(figures.overlapped.median, rel=0.01)
