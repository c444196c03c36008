"""Modes: decode and prefill of one model, each captured as its mode says, in one pool, by whichever call comes.

Bits are compared with `full` graphs of the same sizes; the model itself, which does not pad, agrees to rounding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_blocks import Paged, Stack
from torch import Tensor, nn

import auxstream
from auxstream.capture.buckets import BucketedModel
from auxstream.capture.compiled import CompiledModel
from auxstream.capture.graphs import CapturedGraph, SimulatedGraph
from auxstream.capture.options import MODES, Options
from auxstream.capture.phases import PhasedModel
from auxstream.capture.pieces import PiecewiseGraph
from auxstream.capture.uncaptured import UncapturedGraph
from auxstream.runtime.errors import CaptureError, InputError, SettingsError

HIDDEN, WORDS, BATCH, CONTEXT = 8, 11, 4, 10
TWO_PHASES = [mode for mode in MODES if mode not in ("none",)]
LENGTHS = (1, 2, 3, 4, 5, 8)


class Serving(nn.Module):
    """One layer of attention over a cache of BATCH rows and CONTEXT positions, the last of which nobody sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.mlp, self.head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, WORDS)
        self.register_buffer("keys", torch.zeros(BATCH, CONTEXT, HIDDEN))
        self.register_buffer("values", torch.zeros(BATCH, CONTEXT, HIDDEN))

    def forward(
        self, input_ids: Tensor, position: Tensor, slot: Tensor | None = None, last: Tensor | None = None
    ) -> Tensor:
        """Decode: ids [B, 1], a position each. Prefill: ids [1, T], a position each, the row, the token that counts."""
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = torch.arange(CONTEXT, device=position.device)[None] <= position[:, None]
        if slot is None:
            count = input_ids.shape[0]
            rows = torch.arange(count, device=position.device)
            self.keys[rows, position], self.values[rows, position] = k[:, 0], v[:, 0]
            keys, values, mask = self.keys[:count], self.values[:count], seen[:, None, None]
        else:
            self.keys[slot, position], self.values[slot, position] = k[0], v[0]
            keys, values, mask = self.keys[slot], self.values[slot], seen[None, None]
        out = nn.functional.scaled_dot_product_attention(q[:, None], keys[:, None], values[:, None], attn_mask=mask)
        x = x + out[:, 0]
        x = x + self.mlp(x).tanh()
        return self.head(x[:, -1] if last is None else x[0].index_select(0, last))


class Prefill(nn.Module):
    """The prefill phase as a module of its own, over the weights and caches of the other."""

    def __init__(self, step: Serving) -> None:
        super().__init__()
        self.step = step

    def forward(self, input_ids: Tensor, position: Tensor, slot: Tensor, last: Tensor) -> Tensor:
        return self.step(input_ids, position, slot, last)


def prompt(length: int, slot: int = 0, start: int = 0) -> tuple[Tensor, ...]:
    ids = torch.randint(WORDS, (1, length))
    return ids, torch.arange(start, start + length), torch.tensor([slot]), torch.tensor([length - 1])


def tokens(rows: int, position: int) -> tuple[Tensor, ...]:
    return torch.randint(WORDS, (rows, 1)), torch.arange(rows) % 2 + position


def options(mode: Any, **more: Any) -> Options:
    return Options(
        mode=mode,
        buckets=(1, 2, BATCH),
        prefill_buckets=(2, 4, 8),
        pad={"position": CONTEXT - 1},
        mlir_elementwise_fusion=False,
        **more,
    )


def serving(mode: Any, *, apart: bool = False, **more: Any) -> tuple[Serving, PhasedModel]:
    torch.manual_seed(0)
    model = Serving()
    example = torch.arange(BATCH)[:, None], torch.arange(BATCH)
    given: Any = (torch.arange(8)[None], torch.arange(8), torch.tensor([1]), torch.tensor([0]))
    prefill = (Prefill(model), given) if apart else given
    fast = auxstream.compile(model, example, options(mode, **more), prefill=prefill, name="serving")
    assert isinstance(fast, PhasedModel)
    return model, fast


