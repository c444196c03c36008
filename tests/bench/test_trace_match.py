"""Which kernel of a replay is which node: made-up replays whose answer is known, shuffled, renamed and cut."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from synthetic_traces import Step, graph, mixture, plan, replay_of

from auxstream.bench.trace_match import BY_NODE, BY_ORDER, Kernel, MatchError, match, trace_of
from auxstream.bench.trace_plan import plan_of
from auxstream.capture.evidence import Node


def shuffled(kernels: tuple[Kernel, ...], seed: int = 0) -> list[Kernel]:
    found = list(kernels)
    random.Random(seed).shuffle(found)
    return found


ALIKE = [
    Step("norm", "norm", 2.0),
    # On both lanes two kernels of one name, of other lengths; what comes behind tells them apart.
    Step("mul", "pointwise", 1.0),
    Step("mul", "pointwise", 1.0),
    Step("mul", "pointwise", 5.0, "lane0", "aux", after=(0,)),
    Step("mul", "pointwise", 5.0, "lane0", "aux"),
    Step("tanh", "tanh", 1.0, "lane0", "aux"),
    Step("add", "add", 1.0, after=(5,)),
]


@pytest.mark.parametrize("steps", [mixture(3), ALIKE], ids=["mixture", "alike"])
@pytest.mark.parametrize("one_stream", [False, True])
@pytest.mark.parametrize("streams", [{"caller": 7, "lane0": 20}, {"caller": 20, "lane0": 7}])
def test_a_replay_is_matched_node_by_node(steps: list[Step], one_stream: bool, streams: dict[str, int]) -> None:
    replay = replay_of(steps, one_stream=one_stream, streams=streams)
    for seed in range(3):
        found = match(plan(steps, one_stream=one_stream), shuffled(replay.kernels, seed))
        assert found.kernels == replay.kernels
        assert found.how == BY_ORDER


def test_random_graphs_of_alike_kernels_on_several_lanes() -> None:
    """Three lanes fork from the caller, each a chain of kernels of three names; the last of each names its lane."""
    for seed in range(40):
        draw = random.Random(seed)
        steps = [Step("start", "start", 1.0)]
        ends: list[int] = []
        for lane in ("caller", "lane0", "lane1", "lane2"):
            for n in range(draw.randint(2, 5)):
                after = (0,) if n == 0 and lane != "caller" else ()
                region = None if lane == "caller" else f"r{lane[-1]}"
                steps.append(Step("op", draw.choice("abc"), draw.uniform(1, 6), lane, region, after=after))
            steps.append(Step("end", f"end of {lane}", 1.0, lane, None if lane == "caller" else f"r{lane[-1]}"))
            ends.append(len(steps) - 1)
        steps.append(Step("join", "join", 1.0, after=tuple(ends[1:])))
        replay = replay_of(steps)
        assert match(plan(steps), shuffled(replay.kernels, seed)).kernels == replay.kernels, seed


def test_node_numbers_decide_where_the_profiler_has_them() -> None:
    """Two branches that are the same kernel by kernel: without numbers either could be the other, with them not."""
    twin = [Step("start", "start", 1.0)]
    twin += [Step("mm", "mm", 4.0 + n) for n in range(2)]
    twin += [Step("mm", "mm", 3.0 + n, "lane0", "aux", after=(0,) if n == 0 else ()) for n in range(2)]
    twin.append(Step("add", "add", 1.0, after=(4,)))
    replay = replay_of(twin, streams={"caller": 7, "lane0": 7})
    numbered = tuple(replace(kernel, node=100 + 3 * n) for n, kernel in enumerate(replay.kernels))
    found = match(plan(twin), shuffled(numbered, 1))
    assert found.how == BY_NODE
    assert found.kernels == numbered


def test_node_numbers_that_contradict_the_names_or_the_order_are_not_believed() -> None:
    steps = mixture(1)
    replay = replay_of(steps)
    count = len(steps)
    backwards = tuple(replace(kernel, node=count - n) for n, kernel in enumerate(replay.kernels))
    found = match(plan(steps), shuffled(backwards))
    assert found.how == BY_ORDER
    assert found.kernels == backwards
    same_name = [Step("a", "k", 1.0), Step("b", "k", 2.0)]
    replay = replay_of(same_name)
    swapped = (replace(replay.kernels[0], node=2), replace(replay.kernels[1], node=1))
    assert match(plan(same_name), swapped).kernels == swapped


def test_a_kernel_that_began_before_what_it_waits_for_is_an_error() -> None:
    steps = mixture(1)
    kernels = list(replay_of(steps).kernels)
    join = len(steps) - 1
    early = replace(kernels[join], start=kernels[0].start - 1.0)
    with pytest.raises(MatchError, match="began where the graph does not let it") as caught:
        match(plan(steps), [*kernels[:join], early])
    assert "fused_add_rms_norm_add_2816" in str(caught.value)
    assert "remedy" in str(caught.value)


def test_without_the_edges_that_error_would_not_be_seen() -> None:
    """The control of the test above: it is the graph's order that finds it."""
    steps = mixture(1)
    kernels = list(replay_of(steps).kernels)
    join = len(steps) - 1
    kernels[join] = replace(kernels[join], start=kernels[0].start - 1.0)
    nodes, _ = graph(steps)
    assert len(match(plan_of(nodes, []), kernels).kernels) == len(steps)


