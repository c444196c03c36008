"""`auxstream doctor`: whatever is missing, malformed or broken is told with its remedy, and the rest still works.

Every probe has a control: what it tries is broken, and its row must say so.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from auxstream import doctor, doctor_facts, doctor_probes, doctor_rows
from auxstream.bench import controls
from auxstream.capture import graphs
from auxstream.capture import inspect as reading
from auxstream.capture.inspect import DeviceGraph
from auxstream.doctor_probes import PROBES, Here, tried
from auxstream.doctor_rows import Row
from auxstream.kernels import mlir, store
from auxstream.runtime import ranges, settings

ROOT = Path(__file__).parents[2]
NO_GPU = Here(False, settings.SETTINGS)

COMMAND = """
import sys
for name in sys.argv[2].split():
    sys.modules[name] = None  # importing it fails, as if it were not installed
from auxstream.__main__ import main
sys.exit(main(["doctor", "--json", sys.argv[1]]))
"""


class Told:
    """A doctor's findings in a process of its own."""

    def __init__(self, to: Path, missing: str = "", **environ: str) -> None:
        foreign = ("AUXSTREAM_", "TRITON_INTERPRET", "CUDA_", "PYTORCH_", "NVTX_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        inherited["AUXSTREAM_CACHE_DIR"] = str(to.parent / "cache")
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(to), missing],
            env={**inherited, **environ},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert to.is_file(), done.stderr
        found = json.loads(to.read_text())
        self.code, self.printed = done.returncode, done.stdout
        self.works, self.verdict = found["works"], found["verdict"]
        self.rows = {row["name"]: Row(**row) for row in found["rows"]}
        assert len(self.rows) == len(found["rows"]), "a name for each row"
        assert not done.stderr

    def states(self, state: str) -> set[str]:
        return {name for name, row in self.rows.items() if row.state == state}


# -- as it is here -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told(tmp_path_factory.mktemp("doctor") / "told.json")


def test_what_is_needed_here_works(told: Told) -> None:
    assert (told.code, told.works) == (0, True), told.printed
    assert not told.states("FAILED")
    for name in ("simulated machine", "MLIR", "cache folder"):
        assert told.rows[name].state == "ok", told.printed
    for name in ("torch", "numpy", "python", "auxstream"):
        assert re.match(r"\d+\.\d+", told.rows[name].says)
    assert told.rows["torch"].says == torch.__version__


def test_every_setting_is_there_with_its_origin(told: Told) -> None:
    names = {name for name in settings.MEANING if "<" not in name}
    assert {name for name in told.rows if name.startswith("AUXSTREAM_")} == names
    assert told.rows["AUXSTREAM_VERIFY"].says == "error, by default; in code: Options.verify"
    assert told.rows["AUXSTREAM_CACHE_DIR"].says.endswith("cache', from the environment")


def test_not_on_a_terminal_it_prints_plain_lines(told: Told) -> None:
    assert told.printed.splitlines()[-1] == told.verdict
    for row in told.rows.values():
        assert row.says in told.printed
        assert row.remedy in told.printed
    assert "\x1b" not in told.printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_with_no_gpu_it_says_so_and_what_works(told: Told) -> None:
    assert told.rows["GPU"].state == "absent"
    assert "simulated machine" in told.rows["GPU"].says
    assert told.rows["GPU"].remedy
    assert {"CUDA graph", "graph introspection", "graph proof"} <= told.states("absent")
    if doctor_facts._found("triton"):
        assert told.rows["Triton"].says.startswith("a kernel compiled for sm_90")


@pytest.mark.gpu
def test_on_a_gpu_everything_works(told: Told) -> None:
    wanted = {probe.name for probe in PROBES} | {"driver", "CUDA of torch", "GPU 0"}
    assert wanted <= told.states("ok"), told.printed
    assert re.search(r"\d+ GiB, sm_\d+, \d+ SMs", told.rows["GPU 0"].says)
    assert "on 2 stream(s)" in told.rows["CUDA graph"].says
    assert told.rows["Triton"].says.startswith("a kernel compiled and launched")


