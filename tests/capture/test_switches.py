"""Hand-written stream switches become regions where they order what needs an order, and stay, with a reason, elsewhere.

The switches of these graphs work: `Hand` runs them on whatever machine is in force, so a graph is recorded as it was
written and as it was adopted, and the proof, which knows nothing of `adopt_switches`, judges both.
"""

from __future__ import annotations

import operator
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.variables.streams  # registers torch's stream ops
from moe_blocks import EXPERTS, HIDDEN, INNER, TOKENS, Layer, Model, Routed, routed_sum
from random_programs import RandomProgram
from random_regions import copy_of
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import auxstream
from auxstream.capture import adopt_switches, insert_regions, mark_multi_stream_moe_shared_experts, verify
from auxstream.capture.graphs import SimulatedGraph
from auxstream.capture.switches import Adoption
from auxstream.capture.trace import trace
from auxstream.kernels import fuse_elementwise
from auxstream.runtime.errors import RegionError
from auxstream.runtime.handoff_ops import REGION_OPS
from auxstream.runtime.regions import Region, open_region

X = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5))
STREAMS = torch.ops.streams


# --- switches that work, in the manner of AutoDeploy ----------------------------------------------------------------


class Hand:
    """One auxiliary stream and the region that stands for it; nothing is declared, held or recorded."""

    open: Region | None = None
    ended: Region | None = None


def begin_aux_stream_passthrough(x: Any, *, device: int = -1, event_id: int = -1) -> Any:
    Hand.open = open_region("by hand")
    Hand.open.__enter__()
    return x


def end_aux_stream_passthrough(x: Any, *, device: int = -1, event_id: int = -1) -> Any:
    assert Hand.open is not None
    Hand.open.__exit__(None, None, None)
    Hand.ended, Hand.open = Hand.open, None
    return x


def wait_aux_stream_passthrough(x: Any, *, device: int = -1, event_id: int = -1) -> Any:
    assert Hand.ended is not None
    Hand.ended.join()
    return x


def record_event_passthrough(x: Any, *, device: int = -1) -> Any:
    return x


BEGIN, END, WAIT = begin_aux_stream_passthrough, end_aux_stream_passthrough, wait_aux_stream_passthrough


@pytest.fixture(autouse=True)
def _hands_off() -> Iterator[None]:
    yield
    Hand.open = Hand.ended = None


def by_hand(gm: GraphModule, branch: Sequence[Node], *, wait_before: Node | None = None) -> tuple[Node, Node, Node]:
    """Put `branch` on the auxiliary stream as AutoDeploy's pass does: begin on its first input, end on its result,
    wait on the other operand where the two meet."""
    inside, graph = set(branch), gm.graph
    first, last = branch[0], branch[-1]
    source = next(a for a in first.all_input_nodes if a.op != "get_attr")
    with graph.inserting_before(first):
        begin = graph.call_function(BEGIN, (source,))
    first.replace_input_with(source, begin)
    with graph.inserting_after(last):
        end = graph.call_function(END, (last,))
    meet = next(user for user in last.users if user is not end and user not in inside)
    meet.replace_input_with(last, end)
    other = next((a for a in meet.all_input_nodes if a is not end and a.op != "get_attr"), end)
    with graph.inserting_before(wait_before or meet):
        wait = graph.call_function(WAIT, (other if wait_before is None else source,))
    if wait_before is None and other is not end:
        meet.replace_input_with(other, wait)
    gm.recompile()
    return begin, end, wait


def moe(layers: int = 1, **options: Any) -> tuple[GraphModule, list[tuple[Node, Node, Node]], GraphModule]:
    """A graph with the shared expert of each layer on the hand-made stream, its switches, and the graph before."""
    torch.manual_seed(0)
    model = Model(*[Layer(**options) for _ in range(layers)])
    gm = trace(model, (X,)).graph_module
    plain = copy_of(gm)
    regions = mark_multi_stream_moe_shared_experts(gm)
    for node in gm.graph.nodes:
        for key in ("auxstream", "skip_mlir_fusion"):
            node.meta.pop(key, None)
    gm.meta.clear()
    return gm, [by_hand(gm, region.nodes) for region in regions], plain


def named(gm: GraphModule, name: str) -> Node:
    return next(node for node in gm.graph.nodes if node.name == name)


def switches_in(gm: GraphModule) -> list[str]:
    names = ("begin_aux", "end_aux", "wait_aux", "record_event", "streams.", "control_deps")
    calls = (node for node in gm.graph.nodes if node.op == "call_function")
    return [node.name for node in calls if any(part in str(node.target) for part in names)]


def captured(gm: Callable[..., Any], *inputs: Tensor, **options: Any) -> tuple[SimulatedGraph, Any]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with auxstream.graph(device="cpu", **options) as g:
            out = gm(*inputs)
    assert isinstance(g, SimulatedGraph)
    return g, out