def steps() -> Iterator[tuple[Tensor, ...]]:
    """Prompts at and off bucket edges, each followed by a few tokens."""
    torch.manual_seed(1)
    for turn, length in enumerate(LENGTHS):
        yield prompt(length, slot=turn % BATCH)
        for rows in (1 + turn % BATCH, BATCH, 1):
            yield tokens(rows, length % (CONTEXT - 3))
    yield prompt(3, slot=2, start=4)


@functools.cache
def shared(mode: Any) -> tuple[Serving, PhasedModel]:
    """For tests that leave it as it is, but for its caches."""
    return serving(mode)


@functools.cache
def found(mode: Any) -> list[Tensor]:
    """Outputs of all steps, and the caches at last, but for the position that nobody sees."""
    model, fast = shared(mode)
    model.keys.zero_()
    model.values.zero_()
    outputs = [fast(*step).clone() for step in steps()]
    return [*outputs, model.keys[:, :-1].clone(), model.values[:, :-1].clone()]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["piecewise", "full_and_piecewise"])
def test_pieces_give_the_bits_of_whole_graphs(mode: Any) -> None:
    for step, (mine, whole) in enumerate(zip(found(mode), found("full"), strict=True)):
        assert torch.equal(mine, whole), f"step {step}"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_computes_the_model(mode: Any) -> None:
    torch.manual_seed(0)
    reference = Serving()
    with torch.no_grad():
        expected = [reference(*step).clone() for step in steps()]
    expected += [reference.keys[:, :-1], reference.values[:, :-1]]
    for mine, right in zip(found(mode), expected, strict=True):
        torch.testing.assert_close(mine, right)


def test_phases_may_be_modules_of_their_own() -> None:
    model, fast = serving("full_and_piecewise", apart=True)
    outputs = [fast(*step).clone() for step in steps()]
    assert all(torch.equal(a, b) for a, b in zip(outputs, found("full"), strict=False))
    fast.check()
    model.head.weight = nn.Parameter(torch.zeros(WORDS, HIDDEN))
    with pytest.raises(CaptureError, match="replaced since the capture"):
        fast(*tokens(2, 0))


# --- what is captured how ---------------------------------------------------------------------------------------------


def kind(graph: CapturedGraph) -> str:
    if isinstance(graph, PiecewiseGraph):
        return "pieces"
    return "none" if isinstance(graph, UncapturedGraph) else "whole"


@pytest.mark.parametrize(
    ("mode", "decode", "prefill"),
    [
        ("none", "none", "none"),
        ("piecewise", "pieces", "pieces"),
        ("full", "whole", "whole"),
        ("full_and_piecewise", "whole", "pieces"),
        ("full_decode_only", "whole", None),
    ],
)
def test_each_phase_is_captured_as_its_mode_says(mode: Any, decode: str, prefill: str | None) -> None:
    _, fast = shared(mode)
    assert isinstance(fast.decode, BucketedModel)
    assert {kind(graph) for graph in fast.decode.graphs} == {decode}
    assert list(fast.decode.buckets) == [1, 2, BATCH]
    if prefill is None:
        assert fast.prefill is None
    else:
        assert isinstance(fast.prefill, BucketedModel)
        assert {kind(graph) for graph in fast.prefill.graphs} == {prefill}
        assert list(fast.prefill.buckets) == [2, 4, 8]
    assert len(fast.graphs) == 3 if prefill is None else 6


def test_the_model_itself_runs_prefill_in_full_decode_only() -> None:
    model, fast = shared("full_decode_only")
    ran: list[int] = []
    hook = model.register_forward_hook(lambda *_: ran.append(1))
    try:
        out = fast(*prompt(7))
        assert len(ran) == 1
        assert not out.requires_grad
        fast(*tokens(3, 7))
        assert len(ran) == 1
    finally:
        hook.remove()


def test_attention_alone_runs_eagerly_in_pieces() -> None:
    _, fast = shared("full_and_piecewise")
    assert fast.prefill is not None
    for graph in fast.prefill.graphs:
        assert isinstance(graph, PiecewiseGraph)
        assert [piece.eager for piece in graph.pieces] == [False, True, False]
        assert graph.report.ok


