"""What compiled Triton kernels read and write, and which of them were launched."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from patterns import PATTERNS
from triton.compiler import CompiledKernel
from triton_cases import CASES
from ways import fused

from auxstream.kernels import triton_flow
from auxstream.kernels.triton_accesses import Parameter, TritonAccesses, TritonLaunches, analyse
from auxstream.runtime.errors import CaptureError

HERE = Path(__file__).parent
Kernels = list[dict[str, Any]]


def started(folder: Path, script: str, *jobs: str) -> subprocess.Popen[str]:
    """A child that compiles: Triton compiles nothing in a process in which it interprets."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "AUXSTREAM_CACHE_DIR": str(folder / "auxstream")}
    command = [sys.executable, script, *jobs]
    return subprocess.Popen(command, cwd=HERE, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def printed(child: subprocess.Popen[str]) -> Kernels:
    lines, errors = child.communicate(timeout=280)
    assert child.returncode == 0, errors
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    jobs = (["cases", "patterns"], ["ops"])
    children = [started(tmp_path_factory.mktemp("compiled"), "accesses_worker.py", *some) for some in jobs]
    return [kernel for child in children for kernel in printed(child)]


@pytest.fixture(scope="module")
def cases(kernels: Kernels) -> dict[str, dict[str, Any]]:
    return {kernel["name"]: kernel for kernel in kernels if kernel["job"] == "cases"}


def touched(found: TritonAccesses) -> list[str]:
    """Per parameter "r", "w", "rw" or ""."""
    return ["r" * parameter.reads + "w" * parameter.writes for parameter in found.parameters]


# --- kernels of every kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_touches_what_its_source_says(cases: dict[str, dict[str, Any]], name: str) -> None:
    case, found = CASES[name], analyse(cases[name]["ttir"])
    assert touched(found) == list(case.touched.values())
    assert len(found.assumed) == len(case.assumed), found.assumed
    assert all(any(part in text for text in found.assumed) for part in case.assumed), found.assumed
    positions = tuple(parameter.position for parameter in found.parameters)
    assert positions == (case.positions or tuple(range(len(case.touched))))


def test_parameters_are_named_as_in_the_source(cases: dict[str, dict[str, Any]]) -> None:
    found = analyse(cases["constants_between"]["ttir"])
    assert found == TritonAccesses(
        "constants_between", (Parameter("x", 0, True, False), Parameter("out", 2, False, True)), ()
    )


def test_parameters_without_names_are_counted(cases: dict[str, dict[str, Any]]) -> None:
    """As after TRITON_DISABLE_LINE_INFO."""
    places = r"^#loc.*$| loc\((?:[^()]|\([^()]*\))*\)"
    found = analyse(re.sub(places, "", cases["constants_between"]["ttir"], flags=re.MULTILINE))
    assert found.parameters == (Parameter("argument 0", 0, True, False), Parameter("argument 2", 2, False, True))


@pytest.mark.parametrize("name", CASES)
def test_positions_are_those_of_the_machine_code(cases: dict[str, dict[str, Any]], name: str) -> None:
    """The machine code has the parameters of the TTIR, and behind them two of the launcher's: the first is scratch."""
    kernel = cases[name]
    signature = kernel["ttir"].partition("tt.func public")[2].partition(") attributes")[0]
    count = signature.count(": !tt.") + signature.count(": i32") + signature.count(": i64")
    assert kernel["parameters"] == count + 2
    for parameter in analyse(kernel["ttir"]).parameters:
        assert (parameter.position == count) is (parameter.name == "global scratch")


def test_one_text_is_analysed_once(cases: dict[str, dict[str, Any]]) -> None:
    ttir = cases["elementwise"]["ttir"]
    assert analyse(ttir) is analyse("".join(list(ttir)))


def changed(ttir: str, operation: str, declaration: str = "") -> str:
    """The TTIR with one more operation in front of its kernel, and one more function."""
    at = ttir.index("{\n", ttir.index("tt.func public")) + 2
    whole = f"{ttir[:at]}    {operation}\n{ttir[at:]}"
    return whole.replace("  tt.func public", f"{declaration}\n  tt.func public", 1)


def test_an_operation_that_is_not_known_counts_as_both(cases: dict[str, dict[str, Any]]) -> None:
    text = changed(cases["elementwise"]["ttir"], "%cast = builtin.unrealized_conversion_cast %x : !tt.ptr<f32> to i64")
    found = analyse(text)
    assert touched(found) == ["rw", "r", "w"]
    (assumed,) = found.assumed
    assert assumed.startswith("x: taken as read and written: builtin.unrealized_conversion_cast")


def test_an_operation_that_is_not_known_and_takes_no_address_does_not(cases: dict[str, dict[str, Any]]) -> None:
    text = changed(cases["elementwise"]["ttir"], "%cast = builtin.unrealized_conversion_cast %n : i32 to f32")
    assert analyse(text) == analyse(cases["elementwise"]["ttir"])


def test_a_function_from_elsewhere_counts_as_both(cases: dict[str, dict[str, Any]]) -> None:
    text = changed(
        cases["elementwise"]["ttir"],
        "tt.call @elsewhere(%y, %n) : (!tt.ptr<f32>, i32) -> ()",
        "  tt.func private @elsewhere(!tt.ptr<f32>, i32)",
    )
    found = analyse(text)
    assert touched(found) == ["r", "rw", "w"]
    assert len(found.assumed) == 1
    assert "elsewhere" in found.assumed[0]


def test_text_that_is_not_ttir_is_refused() -> None:
    with pytest.raises(CaptureError, match="cannot be parsed"):
        analyse("module { tt.func public @kernel(")


Flow = triton_flow._Flow


def _once(self: Any, value: Any, origins: Any, reach: Any = Flow._reach) -> None:
    reach(self, value, origins)
    self._grown = False


def _through_selects_nothing(self: Any, operation: Any, carried: Any = Flow._carried) -> frozenset[Any]:
    return frozenset() if operation.name == "arith.select" else carried(self, operation)


def _along_branches_nothing(self: Any, region: Any) -> None:
    for block in region:
        for operation in block.operations:
            self._flow(operation)


# What each part of the flow is for: what replaces it, and cases that must show that it is gone.
CUTS: dict[str, tuple[str, Callable[..., Any], Sequence[str]]] = {
    "loops and ifs": (
        "_bind", lambda *_: None, ("walking_loop", "while_loop", "written_behind_a_loop", "chosen_by_branch")
    ),
    "second turns": ("_reach", _once, ("rotating_loop",)),
    "selects": ("_carried", _through_selects_nothing, ("selected", "selected_by_element")),
    "branches": ("_region", _along_branches_nothing, ("returning_early",)),
    "calls": ("_called", lambda *_: (), ("calling", "calling_deep", "calling_with_integers")),
    "what calls return": ("_returned", lambda *_: [], ("calling_deep",)),
    "what is loaded": ("_loaded", lambda *_: frozenset(), ("table_read", "table_written")),
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_a_flow_that_is_cut_would_show(
    cases: dict[str, dict[str, Any]], cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, instead, shows = CUTS[cut]
    whole = {name: analyse(cases[name]["ttir"]) for name in shows}
    monkeypatch.setattr(Flow, method, instead)
    for name in shows:
        assert analyse.__wrapped__(cases[name]["ttir"]) != whole[name], name


# --- kernels this project generates -----------------------------------------------------------------------------------


def test_fused_kernels_read_inputs_and_write_outputs(kernels: Kernels) -> None:
    mine = [kernel for kernel in kernels if "loaded" in kernel]
    assert len(mine) > 400
    for kernel in mine:
        inputs = ["r" if f"in{i}" in kernel["loaded"] else "" for i in range(kernel["inputs"])]
        found = analyse(kernel["ttir"])
        assert touched(found) == inputs + ["w"] * kernel["outputs"], kernel["name"]
        assert not found.assumed, kernel["name"]


def test_few_inputs_are_not_read(kernels: Kernels) -> None:
    """`x.pow(0)` and the like. Were `loaded` empty by mistake, the test above would ask for nothing."""
    mine = [kernel for kernel in kernels if "loaded" in kernel]
    assert sum(len(set(kernel["loaded"])) for kernel in mine) > 0.95 * sum(kernel["inputs"] for kernel in mine)


def test_a_store_into_an_input_is_found(kernels: Kernels) -> None:
    mutants = [kernel for kernel in kernels if kernel.get("mutant")]
    assert len(mutants) > 100
    for kernel in mutants:
        (
            first,
            *_,
        ) = analyse(kernel["ttir"]).parameters
        output = analyse(kernel["ttir"]).parameters[kernel["inputs"]]
        assert first.writes, kernel["name"]
        assert not output.writes, kernel["name"]


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = printed(started(tmp_path_factory.mktemp("launched"), "launches_worker.py", "early"))
    return found


def test_launches_are_known_by_function(launched: dict[str, Any]) -> None:
    assert [known["kernel"] for known in launched["known"]] == ["elementwise", "in_place"] * 2
    writes = [[parameter["writes"] for parameter in known["parameters"]] for known in launched["known"]]
    assert writes == [[False, False, True], [True]] * 2
    assert launched["unknown"] is None
    assert launched["not launched meanwhile"] is None


def test_hooks_of_others_run_and_nothing_stays_behind(launched: dict[str, Any]) -> None:
    assert launched["told"] == ["elementwise", "in_place"] * 2
    assert launched["put back"]


def test_triton_may_come_late_and_is_not_imported_for_it(tmp_path: Path) -> None:
    (found,) = printed(started(tmp_path, "launches_worker.py", "late"))
    assert not found["imported"]
    assert [known["kernel"] for known in found["known"]] == ["elementwise", "in_place"] * 2


def method() -> Any:
    return vars(CompiledKernel)["launch_metadata"]


@contextmanager
def kernel_object(function: int | None, **asm: str) -> Iterator[Any]:
    """A compiled kernel as Triton's launches see it, without machine code."""
    kernel: Any = CompiledKernel.__new__(CompiledKernel)
    kernel.module, kernel._module_pid, kernel.function, kernel._run = object(), None, function, None
    kernel.name, kernel.src, kernel.asm = "made_up", None, asm
    try:
        yield kernel
    finally:
        kernel.module = None  # there is nothing to unload


def test_nested_notes_may_end_in_any_order(cases: dict[str, dict[str, Any]]) -> None:
    before, outer, inner = method(), TritonLaunches(), TritonLaunches()
    with kernel_object(1, ttir=cases["in_place"]["ttir"]) as first, kernel_object(2, ttir="") as second:
        outer.__enter__()
        inner.__enter__()
        told = first.launch_metadata((1,), 0).get()
        outer.__exit__(None, None, None)
        assert method() is not before
        second.launch_metadata((1,), 0)
        inner.__exit__(None, None, None)
        assert method() is before
        assert told == {"name": "made_up", "function": 1, "stream": 0}
        assert outer.of(1) == inner.of(1) == analyse(cases["in_place"]["ttir"])
        assert set(inner._kernels) == {1, 2}
        assert set(outer._kernels) == {1}


def test_a_stand_in_of_others_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody wraps the method while launches are noted, and keeps it longer."""
    calls: list[int] = []
    monkeypatch.setattr(CompiledKernel, "launch_metadata", method())  # put back whatever happens below
    with TritonLaunches() as launches, kernel_object(1, ttir="") as kernel:
        ours = CompiledKernel.launch_metadata

        def theirs(self: Any, *arguments: Any) -> Any:
            calls.append(self.function)
            return ours(self, *arguments)

        CompiledKernel.launch_metadata = theirs
        kernel.launch_metadata((1,), 0)
    assert method() is theirs
    with kernel_object(2, ttir="") as kernel:
        assert kernel.launch_metadata((1,), 0).get()["function"] == 2
    assert calls == [1, 2]
    assert launches.of(1) is None  # no TTIR
    assert set(launches._kernels) == {1}


def test_notes_end_with_an_exception() -> None:
    def fails() -> None:
        with TritonLaunches():
            assert method() is not before
            raise ZeroDivisionError

    before = method()
    with pytest.raises(ZeroDivisionError):
        fails()
    assert method() is before


def test_a_function_that_comes_with_the_first_launch(cases: dict[str, dict[str, Any]]) -> None:
    with kernel_object(None, ttir=cases["in_place"]["ttir"]) as kernel, TritonLaunches() as launches:
        kernel.launch_metadata((1,), 0)
        assert launches.of(5) is None
        kernel.function = 5
        assert launches.of(5) == analyse(cases["in_place"]["ttir"])


@pytest.mark.parametrize("asm", [{}, {"ttir": "not TTIR"}, {"ptx": ".entry"}])
def test_a_kernel_without_ttir_is_as_if_unknown(asm: dict[str, str]) -> None:
    with kernel_object(3, **asm) as kernel, TritonLaunches() as launches:
        kernel.launch_metadata((1,), 0)
    assert launches.of(3) is None


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def kernel_nodes(graph: torch.cuda.CUDAGraph) -> list[tuple[int, int]]:
    """Of each kernel node: its CUfunction, and where the pointers to its parameters lie."""
    from cuda.bindings import driver

    def checked(result: Any) -> Any:
        error, *rest = result
        assert error == driver.CUresult.CUDA_SUCCESS, error
        return rest[0] if len(rest) == 1 else rest

    raw = driver.CUgraph(graph.raw_cuda_graph())
    _, count = checked(driver.cuGraphGetNodes(raw))
    nodes, _ = checked(driver.cuGraphGetNodes(raw, count))
    kind = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    kernels = [node for node in nodes if checked(driver.cuGraphNodeGetType(node)) == kind]
    found = [checked(driver.cuGraphKernelNodeGetParams(node)) for node in kernels]
    return [(int(parameters.func), int(parameters.kernelParams)) for parameters in found]


def word(parameters: int, position: int, offset: int = 0) -> int:
    """A word of a launch's parameter, as an address."""
    place = ctypes.c_void_p.from_address(parameters + 8 * position).value
    assert place is not None
    return ctypes.c_uint64.from_address(place + 8 * offset).value


@pytest.mark.gpu
def test_captured_launches_are_known_by_function() -> None:
    x, y, out = torch.randn(3, 64, device="cuda")
    kernel, in_place = CASES["elementwise"].kernel, CASES["in_place"].kernel

    def run() -> None:
        kernel[(1,)](x, y, out, 64)
        in_place[(1,)](out, 3)
        out.add_(x)  # torch's own

    run()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with TritonLaunches() as launches, torch.cuda.graph(graph):
        run()
    nodes = kernel_nodes(graph)
    found = [(launches.of(function), parameters) for function, parameters in nodes]
    known = {accesses.kernel: (accesses, parameters) for accesses, parameters in found if accesses is not None}
    assert len(nodes) == 3
    assert set(known) == {"elementwise", "in_place"}
    accesses, parameters = known["elementwise"]
    assert touched(accesses) == ["r", "r", "w"]
    assert [word(parameters, p.position) for p in accesses.parameters] == [t.data_ptr() for t in (x, y, out)]
    accesses, parameters = known["in_place"]
    assert touched(accesses) == ["rw"]
    assert word(parameters, accesses.parameters[0].position) == out.data_ptr()


@pytest.mark.gpu
def test_captured_fused_kernels_are_known() -> None:
    pattern = PATTERNS["residual_and_norm"]
    args = [arg.cuda() for arg in pattern.make(16, 4096, torch.bfloat16)]
    gm, report = fused(pattern.function, args)
    gm(*args)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with TritonLaunches() as launches, torch.cuda.graph(graph):
        gm(*args)
    found = [launches.of(function) for function, _ in kernel_nodes(graph)]
    ours = [fusion.spec for fusion in report.fusions]
    assert [touched(accesses) for accesses in found if accesses is not None] == [
        ["r"] * len(spec.inputs) + ["w"] * len(spec.outputs) for spec in ours
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_captured_kernels_of_inductor(static: bool) -> None:
    """Known if Triton launches them; not if Inductor does so itself, which keeps no TTIR."""
    from torch._inductor import config

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x + y).relu() * 3

    x, y = torch.randn(2, 1000, device="cuda")
    torch._dynamo.reset()
    with config.patch(use_static_cuda_launcher=static, force_disable_caches=True):
        compiled = torch.compile(function)
        compiled(x, y)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with TritonLaunches() as launches, torch.cuda.graph(graph):
            compiled(x, y)
    ((node, parameters),) = kernel_nodes(graph)
    found = launches.of(node)
    if static:
        assert found is None
        return
    assert found is not None
    assert touched(found) == ["r", "r", "w"]
    assert [word(parameters, p.position) for p in found.parameters[:2]] == [x.data_ptr(), y.data_ptr()]


@pytest.mark.gpu
def test_a_captured_descriptor_is_at_its_position() -> None:
    """A tensor map is 128 bytes, and one of its words is the address of what it describes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, out = torch.randn(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")
    mark = torch.zeros(1, device="cuda")
    kernel = CASES["descriptors_from_the_host"].kernel

    def run() -> None:
        described = [TensorDescriptor.from_tensor(tensor, [16, 16]) for tensor in (x, out)]
        kernel[(1,)](*described, mark)

    run()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with TritonLaunches() as launches, torch.cuda.graph(graph):
        run()
    ((node, parameters),) = kernel_nodes(graph)
    found = launches.of(node)
    assert found is not None
    assert touched(found) == ["r", "w", "w"]
    for parameter, tensor in zip(found.parameters, (x, out, mark), strict=True):
        words = 1 if tensor is mark else 16
        assert tensor.data_ptr() in [word(parameters, parameter.position, i) for i in range(words)]