def replays_as(gm: GraphModule, plain: GraphModule, *inputs: Tensor, replays: int = 8) -> SimulatedGraph:
    """Capture and prove `gm`, and replay it in orders that hurt: the values of `plain` every time, buffers too."""
    inputs = inputs or (X.clone(),)
    g, out = captured(gm, *inputs)
    for _ in range(replays):
        for tensor in inputs:
            tensor.normal_()
        rng = torch.get_rng_state()
        g.replay()
        torch.set_rng_state(rng)
        with torch.no_grad():
            expected = plain(*inputs)
        pairs = zip(torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(expected), strict=True)
        theirs_by_name = dict(plain.named_buffers())
        buffers = [(value, theirs_by_name[name]) for name, value in gm.named_buffers() if name in theirs_by_name]
        for mine, theirs in (*pairs, *buffers):
            assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
    return g


def untouched(gm: GraphModule, reason: str, **options: Any) -> Adoption:
    """Adopting `gm` changes nothing and gives this one reason."""
    before, metas = gm.code, {node: dict(node.meta) for node in gm.graph.nodes}
    found = adopt_switches(gm, **options)
    assert gm.code == before
    assert all(node.meta == metas[node] for node in gm.graph.nodes)
    assert found
    assert all(not adoption.adopted for adoption in found)
    assert reason in {adoption.reason for adoption in found}, [adoption.reason for adoption in found]
    return next(adoption for adoption in found if adoption.reason == reason)


# --- passthroughs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"merge": "in_place"}, {"form": "opaque", "gated": True}], ids=str)
@pytest.mark.parametrize("shared_first", [True, False], ids=["shared_first", "routed_first"])
def test_a_branch_on_a_hand_made_stream_becomes_a_region(options: dict[str, Any], shared_first: bool) -> None:
    gm, switches, plain = moe(2, pre_norm=True, shared_first=shared_first, **options)
    names = [tuple(node.name for node in group) for group in switches]
    one, two = adopt_switches(gm)
    assert [one.name, two.name] == ["layers.0.aux", "layers.1.aux"]
    assert [set(one.switches), set(two.switches)] == [set(group) for group in names]
    assert switches_in(gm) == []
    assert [n.target for n in gm.graph.nodes] == [n.target for n in plain.graph.nodes], "the switches went, no more"
    for adoption in (one, two):
        assert adoption.adopted
        assert all(node.meta["auxstream"] == adoption.name for node in adoption.nodes)
        assert all(node.meta["skip_mlir_fusion"] is True for node in adoption.nodes)
    marked = {node for node in gm.graph.nodes if "auxstream" in node.meta}
    assert marked == {*one.nodes, *two.nodes}
    plans = insert_regions(gm)
    assert [plan.name for plan in plans] == ["layers.0.aux", "layers.1.aux"]
    assert replays_as(gm, plain).report.ok


def test_an_adoption_reads_well() -> None:
    gm, _, _ = moe()
    (adoption,) = adopt_switches(gm)
    assert str(adoption) == (
        "layers.0.aux: adopted (5 nodes, linear_2 to linear_4) in place of "
        "begin_aux_stream_passthrough, end_aux_stream_passthrough, wait_aux_stream_passthrough; "
        "until now nothing kept add alive for its readers"
    )
    assert adopt_switches(gm) == (), "nothing is left to adopt"


def test_adopted_regions_fuse_and_mark_as_marked_ones() -> None:
    gm, _, plain = moe(2, pre_norm=True)
    adoptions = adopt_switches(gm)
    marks = mark_multi_stream_moe_shared_experts(gm)
    assert [set(mark.nodes) for mark in marks] == [set(adoption.nodes) for adoption in adoptions]
    report = fuse_elementwise(gm)
    assert {node.name for adoption in adoptions for node in adoption.nodes} <= {node.name for node in gm.graph.nodes}, (
        "fused kernels stay off the branches"
    )
    assert report.fusions, "and go elsewhere"
    insert_regions(gm)
    g, out = captured(gm, x := X.clone())
    g.replay()
    with torch.no_grad():
        torch.testing.assert_close(out, plain(x))


def test_a_graph_without_switches_is_left_alone() -> None:
    gm = trace(Model(Layer()), (X,)).graph_module
    code = gm.code
    assert adopt_switches(gm) == ()
    assert gm.code == code


def test_regions_come_last() -> None:
    gm, _, _ = moe()
    adopt_switches(gm)
    insert_regions(gm)
    with pytest.raises(RegionError, match="has regions already"):
        adopt_switches(gm)


def test_a_switch_that_is_not_known_as_one_is_an_error() -> None:
    """It has no traced value, and no schema: nobody can tell what it does."""

    def other_begin(x: Tensor) -> Tensor:
        return x

    gm, ((begin, _, _),), _ = moe()
    begin.target = other_begin
    with pytest.raises(RegionError, match="no traced value") as caught:
        adopt_switches(gm)
    assert "passthroughs" in caught.value.remedy
    assert [a.adopted for a in adopt_switches(gm, passthroughs=dict(NAMES, other_begin="begin"))] == [True]


NAMES: dict[str, Any] = {WAIT.__name__: "wait", END.__name__: "end"}

