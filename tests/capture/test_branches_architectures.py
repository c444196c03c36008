"""The branches of real architectures are those written down, they are found by order alone, and each can run beside."""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

import auxstream
from auxstream.capture.branches import BranchPair, find_branches
from auxstream.capture.mark import MarkedRegion, mark_multi_stream_moe_shared_experts
from auxstream.capture.schedule import insert_regions

pytest.importorskip("transformers")
from architectures import ARCHITECTURES, BATCH, Matrices, copied, expected, traced

from auxstream.capture.huggingface import DecodeStep

POSITIONS = [torch.tensor([i, i + 2]) for i in range(2)]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def described_pairs(gm: GraphModule) -> Iterator[tuple[str, BranchPair]]:
    matrices = Matrices(gm)
    for pair in find_branches(gm):
        if (text := matrices.described(pair.sides)) is not None:
            yield text, pair


def found(gm: GraphModule) -> list[str]:
    return sorted(text for text, _ in described_pairs(gm))


@functools.cache
def pairs_of(name: str) -> tuple[tuple[str, BranchPair], ...]:
    """Of the graph that nobody changes."""
    return tuple(described_pairs(traced(name)[1]))


@every_architecture
def test_the_pairs_are_those_written_down(name: str) -> None:
    gm = traced(name)[1]
    assert found(gm) == expected(ARCHITECTURES[name].pairs)


def test_a_table_with_a_pair_too_few_or_another_side_does_not_match() -> None:
    gm, lines = traced("gemma4")[1], ARCHITECTURES["gemma4"].pairs.strip().splitlines()
    assert found(gm) != expected("\n".join(lines[:-1]))
    assert found(gm) != expected("\n".join([*lines[:-1], lines[-1].replace("router", "router + experts")]))


@every_architecture
def test_what_crosses_a_border_and_what_a_side_costs(name: str) -> None:
    """Against the graph itself: neighbours and schemas, and the weights of its linear layers."""
    gm = traced(name)[1]
    for pair in find_branches(gm):
        for branch in pair.branches:
            inside = set(branch.nodes)
            arguments = {a for node in inside for a in node.all_input_nodes} - inside
            assert set(branch.live_ins) == {a for a in arguments if not lasts(a)}
            assert list(branch.live_outs) == [node for node in branch.nodes if set(node.users) - inside]
            assert set(branch.writes) == {a for a in arguments if is_written(a, inside)}
            linear = [node.args[1] for node in inside if node.target is torch.ops.aten.linear.default]
            weights = [w for w in linear if isinstance(w, Node) and w.op == "get_attr"]
            rows = BATCH if branch.flops else 0
            assert branch.flops >= sum(2 * rows * w.meta["val"].numel() for w in weights)
            assert branch.bytes >= sum(w.meta["val"].nbytes for w in weights)
            assert branch.bytes > 0


def lasts(node: Node, *, made_of: bool = False) -> bool:
    """A parameter or a buffer, or made of literals and of those that the step does not write."""
    if node.op == "get_attr":
        return not (made_of and str(node.target).startswith(("keys_", "values_", "conv_", "recurrent_")))
    return node.op == "call_function" and all(lasts(a, made_of=True) for a in node.all_input_nodes)


def is_written(node: Node, by: set[Node]) -> bool:
    """Whether a node of `by` writes `node` in place, or a view of it that is made among them."""
    for user in set(node.users) & by:
        target, info = user.target, None
        if isinstance(target, OpOverload) and user.args[:1] == (node,):
            info = target._schema.arguments[0].alias_info
        if (info is not None and info.is_write) or (
            (info is not None or target is operator.getitem) and is_written(user, by)
        ):
            return True
    return False


# --- negative controls: an edge between the sides, and the pair is gone -----------------------------------------------


Sides = Sequence[Sequence[Node]]


def ends(matrices: Matrices, sides: Sides) -> tuple[Node, Node]:
    """The first product of the two sides, and the last one of the other side: an edge can be laid between them."""
    order = {node: i for i, node in enumerate(sides[0][0].graph.nodes)}
    products = [[node for node in side if matrices.of((node,))] for side in sides]
    early, late = sorted(products, key=lambda nodes: order[nodes[0]])
    return early[0], late[-1]


def planted(original: GraphModule, pair: BranchPair, how: str) -> GraphModule:
    """A copy in which a product of one side waits for one of the other side: through a value, or through memory that
    one writes."""
    gm = copied(original)
    named = {node.name: node for node in gm.graph.nodes}
    matrices = Matrices(gm)
    early, late = ends(matrices, [[named[node.name] for node in side] for side in pair.sides])
    graph = gm.graph
    argument = next(a for a in late.all_input_nodes if not matrices.of((a,)) and a.op != "get_attr")
    value: Tensor = argument.meta["val"]

    def call(op: OpOverload, *args: Node, val: Tensor) -> Node:
        node = graph.call_function(op, args)
        node.meta["val"] = val
        return node

    def memory(name: str) -> Node:
        gm.register_buffer(name, torch.zeros(()))
        node = graph.get_attr(name)
        node.meta["val"] = value.new_zeros(())
        return node

    with graph.inserting_after(early):
        signal = call(torch.ops.aten.sum.default, early, val=value.new_zeros(()))
    if how != "dependency":
        with graph.inserting_before(next(iter(graph.nodes))):
            written, read = memory("planted"), memory("other")
        with graph.inserting_after(signal):
            call(torch.ops.aten.copy_.default, written, signal, val=written.meta["val"])
        signal = written if how == "mutation" else read
    with graph.inserting_before(late):
        late.replace_input_with(argument, call(torch.ops.aten.add.Tensor, argument, signal, val=value))
    graph.lint()
    return gm