@pytest.mark.gpu
def test_on_a_gpu_what_is_missing_fails(tmp_path: Path) -> None:
    told = Told(tmp_path / "told.json", "cuda.bindings triton", AUXSTREAM_DISABLE="0")
    assert told.code == 1
    assert {"cuda-bindings", "triton", "CUDA graph", "Triton"} <= told.states("FAILED"), told.printed
    assert "cuda-bindings" in told.rows["CUDA graph"].remedy


@pytest.mark.gpu
def test_on_a_gpu_without_the_caching_allocator_no_capture_works(tmp_path: Path) -> None:
    told = Told(tmp_path / "told.json", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert told.code == 1
    assert told.rows["CUDA graph"].state == "FAILED", told.printed
    assert told.rows["PYTORCH_NO_CUDA_MEMORY_CACHING"].remedy == "unset PYTORCH_NO_CUDA_MEMORY_CACHING"


@pytest.mark.gpu
def test_a_gpu_that_is_hidden(tmp_path: Path) -> None:
    told = Told(tmp_path / "told.json", CUDA_VISIBLE_DEVICES="", AUXSTREAM_DISABLE="1")
    assert told.code == 0
    assert told.rows["GPU"].remedy == "unset CUDA_VISIBLE_DEVICES"
    assert told.rows["AUXSTREAM_DISABLE"].state == "note"


# -- what is missing or malformed --------------------------------------------------------------------------------------


def test_malformed_variables_and_missing_packages_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    told = Told(
        tmp_path / "told.json",
        "iree.compiler transformers rich nvtx",
        AUXSTREAM_NVTX="yes",
        AUXSTREAM_DISABEL="1",
        AUXSTREAM_VERIFY="warn",
    )
    assert told.code == 1
    assert {"AUXSTREAM_NVTX", "AUXSTREAM_DISABEL", "iree-base-compiler", "MLIR", "rich"} == told.states("FAILED")
    assert "expected 0 or 1" in told.rows["AUXSTREAM_NVTX"].says
    assert "no such variable, but AUXSTREAM_DISABLE" in told.rows["AUXSTREAM_DISABEL"].says
    assert told.rows["AUXSTREAM_VERIFY"].says == "'warn', from the environment"
    assert "iree-base-compiler" in told.rows["MLIR"].remedy
    assert told.rows["simulated machine"].state == "ok"
    assert {"transformers", "nvtx"} <= told.states("absent")
    assert all(row.remedy for row in told.rows.values() if row.state == "FAILED")
    for name in told.states("FAILED"):
        assert name in told.verdict


def test_without_torch_it_still_answers(tmp_path: Path) -> None:
    told = Told(tmp_path / "told.json", "torch")
    assert told.code == 1
    assert {"torch", "simulated machine"} <= told.states("FAILED")
    assert told.rows["torch"].remedy == "pip install 'torch>=2.11'"


def test_with_a_torch_that_cannot_be_imported_it_still_answers(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcublas.so.13: cannot open\\nmore')\n")
    told = Told(tmp_path / "told.json", PYTHONPATH=str(tmp_path))
    assert told.code == 1
    assert {"GPU", "simulated machine"} <= told.states("FAILED")
    assert told.rows["GPU"].says.endswith("OSError: libcublas.so.13: cannot open")
    assert told.rows["GPU"].remedy


@pytest.mark.parametrize("package", doctor_facts.PACKAGES, ids=lambda package: package.name)
def test_a_package_that_is_missing_or_too_old(package: doctor_facts.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(doctor_facts, "_found", lambda module: module != package.module)
        for needed, state in ((True, "FAILED"), (False, "absent")):
            row = doctor_facts._package(package, needed)
            assert (row.name, row.state, row.remedy) == (package.name, state, f"pip install '{package.wanted}'")
    if package.least:
        monkeypatch.setattr(doctor_facts, "_found", lambda module: True)
        monkeypatch.setattr(doctor_facts, "_version", lambda name: "1.99.9+cu130")
        assert doctor_facts._package(package, True).state == "FAILED"
        monkeypatch.setattr(doctor_facts, "_version", lambda name: package.least + ".0")
        assert doctor_facts._package(package, True).state == "ok"


def test_packages_and_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    assert sorted(package.wanted for package in doctor_facts.PACKAGES) == sorted(
        requirement.partition(";")[0].strip() for requirement in wanted
    )
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor_facts.LEAST_PYTHON))


# -- every probe, broken -----------------------------------------------------------------------------------------------


def row_of(name: str, here: Here = NO_GPU) -> Row:
    return tried(next(probe for probe in PROBES if probe.name == name), here)


def wrong(row: Row, says: str, state: str = "FAILED") -> None:
    assert row.state == state, row
    assert re.search(says, row.says), row
    assert row.remedy, row


def test_the_simulated_machine_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_of("simulated machine").state == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(graphs.SimulatedGraph, "replay", lambda graph: None)
        wrong(row_of("simulated machine"), r"replay \d gave wrong numbers")
    with monkeypatch.context() as patch:
        patch.setattr(controls, "without_waits", lambda program, fault: program)
        wrong(row_of("simulated machine"), "a missing wait goes unnoticed")
    assert row_of("simulated machine").state == "ok"


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Probes that believe in a GPU, whose graphs are the simulated machine's."""
    captured = doctor_probes._captured
    monkeypatch.setattr(doctor_probes, "_captured", lambda device: captured("cpu"))
    return Here(True, settings.SETTINGS)


def test_cuda_graphs_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    here = on_gpu(monkeypatch)
    assert row_of("CUDA graph", here).state == "ok"
    assert here.graph is not None
    wrong(row_of("CUDA graph", replace(here, settings=replace(here.settings, disable=True))), "on 2 stream")
    monkeypatch.setattr(graphs.SimulatedGraph, "replay", lambda graph: None)
    broken = on_gpu(monkeypatch)
    wrong(row_of("CUDA graph", broken), r"replay \d gave wrong numbers")
    wrong(row_of("graph introspection", broken), "no CUDA graph was captured")
    wrong(row_of("graph proof", broken), "no CUDA graph was captured")


def device_graph(kernels: int, unreadable: Sequence[str] = ()) -> Callable[[Any], DeviceGraph]:
    nodes: Any = (SimpleNamespace(kind="kernel"),) * kernels
    return lambda graph: DeviceGraph(nodes, ((0, 1),), (), tuple(unreadable))


def test_introspection_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here(True, settings.SETTINGS, SimpleNamespace(cuda_graph=None))
    monkeypatch.setattr(reading, "inspect", device_graph(4))
    assert row_of("graph introspection", here).says.startswith("4 kernels with their arguments and 1 edges")
    monkeypatch.setattr(reading, "inspect", device_graph(3))
    wrong(row_of("graph introspection", here), "3 kernels were read")
    monkeypatch.setattr(reading, "inspect", device_graph(4, ["a node of an unknown kind"]))
    wrong(row_of("graph introspection", here), "unknown kind")


def test_a_proof_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    here = on_gpu(monkeypatch)
    row_of("CUDA graph", here)
    assert row_of("graph proof", here).state == "ok"
    here.graph = SimpleNamespace(report=controlled_report())
    wrong(row_of("graph proof", here), "race")
    off = replace(here, settings=replace(here.settings, verify="off"))
    assert row_of("graph proof", off).state == "absent"


def controlled_report() -> Any:
    from auxstream.capture.proof import verify

    captured, _ = doctor_probes._captured("cpu")
    return verify(controls.without_waits(captured.program, "join wait"))


def test_mlir_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("iree.compiler")
    assert row_of("MLIR").state == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(mlir, "run_passes", lambda module: module)
        wrong(row_of("MLIR"), "left 2 ops")
    with monkeypatch.context() as patch:
        patch.setattr(doctor_probes, "_ILL_TYPED", "func.func @doctor() { return }")
        wrong(row_of("MLIR"), "passed the verifier")
    off = Here(False, replace(settings.SETTINGS, fusion="off"))
    with monkeypatch.context() as patch:
        patch.setattr(mlir, "run_passes", lambda module: module)
        wrong(row_of("MLIR", off), "left 2 ops", "note")


def test_triton_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from auxstream import doctor_kernel

    monkeypatch.setattr(doctor_kernel, "launched", lambda device: torch.arange(1.0, 101))
    assert row_of("Triton", Here(True, settings.SETTINGS)).state == "ok"
    monkeypatch.setattr(doctor_kernel, "launched", lambda device: torch.zeros(100))
    wrong(row_of("Triton", Here(True, settings.SETTINGS)), "a kernel that adds one made")


def test_triton_compiles_anew_whatever_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton.compiler import ASTSource

    from auxstream import doctor_kernel

    if not doctor_kernel.compiled(90):
        pytest.skip("Triton interprets: TRITON_INTERPRET=1")

    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ASTSource, "make_ir", broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        doctor_kernel.compiled(90)


def test_triton_launches_or_interprets() -> None:
    pytest.importorskip("triton")
    from auxstream import doctor_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert doctor_kernel.launched(device).tolist() == [number + 1.0 for number in range(100)]


def test_no_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu = Here(True, settings.SETTINGS)
    monkeypatch.setitem(settings._environ, "CC", "false")
    wrong(row_of("C compiler", with_gpu), "false cannot compile a launcher")
    monkeypatch.setitem(settings._environ, "CC", "/nowhere/cc")
    wrong(row_of("C compiler", with_gpu), "/nowhere/cc")
    monkeypatch.delitem(settings._environ, "CC")
    monkeypatch.setattr(doctor_probes.shutil, "which", lambda name: None)
    wrong(row_of("C compiler", with_gpu), "neither CC")
    wrong(row_of("C compiler"), "neither CC", "absent")


def test_nvtx_missing_or_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Here(False, replace(settings.SETTINGS, nvtx=True))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nvtx", None)
        wrong(row_of("NVTX", on), "not installed")
        wrong(row_of("NVTX"), "not installed", "absent")
    for domain, says in ((None, "no tool listens"), (object(), "a tool listens")):
        monkeypatch.setattr(ranges, "heard", lambda domain=domain: domain)
        assert row_of("NVTX", on).says.startswith(says)


def test_a_cache_that_cannot_be_written_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert row_of("cache folder").state == "ok"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(store, "SETTINGS", replace(settings.SETTINGS, cache_dir=tmp_path / "file" / "below"))
    wrong(row_of("cache folder"), "file", "note")


# -- facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "gpu", "says"),
    [
        ("CUDA_LAUNCH_BLOCKING", "1", False, "nothing overlaps in eager"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1", False, "one hardware queue"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", False, "caching allocator"),
        ("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync", False, "keeps no history"),
        ("TRITON_INTERPRET", "1", True, "run on the host"),
        ("CUDA_LAUNCH_BLOCKING", "0", False, ""),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8", False, ""),
        ("TRITON_INTERPRET", "1", False, ""),
        ("CUDA_VISIBLE_DEVICES", "1", True, ""),
        ("PYTORCH_ALLOC_CONF", "graph_capture_record_stream_reuse:True", True, ""),
    ],
)
def test_others_variables(name: str, value: str, gpu: bool, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for matter in doctor_facts.MATTERS:
        for known in matter.names:
            monkeypatch.delitem(settings._environ, known, raising=False)
    unset = {row.name: row for row in doctor_facts.environment(gpu)}
    assert {row.state for row in unset.values()} == {"ok"}
    assert len(unset) == len(doctor_facts.MATTERS)
    monkeypatch.setitem(settings._environ, name, value)
    row = next(row for row in doctor_facts.environment(gpu) if row.name == name)
    assert row.state == ("note" if says else "ok")
    assert says in row.says
    assert repr(value) in row.says
    assert row.remedy == (f"unset {name}" if says else "")


def test_allocator_settings_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(settings._environ, "PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setitem(settings._environ, "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64")
    row = next(doctor_facts.environment(True))
    assert row.says.endswith("reuse within captures off, expandable segments on")
    monkeypatch.delitem(settings._environ, "PYTORCH_CUDA_ALLOC_CONF")
    both = "graph_capture_record_stream_reuse:True,expandable_segments:False"
    monkeypatch.setitem(settings._environ, "PYTORCH_ALLOC_CONF", both)
    row = next(doctor_facts.environment(True))
    assert row.name == "PYTORCH_ALLOC_CONF"
    assert row.says.endswith("reuse within captures on, expandable segments off")


def test_of_two_names_for_the_allocators_settings_the_one_that_torch_reads_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
    read = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    done = subprocess.run([sys.executable, "-c", read], env={**os.environ, **given}, capture_output=True, text=True)
    for name, value in given.items():
        monkeypatch.setitem(settings._environ, name, value)
    row = next(doctor_facts.environment(True))
    assert repr(done.stdout.strip().splitlines()[-1]) in row.says


def test_gpus_are_described() -> None:
    def gpu(name: str, major: int) -> Row:
        made = SimpleNamespace(name=name, major=major, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
        return doctor_facts._gpu(1, made)

    whole, slice_, old = gpu("NVIDIA H100", 9), gpu("NVIDIA H100 MIG 3g.40gb", 9), gpu("Tesla V100", 7)
    assert (whole.name, whole.state, whole.says) == ("GPU 1", "ok", "NVIDIA H100, 80 GiB, sm_90, 132 SMs")
    assert slice_.says.endswith("a MIG slice")
    assert old.state == "note"


def test_a_gpu_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(number: int) -> Any:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable\nmore")

    gpus = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, get_device_properties=refuses)
    fake = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=gpus)
    monkeypatch.setattr(doctor_facts, "_torch", lambda: fake)
    assert doctor_facts.has_gpu()
    row = next(row for row in doctor_facts.device() if row.name == "GPU 0")
    assert row.state == "FAILED"
    assert row.says == "RuntimeError: CUDA-capable device(s) is/are busy or unavailable"
    assert row.remedy


def no_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, error: str = "", visible: str | None = None) -> Any:
    def init() -> None:
        if error:
            raise RuntimeError(error)

    monkeypatch.delitem(settings._environ, "CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setitem(settings._environ, "CUDA_VISIBLE_DEVICES", visible)
    return doctor_facts._why_no_gpu(
        SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(init=init))
    )


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "built without CUDA" in no_gpu(monkeypatch, None)[0]
    assert "CUDA_VISIBLE_DEVICES hides" in no_gpu(monkeypatch, "13.0", visible="")[0]
    why, remedy = no_gpu(monkeypatch, "13.0", "Found no NVIDIA driver on your system.\nMore.", visible="0")
    assert why == "none: Found no NVIDIA driver on your system."
    assert "driver" in remedy