_LIBRARY = torch.library.Library("auxstream_test_switches", "DEF")
for _name in ("into", "back", "meet"):
    _LIBRARY.define(f"{_name}(Tensor(a) x, int device) -> Tensor(a)")
    _LIBRARY.impl(_name, lambda x, device: x, "CompositeExplicitAutograd")


def test_ops_switch_streams_too_and_names_are_the_users() -> None:
    gm, ((begin, end, wait),), plain = moe()
    ops = torch.ops.auxstream_test_switches
    for node, op in ((begin, ops.into.default), (end, ops.back.default), (wait, ops.meet.default)):
        node.target, node.args = op, (*node.args, 0)
        node.meta["val"] = node.args[0].meta["val"]
    gm.recompile()
    assert adopt_switches(gm) == ()
    roles: dict[str, Any] = {"into": "begin", "auxstream_test_switches::back": "end", "meet": "wait"}
    (adoption,) = adopt_switches(gm, passthroughs=roles)
    assert adoption.adopted
    insert_regions(gm)
    replays_as(gm, plain)


def test_a_passthrough_may_pass_a_tuple_and_keywords() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x * 2, x + 1
            return (a.sin() + b.exp()) * x.cos()

    gm = trace(Two(), (X,)).graph_module
    plain, graph = copy_of(gm), gm.graph
    a, b, sin, exp, inner = (named(gm, name) for name in ("mul", "add", "sin", "exp", "add_1"))
    with graph.inserting_before(sin):
        begin = graph.call_function(BEGIN, ((a, [b]),), {"device": 0, "event_id": 3})
        first = graph.call_function(operator.getitem, (begin, 0))
        second = graph.call_function(operator.getitem, (graph.call_function(operator.getitem, (begin, 1)), 0))
    sin.replace_input_with(a, first)
    exp.replace_input_with(b, second)
    with graph.inserting_after(inner):
        end = graph.call_function(END, (), {"x": inner, "device": 0, "event_id": 3})
    named(gm, "mul_1").replace_input_with(inner, end)
    with graph.inserting_before(named(gm, "mul_1")):
        graph.call_function(WAIT, (named(gm, "cos"),), {"device": 0, "event_id": 3})
    gm.recompile()
    (adoption,) = adopt_switches(gm)
    assert adoption.adopted, adoption
    assert {node.name for node in adoption.nodes} == {"sin", "exp", "add_1"}
    insert_regions(gm)
    replays_as(gm, plain)


# --- refusals, each a graph that is adopted but for one thing -------------------------------------------------------


def test_a_missing_wait_is_refused() -> None:
    gm, ((_, _, wait),), _ = moe()
    wait.replace_all_uses_with(wait.args[0])
    gm.graph.erase_node(wait)
    gm.recompile()
    adoption = untouched(gm, "the caller's stream never waits for linear_4")
    assert str(adoption) == (
        "layers.0.aux: left as it is (5 nodes, linear_2 to linear_4), "
        "because the caller's stream never waits for linear_4"
    )


def test_a_result_read_before_the_wait_is_refused() -> None:
    gm, ((_, _, wait),), _ = moe()
    meet = next(iter(wait.users))
    meet.append(wait)
    meet.replace_input_with(wait, wait.args[0])
    gm.recompile()
    untouched(
        gm,
        f"{meet}, on the caller's stream, reads what linear_4 writes on the auxiliary stream, and no wait lies between",
    )


