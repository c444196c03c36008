"""A report's forms: the sentences people read, and the JSON that tools do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import auxstream
from auxstream.capture import Report, verify
from auxstream.capture.evidence import Evidence, Node, span
from auxstream.capture.program import Buffer
from auxstream.capture.report import MOST_SHOWN, SCHEMA, place, short
from auxstream.runtime.regions import open_region

BLOCK = (Buffer(0, 64, 0, "mul.Tensor"), Buffer(0, 64, 0, "add.Tensor"), Buffer(512, 64, None, "outside tensor (4, 4)"))


def node(op: str, stream: str, line: int, *touches: tuple[int, bool], kernel: str = "", region: str = "") -> Node:
    refs = tuple((span(buffer, 0, 64), writes) for buffer, writes in touches)
    return Node(op, stream, region or None, f"a.py:{line}: y = f(x)", refs, kernel)


def report(*nodes: Node, edges: tuple[tuple[int, int], ...] = ()) -> Report:
    return verify(Evidence(nodes, edges, BLOCK, (), ()))


def early_free() -> Report:
    x = torch.ones(256)
    with auxstream.graph(device="cpu", verify="off") as g:
        h = x * 2
        region = open_region("aux")
        with region:
            s = region.returns(h * 3)
        del h
        z = x + 5
        region.join()
        z.add_(s)
    return verify(g)


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_block_reused_while_it_is_read() -> None:
    (race,) = report(
        node("mul.Tensor", "caller", 10, (0, True)),
        node("sum.dim_IntList", "aux", 11, (0, False)),
        node("relu.default", "caller", 12, (0, False)),
        node("fill_.Scalar", "caller", 15, (1, True)),
        edges=((0, 1), (0, 2), (2, 3)),
    ).races
    assert race.headline == (
        "block of `mul` (made at a.py:10), freed after a.py:12, reused by `fill_` at a.py:15 while `sum` on aux may "
        "still read it"
    )
    assert "a wait on caller for aux, after `sum` at a.py:11 and before `fill_` at a.py:15" in race.missing


def test_a_block_reused_while_it_is_written() -> None:
    nodes = (node("mul.Tensor", "aux", 10, (0, True)), node("mm.default", "caller", 15, (1, False)))
    (race,) = report(*nodes).races
    assert race.headline == (
        "block of `mul` (made at a.py:10), freed after a.py:10, reused, and read by `mm` at a.py:15 while `mul` on aux "
        "may still write it"
    )


def test_a_tensor_shared_in_no_order() -> None:
    reader = node("add_.Tensor", "aux", 15, (2, True), region="shared", kernel="void k<float>()")
    (race,) = report(node("mm.default", "caller", 10, (2, False)), reader).races
    assert race.headline == (
        "`mm` at a.py:10 on caller reads and `add_` at a.py:15 on aux writes outside tensor (4, 4), in no fixed order"
    )
    text = str(race)
    assert text.splitlines()[1:3] == [
        "  reads  `mm.default` on caller: a.py:10: y = f(x)",
        "  writes `add_.Tensor` (void k<float>()) on aux, region shared: a.py:15: y = f(x)",
    ]


def test_first_is_what_was_enqueued_first() -> None:
    """Though the graph may be walked in another order."""
    nodes = (
        node("mul.Tensor", "caller", 1, (0, True)),
        node("mm.default", "aux", 2, (0, False)),
        node("relu.default", "caller", 3),
    )
    (race,) = report(*nodes, edges=((2, 1),)).races
    assert (race.first.node, race.second.node) == (0, 1)


def test_many_races_are_cut_short_in_the_text_alone() -> None:
    memory = tuple(Buffer(64 * n, 64, None, f"tensor {n}") for n in range(MOST_SHOWN + 5))
    writes = [node("fill_.Scalar", stream, 1, (n, True)) for stream in ("a", "b") for n in range(len(memory))]
    chains = [(n, n + 1) for n in range(len(writes) - 1) if n + 1 != len(memory)]
    found = verify(Evidence(tuple(writes), tuple(chains), memory, (), ()))
    assert len(found.races) == len(memory)
    text = str(found)
    assert text.count("race on a shared tensor") == MOST_SHOWN
    assert "and 5 more races: to_json() has all of them" in text
    assert len(json.loads(found.to_json())["races"]) == len(memory)


def test_only_a_proof_says_no_race() -> None:
    proved = Report((), (), (), (), ())
    foreign = Report((), ("kernel `k`: no recorded op launched it",), (), (), ())
    for found in (foreign, early_free()):
        for text in (str(found), found.verdict, found.to_json(), found.picture()):
            assert "no race" not in text
            assert '"ok": true' not in text
    for text in (str(proved), proved.verdict, proved.picture()):
        assert "no race" in text
    assert '"ok": true' in proved.to_json()


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("mul.Tensor", "mul"),
        ("auxstream_fused.rows_3fa9.default", "auxstream_fused.rows_3fa9"),
        ("memcpy", "memcpy"),
        ("...", "..."),
        ("", ""),
    ],
)
def test_names_without_overloads(op: str, name: str) -> None:
    assert short(op) == name


@pytest.mark.parametrize(
    ("line", "where"),
    [("a.py:12: y = x[1:2]", "a.py:12"), ("graph: add_1", "node add_1"), ("?", "?"), ("", "")],
)
def test_places(line: str, where: str) -> None:
    assert place(line) == where


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_says_what_the_report_says() -> None:
    found = early_free()
    read: dict[str, Any] = json.loads(found.to_json())
    assert json.loads(json.dumps(read)) == read == found.as_dict()
    assert set(read) == {"schema", "ok", "races", "unattributed", "assumptions", "nodes", "edges"}
    assert (read["schema"], read["ok"]) == (SCHEMA, False)
    assert [tuple(edge) for edge in read["edges"]] == list(found.edges)
    assert read["assumptions"] == list(found.assumptions)
    assert len(read["nodes"]) == len(found.nodes)
    for written, given in zip(read["nodes"], found.nodes, strict=True):
        assert written == {
            "op": given.name,
            "kernel": given.kernel,
            "stream": given.stream,
            "region": given.region,
            "line": given.line,
        }
    (race,) = found.races
    (written,) = read["races"]
    assert set(written) == {"headline", "first", "second", "nbytes", "bytes", "reuse", "missing"}
    assert written["headline"] == race.headline
    assert (written["nbytes"], written["reuse"], written["missing"]) == (1024, True, race.missing)
    start, stop = written["bytes"]
    assert stop - start == 1024
    for side, party in (("first", race.first), ("second", race.second)):
        assert set(written[side]) == {
            *("op", "stream", "region", "line", "writes", "buffer", "node", "kernel", "made", "last_use")
        }
        assert all(written[side][key] == getattr(party, key) for key in written[side])
        there = read["nodes"][written[side]["node"]]
        assert all(there[key] == written[side][key] for key in there), "a party is one of the nodes"


def test_json_is_the_same_each_time() -> None:
    found = early_free()
    assert found.to_json() == found.to_json()