# -- how it looks ------------------------------------------------------------------------------------------------------

ROWS = (
    Row("one", "a", "ok", "fine"),
    Row("one", "b[8]", "FAILED", "broken [bold]", "mend it"),
    Row("two", "c", "note", "works, but", "think"),
)


def test_on_a_terminal_there_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=100, color_system="standard")
    monkeypatch.setattr(rich.console, "Console", lambda: console)
    doctor_rows.show(ROWS)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert text != out.getvalue(), "in colour"
    for part in ("one", "two", "b[8]", "broken [bold]", "-> mend it", "-> think", doctor_rows.verdict(ROWS)):
        assert part in text


def test_verdicts() -> None:
    assert doctor_rows.verdict(ROWS) == "auxstream: needed here, and not working: b[8]"
    assert doctor_rows.verdict(ROWS[2:]) == "auxstream: all that is needed here works, with 1 note(s)"
    assert doctor_rows.verdict(ROWS[:1]) == "auxstream: all that is needed here works"
    assert doctor_rows.as_json(ROWS)["works"] is False


def test_the_exit_code_and_the_file_follow_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for rows, code in ((ROWS, 1), (ROWS[::2], 0)):
        monkeypatch.setattr(doctor, "examined", lambda rows=rows: list(rows))
        assert doctor.doctor(tmp_path / "rows.json") == code
        assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(rows)
