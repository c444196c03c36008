"""Capabilities, each tried by doing it.

Enters: what is here. Leaves: per capability what was done and seen, or an exception, which the row then tells. What
cannot be tried raises `Absent`. Invariant: nothing is taken from a version number or an import: a graph is captured and
replayed, a module parsed, a kernel compiled.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .doctor_rows import Row
from .runtime.errors import AuxstreamError, MissingDependencyError
from .runtime.settings import Settings, others

CAPABILITIES: Final = "capabilities"
REPLAYS: Final = 8
ABROAD: Final = 90
"""The compute capability that Triton compiles for where there is no GPU."""


@dataclass(slots=True)
class Here:
    """What probes need to know. `graph`: a captured CUDA graph, once there is one."""

    gpu: bool
    settings: Settings
    graph: Any = None


class Absent(Exception):
    """A capability that is not there to be tried: why, and the remedy."""

    def __init__(self, why: str, remedy: str = "") -> None:
        super().__init__(why)
        self.remedy = remedy


class Wrong(Exception):
    """It ran, and did not do what it should."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One capability.

    Attributes:
        run: tries it; returns what was seen.
        needed: whether auxstream needs it here.
        remedy: for failures that bring none of their own.
    """

    name: str
    run: Callable[[Here], str]
    needed: Callable[[Here], bool]
    remedy: str


def tried(probe: Probe, here: Here) -> Row:
    """Run one probe."""
    needed = probe.needed(here)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they would say is in the rows
            says = probe.run(here)
    except Absent as absent:
        return Row(CAPABILITIES, probe.name, "FAILED" if needed else "absent", str(absent), absent.remedy)
    except (ImportError, MissingDependencyError) as error:
        remedy = error.remedy if isinstance(error, MissingDependencyError) else probe.remedy
        return Row(CAPABILITIES, probe.name, "FAILED" if needed else "absent", _told(error), remedy)
    except Exception as error:
        remedy = (error.remedy if isinstance(error, AuxstreamError) else "") or probe.remedy
        return Row(CAPABILITIES, probe.name, "FAILED" if needed else "note", _told(error), remedy)
    return Row(CAPABILITIES, probe.name, "ok", f"{says} ({(time.perf_counter() - start) * 1e3:,.0f} ms)")


def _told(error: Exception) -> str:
    what = f"{error.what}: {error.came}" if isinstance(error, AuxstreamError) else str(error)
    first = what.strip().partition("\n")[0]
    return first if isinstance(error, AuxstreamError | Wrong) else f"{type(error).__name__}: {first}"


# -- capturing ---------------------------------------------------------------------------------------------------------


def simulated_machine(here: Here) -> str:
    """Without a GPU too: a region recorded, proved, and replayed in orders that hurt; and without its fork wait."""
    from .bench.controls import directed_replays, without_waits
    from .capture.graphs import SimulatedGraph
    from .capture.proof import verify

    captured, right = _captured("cpu")
    assert isinstance(captured, SimulatedGraph)
    for number in range(REPLAYS):
        captured.replay()
        if not right(number):
            raise Wrong(f"replay {number} gave wrong numbers")
    report = verify(captured.program)
    if not report.ok:
        raise Wrong(str(report))
    if here.settings.disable:
        return f"{REPLAYS} replays right, on one stream: AUXSTREAM_DISABLE=1"
    faulty = without_waits(captured.program, "fork wait")
    replay = directed_replays(captured, faulty)

    def wrong(number: int) -> bool:
        replay()
        return not right(number)

    if verify(faulty).ok or not any(wrong(number) for number in range(REPLAYS)):
        raise Wrong("a missing wait goes unnoticed")
    return f"two streams: {REPLAYS} adversarial replays right, and proved; without a wait, wrong and refused"


def cuda_graph(here: Here) -> str:
    if not here.gpu:
        raise Absent("no GPU: graphs are recorded and replayed on the simulated machine")
    captured, right = _captured("cuda")
    for number in range(REPLAYS):
        captured.replay()
        if not right(number):
            raise Wrong(f"replay {number} gave wrong numbers")
    here.graph = captured
    streams = len({step.stream for step in captured.program.steps})
    if streams != (1 if here.settings.disable else 2):
        raise Wrong(f"the region was captured on {streams} stream(s)")
    off = ": AUXSTREAM_DISABLE=1" if here.settings.disable else ""
    return f"a region captured on {streams} stream(s){off}, {REPLAYS} replays right"


def graph_introspection(here: Here) -> str:
    if here.graph is None:
        raise Absent("no CUDA graph was captured, so there is none to read", FIRST_A_GRAPH if here.gpu else "")
    from .capture.inspect import inspect

    read = inspect(here.graph.cuda_graph)
    kernels = sum(node.kind == "kernel" for node in read.nodes)
    if read.unreadable:
        raise Wrong(read.unreadable[0])
    if kernels < 4:
        raise Wrong(f"{kernels} kernels were read of a graph that has at least four")
    return f"{kernels} kernels with their arguments and {len(read.edges)} edges read back"


def graph_proof(here: Here) -> str:
    if here.settings.verify == "off":
        raise Absent("AUXSTREAM_VERIFY=off", "unset AUXSTREAM_VERIFY")
    if here.graph is None:
        raise Absent("no CUDA graph was captured, so there is none to prove", FIRST_A_GRAPH if here.gpu else "")
    report = here.graph.report
    if not report.ok:
        raise Wrong(str(report))
    return f"no race among {len(report.nodes)} nodes, each explained"


def _captured(device: str) -> tuple[Any, Callable[[int], bool]]:
    """A graph of one region, which reads what the caller's stream made; and whether its last replay was right. That
    is asked with the number of the replay, and makes the input of the next."""
    import torch

    from .capture.graphs import graph
    from .runtime.regions import parallel

    x = torch.zeros(1000, device=device)

    def work() -> torch.Tensor:
        base = x * 3
        caller, branch = parallel(lambda: base + 1, lambda: base * 2, reads=base, name="doctor")
        return caller + branch

    work()  # kernels load at their first launch
    with torch.no_grad(), graph("doctor", verify="warn", device=device) as captured:
        out = work()

    def right(number: int) -> bool:
        same = bool(out.eq(x * 9 + 1).all())
        x.fill_(number + 1)
        return same

    return captured, right


# -- kernels -----------------------------------------------------------------------------------------------------------

_TWO_OPS: Final = """
#map = affine_map<(d0) -> (d0)>
func.func @doctor(%x: tensor<8xf32>) -> tensor<8xf32> {
  %empty = tensor.empty() : tensor<8xf32>
  %a = linalg.generic {indexing_maps = [#map, #map], iterator_types = ["parallel"]}
      ins(%x : tensor<8xf32>) outs(%empty : tensor<8xf32>) {
    ^bb0(%i: f32, %o: f32):
      %r = arith.addf %i, %i : f32
      linalg.yield %r : f32
  } -> tensor<8xf32>
  %b = linalg.generic {indexing_maps = [#map, #map], iterator_types = ["parallel"]}
      ins(%a : tensor<8xf32>) outs(%empty : tensor<8xf32>) {
    ^bb0(%i: f32, %o: f32):
      %r = arith.mulf %i, %i : f32
      linalg.yield %r : f32
  } -> tensor<8xf32>
  return %b : tensor<8xf32>
}
"""
_ILL_TYPED: Final = "func.func @doctor(%x: f32) -> i32 { return %x : f32 }"


def mlir(here: Here) -> str:
    from .kernels import mlir as bindings

    fused = str(bindings.run_passes(bindings.parse(_TWO_OPS)))
    if fused.count("linalg.generic") != 1:
        raise Wrong(f"upstream's passes left {fused.count('linalg.generic')} ops where they should make one")
    try:
        bindings.parse(_ILL_TYPED)
    except bindings.LoweringError:
        return "a module parsed, verified and fused; an ill-typed one refused"
    raise Wrong("an ill-typed module passed the verifier")


def triton(here: Here) -> str:
    from . import doctor_kernel

    if here.gpu or not (size := doctor_kernel.compiled(ABROAD)):
        found = doctor_kernel.launched("cuda" if here.gpu else "cpu").tolist()
        if found != [number + 1.0 for number in range(100)]:
            raise Wrong(f"a kernel that adds one made {found[:4]} of 0, 1, 2, 3")
        return "a kernel compiled and launched" if here.gpu else "a kernel interpreted: TRITON_INTERPRET=1"
    return f"a kernel compiled for sm_{ABROAD}, {size:,} bytes; no GPU to launch it on"


def c_compiler(here: Here) -> str:
    """What Triton does for each new launcher."""
    chosen = others("CC").get("CC") or shutil.which("gcc") or shutil.which("clang")
    if chosen is None:
        raise Absent("neither CC is set nor gcc or clang on the PATH", COMPILER)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "launcher.c"
        source.write_text("#include <Python.h>\nvoid launch(PyObject *x) { Py_XINCREF(x); }\n")
        include = sysconfig.get_paths()["include"]
        command = [*chosen.split(), "-shared", "-fPIC", f"-I{include}", str(source), "-o", f"{source}.so"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise Wrong(f"{chosen} cannot compile a launcher: {done.stderr.strip().partition(chr(10))[0]}")
    return f"{chosen} compiled a launcher"


# -- the rest ----------------------------------------------------------------------------------------------------------


def nvtx(here: Here) -> str:
    from .runtime import ranges

    try:
        domain = ranges.heard()
    except ImportError as error:
        raise Absent("nvtx is not installed", "pip install nvtx") from error
    on = "AUXSTREAM_NVTX=1" if here.settings.nvtx else "turn ranges on with AUXSTREAM_NVTX=1"
    return f"{'no tool listens' if domain is None else 'a tool listens'} to the domain auxstream; {on}"


def cache_folder(here: Here) -> str:
    from .kernels.store import folder

    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place) as file:
        file.write(b"auxstream")
    return f"{place} can be written"


FIRST_A_GRAPH: Final = "see to the row CUDA graph first"
COMPILER: Final = "install gcc and Python's headers (apt-get install gcc python3-dev), or set CC"


def _always(here: Here) -> bool:
    return True


def _never(here: Here) -> bool:
    return False


def _with_gpu(here: Here) -> bool:
    return here.gpu


def _fusing(here: Here) -> bool:
    return here.settings.fusion != "off"


PROBES: Final = (
    Probe("simulated machine", simulated_machine, _always, "reinstall auxstream and torch"),
    Probe("CUDA graph", cuda_graph, _with_gpu, "see the rows on the GPU and the environment; torch >= 2.11 is needed"),
    Probe("graph introspection", graph_introspection, _with_gpu, "pip install 'cuda-bindings>=12.9'"),
    Probe(
        "graph proof",
        graph_proof,
        lambda here: here.gpu and here.settings.verify != "off",
        "see docs/verify.md; AUXSTREAM_VERIFY=warn goes on without a proof",
    ),
    Probe("MLIR", mlir, _fusing, "pip install 'iree-base-compiler>=3.13', or AUXSTREAM_FUSION=off"),
    Probe("Triton", triton, _with_gpu, "pip install 'triton>=3.6'"),
    Probe("C compiler", c_compiler, _with_gpu, COMPILER),
    Probe("NVTX", nvtx, lambda here: here.settings.nvtx, "pip install nvtx"),
    Probe("cache folder", cache_folder, _never, "set AUXSTREAM_CACHE_DIR to a folder that can be written"),
)