@every_architecture
@pytest.mark.parametrize("how", ["dependency", "mutation"])
def test_an_edge_between_the_sides_removes_the_pair(name: str, how: str) -> None:
    lines = Counter(text for text, _ in pairs_of(name))
    for text, pair in pairs_of(name):
        left = Counter(found(planted(traced(name)[1], pair, how)))
        assert left[text] == lines[text] - 1, f"{text}: still there in spite of a {how}"


@every_architecture
def test_a_write_that_the_other_side_does_not_read_removes_nothing(name: str) -> None:
    """The twin: the same nodes, over another buffer."""
    lines = sorted(text for text, _ in pairs_of(name))
    for _, pair in pairs_of(name):
        assert found(planted(traced(name)[1], pair, "elsewhere")) == lines


# --- the marker -------------------------------------------------------------------------------------------------------


@every_architecture
def test_the_marker_finds_the_shared_experts_of_the_table_and_nothing_else(name: str) -> None:
    architecture, gm = ARCHITECTURES[name], copied(traced(name)[1])
    regions = mark_multi_stream_moe_shared_experts(gm)
    assert [region.name for region in regions] == [f"layers.{layer}.shared" for layer in architecture.shared]
    lines, matrices = set(expected(architecture.pairs)), Matrices(gm)
    for region, layer in zip(regions, architecture.shared, strict=True):
        text = matrices.described((region.nodes, region.routed))
        assert text in lines
        assert f"layers.{layer}" in str(text)
        assert "shared" in str(matrices.described((region.nodes, region.nodes))) or name == "gemma4"
    marked = {node for node in gm.graph.nodes if "auxstream" in node.meta or "skip_mlir_fusion" in node.meta}
    assert marked == {node for region in regions for node in region.nodes}


# --- each of them beside the rest, on the simulated machine -----------------------------------------------------------


def steps(step: DecodeStep, call: torch.nn.Module) -> list[Tensor]:
    """Logits of a few steps from empty caches, and the state they leave."""
    step.reset()
    results = [call(tokens(number), position).clone() for number, position in enumerate(POSITIONS)]
    return results + [state.clone() for layer in step.caches() for state in layer.values()]


def replays(step: DecodeStep, gm: GraphModule) -> list[Tensor]:
    """The same, replayed in orders chosen to go wrong."""
    given, position = tokens(0), POSITIONS[0].clone()
    with auxstream.graph("step", device="cpu") as graph:
        logits = gm(given, position)
    assert graph.report.ok, graph.report

    class Replay(torch.nn.Module):
        def forward(self, now: Tensor, at: Tensor) -> Tensor:
            given.copy_(now)
            position.copy_(at)
            graph.replay()
            return logits

    return steps(step, Replay())


def tokens(number: int) -> Tensor:
    return torch.randint(0, 128, (BATCH, 1), generator=torch.Generator().manual_seed(number))


@every_architecture
def test_marked_steps_replay_to_eager_values(name: str) -> None:
    step, gm = traced(name)[0], copied(traced(name)[1])
    mark_multi_stream_moe_shared_experts(gm)
    plans = insert_regions(gm)
    assert [plan.name for plan in plans] == [f"layers.{layer}.shared" for layer in ARCHITECTURES[name].shared]
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(replays(step, gm), steps(step, step), strict=True))


def batches(sides: list[tuple[Node, ...]]) -> list[list[tuple[Node, ...]]]:
    """Sides that share no node can be regions of one graph."""
    found: list[list[tuple[Node, ...]]] = []
    for side in sides:
        free = (batch for batch in found if not any(set(side) & set(other) for other in batch))
        if (batch := next(free, None)) is not None:
            batch.append(side)
        else:
            found.append([side])
    return found


@every_architecture
def test_a_side_of_every_pair_can_run_beside_the_rest(name: str) -> None:
    step, original = traced(name)
    with torch.no_grad():
        eager = steps(step, step)
        pairs = [pair for _, pair in pairs_of(name)]
        sides = [pair.sides[side] for pair, side in zip(pairs, itertools.cycle((0, 1)), strict=False)]
        for batch in batches(sides):
            gm = copied(original)
            named = {node.name: node for node in gm.graph.nodes}
            nodes = [tuple(named[node.name] for node in side) for side in batch]
            plans = insert_regions(gm, [MarkedRegion(f"aux.{i}", side, (), side[-1]) for i, side in enumerate(nodes)])
            assert len(plans) == len(batch)
            assert all(torch.equal(a, b) for a, b in zip(replays(step, gm), eager, strict=True))
    assert pairs
