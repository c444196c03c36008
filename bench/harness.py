"""The one way benchmarks here are run: variants interleaved, medians with spread, JSON with the machine's description.

Enters: named variants, each a callable that returns one sample. Leaves: `Sample`s per variant.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of a variant's samples and the middle half around it, in `unit`."""

    median: float
    low: float
    high: float
    samples: int
    unit: str

    def __str__(self) -> str:
        return f"{self.median:8.2f} {self.unit} [{self.low:.2f} .. {self.high:.2f}]"


def interleave(variants: Mapping[str, Callable[[], float]], rounds: int, unit: str) -> dict[str, Figure]:
    """Run every variant once per round, in turn, so that drift hits all alike. The first round warms up."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            value = variant()
            if turn:
                samples[name].append(value)
    return {name: figure(values, unit) for name, values in samples.items()}


def figure(values: list[float], unit: str) -> Figure:
    """Summarise samples (at least two). Quartiles of two lie outside of them: what was not seen is not said."""
    low, median, high = statistics.quantiles(values, n=4)
    return Figure(median, max(low, min(values)), min(high, max(values)), len(values), unit)


def machine() -> dict[str, str]:
    """What the figures are measured on, and when."""
    described = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    for package in ("triton", "transformers"):
        try:
            described[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            described[package] = "none"
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = str(torch.version.cuda)
        described["driver"] = _driver()
    return described


@functools.cache
def _driver() -> str:
    """The driver's version, which only its own tool knows."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown, no nvidia-smi"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:  # no reason to lose figures
        return "unknown, nvidia-smi does not answer"
    return said.stdout.partition("\n")[0].strip() or f"unknown, nvidia-smi exits with {said.returncode}"


def device_time(run: Callable[[], object], times: int) -> float:
    """Microseconds of device time per call, over `times` calls enqueued back to back on the current stream."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1000 / times


def write(path: str | None, name: str, results: Mapping[str, Any]) -> None:
    """Write the results as JSON, with the command and the machine, if a path was given.

    To be called whenever there is something new: what stands there before is whole until the new is, so that a process
    which is stopped, or fails, leaves all but its last part.
    """
    if path is None:
        return
    arguments = [Path(given).name if given == path else given for given in sys.argv[1:]]
    command = " ".join(["python -m", f"auxstream.bench.{name}", *arguments])
    document = {"benchmark": name, "command": command, "machine": machine(), "results": _plain(results)}
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(json.dumps(document, indent=2) + "\n")
    os.replace(unfinished, path)


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value