def test_one_phase_alone_may_be_captured_in_pieces() -> None:
    torch.manual_seed(0)
    model = Serving()
    example = torch.arange(BATCH)[:, None], torch.arange(BATCH)
    wanted = Options(mode="piecewise", buckets=(2, 4), pad={"position": CONTEXT - 1}, mlir_elementwise_fusion=False)
    fast = auxstream.compile(model, example, wanted)
    assert isinstance(fast, BucketedModel)
    assert {kind(graph) for graph in fast.graphs} == {"pieces"}
    reference = copy.deepcopy(model)
    for rows in (1, 3, 4, 2):
        step = tokens(rows, 3)
        torch.testing.assert_close(fast(*step), reference(*step))


# --- which phase a call is --------------------------------------------------------------------------------------------


def replays(model: CompiledModel | None) -> int:
    assert model is not None
    return sum(graph.replays for graph in model.graphs if isinstance(graph, SimulatedGraph))


def test_calls_go_by_structure() -> None:
    _, fast = shared("full_and_piecewise")
    before = replays(fast.decode), replays(fast.prefill)
    fast(*tokens(1, 0))
    fast(*prompt(1))
    fast(*prompt(6))
    assert (replays(fast.decode) - before[0], replays(fast.prefill) - before[1]) == (1, 2)


def test_keywords_come_in_any_order() -> None:
    model = Serving()
    names = ("input_ids", "position", "slot", "last")
    decode = {"input_ids": torch.arange(BATCH)[:, None], "position": torch.arange(BATCH)}
    given = (torch.arange(8)[None], torch.arange(8), torch.tensor([1]), torch.tensor([0]))
    prefill = dict(zip(names, given, strict=True))
    fast = auxstream.compile(model, decode, options("full_decode_only"), prefill=prefill)
    step = dict(zip(reversed(names), reversed(prompt(5)), strict=True))
    torch.testing.assert_close(fast(**step), model(**step))
    torch.testing.assert_close(fast(**dict(reversed(decode.items()))), model(**decode))