@pytest.mark.parametrize("change", ["missing", "unknown", "twice"])
def test_kernels_that_are_not_the_graphs_are_named(change: str) -> None:
    steps = mixture(1)
    kernels = list(replay_of(steps).kernels)
    if change == "missing":
        gone = kernels.pop(5)
        expected = f"without 1 x {gone.name}"
    elif change == "unknown":
        kernels.append(replace(kernels[0], name="somebody_elses"))
        expected = "besides 1 x somebody_elses"
    else:
        kernels.append(kernels[4])
        expected = f"besides 1 x {kernels[4].name}"
    with pytest.raises(MatchError, match=expected):
        match(plan(steps), kernels)


def test_of_several_replays_those_that_cannot_be_matched_are_counted() -> None:
    steps = mixture(1)
    whole = replay_of(steps).kernels
    found = trace_of(plan(steps), [whole, whole[:-1], whole])
    assert len(found.replays) == 2
    assert len(found.lost) == 1
    with pytest.raises(MatchError, match="did not show the kernels"):
        trace_of(plan(steps), [whole[1:]])
    with pytest.raises(MatchError, match="no replay"):
        trace_of(plan(steps), [])
    with pytest.raises(MatchError, match="not known"):
        trace_of(plan_of([Node("add", "caller", None, "x.py:1: add")], []), [whole])


def test_what_a_timeline_does_not_show_still_orders() -> None:
    """norm -> event -> empty node -> mm, and a host node beside: mm waits for norm."""
    nodes = [
        Node("norm", "caller", None, "", (), "norm"),
        Node("host", "host", None, "", ()),
        Node("event record", "?", None, "", (), "event record"),
        Node("empty", "?", None, "", (), "empty"),
        Node("mm", "lane0", "aux", "", (), "mm"),
        Node("copy_", "caller", None, "", (), "memcpy"),
    ]
    found = plan_of(nodes, [(0, 2), (2, 3), (3, 4), (1, 4), (0, 5)])
    assert [work.kernel for work in found.works] == ["norm", "mm", "memcpy"]
    assert found.before == ((), (0,), (0,))
    assert found.lanes == ("caller", "lane0")


def test_regions_of_one_name_are_told_apart_by_the_callers_work_between_them() -> None:
    steps = [
        Step("a", "a", 1.0),
        Step("b", "b", 1.0, "lane0", "aux", after=(0,)),
        Step("b", "b", 1.0, "lane0", "aux"),
        Step("c", "c", 1.0, after=(2,)),
        Step("b", "b", 1.0, "lane0", "aux", after=(3,)),
        Step("d", "d", 1.0, "lane1"),
    ]
    assert plan(steps).regions == {"aux": (1, 2), "aux #2": (4,), "lane1": (5,)}


def test_encoded_names_are_read() -> None:
    node = Node("add", "caller", None, "", (), "_Z6kernelILi4EEvPf")
    assert plan_of([node], []).works[0].kernel == "void kernel<4>(float*)"
