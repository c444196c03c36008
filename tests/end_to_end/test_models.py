"""Every architecture on one stream and on several, bit for bit; and what the benchmarks of whole models count with."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from auxstream.bench import costliest, equality, memory
from auxstream.bench.architectures import MODELS
from auxstream.bench.equality import BATCHES, CONTEXT, FAULTS, check, check_controls, prompted
from auxstream.bench.lab import Lab, Row, Variant, compare, repeatable_attention
from auxstream.bench.layouts import Layout, layouts
from auxstream.bench.prompts import LENGTHS
from auxstream.capture.branches import find_branches
from auxstream.capture.evidence import Evidence, Node
from auxstream.capture.huggingface import DecodeStep
from auxstream.capture.program import Buffer, TensorRef
from auxstream.capture.schedule import insert_regions
from auxstream.capture.trace import TracedGraph, trace
from auxstream.runtime.errors import AuxstreamError

REPLAYS = 100
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def repeatable() -> Generator[None]:
    with repeatable_attention():
        yield


def traced(name: str, batch: int) -> TracedGraph:
    step = DecodeStep(MODELS[name].build(), batch, CONTEXT)
    return trace(step, (torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)))


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_the_same_bits_on_several_streams(name: str, batch: int) -> None:
    same(check(name, batch, REPLAYS, torch.device("cuda")))


@pytest.mark.parametrize(("name", "batch"), [("gemma4", 3), ("deepseek_v3", 1)])
def test_two_architectures_have_the_same_bits_on_the_simulated_machine(name: str, batch: int) -> None:
    same(check(name, batch, 4, CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma4", "deepseek_v3", "qwen2_moe", "glm4_moe"])
def test_prompts_of_every_length_have_the_same_bits_on_several_streams(name: str) -> None:
    (case,) = prompted(name, 50, torch.device("cuda"))
    assert case.row.passed, case


def test_prompts_have_the_same_bits_on_the_simulated_machine() -> None:
    (case,) = prompted("afmoe", 5, CPU)
    assert case.row.passed, case
    assert case.row.runs == len(LENGTHS)
    assert prompted("qwen3_next", 5, CPU) == []


def same(cases: list[equality.Case]) -> None:
    assert all(case.row.passed and case.row.checker == "no race" for case in cases), "\n".join(map(str, cases))
    assert cases[0].regions == 0
    assert sum(case.regions for case in cases) > 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_without_a_wait_bits_differ(device: str) -> None:
    controls = check_controls("gemma4", 1, 4, torch.device(device))
    assert [case.row.control for case in controls] == list(FAULTS)
    for case in controls:
        assert case.row.passed, case
        assert case.row.equal < case.row.runs / 2
        assert case.row.differing


class Steps:
    """What a comparison compares, without a model."""

    def __init__(self, *, wrong_at: int | None = None, wrong_cache: int | None = None, value: float = 1.0) -> None:
        self.turn, self.wrong_at, self.wrong_cache, self.value = -1, wrong_at, wrong_cache, value
        self.cache = torch.zeros(4)
        self.variant = Variant(Row("graph", "aux"), self.run, [self.cache], 3)

    def run(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        self.cache[0] += 1
        if self.turn == self.wrong_cache:
            self.cache[3] = -0.0  # equal to the right value, and other bits
        return torch.full((1, 2), self.value + (self.turn == self.wrong_at))


def compared(reference: Steps, steps: Steps) -> Row:
    gm = TracedGraph(torch.fx.symbolic_trace(torch.nn.Identity()), (), ("cache",), ())
    ids, position = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    compare(Lab(gm, ids, position, vocabulary=8, context=8), reference.variant, [steps.variant], 0)
    return steps.variant.row


def test_a_replay_that_differs_counts_once_and_says_in_what() -> None:
    assert compared(Steps(), Steps()).equal == 3
    row = compared(Steps(), Steps(wrong_at=1))
    assert (row.equal, row.runs, row.differing) == (2, 3, ["replay 1: logits"])
    row = compared(Steps(), Steps(wrong_cache=0))
    assert (row.equal, row.runs, row.differing) == (2, 3, ["replay 0: cache"])


def test_bits_of_what_is_no_number_are_not_compared() -> None:
    with pytest.raises(AuxstreamError, match="infinities or NaN"):
        compared(Steps(value=float("nan")), Steps(value=float("nan")))


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_among_the_layouts_a_side_of_every_pair_is_on_a_lane() -> None:
    gm = traced("cohere", 2).graph_module  # whose attention runs beside its MLP, and has branches of its own
    found = layouts(gm)
    assert len(found) > 1
    regions = [region for layout in found for region in layout.regions.values()]
    pairs = [pair for pair in find_branches(gm) if all(branch.flops for branch in pair.branches)]
    assert pairs
    for pair in pairs:
        assert any({node.name for node in side} <= region for side in pair.sides for region in regions)
    for layout in found:
        plans = insert_regions(layout.marked(gm))
        assert {plan.name for plan in plans} == set(layout.regions)
        assert sum(map(len, layout.regions.values())) == len(frozenset().union(*layout.regions.values()))


def test_a_layout_refuses_what_cannot_run_beside() -> None:
    gm = traced("mixtral", 1).graph_module
    nodes = [node.name for node in gm.graph.nodes if node.op == "call_function"]
    layout = Layout()
    assert not layout.takes(gm, "torn", frozenset((nodes[0], nodes[-1])))
    assert layout.regions == {}


# --- memory -----------------------------------------------------------------------------------------------------------


def test_holding_needs_no_more_memory_than_events_alone_and_recording_does(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--size", "tiny", "--layers", "4", "--tokens", "32", "--quick"]
    results = memory.main(arguments)
    assert results[memory.PASSED]
    (rows,) = (rows for where, rows in results.items() if where != memory.PASSED)
    reserved = {name: row["reserved"] for name, row in rows.items()}
    assert reserved[memory.ONE] < reserved[memory.AUTO] == reserved[memory.EVENTS] < reserved[memory.RECORD]
    assert "passes" in capsys.readouterr().out


@pytest.mark.parametrize(("auto", "proved"), [(101, True), (100, False)])
def test_more_memory_or_no_proof_does_not_pass(auto: int, proved: bool) -> None:
    rows = {memory.EVENTS: {"reserved": 100}, memory.AUTO: {"reserved": auto, "proved": proved, "report": ""}}
    assert not memory.judged({"here": rows})
    rows[memory.AUTO] |= {"reserved": 100, "proved": True}
    assert memory.judged({"here": rows})


# --- bytes of kernels -------------------------------------------------------------------------------------------------


def ref(buffer: int, *size: int, dtype: torch.dtype = torch.bfloat16) -> TensorRef:
    return TensorRef(buffer, 0, size, torch.empty(size, device="meta").stride(), dtype)


def test_bytes_of_kernels() -> None:
    experts, rows, ends, out = ref(0, 16, 8, 4), ref(1, 3, 4), ref(2, 16, dtype=torch.int32), ref(3, 3, 8)
    buffers = (Buffer(0, 1024, None, "weights"), *(Buffer(4096 * n, 64, 1, "made") for n in (1, 2, 3)))
    both = ((out, True), (experts, False), (rows, False), (ends, False))
    nodes: list[Any] = [
        Node("grouped", "caller", touches=both[:-1], kernel="prepare"),
        Node("grouped", "caller", touches=both, kernel="multiply"),
        *(Node("add", "caller", touches=((out, True), (rows, False)), kernel="add") for _ in range(2)),
    ]
    evidence = Evidence(tuple(nodes), (), buffers, (), ())
    found = costliest.bytes_by_kernel(evidence, {"prepare": (1, 1.0), "multiply": (1, 9.0), "add": (2, 4.0)})
    slices = 3 * 8 * 4 * 2  # of three rows, each may go to an expert of its own
    product = slices + 24 + 64 + 48
    assert found == {"prepare": round(product / 10), "multiply": round(product * 9 / 10), "add": 2 * (48 + 24)}


def test_names_of_kernels_are_readable() -> None:
    assert costliest.readable("_Z3addIfEvPT_") == "void add<float>(float*)"
    assert costliest.readable("nvjet_tst_64x8") == "nvjet_tst_64x8"