class Alike(nn.Module):
    """Both phases have one structure: ids [B, 1] or [1, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, HIDDEN)

    def forward(self, input_ids: Tensor, scale: Tensor) -> Tensor:
        q = self.embed(input_ids)[:, None] * scale[..., None, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]


def test_calls_of_one_structure_go_by_the_sizes_that_a_phase_fixes() -> None:
    model = Alike()
    rows = {"input_ids": 0, "scale": 0}
    wanted = Options(mode="full_and_piecewise", buckets=(2, 4), token_dims=rows, mlir_elementwise_fusion=False)
    prefill = torch.arange(8)[None], torch.ones(1)
    fast = auxstream.compile(model, (torch.arange(4)[:, None], torch.arange(4.0)), wanted, prefill=prefill)
    assert isinstance(fast, PhasedModel)
    before = replays(fast.decode), replays(fast.prefill)
    for step in ((torch.arange(1)[:, None], torch.ones(1)), (torch.arange(3)[:, None], torch.ones(3)), prefill):
        torch.testing.assert_close(fast(*step), model(*step))
    assert (replays(fast.decode) - before[0], replays(fast.prefill) - before[1]) == (2, 1)
    with pytest.raises(InputError, match="input 'input_ids' differs"):
        fast(torch.arange(6)[None], torch.ones(1))


def test_what_fits_neither_phase_is_refused_by_the_nearer_one() -> None:
    _, fast = shared("full_and_piecewise")
    ids, position, slot, last = prompt(3)
    with pytest.raises(InputError, match="'slot'"):
        fast(ids, position, slot.float(), last)
    with pytest.raises(InputError, match="'input_ids'"):
        fast(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="another structure"):
        fast(ids, position, slot)
    _, fast = shared("full_decode_only")
    for wrong in ([slot], slot.float(), slot[None]):
        with pytest.raises(InputError, match="not those of prefill, nor of another phase"):
            fast(ids, position, wrong, last)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full_decode_only", "full_and_piecewise"])
def test_modes_of_two_phases_need_both(mode: Any) -> None:
    with pytest.raises(CaptureError, match=f"mode '{mode}' is of two phases") as refused:
        auxstream.compile(Alike(), (torch.arange(4)[:, None], torch.ones(4)), Options(mode=mode))
    assert "prefill=" in refused.value.remedy
    with pytest.raises(CaptureError, match="prefill_buckets is of two phases"):
        auxstream.compile(Alike(), (torch.arange(4)[:, None], torch.ones(4)), Options(prefill_buckets=(2,)))


def test_what_is_said_of_inputs_is_said_to_the_phase_that_has_them() -> None:
    _, fast = serving("full", token_dims={"slot": None, "last": None})
    assert fast.prefill is not None
    with pytest.raises(InputError, match="'nobody'"):
        serving("full", token_dims={"nobody": 0})


def test_split_ops_must_be_ops_of_some_phase() -> None:
    x = torch.randn(5, HIDDEN)
    op = "auxstream_test.paged_attention"
    how: dict[str, Any] = {"mode": "piecewise", "mlir_elementwise_fusion": False}
    fast = auxstream.compile(Stack(Paged()), (x,), Options(**how, split_ops=(op,)))
    assert isinstance(fast.graph, PiecewiseGraph)
    assert sum(piece.eager for piece in fast.graph.pieces) == 1
    with pytest.raises(CaptureError, match=r"split_ops names 'auxstream_test\.flash'") as refused:
        auxstream.compile(Stack(Paged()), (x,), Options(**how, split_ops=(op, "auxstream_test.flash")))
    assert op in refused.value.expected
    in_one = auxstream.compile(Stack(Paged()), (x,), Options(**how, split_ops=(op,)), prefill=(nn.Linear(8, 8), (x,)))
    assert isinstance(in_one, PhasedModel)


@pytest.mark.parametrize(
    ("option", "value"),
    [("split_ops", "mylib.op"), ("split_ops", [1]), ("prefill_buckets", [0]), ("prefill_buckets", [2, 2])],
)
def test_malformed_options(option: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"malformed option {option}"):
        Options(**{option: value})


def test_options_of_phases_come_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("mode: full_and_piecewise\nsplit_ops: [mylib.paged_attention]\nprefill_buckets: [512, 128]\n")
    read = Options.from_yaml(file)
    assert (read.mode, read.split_ops, read.prefill_buckets) == (
        "full_and_piecewise", ("mylib.paged_attention",), (128, 512)
    )  # fmt: skip


# --- what phases share ------------------------------------------------------------------------------------------------


def test_phases_share_one_pool_and_the_larger_is_captured_first() -> None:
    _, fast = shared("full_and_piecewise")
    assert fast.prefill is not None
    memory = fast.memory
    assert [entry.bucket for entry in memory.buckets] == [
        *(f"prefill {size}" for size in (8, 4, 2)), *(f"decode {size}" for size in (BATCH, 2, 1))
    ]  # fmt: skip
    first, *others = memory.buckets
    assert first.added > 0.5 * memory.pool
    assert sum(entry.added for entry in memory.buckets) == memory.pool
    assert all(entry.added < first.added for entry in others)
    pools = {id(program.pool) for graph in fast.graphs for program in graph.programs}
    assert len(pools) == 1
    assert "prefill 8" in str(memory)


def test_it_is_one_compiled_model(tmp_path: Path) -> None:
    model, fast = serving("full_and_piecewise", dump_dir=tmp_path)
    assert "serving decode: " in fast.summary
    assert "serving prefill: " in fast.summary
    assert {path.name for path in tmp_path.iterdir()} == {"decode", "prefill"}
    assert (tmp_path / "prefill" / "bucket-8" / "5-program.txt").exists()
    step = prompt(5)
    torch.testing.assert_close(fast.eager(*step), model(*step))
    fast.wait()
    before = fast(*step).clone()
    fast.recapture()
    assert torch.equal(fast(*step), before)
    assert isinstance(fast.prefill, BucketedModel)