def test_a_view_read_before_the_wait_is_refused_and_one_only_made_is_not() -> None:
    def graph_of(reads: bool) -> GraphModule:
        class Viewed(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = x.sin()
                z = x.cos()
                return (y.t() if not reads else y.t().exp()) + z.t()

        gm = trace(Viewed(), (X,)).graph_module
        last = named(gm, "add")
        by_hand(gm, [named(gm, "sin")], wait_before=last)
        return gm

    assert [a.adopted for a in adopt_switches(graph_of(reads=False))] == [True]
    reason = "exp, on the caller's stream, reads what sin writes on the auxiliary stream, and no wait lies between"
    untouched(graph_of(reads=True), reason)


class Scratch(nn.Module):
    """The caller overwrites a buffer that the branch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(TOKENS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.kept
        z = x.cos()
        self.kept.mul_(2)
        return y + z


def test_memory_that_the_branch_reads_is_overwritten_before_the_wait() -> None:
    gm = trace(Scratch(), (X,)).graph_module
    by_hand(gm, [named(gm, "add")], wait_before=named(gm, "add_1"))
    untouched(
        gm,
        "mul_, on the caller's stream, overwrites what add reads on the auxiliary stream, and no wait lies between",
    )
    gm = trace(Scratch(), (X,)).graph_module
    plain = copy_of(gm)
    by_hand(gm, [named(gm, "add")], wait_before=named(gm, "mul_"))
    (adoption,) = adopt_switches(gm)
    assert adoption.adopted
    insert_regions(gm)
    replays_as(gm, plain)


def test_work_of_the_callers_between_begin_and_end_is_on_the_auxiliary_stream() -> None:
    """It stands between the switches, and the caller uses it without a wait."""

    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            z = x.cos()
            return y.exp() + z.tan()

    gm = trace(Mixed(), (X,)).graph_module
    by_hand(gm, [named(gm, "sin"), named(gm, "exp")])
    untouched(
        gm, "tan, on the caller's stream, reads what cos writes on the auxiliary stream, and no wait lies between"
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("nested", "{begin}_1 switches streams before {begin} has ended"),
        ("unclosed", "nothing ends {begin}"),
        ("another device", "{end} ends the auxiliary stream of device 1, and {begin} began the auxiliary stream"),
        ("wait inside", "{wait}_1 switches streams before {begin} has ended"),
    ],
)
def test_confused_switches_are_refused(damage: str, reason: str) -> None:
    gm, ((begin, end, _),), _ = moe()
    inside = end.args[0]
    with gm.graph.inserting_before(inside):
        if damage == "nested":
            gm.graph.call_function(BEGIN, (inside.args[0],))
            gm.graph.call_function(END, (inside.args[0],))
        elif damage == "wait inside":
            gm.graph.call_function(WAIT, (inside.args[0],))
    if damage == "unclosed":
        end.replace_all_uses_with(inside)
        gm.graph.erase_node(end)
    elif damage == "another device":
        end.kwargs = {"device": 1}
    gm.recompile()
    names = {"begin": BEGIN.__name__, "end": END.__name__, "wait": WAIT.__name__}
    assert begin.name == names["begin"]
    untouched(gm, reason.format(**names))


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        (END, "{0} ends what nothing began"),
        (WAIT, "{0} waits for an event nothing in the graph recorded"),
        (
            record_event_passthrough,
            "{0} records an event for ops that switch streams inside themselves, out of the graph's sight",
        ),
    ],
    ids=["end", "wait", "record"],
)
def test_a_switch_alone_is_reported_and_left(role: Callable[..., Any], reason: str) -> None:
    gm = trace(Model(Layer()), (X,)).graph_module
    node = named(gm, "linear_2")
    with gm.graph.inserting_after(node):
        alone = gm.graph.call_function(role, (node,))
    gm.recompile()
    adoption = untouched(gm, reason.format(alone.name))
    assert adoption.nodes == ()
    assert str(adoption).startswith(f"{alone.name}: left as it is (no work), because ")


def test_switches_around_nothing_go() -> None:
    gm, ((begin, end, _),), plain = moe()
    for node in list(gm.graph.nodes)[list(gm.graph.nodes).index(begin) + 1 : list(gm.graph.nodes).index(end)]:
        begin.prepend(node)
    source = begin.args[0]
    begin.replace_all_uses_with(source)
    gm.recompile()
    (adoption,) = adopt_switches(gm)
    assert adoption.adopted
    assert adoption.nodes == ()
    assert switches_in(gm) == []
    assert insert_regions(gm) == ()
    with torch.no_grad():
        assert torch.equal(gm(X), plain(X))


def test_what_is_proper_is_adopted_beside_what_is_not() -> None:
    gm, switches, plain = moe(3)
    wait = switches[1][2]
    meet = next(iter(wait.users))
    meet.append(wait)
    meet.replace_input_with(wait, wait.args[0])
    gm.recompile()
    found = adopt_switches(gm)
    assert [a.adopted for a in found] == [True, False, True]
    assert sorted(switches_in(gm)) == sorted(node.name for node in switches[1])
    insert_regions(gm)
    assert [n.args[0] for n in gm.graph.nodes if n.target is REGION_OPS[0]] == ["layers.0.aux", "layers.2.aux"]
    with torch.no_grad():
        assert torch.equal(gm(X), plain(X))


def two_pieces(second_reads_first: bool) -> GraphModule:
    """Two stretches on the auxiliary stream under one wait; what the second makes is read before it."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = x.sin()
            b = (a if second_reads_first else x).exp()
            c = b.tan()
            return a + x.cos() + c

    gm = trace(Two(), (X,)).graph_module
    sin, exp = named(gm, "sin"), named(gm, "exp")
    for node in (sin, exp):
        with gm.graph.inserting_before(node):
            gm.graph.call_function(BEGIN, (named(gm, "x"),))
        with gm.graph.inserting_after(node):
            gm.graph.call_function(END, (node,))
    with gm.graph.inserting_before(named(gm, "add")):
        gm.graph.call_function(WAIT, (sin,))
    gm.recompile()
    return gm


def test_a_wait_that_somebody_still_needs_stays() -> None:
    gm = two_pieces(second_reads_first=False)
    one, two = adopt_switches(gm)
    assert one.adopted
    assert two.reason.startswith("tan, on the caller's stream, reads what exp writes")
    assert switches_in(gm) == [f"{f.__name__}{'_1' * (f is not WAIT)}" for f in (BEGIN, END, WAIT)]


def test_work_that_feeds_refused_work_is_refused() -> None:
    gm = two_pieces(second_reads_first=True)
    because = "tan, on the caller's stream, reads what exp writes on the auxiliary stream, and no wait lies between"
    untouched(gm, f"it exchanges values with exp, which stays on its stream: {because}")


def test_an_op_without_a_schema_beside_the_branch() -> None:
    def opaque(x: Tensor) -> Tensor:
        return x * 2

    gm, ((_, _, wait),), _ = moe()
    routed = wait.args[0]
    with gm.graph.inserting_before(wait):
        node = gm.graph.call_function(opaque, (routed,))
        node.meta["val"] = routed.meta["val"]
    wait.args = (node,)
    gm.recompile()
    untouched(gm, "opaque may touch anything, having no schema, and nothing orders linear_2 and opaque")


# --- torch's stream ops ---------------------------------------------------------------------------------------------


class Side(nn.Module):
    """`sin` and `exp` are for a side stream; `cos` and `tan` run beside."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        y = h.sin().exp()
        return y + h.cos().tan()


Put = Callable[..., Node]
Ordered = Callable[[Put], None]


def annotated(
    *streams: tuple[str, int], put: Ordered, model: type[nn.Module] = Side
) -> tuple[GraphModule, GraphModule]:
    """A graph with nodes on numbered streams, and the ops that `put` puts: put(before, op, *numbers)."""
    gm = trace(model(), (X,)).graph_module
    plain = copy_of(gm)
    for name, stream in streams:
        named(gm, name).meta["custom"] = {"stream": stream, "kept": True}

    def place(before: str, op: str, *numbers: Any, **by_name: Any) -> Node:
        if not hasattr(STREAMS, op):
            pytest.skip(f"this torch has no streams::{op}")
        with gm.graph.inserting_before(named(gm, before)):
            return gm.graph.call_function(getattr(STREAMS, op).default, numbers, by_name)

    put(place)
    gm.recompile()
    return gm, plain


ON_SIDE = (("sin", 2), ("exp", 2))


def by_events(put: Put) -> None:
    put("sin", "record_event", 0, 0)
    put("sin", "wait_event", 0, 2)
    put("cos", "record_event", 1, 2)
    put("add", "wait_event", 1, 0)


def by_streams(put: Put) -> None:
    put("sin", "wait_stream", 2, 0)
    put("add", "wait_stream", 0, 2)


def with_deallocation(put: Put) -> None:
    """What Dynamo writes for `del h`: `h` is mentioned again once its own stream has waited for its reader."""
    put("sin", "wait_stream", 2, 0)
    h = put("sin", "record_stream", 0, 2).graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[0]
    record = next(node for node in h.graph.nodes if node.target is STREAMS.record_stream.default)
    record.args = (h, 2)
    put("add", "record_event", 5, 2)
    put("add", "sync_dealloc", wait_event_index=5, src_stream_index=0, to_dealloc=h)  # the order differs by version


def by_packets(put: Put) -> None:
    """Dynamo's own graphs hold overload packets."""
    for node in (put("sin", "wait_stream", 2, 0), put("add", "wait_stream", 0, 2)):
        node.target = STREAMS.wait_stream


@pytest.mark.parametrize("put", [by_events, by_streams, with_deallocation, by_packets])
def test_annotated_nodes_become_regions(put: Ordered) -> None:
    gm, plain = annotated(*ON_SIDE, put=put)
    (adoption,) = adopt_switches(gm)
    assert adoption.adopted, adoption
    assert adoption.form == "streams"
    assert [node.name for node in adoption.nodes] == ["sin", "exp"]
    assert switches_in(gm) == []
    assert all(node.meta["custom"] == {"kept": True} for node in adoption.nodes)
    (plan,) = insert_regions(gm)
    at = {node: index for index, node in enumerate(gm.graph.nodes)}
    assert at[plan.fork] < at[named(gm, "tan")] < at[plan.enter], "the caller's work first"
    replays_as(gm, plain)


@pytest.mark.parametrize("out", range(4))
def test_each_wait_and_record_is_needed(out: int) -> None:
    gm, _ = annotated(*ON_SIDE, put=by_events)
    gm.graph.erase_node(named(gm, switches_in(gm)[out]))
    gm.recompile()
    before = gm.code
    found = adopt_switches(gm)
    assert found
    assert not any(adoption.adopted for adoption in found)
    assert gm.code == before


def in_control_deps(gm: GraphModule) -> None:
    """Wrap the stream ops as AOTAutograd does: each hands on values that are used behind it."""
    streams = pytest.importorskip("torch._functorch._aot_autograd.streams")
    if not hasattr(streams, "wrap_all_sync_nodes_with_control_deps"):
        pytest.skip("this torch does not wrap stream ops")
    streams.wrap_all_sync_nodes_with_control_deps(gm)
    gm.graph.lint()


@pytest.mark.parametrize("put", [by_events, by_streams])
def test_wrapped_stream_ops_are_read_too(put: Ordered) -> None:
    gm, plain = annotated(*ON_SIDE, put=put)
    in_control_deps(gm)
    assert all("control_deps" in name for name in switches_in(gm)), "each op is wrapped"
    assert len(switches_in(gm)) == (4 if put is by_events else 2)
    (adoption,) = adopt_switches(gm)
    assert adoption.adopted, adoption
    assert [n.target for n in gm.graph.nodes] == [n.target for n in plain.graph.nodes]
    insert_regions(gm)
    replays_as(gm, plain)


def test_wrapped_ops_without_the_wait_are_refused() -> None:
    gm, _ = annotated(*ON_SIDE, put=lambda put: put("sin", "wait_stream", 2, 0))
    in_control_deps(gm)
    untouched(gm, "the caller's stream never waits for exp")


def test_fork_and_join_switch_the_current_stream() -> None:
    def put(put: Put) -> None:
        by_streams(put)
        put("sin", "fork", 0, 2)
        put("cos", "join", 2, 0)

    gm, plain = annotated(put=put)
    (adoption,) = adopt_switches(gm)
    assert adoption.adopted, adoption
    assert [node.name for node in adoption.nodes] == ["sin", "exp"]
    insert_regions(gm)
    replays_as(gm, plain)

    def unjoined(put: Put) -> None:
        by_streams(put)
        put("sin", "fork", 0, 2)

    gm, _ = annotated(put=unjoined)
    untouched(gm, "fork_default switches to a stream that is still current when the graph ends")


class Long(nn.Module):
    """Two stretches on one side stream, and one on another, which reads the first's."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        a = h.sin()
        b = a.exp()
        c = h.cos()
        d = (c + a).tan()
        return b + c + d


def test_several_streams_and_stretches() -> None:
    def put(put: Put) -> None:
        put("sin", "wait_stream", 2, 0)
        put("exp", "wait_stream", 3, 2)
        put("add", "wait_stream", 2, 0)
        put("add_1", "wait_stream", 0, 2)
        put("add_1", "wait_stream", 0, 3)

    gm, plain = annotated(("sin", 2), ("exp", 3), ("add", 2), ("tan", 2), put=put, model=Long)
    found = adopt_switches(gm)
    assert [[node.name for node in a.nodes] for a in found] == [["sin"], ["exp"], ["add", "tan"]]
    assert all(a.adopted for a in found), [str(a) for a in found]
    assert {plan.lane for plan in insert_regions(gm)} == {0, 1}
    replays_as(gm, plain)


def test_one_bad_stream_keeps_all_torch_ops_where_they_are() -> None:
    def put(put: Put) -> None:
        put("sin", "wait_stream", 2, 0)
        put("exp", "wait_stream", 3, 0)
        put("add", "wait_stream", 0, 2)
        put("add_1", "wait_stream", 0, 3)

    gm, _ = annotated(("sin", 2), ("exp", 3), put=put, model=Long)
    why = "exp, on stream 3, reads what sin writes on stream 2, and no wait lies between"
    untouched(gm, why)


def test_what_the_side_stream_reads_is_made_behind_its_fork() -> None:
    """The nodes lie in between each other: it is events that order, not the order of the lines."""

    def put(put: Put) -> None:
        put("mul", "wait_stream", 2, 0)
        put("add", "wait_stream", 0, 2)

    gm, _ = annotated(*ON_SIDE, put=put)
    untouched(gm, "sin, on stream 2, reads what mul writes on the caller's stream, and no wait lies between")


@pytest.mark.parametrize(
    ("op", "numbers", "reason"),
    [
        ("synchronize_event", (0,), "synchronize_event_default makes the host wait, which no capture allows"),
        ("synchronize_stream", (2,), "synchronize_stream_default makes the host wait, which no capture allows"),
        ("synchronize_device", ("cuda", 0), "synchronize_device_default makes the host wait, which no capture allows"),
        ("record_event", (9, 0), "record_event_default records an event for somebody outside of the graph"),
        ("wait_event", (9, 2), "wait_event_default waits for an event nothing in the graph recorded"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_ops_that_reach_outside_keep_everything_as_it_is(op: str, numbers: tuple[Any, ...], reason: str) -> None:
    def put(put: Put) -> None:
        by_streams(put)
        put("exp", op, *numbers)

    gm, _ = annotated(*ON_SIDE, put=put)
    untouched(gm, reason)


def test_stream_ops_around_no_work() -> None:
    gm, _ = annotated(put=lambda put: put("sin", "wait_stream", 2, 0))
    untouched(gm, "wait_stream_default orders no work that runs on another stream")


def test_annotations_without_any_order() -> None:
    gm, _ = annotated(*ON_SIDE, put=lambda put: None)
    untouched(gm, "the caller's stream never waits for exp")


def test_a_stretch_with_a_foreign_view_in_its_middle_stays() -> None:
    """The caller's view costs nothing and needs no wait, but a region is enqueued in one piece."""

    class Viewed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            return y.t().exp().t() + x.cos()

    gm, _ = annotated(*ON_SIDE, put=by_streams, model=Viewed)
    found = adopt_switches(gm)
    assert [a.reason.split(",")[0] for a in found] == ["it cannot run in one piece beside t (aten.t.default)"]
    assert len(switches_in(gm)) == 2
    gm, plain = annotated(*ON_SIDE, ("t", 2), put=by_streams, model=Viewed)
    assert [a.adopted for a in adopt_switches(gm)] == [True], "a view of the stretch's own is part of it"
    insert_regions(gm)
    replays_as(gm, plain)


def test_where_torchs_ops_stay_nothing_else_moves() -> None:
    gm, _ = annotated(*ON_SIDE, put=lambda put: put("sin", "wait_stream", 2, 0))
    by_hand(gm, [named(gm, "cos"), named(gm, "tan")])
    untouched(gm, "other stream ops stay in the graph: the caller's stream never waits for exp")
    gm, plain = annotated(*ON_SIDE, put=by_streams)
    by_hand(gm, [named(gm, "cos"), named(gm, "tan")])
    found = adopt_switches(gm)
    assert [(a.form, a.adopted) for a in found] == [("streams", True), ("passthrough", True)]
    insert_regions(gm)
    replays_as(gm, plain)


def test_which_stream_is_the_callers_where_torch_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo.graph_bytecode_inputs as registry

    monkeypatch.delattr(registry, "CURRENT_STREAM_INDEX", raising=False)

    def put(put: Put, caller: int = 7) -> None:
        put("sin", "wait_stream", 2, caller)
        put("add", "wait_stream", 7, 2)

    gm, _ = annotated(*ON_SIDE, put=put)
    assert [a.adopted for a in adopt_switches(gm)] == [True], "7 is all that is left over"
    gm, _ = annotated(*ON_SIDE, put=lambda op: put(op, caller=8))
    untouched(gm, "the caller's stream never waits for exp")

    def forked(put: Put) -> None:
        put("sin", "wait_stream", 2, 4)
        put("sin", "fork", 4, 2)
        put("cos", "join", 2, 4)
        put("add", "wait_stream", 4, 2)

    gm, _ = annotated(put=forked)
    assert [a.adopted for a in adopt_switches(gm)] == [True]


def test_a_recorded_value_is_not_exposed() -> None:
    def exposed(*puts: Ordered) -> tuple[str, ...]:
        gm, _ = annotated(*ON_SIDE, put=lambda put: [each(put) for each in puts] and None)
        (adoption,) = adopt_switches(gm)
        assert adoption.adopted
        return adoption.exposed

    assert exposed(by_streams) == ("mul",)
    assert exposed(with_deallocation) == ()


# --- ops that are a whole mixture of experts ------------------------------------------------------------------------


def expert_op(name: str) -> Any:
    """An op of that name: experts found by a layer's number, as vLLM finds them by name, and no weights to see."""

    @torch.library.custom_op(name, mutates_args=())
    def op(x: Tensor, logits: Tensor, layer: int) -> Tensor:
        up, down = torch.ones(EXPERTS, HIDDEN, INNER), torch.ones(EXPERTS, INNER, HIDDEN)
        return routed_sum(x, *logits.softmax(-1).topk(2), up, down)

    @op.register_fake
    def _(x: Tensor, logits: Tensor, layer: int) -> Tensor:
        return torch.empty_like(x)

    return op


EXPERT_OPS = {
    name: expert_op(name)
    for name in (
        "vllm::moe_forward_alike",
        "auto_deploy::alike_moe_fused",
        "other::mixture",
        "auto_deploy::moe_router_a",
    )
}


class Hidden(Routed):
    """Experts behind an op that shows no weights."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.router(x), 3)


@pytest.mark.parametrize(
    ("name", "globs", "found"),
    [
        ("vllm::moe_forward_alike", (), True),
        ("auto_deploy::alike_moe_fused", (), True),
        ("other::mixture", (), False),
        ("other::mixture", ("other::mix*",), True),
        ("auto_deploy::moe_router_a", (), False),
    ],
)
def test_ops_known_as_experts_are_the_routed_side(name: str, globs: tuple[str, ...], found: bool) -> None:
    layer = Layer(pre_norm=True)
    layer.routed = Hidden(EXPERT_OPS[name])
    gm = trace(Model(layer), (X,)).graph_module
    plain = copy_of(gm)
    assert adopt_switches(gm, experts=globs) == (), "there is nothing to adopt"
    regions = mark_multi_stream_moe_shared_experts(gm)
    assert [region.name for region in regions] == ["layers.0.shared"] * found
    for region in regions:
        assert any(str(node.target).startswith(name.replace("::", ".")) for node in region.routed)
    insert_regions(gm)
    replays_as(gm, plain, replays=2)


# --- lifetime -------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """The branch reads a value that nothing else reads, and the caller allocates beside it."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        y = (h + 1).sin().exp()
        return y + x.cos().tan().neg()


def test_the_original_lifetime_is_not_proved_and_the_regions_is() -> None:
    gm = trace(Normed(), (X,)).graph_module
    plain = copy_of(gm)
    by_hand(gm, [named(gm, name) for name in ("sin", "exp")])
    g, _ = captured(gm, X.clone(), verify="off")
    report = verify(g.program)
    assert not report.ok, "the block of h + 1 is free as soon as the branch is enqueued"
    (adoption,) = adopt_switches(gm)
    assert adoption.adopted
    assert adoption.exposed == ("add",)
    assert str(adoption).endswith("; until now nothing kept add alive for its readers")
    unsafe = copy_of(gm)
    insert_regions(gm)
    assert replays_as(gm, plain).report.ok
    insert_regions(unsafe, order="aux_first", unsafe_no_lifetime=True)
    g, _ = captured(unsafe, X.clone(), verify="off")
    assert not verify(g.program).ok


def test_a_value_the_caller_still_holds_is_not_exposed() -> None:
    class Held(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 2 + 1
            return h.sin().exp() + h.cos().tan()

    gm = trace(Held(), (X,)).graph_module
    by_hand(gm, [named(gm, name) for name in ("sin", "exp")])
    for node in ("cos", "tan"):
        assert named(gm, node)
    (adoption,) = adopt_switches(gm)
    assert adoption.exposed == ("add",), "free behind cos, and tan asks for memory before the wait"

    class Longer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 2 + 1
            return h.sin().exp() + h.cos()

    gm = trace(Longer(), (X,)).graph_module
    by_hand(gm, [named(gm, name) for name in ("sin", "exp")])
    (adoption,) = adopt_switches(gm)
    assert adoption.adopted
    assert adoption.exposed == ()


# --- any switches over any program: the proof over the recording of the original decides -----------------------------


class WholeTensors(nn.Module):
    """A random straight line over whole tensors, in place and not: two accesses of one storage meet in every byte."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("kept", torch.arange(16.0).reshape(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rng = random.Random(self.seed)
        pool = [self.kept, x.clone()]
        moves: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda s, t: s + t,
            lambda s, t: s.sin(),
            lambda s, t: s.t(),
            lambda s, t: s.mul_(t.cos()),
            lambda s, t: torch.where(s > t, s, t),
        ]
        for _ in range(9):
            pool.append(rng.choice(moves)(rng.choice(pool), rng.choice(pool)))
        return tuple(value.clone() for value in pool[-3:])


def sprinkle(gm: GraphModule, draw: random.Random) -> None:
    """Once or twice begin, end and wait, at any places in order."""
    ops = [node for node in gm.graph.nodes if node.op == "call_function"]
    places = sorted(draw.choices(range(len(ops)), k=3 * draw.randint(1, 2)))
    source = next(iter(gm.graph.nodes))
    for at, place in enumerate(places):
        with gm.graph.inserting_before(ops[place]):
            gm.graph.call_function((BEGIN, END, WAIT)[at % 3], (source,))
    gm.recompile()


@pytest.mark.parametrize("program", [WholeTensors, RandomProgram])
@pytest.mark.parametrize("block", range(4))
def test_adopted_only_if_the_original_is_ordered(block: int, program: Callable[[int], nn.Module]) -> None:
    """The original runs with every value kept, so that order alone counts; the proof over it is the judge.

    Of accesses to parts of a storage the dataflow does not know whether they meet, so there it may refuse more.
    """
    adopted = refused = 0
    for seed in range(20 * block, 20 * block + 20):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        x = torch.randn(4, 4)
        gm = trace(program(seed), (x,)).graph_module
        plain = copy_of(gm)
        sprinkle(gm, draw)
        g, _ = captured(Interpreter(copy_of(gm), garbage_collect_values=False).run, x.clone(), verify="off")
        ordered = verify(g.program).ok
        found = adopt_switches(gm)
        taken = all(adoption.adopted for adoption in found)
        assert taken <= ordered, f"seed {seed}: {verify(g.program)}"
        if program is WholeTensors:
            assert taken == ordered, f"seed {seed}: {', '.join(map(str, found))}"
        adopted, refused = adopted + taken, refused + (not taken)
        if taken:
            insert_regions(gm)
            replays_as(gm, plain, x, replays=3)
    assert adopted > 1
    assert refused > 1


# --- graphs that torch itself wrote ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_stream_context_that_dynamo_traced() -> None:
    """`with torch.cuda.stream(side)` under torch.compile: adopted where torch numbers the caller's stream."""
    import torch._dynamo.graph_bytecode_inputs as registry
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    side, forked, done = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()

    def model(x: Tensor) -> Tensor:
        h = x * 2
        forked.record()
        forked.wait(side)
        with torch.cuda.stream(side):
            y = h.sin().exp()
            done.record(side)
        z = h.cos().tan()
        done.wait()
        return y + z

    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(copy_of(gm))
        return make_boxed_func(lambda *given: (given[0],))  # what torch 2.11 wrote it cannot run itself

    x = torch.randn(64, 64, device="cuda")
    with torch.no_grad():
        torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x)
    (gm,) = graphs
    found = adopt_switches(gm)
    assert [str(a) for a in found]
    if hasattr(registry, "CURRENT_STREAM_INDEX"):
        assert [a.adopted for a in found] == [True], [str(a) for a in found]
        insert_regions(gm)
        with torch.no_grad(), auxstream.graph() as g:
            (out,) = gm(x)
        x.normal_()
        g.replay()
        assert torch.equal(out, x.mul(2).sin().exp() + x.mul(2).cos().tan())
