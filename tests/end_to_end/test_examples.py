"""The examples: `by_hand.py` as a newcomer runs it, and with changes it invites; a whole model; options in a file."""

from __future__ import annotations

import copy
import os
import re
import runpy
import subprocess
import sys
import traceback
import warnings
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import auxstream

EXAMPLES = Path(__file__).parents[2] / "examples"
BY_HAND = EXAMPLES / "by_hand.py"
JOIN = "    region.join()  # A: the caller's stream waits; the host does not\n"
READ = 'fork("shared_expert", h)'
SUM = "return x + (routed + shared)"


def run(script: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AUXSTREAM_")}
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=environ)


def changed(folder: Path, *changes: tuple[str, str]) -> Path:
    text = BY_HAND.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"the example no longer has exactly one {old!r}"
        text = text.replace(old, new)
    script = folder / "by_hand_changed.py"
    script.write_text(text)
    return script


def test_as_it_stands() -> None:
    done = run(BY_HAND)
    assert done.returncode == 0, done.stderr
    assert "regions ['shared_expert']" in done.stdout
    assert "100 of 100 replays equal serial, bit for bit" in done.stdout
    assert "no race" in done.stdout
    assert "Warning" not in done.stderr


def test_is_short_enough_to_read_at_once() -> None:
    assert len(BY_HAND.read_text().splitlines()) <= 40


def run_in_this_process(script: Path) -> None:
    """As a script: torch takes longer to import than an example to run."""
    runpy.run_path(str(script), run_name="__main__")


def shown_by(script: Path) -> str:
    """What Python shows of the error that ends a script, which warns of the region first."""
    with (
        pytest.warns(auxstream.AuxstreamWarning, match="'shared_expert' .*nobody waited for its branch"),
        pytest.raises(auxstream.AuxstreamError) as caught,
    ):
        run_in_this_process(script)
    return "".join(traceback.format_exception(caught.value))


def test_without_the_join_the_capture_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = shown_by(changed(tmp_path, (JOIN, "")))
    assert "UndeclaredAccessError" in error
    assert "join its region first" in error
    assert SUM in error
    assert "replays equal" not in capsys.readouterr().out


def test_without_the_join_and_without_a_use_the_capture_names_the_open_region(tmp_path: Path) -> None:
    shown = shown_by(changed(tmp_path, (JOIN, ""), (SUM, "return x + routed")))
    error = shown[shown.rindex("CaptureError") :]
    assert "'shared_expert'" in error
    assert "region.join()" in error


def test_without_the_declared_read_a_warning_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = changed(tmp_path, (READ, 'fork("shared_expert")'))
    read = "reads an undeclared tensor made by `native_layer_norm.default`"
    with pytest.warns(auxstream.AuxstreamWarning, match=read), pytest.raises(SystemExit) as done:
        run_in_this_process(script)
    assert not done.value.code
    assert "100 of 100 replays equal serial, bit for bit" in capsys.readouterr().out


def test_the_one_to_verify_raises_nothing_and_is_wrong_at_times(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_in_this_process(EXAMPLES / "verify_me.py")
    said = capsys.readouterr()
    assert not said.err
    right = int(said.out.removesuffix(" of 100 replays were right\n"))
    assert right < 100 or torch.cuda.is_available(), "a GPU may be lucky; the simulated machine never is"


# --- gemma4_moe.yaml --------------------------------------------------------------------------------------------------

YAML = EXAMPLES / "gemma4_moe.yaml"


def test_the_file_compiles_a_decode_step() -> None:
    pytest.importorskip("transformers")
    from auxstream.capture.huggingface import DecodeStep, build, gemma4_config

    options = auxstream.Options.from_yaml(YAML)
    assert options == auxstream.Options(multi_stream_moe=True, mlir_elementwise_fusion=True)
    step = DecodeStep(build(gemma4_config(2, "tiny"), torch.device("cpu")), 1, 16)
    reference = copy.deepcopy(step)
    fast = auxstream.compile(step, (torch.tensor([[3]]), torch.tensor([0])), options)
    assert len(fast.regions) == 2
    assert fast.fusion is not None
    assert fast.fusion.fusions
    with torch.no_grad():
        for position in range(3):
            inputs = torch.tensor([[position + 5]]), torch.tensor([position])
            torch.testing.assert_close(fast(*inputs), reference(*inputs), rtol=2e-2, atol=2e-2)


def test_switched_off_in_the_file_there_are_no_regions_and_no_kernels(tmp_path: Path) -> None:
    changed = tmp_path / "changed.yaml"
    changed.write_text(YAML.read_text().replace("enabled: true", "enabled: false"))
    options = auxstream.Options.from_yaml(changed)
    assert options == auxstream.Options(multi_stream_moe=False, mlir_elementwise_fusion=False)


def test_the_comments_name_every_other_option_with_its_default(tmp_path: Path) -> None:
    named = [line[2:] for line in YAML.read_text().splitlines() if re.match(r"# \w+: ", line)]
    everything = tmp_path / "everything.yaml"
    everything.write_text("\n".join(named))
    assert auxstream.Options.from_yaml(everything) == auxstream.Options()
    names = {line.partition(":")[0] for line in named}
    assert names | {"multi_stream_moe", "mlir_elementwise_fusion"} == {
        field.name for field in fields(auxstream.Options)
    }


# --- compile_moe.py, torch_compile.py: a whole model ------------------------------------------------------------------


def run_here(name: str, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> int:
    """The exit code of an example, run in this process as a script; torch takes longer to import than it to run."""
    text = (EXAMPLES / name).read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"the example no longer has exactly one {old!r}"
        text = text.replace(old, new)
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as done:
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
    return int(done.value.code or 0)


def test_a_model_is_compiled_for_several_numbers_of_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("compile_moe.py", monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "2 graphs, 2 regions, proved" in shown
    assert "layers.0.shared: " in shown
    assert "bucket 8: 3 to 8 rows" in shown
    assert ": no race" in shown
    assert "8 of 8 outputs near eager's" in shown


def test_a_region_may_have_fused_kernels_where_they_are_proved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for safe, said in (("", "kept off (the marker)"), ("layers.*.shared=auto", "proved safe")):
        changes = ("(2, 8)", "(8,)"), ('shared=on")', f'shared=on", fusion_safe="{safe}")')
        assert run_here("compile_moe.py", monkeypatch, *changes) == 0
        shown = capsys.readouterr().out
        assert f"region layers.0.shared: fused kernels {said}" in shown
        assert ("in layers.0.shared: silu" in shown) == bool(safe)


def test_a_region_is_switched_off_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("(2, 8)", "(8,)"), (',layers.*.shared=on")', ',layers.1.shared=on")')
    assert run_here("compile_moe.py", monkeypatch, *changes) == 0
    shown = capsys.readouterr().out
    assert "1 region, proved" in shown
    assert "layers.1.shared: " in shown
    assert "layers.0.shared" not in shown


def test_torch_compile_finds_the_backend_and_overlaps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    changes: tuple[tuple[str, str], ...] = ()
    if "auxstream" not in entry_points(group="torch_dynamo_backends").names:  # on the path, and not installed
        changes = (
            ('backend="auxstream"', "backend=auxstream.capture.dynamo.auxstream"),
            ("import logging\n", "import logging\n\nimport auxstream.capture.dynamo\n"),
        )
    torch._dynamo.reset()
    assert run_here("torch_compile.py", monkeypatch, *changes) == 0
    assert "5 of 5 outputs near eager's" in capsys.readouterr().out
    assert "1 graph, 2 regions, proved" in caplog.text
