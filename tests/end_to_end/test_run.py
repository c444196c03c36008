"""`python -m auxstream run`: equal bits, guilty regions by name, and everything a user can get wrong."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor
from torch.fx import GraphModule

from auxstream.__main__ import main
from auxstream.bisect import Regions, Unsteady, find_causes
from auxstream.runtime.errors import SettingsError

transformers = pytest.importorskip("transformers")
from auxstream import run  # noqa: E402
from auxstream.bench.controls import directed_replays  # noqa: E402
from auxstream.capture.compiler import warm_up_and_capture  # noqa: E402
from auxstream.capture.graphs import SimulatedGraph  # noqa: E402
from auxstream.capture.huggingface import build, gemma4_config  # noqa: E402
from auxstream.capture.program import Wait  # noqa: E402
from auxstream.capture.proof import verify  # noqa: E402
from auxstream.side_by_side import Capture, Captured, Inputs, capture_step  # noqa: E402

IDS = "[1, 2]"
TINY = ("run", "--model", "gemma4-tiny", "--device", "cpu", "--tokens", "2", "--prompt", IDS)


@pytest.fixture(autouse=True)
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the tests' own process kernels would run in Triton's interpreter, which takes its time."""
    module = sys.modules["auxstream.kernels.fuse"]
    monkeypatch.setattr(module, "SETTINGS", replace(module.SETTINGS, fusion="off"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of its own weights, and a tokenizer of ten words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("checkpoint")
    build(tiny_models._config("glm4_moe"), dtype=torch.float32, seed=3).save_pretrained(path)  # pyright: ignore
    words = ["a", "branch", "reads", "what", "the", "caller", "wrote", "before", "it", "forked"]
    tokenizer = Tokenizer(models.WordLevel({word: 10 + i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    return tmp_path / "figures.json"


def with_capture(monkeypatch: pytest.MonkeyPatch, capture: Capture) -> None:
    monkeypatch.setattr(run, "run_model", lambda options, whole=run.run_model: whole(options, capture))


# --- equal ------------------------------------------------------------------------------------------------------------


def test_a_config_alone_runs_with_random_weights_and_fused_kernels(figures: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AUXSTREAM_", "TRITON_"))}
    command = [sys.executable, "-P", "-m", "auxstream", "run", "--model", "gemma4-tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--tokens", "3", "--json", str(figures)], capture_output=True, text=True, timeout=240, env=clean
    )
    out = done.stdout
    assert done.returncode == 0, out + done.stderr
    assert re.search(r"^fused: \d+ ops in [1-9]", out, re.M)
    assert "regions: 2: layers.0.shared, layers.1.shared" in out
    assert "the same bits in 18 of 18 steps" in out
    assert "caches at the end: the same bits in 4 of 4" in out
    assert "timing means nothing" in out
    assert re.search(r"^overlapped +2 +n/a +no race: [1-9]", out, re.M)
    assert out.endswith("EQUAL: overlapped gives the bits of one stream\n")
    written = json.loads(figures.read_text())
    assert written["equal"]
    assert written["proved"]
    assert written["guilty"] == []
    assert [len(prompt["ids"]) for prompt in written["prompts"]] == [16]


def test_a_checkpoint_makes_the_tokens_that_its_own_generate_makes(folder: Path, figures: Path, tmp_path: Path) -> None:
    """Prompts of other lengths in one batch, the last batch not full."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the caller wrote\n\n[7, 8, 9, 1, 2]\nwhat a branch reads before it forked\n")
    options = ("--prompts", str(prompts), "--tokens", "5", "--batch", "2", "--json", str(figures))
    assert main(["run", "--model", str(folder), "--device", "cpu", *options]) == 0
    written = json.loads(figures.read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert [prompt["ids"] for prompt in written["prompts"]] == [
        [14, 15, 16],
        [7, 8, 9, 1, 2],
        [13, 10, 11, 12, 17, 18, 19],
    ]
    for prompt in written["prompts"]:
        given = torch.tensor([prompt["ids"]])
        made = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=5)
        assert prompt["made"] == made[0, given.shape[1] :].tolist()
    assert written["prompts"][0]["text"] == "the caller wrote"
    assert [prompt["says"] is None for prompt in written["prompts"]] == [False] * 3
    assert written["model"] == {"given": str(folder), "class": "Glm4MoeForCausalLM", "weights": "its own weights"}


def test_the_first_layers_of_a_config_file(folder: Path, figures: Path) -> None:
    options = ("--layers", "1", "--tokens", "1", "--prompt", "[5]", "[6, 7]", "--json", str(figures))
    assert main(["run", "--model", str(folder / "config.json"), "--device", "cpu", *options]) == 0
    written = json.loads(figures.read_text())
    assert written["regions"] == ["layers.0.shared"]
    assert written["model"]["weights"] == "random weights, seed 0"
    assert [len(prompt["made"]) for prompt in written["prompts"]] == [1, 1]


def test_the_text_model_of_a_checkpoint_that_sees_too(tmp_path: Path, figures: Path) -> None:
    whole = transformers.Gemma4Config(text_config=gemma4_config(1, "tiny"), vision_config=None, audio_config=None)
    transformers.AutoModelForCausalLM.from_config(whole, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert main(["run", "--model", str(tmp_path), *TINY[3:], "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["model"]["class"] == "Gemma4ForCausalLM"


def test_rules_say_which_branches_are_on_lanes(
    figures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("auxstream.capture.proposals._LEAST_BYTES", 1)
    rules = "*=off,layers.1.shared=on,*.k_proj=on,layers.7.*=on"
    assert main([*TINY, "--overlap", rules, "--json", str(figures)]) == 0
    written = json.loads(figures.read_text())
    assert written["regions"] == ["layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj", "layers.1.shared"]
    assert set(written["branches"]) >= {"layers.*.shared", "layers.*.self_attn.k_proj"}
    assert "the overlap rule 'layers.7.*' matches no branch; there are layers.*.shared" in capsys.readouterr().out
    assert main([*TINY, "--overlap", "*=off"]) == 0
    end = capsys.readouterr().out.splitlines()[-1]
    assert end.startswith("NOTHING OVERLAPS: both steps are one stream. Branches for --overlap: layers.*.shared, ")
    assert main([*TINY, "--overlap", "shared=maybe"]) == 2
    assert "malformed --overlap" in capsys.readouterr().err


def test_logits_that_are_no_numbers_are_not_called_equal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], figures: Path
) -> None:
    def capture(step: GraphModule, inputs: Inputs, caches: Sequence[Tensor], name: str) -> Captured:
        captured = capture_step(step, inputs, caches, name)
        return replace(captured, replay=lambda: None)  # both steps stay as they were poisoned

    with_capture(monkeypatch, capture)
    assert main([*TINY, "--json", str(figures)]) == 1
    assert capsys.readouterr().out.endswith(
        "NO NUMBERS: logits were NaN in 3 steps, on one stream too: equal bits say nothing\n"
    )
    assert json.loads(figures.read_text())["comparisons"][0]["nan"] == 3


# --- different --------------------------------------------------------------------------------------------------------


def broken(*guilty: str) -> Capture:
    """Captures in which nobody waits for these regions to end."""

    def capture(step: GraphModule, inputs: Inputs, caches: Sequence[Tensor], name: str) -> Captured:
        graph, logits = warm_up_and_capture(step, inputs, caches, inputs[0].device, name=name, verify="off")
        assert isinstance(graph, SimulatedGraph)
        program = graph.program
        for index, at in enumerate(program.steps):
            if isinstance(at, Wait) and at.what in [f"end of {region}" for region in guilty]:
                program = program.without(index)
        return Captured(directed_replays(graph, program), logits, verify(program))

    return capture


@pytest.mark.parametrize("guilty", [("layers.1.shared",), ("layers.0.shared", "layers.2.shared")], ids=len)
def test_bisect_names_exactly_the_regions_whose_handoff_is_broken(
    guilty: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], figures: Path
) -> None:
    with_capture(monkeypatch, broken(*guilty))
    code = main([*TINY, "--layers", "3", "--tokens", "1", "--bisect", "--retries", "1", "--json", str(figures)])
    out = capsys.readouterr().out
    assert code == 1
    assert f"DIFFERENT: guilty: {'; '.join(guilty)}. " in out
    assert "overlapped is not proved" in out
    written = json.loads(figures.read_text())
    assert written["guilty"] == [[region] for region in guilty]
    assert not written["equal"]
    assert written["comparisons"][0]["differing"] != []


def test_without_bisect_the_message_offers_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_capture(monkeypatch, broken("layers.0.shared"))
    assert main([*TINY]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT: run it again with --bisect" in out
    assert re.search(r"prompt 1: first in step \d, by ", out)


def noisy(only: str, times: int | None = None) -> Capture:
    """Captures whose logits are never the same twice, in steps of this name; so many times."""
    left = itertools.repeat(1) if times is None else iter([1] * times)

    def capture(step: GraphModule, inputs: Inputs, caches: Sequence[Tensor], name: str) -> Captured:
        made = capture_step(step, inputs, caches, name)

        def replay() -> None:
            made.replay()
            if name == only and next(left, 0):
                made.logits.add_(torch.rand(()))

        return replace(made, replay=replay)

    return capture


@pytest.mark.parametrize(
    ("capture", "says"),
    [
        (noisy("serial"), "one stream differs from itself"),
        (noisy("overlapped", times=1), "the difference did not come again in 3 runs"),
    ],
    ids=["not repeatable", "once"],
)
def test_no_region_is_named_for_what_regions_did_not_do(
    capture: Capture, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_capture(monkeypatch, capture)
    assert main([*TINY, "--layers", "1", "--bisect"]) == 1
    out = capsys.readouterr().out
    assert f"DIFFERENT: {says}" in out
    assert "guilty" not in out


def test_equal_bits_without_a_proof_are_not_called_equal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def capture(step: GraphModule, inputs: Inputs, caches: Sequence[Tensor], name: str) -> Captured:
        unproved = broken("layers.0.shared")(step, inputs, caches, name).report
        return replace(capture_step(step, inputs, caches, name), report=unproved)

    with_capture(monkeypatch, capture)
    assert main([*TINY, "--layers", "1"]) == 1
    assert "NOT PROVED: the bits were the same" in capsys.readouterr().out


# --- bisection --------------------------------------------------------------------------------------------------------

ALL = tuple(f"r{i}" for i in range(13))


def culprits(*causes: set[str]) -> tuple[Callable[[Regions], bool], list[Regions]]:
    asked: list[Regions] = []

    def differs(regions: Regions) -> bool:
        asked.append(regions)
        return any(cause <= set(regions) for cause in causes)

    return differs, asked


@pytest.mark.parametrize(
    "causes",
    [(), ({"r4"},), ({"r0"}, {"r12"}), ({"r3"}, {"r4"}, {"r5"}), ({"r1", "r9"},), ({"r2", "r3", "r11"}, {"r7"})],
    ids=len,
)
def test_every_cause_is_found_and_nothing_else(causes: tuple[set[str], ...]) -> None:
    differs, asked = culprits(*causes)
    assert sorted(map(sorted, find_causes(ALL, differs))) == sorted(map(sorted, causes))
    left = tuple(region for region in ALL if not any(region in cause for cause in causes))
    assert asked[-1] == left, "at last, all others together"


def test_one_of_many_is_found_in_few_steps() -> None:
    for guilty in ALL:
        differs, asked = culprits({guilty})
        assert find_causes(ALL, differs) == [(guilty,)]
        assert len(asked) <= 2 + 2 * 4


def test_all_of_many_are_found_in_few_steps() -> None:
    differs, asked = culprits(*({region} for region in ALL))
    assert find_causes(ALL, differs) == [(region,) for region in ALL]
    assert len(asked) < 2 * len(ALL)


def test_random_causes_that_share_no_region_are_found() -> None:
    draw = random.Random(0)
    for _ in range(200):
        shuffled = draw.sample(ALL, len(ALL))
        cuts = sorted(draw.sample(range(len(ALL)), 3))
        causes = [set(shuffled[a:b]) for a, b in itertools.pairwise(cuts)]
        differs, _ = culprits(*causes)
        assert sorted(map(sorted, find_causes(ALL, differs))) == sorted(map(sorted, causes))


def test_a_test_that_contradicts_itself_names_nothing() -> None:
    answers = iter([True, False, False])
    with pytest.raises(Unsteady):
        find_causes(("a", "b"), lambda _: next(answers, False))


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it says, with exit code 2; each refusal says what was expected, what came, and the remedy."""
    assert main(["run", "--device", "cpu", *arguments]) == 2
    told = capsys.readouterr().err
    assert all(f"\n  {part}: " in told for part in ("expected", "came", "remedy")), told
    return told


def test_models_that_are_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing of that name" in refused(capsys, "--model", str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "a folder without config.json and *.safetensors" in refused(capsys, "--model", str(empty))
    (empty / "config.json").write_text("{}")
    assert "a folder without *.safetensors" in refused(capsys, "--model", str(empty))
    assert "Unrecognized model" in refused(capsys, "--model", str(empty / "config.json"))
    (empty / "config.json").write_text((folder / "config.json").read_text())
    (empty / "model.safetensors").write_bytes(b"nothing of the kind")
    assert "SafetensorError" in refused(capsys, "--model", str(empty))
    assert "a file that is no .json" in refused(capsys, "--model", str(empty / "model.safetensors"))
    assert "cannot have 3 layers" in refused(capsys, "--model", str(folder), "--layers", "3")


def test_a_checkpoint_that_lacks_weights_is_not_completed_with_random_ones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    told = refused(capsys, "--model", str(tmp_path), "--prompt", IDS)
    assert "1 missing or of another shape: model.layers.1.input_layernorm.weight" in told


def test_a_model_that_a_decode_step_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 64, "num_attention_heads": 4, "lru_width": 64}
    transformers.RecurrentGemmaConfig(**sizes, intermediate_size=96).save_pretrained(tmp_path)
    told = refused(capsys, "--model", str(tmp_path / "config.json"))
    assert "layer 0 of RecurrentGemmaForCausalLM" in told


def test_prompts_that_cannot_be_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, own = ("--model", "gemma4-tiny"), ("--model", str(folder))
    assert "no tokenizer to read it with" in refused(capsys, *tiny, "--prompt", "[1]", "the caller")
    told = refused(capsys, *tiny, "--prompt", "[1]", "[5, 512, -1]")
    assert "prompt 2 has ids outside the vocabulary" in told
    assert "came:     512, -1" in told
    assert "prompt 1 has no tokens" in refused(capsys, *tiny, "--prompt", "[]")
    assert "prompt 1 has no tokens" in refused(capsys, *own, "--prompt", "  ")
    told = refused(capsys, *own, "--prompt", "[1]", "[1, 2, 3, 4]", "--context", "8", "--tokens", "6")
    assert "prompt 2 does not fit" in told
    assert "3 tokens of prompt before 6 new ones" in told
    assert "a larger --context" in told
    assert "max_position_embeddings" in refused(capsys, *own, "--prompt", "[1]", "--tokens", "65")
    assert "has no 65 positions" in refused(capsys, *own, "--prompt", "[1]", "--context", "65")
    for content in ("", "\n \n"):
        (tmp_path / "prompts.txt").write_text(content)
        assert "has no prompts" in refused(capsys, *own, "--prompts", str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\xff")
    assert "is no text file" in refused(capsys, *own, "--prompts", str(tmp_path / "prompts.txt"))


def test_a_checkpoint_without_a_tokenizer_is_not_given_an_empty_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert f"none in {tmp_path}" in refused(capsys, "--model", str(tmp_path), "--prompt", "the caller")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tokens", "0"), "less than 1"),
        (("--rounds", "1"), "less than 2"),
        (("--prompts", "/no/such/file"), "there is no file"),
        (("--json", "/no/such/folder/figures.json"), "no file can be made"),
        (("--prompts", __file__, "--prompt", "[1]"), "not allowed with"),
    ],
)
def test_arguments_that_are_refused(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--model", "gemma4-tiny", *arguments])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["disable", "verify"])
def test_settings_that_would_falsify_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SETTINGS", replace(run.SETTINGS, **{name: "error" if name == "verify" else True}))
    with pytest.raises(SettingsError, match=f"AUXSTREAM_{name.upper()}"):
        run._refuse_settings()


def test_without_transformers_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from auxstream.__main__ import main\n"
        "sys.exit(main(['run', '--model', 'gemma4-tiny', '--device', 'cpu']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "auxstream[hf]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "gemma4-tiny", "--device", "cuda"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_both_rates_stand_beside_each_other(figures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--layers", "2", "--batch", "2", "--tokens", "16", "--rounds", "3", "--json", str(figures))
    assert main(["run", "--model", "gemma4-tiny", "--device", "cuda", *options]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^overlapped / serial: \d\.\d+$", out, re.M)
    steps = json.loads(figures.read_text())["steps"]
    assert all(step["tokens_per_second"]["median"] > 0 for step in steps.values())
    assert steps["overlapped"]["ok"]


def broken_on_gpu(guilty: str) -> Capture:
    """CUDA graphs in which nobody waits for this region, whose lane is late."""
    from auxstream.bench.faulty import FaultyMachine
    from auxstream.bench.lab import _captured_by_torch
    from auxstream.capture.delays import insert_delays
    from auxstream.runtime.cuda import CudaMachine
    from auxstream.runtime.handoff_ops import region_fork
    from auxstream.runtime.machine import using_machine
    from auxstream.runtime.regions import Region

    class Machine(FaultyMachine):
        def join(self, region: Region, returned: Sequence[Tensor]) -> None:
            if region.name == guilty:
                super().join(region, returned)
            else:
                CudaMachine.join(self, region, returned)

    def capture(step: GraphModule, inputs: Inputs, caches: Sequence[Tensor], name: str) -> Captured:
        forks = sum(node.target is region_fork for node in step.graph.nodes)
        insert_delays(step, torch.tensor([0, 300_000] * forks, dtype=torch.int64, device="cuda"))
        machine = Machine("join wait")

        def run(ids: Tensor, position: Tensor) -> Tensor:
            machine.begin()
            logits = step(ids, position)
            machine.finish()
            return logits

        with using_machine(machine):
            return Captured(*_captured_by_torch(run, inputs, list(caches), inputs[0].device))

    return capture


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_bisect_names_the_region_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch, figures: Path) -> None:
    with_capture(monkeypatch, broken_on_gpu("layers.2.shared"))
    options = ("--layers", "4", "--tokens", "16", "--rounds", "2", "--bisect", "--json", str(figures))
    assert main(["run", "--model", "gemma4-tiny", "--device", "cuda", *options]) == 1
    assert json.loads(figures.read_text())["guilty"] == [["layers.2.shared"]]
