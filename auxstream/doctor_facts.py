"""What is here: versions, the driver and GPUs, settings in force and where each comes from, what others' variables do.

Enters: nothing but the machine. Leaves: rows. Invariant: nothing here raises, whatever is missing or malformed, and a
fact that hurts has its remedy.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from .doctor_rows import Row
from .runtime.settings import MEANING, Setting, Settings, others

VERSIONS: Final = "versions"
DEVICE: Final = "device"
SETTINGS_IN_FORCE: Final = "settings (environment over options in code over defaults)"
ENVIRONMENT: Final = "environment of CUDA, torch and Triton"

Needed = Literal["always", "gpu", "fusion", "nvtx", "never"]


@dataclass(frozen=True, slots=True)
class Package:
    """A package auxstream uses: its name on PyPI, the module that is imported, the least version, when it is needed."""

    name: str
    module: str
    least: str
    needed: Needed
    without: str
    """What goes without it."""

    @property
    def wanted(self) -> str:
        return f"{self.name}>={self.least}" if self.least else self.name


PACKAGES: Final = (
    Package("torch", "torch", "2.11", "always", "nothing works"),
    Package("numpy", "numpy", "", "always", "nothing works"),
    Package("pyyaml", "yaml", "", "always", "no Options, so nothing is compiled"),
    Package("tqdm", "tqdm", "", "always", "no bar over captures, so nothing is compiled"),
    Package("rich", "rich", "", "always", "no tables of the command line"),
    Package("triton", "triton", "3.6", "gpu", "fused ops are run by torch, and kernels of our own not at all"),
    Package("cuda-bindings", "cuda.bindings", "12.9", "gpu", "no regions on a GPU, no proofs of CUDA graphs"),
    Package("iree-base-compiler", "iree.compiler", "3.13", "fusion", "no MLIR, so no fusion"),
    Package("nvtx", "nvtx", "", "nvtx", "no NVTX ranges"),
    Package("transformers", "transformers", "5.17", "never", "no models of Hugging Face: `demo`, `run`"),
)
LEAST_PYTHON: Final = (3, 11)


def packages(gpu: bool, settings: Settings) -> Iterator[Row]:
    """Versions, and what is missing or too old."""
    fits = sys.version_info[:2] >= LEAST_PYTHON
    remedy = "" if fits else f"Python >= {'.'.join(map(str, LEAST_PYTHON))} is needed"
    yield Row(VERSIONS, "python", "ok" if fits else "FAILED", platform.python_version(), remedy)
    yield Row(VERSIONS, "auxstream", "ok", _version("auxstream") or "run from its source, not installed")
    needed = {
        "always": True,
        "gpu": gpu,
        "fusion": settings.fusion != "off",
        "nvtx": settings.nvtx,
        "never": False,
    }
    for package in PACKAGES:
        yield _package(package, needed[package.needed])


def _package(package: Package, needed: bool) -> Row:
    install = f"pip install '{package.wanted}'"
    if not _found(package.module):
        says = f"not installed: {package.without}" + ("" if needed else "; not needed here")
        return Row(VERSIONS, package.name, "FAILED" if needed else "absent", says, install)
    version = _version(package.name) or getattr(importlib.import_module(package.module), "__version__", "unknown")
    if _numbers(version) < _numbers(package.least):
        says = f"{version}, and {package.least} is the least"
        return Row(VERSIONS, package.name, "FAILED" if needed else "note", says, install)
    return Row(VERSIONS, package.name, "ok", version)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:2]))


# -- the device --------------------------------------------------------------------------------------------------------


def has_gpu() -> bool:
    """Whether torch can use a GPU here."""
    torch = _torch()
    return torch is not None and not isinstance(torch, Exception) and bool(torch.cuda.is_available())


def _torch() -> Any:
    """torch; None where it is not installed, and the error where it cannot be imported."""
    try:
        return importlib.import_module("torch") if _found("torch") else None
    except Exception as error:  # a library of CUDA's that is missing, another's binary interface
        return error


def device() -> Iterator[Row]:
    """Driver, CUDA and GPUs; or why there is none."""
    yield _driver()
    torch = _torch()
    if torch is None:
        yield Row(DEVICE, "GPU", "absent", "torch is not installed, so none was looked for")
        return
    if isinstance(torch, Exception):
        says = f"torch cannot be imported, so none was looked for: {_first_line(torch)}"
        yield Row(DEVICE, "GPU", "FAILED", says, "install torch anew, with the CUDA libraries it names")
        return
    yield Row(DEVICE, "CUDA of torch", "ok" if torch.version.cuda else "absent", torch.version.cuda or "none")
    if not torch.cuda.is_available():
        why, remedy = _why_no_gpu(torch)
        works = "the simulated machine stands in: tracing, fusing, capturing, proving and replaying work, at no speed"
        yield Row(DEVICE, "GPU", "absent", f"{why}; {works}", remedy)
        return
    for number in range(torch.cuda.device_count()):
        try:
            yield _gpu(number, torch.cuda.get_device_properties(number))
        except Exception as error:  # the first call that makes a context, which a GPU may refuse
            remedy = "see with nvidia-smi whether another process has it to itself, or it has to be reset"
            yield Row(DEVICE, f"GPU {number}", "FAILED", _first_line(error), remedy)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _gpu(number: int, properties: Any) -> Row:
    capability = properties.major, properties.minor
    says = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{capability[0]}{capability[1]}, "
        f"{properties.multi_processor_count} SMs"
    )
    says += ", a MIG slice" if "MIG" in properties.name else ""
    if capability < (8, 0):
        return Row(DEVICE, f"GPU {number}", "note", says, "models in bfloat16 want sm_80 or later")
    return Row(DEVICE, f"GPU {number}", "ok", says)


def _driver() -> Row:
    found: list[str] = []
    told = Path("/proc/driver/nvidia/version")
    if told.is_file() and (version := re.search(r"\d+\.\d+(\.\d+)?", told.read_text())):
        found.append(version[0])
    try:
        from .runtime import driver

        code, number = driver.cuda.cuDriverGetVersion()
        found += [] if code else [f"CUDA {number // 1000}.{number % 1000 // 10}"]
    except Exception as error:  # cuda-python is missing, or finds no driver to load
        found += [f"not asked through cuda-python: {type(error).__name__}"] if found else []
    return Row(DEVICE, "driver", "ok" if found else "absent", ", ".join(found) or "no NVIDIA driver")


def _why_no_gpu(torch: Any) -> tuple[str, str]:
    if torch.version.cuda is None:
        index = "https://download.pytorch.org/whl/cu130"
        return "none: torch is built without CUDA", f"where there is one: pip install torch --index-url {index}"
    if others("CUDA_VISIBLE_DEVICES").get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "none: CUDA_VISIBLE_DEVICES hides them all", "unset CUDA_VISIBLE_DEVICES"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"none: {str(error).partition(chr(10))[0]}", "`nvidia-smi` must list a GPU: install or update the driver"
    return "none", "`nvidia-smi` must list a GPU"


# -- settings ----------------------------------------------------------------------------------------------------------


def settings_in_force(found: Sequence[Setting]) -> Iterator[Row]:
    """Every `AUXSTREAM_*` variable, what is in force, and where that comes from; faults come first."""
    defaults = _defaults()
    for setting in sorted(found, key=lambda setting: setting.fault is None):
        if setting.fault is not None:
            says = f"{setting.value!r}: {_fault(setting)}; until it is corrected, nothing of auxstream can be used"
            yield Row(SETTINGS_IN_FORCE, setting.name, "FAILED", says, setting.fault.remedy)
        elif setting.value is not None:
            state = "note" if (setting.name, setting.value) in _TELLING else "ok"
            effect = _TELLING.get((setting.name, setting.value), "")
            says = f"{setting.value!r}, from the environment{effect and f': {effect}'}"
            yield Row(SETTINGS_IN_FORCE, setting.name, state, says, f"unset {setting.name}" if effect else "")
        else:
            yield Row(SETTINGS_IN_FORCE, setting.name, "ok", defaults.get(setting.name, "not set"))


def _fault(setting: Setting) -> str:
    assert setting.fault is not None
    if setting.fault.what.startswith("malformed"):
        return f"malformed; expected {setting.fault.expected}"
    alike = difflib.get_close_matches(setting.name, MEANING, 1)
    return f"there is no such variable{f', but {alike[0]}' if alike else ''}"


_TELLING: Final = {
    ("AUXSTREAM_DISABLE", "1"): "the kill switch, so nothing overlaps",
    ("AUXSTREAM_VERIFY", "off"): "no graph is proved",
    ("AUXSTREAM_FUSION", "off"): "no kernels are fused",
}
"""Settings whose effect may surprise whoever did not set them."""


def _defaults() -> dict[str, str]:
    """What is in force where nothing is set, and the option in code that may say otherwise."""
    try:
        from .capture.options import Options
        from .kernels.store import folder

        options, cache = Options(), folder()
    except Exception as error:  # what is missing has a row of its own
        return dict.fromkeys(_OPTIONS, f"not told, as Options cannot be imported ({type(error).__name__})")
    values = {
        "AUXSTREAM_DISABLE": "0",
        "AUXSTREAM_NVTX": "0",
        "AUXSTREAM_CACHE_DIR": str(cache),
        "AUXSTREAM_HANDOFF": options.handoff,
        "AUXSTREAM_VERIFY": options.verify,
        "AUXSTREAM_TOKEN_THRESHOLD": options.token_threshold or "no bound",
        "AUXSTREAM_DUMP_DIR": options.dump_dir or "nothing is written",
        "AUXSTREAM_OVERLAP": options.overlap or "what is measured to be faster",
        "AUXSTREAM_FUSION": "on" if options.mlir_elementwise_fusion else "off",
        "AUXSTREAM_FUSION_SAFE": options.fusion_safe or "no region",
    }
    in_code = {name: f"; in code: Options.{option}" for name, option in _OPTIONS.items()}
    return {name: f"{value}, by default{in_code.get(name, '')}" for name, value in values.items()}


_OPTIONS: Final = {
    "AUXSTREAM_HANDOFF": "handoff",
    "AUXSTREAM_VERIFY": "verify",
    "AUXSTREAM_TOKEN_THRESHOLD": "token_threshold",
    "AUXSTREAM_DUMP_DIR": "dump_dir",
    "AUXSTREAM_OVERLAP": "overlap, whose rules come first",
    "AUXSTREAM_FUSION": "mlir_elementwise_fusion",
    "AUXSTREAM_FUSION_SAFE": "fusion_safe, whose rules come first",
}


# -- others' variables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Matter:
    """Variables of one meaning, which of their values hurt, and what is to be known of them.

    Attributes:
        names: the first that is set counts; where none is, the last is named.
        hurts: what a value does that one may not want; "" where it does no harm.
        unset: what holds where none is set.
    """

    names: tuple[str, ...]
    hurts: Callable[[str, bool], str]
    unset: str


def _allocator(value: str, gpu: bool) -> str:
    if re.search(r"backend\s*:\s*cudaMallocAsync", value):
        return "cudaMallocAsync keeps no history, without which no CUDA graph is proved"
    return ""


def _blocking(value: str, gpu: bool) -> str:
    return "" if value in ("", "0") else "the host waits for each launch, so nothing overlaps in eager; replays do"


def _connections(value: str, gpu: bool) -> str:
    return "one hardware queue for all streams, so branches wait for one another" if value.strip() == "1" else ""


def _no_caching(value: str, gpu: bool) -> str:
    return "" if value in ("", "0") else "tensors made in a capture need the caching allocator"


def _interpret(value: str, gpu: bool) -> str:
    return "kernels run on the host, which no capture can record" if gpu and value not in ("", "0") else ""


def _harmless(value: str, gpu: bool) -> str:
    return ""


MATTERS: Final = (
    Matter(
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),  # to torch, the older name goes first
        _allocator,
        "graph_capture_record_stream_reuse is off: in a capture, blocks with record_stream stay taken until it ends",
    ),
    Matter(("PYTORCH_NO_CUDA_MEMORY_CACHING",), _no_caching, "the caching allocator is in use"),
    Matter(("CUDA_LAUNCH_BLOCKING",), _blocking, "launches return at once"),
    Matter(("CUDA_DEVICE_MAX_CONNECTIONS",), _connections, "8 hardware queues, CUDA's default"),
    Matter(("CUDA_VISIBLE_DEVICES",), _harmless, "all GPUs are visible"),
    Matter(("TRITON_INTERPRET",), _interpret, "kernels are compiled"),
    Matter(("NVTX_INJECTION64_PATH",), _harmless, "no tool asks to listen to NVTX"),
)


def environment(gpu: bool) -> Iterator[Row]:
    """Others' variables that change what auxstream does."""
    for matter in MATTERS:
        given = others(*matter.names)
        name = next((name for name in matter.names if name in given), matter.names[-1])
        if name not in given:
            yield Row(ENVIRONMENT, name, "ok", f"not set: {matter.unset}")
            continue
        value = given[name]
        effect = matter.hurts(value, gpu)
        says = f"{value!r}{effect and f': {effect}'}{_reuse(value) if matter.hurts is _allocator else ''}"
        yield Row(ENVIRONMENT, name, "note" if effect else "ok", says, f"unset {name}" if effect else "")


def _reuse(conf: str) -> str:
    on = re.search(r"graph_capture_record_stream_reuse\s*:\s*True", conf) is not None
    segments = re.search(r"expandable_segments\s*:\s*True", conf) is not None
    return f": reuse within captures {'on' if on else 'off'}, expandable segments {'on' if segments else 'off'}"
