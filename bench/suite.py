"""`auxstream bench`: all benchmarks by name, each in a process of its own, within a time limit.

Enters: names, or all of them. Leaves: their output as it comes, JSON, and a line for each: done, failed, or skipped,
and why. Invariant: one that fails or takes too long ends alone; what it started ends with it, as it does if the whole
is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal

from ..runtime.errors import InputError
from .harness import machine


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module and its arguments.

    Attributes:
        what: it measures, in a line.
        full, quick: seconds it may take, whole and under `--quick`; `quick` 0: it is not among the quick ones.
        module: its name; it takes what bench/command.py takes.
        arguments: in both forms.
        whole: further arguments, of the whole form.
        no_gpu: arguments with which it says something true where there is no GPU; None: there are none.
        hf: whether it needs the extra `hf`.
    """

    what: str
    full: float
    quick: float = 0
    module: str = ""
    arguments: str = ""
    whole: str = ""
    no_gpu: str | None = None
    hf: bool = True

    def limit(self, quick: bool) -> float:
        return self.quick or self.full if quick else self.full

    def command(self, name: str, quick: bool, gpu: bool, to: Path) -> list[str]:
        """In its own time limit it leaves out, by name, what does not fit, before it is stopped as a whole."""
        module = self.module or f"auxstream.bench.{name.replace('-', '_')}"
        limit = self.limit(quick)
        given = [self.arguments, "" if quick else self.whole] if gpu else [self.no_gpu or ""]
        given = shlex.split(" ".join(["--quick" if quick else "", *given]))
        soft = f"{max(limit - 12, limit * 0.6):.0f}"
        return [sys.executable, "-m", module, "--json", str(to), "--limit", soft, *given]


SUITE: Final[Mapping[str, Benchmark]] = {
    "handoff": Benchmark("one handoff: on the host in eager, on the device in a graph", 40, 25, hf=False),
    "fusion": Benchmark(
        "fused chains against eager, torch.compile, a device copy and an empty kernel", 170, 40,
        whole="--hidden 4096 16384 --rows 1 64 --rounds 10", hf=False,
    ),
    "overlap": Benchmark("feed-forward blocks on two streams, against every other way, and its bounds", 220, 70),
    "models": Benchmark(
        "a decode step of all 30 layers: Hugging Face's in a graph, serial, overlapped, torch.compile", 300, 70,
        arguments="--parts decode --batch 1 --variants 'own kernels, serial' 'own kernels, chosen'",
        whole="--reduce-overhead",
    ),
    "memory": Benchmark(
        "bytes that a captured prefill reserves, by what secures lifetimes", 90, 30,
        no_gpu="--device cpu --size tiny --layers 4 --tokens 32",
    ),
    "verify": Benchmark(
        "the race checker alone, in nodes per second", 60, 25, whole="--rounds 2",
        no_gpu="--rounds 2 --nodes 10000 30000", hf=False,
    ),
    "capture": Benchmark("a capture with its proof and without", 100, 40),
    "ffn": Benchmark("launches of feed-forward blocks, by fusion", 40),
    "decode": Benchmark("launches of a decode step per layer, by kind", 80, arguments="--layers 4 --compile-limit 40"),
    "experts": Benchmark(
        "the experts of a mixture against torch's grouped product", 40, arguments="--batch 1 8 32", hf=False
    ),
    "router": Benchmark("a router in two kernels against its ops", 40, arguments="--batch 1 64", hf=False),
    "attention": Benchmark(
        "attention at one query per row against torch's own", 40, arguments="--context 1024", hf=False
    ),
    "products": Benchmark("products of few rows against cuBLAS", 50, hf=False),
    "prefill": Benchmark(
        "a prompt through pieces against torch.compile", 80, module="auxstream.bench.models",
        arguments="--parts prefill --layers 4",
    ),
    "first-replay": Benchmark("a process from its start to the first result", 60, arguments="--layers 4"),
    "equality": Benchmark(
        "architectures on one stream and on several, bit for bit", 90,
        arguments="--model gemma4 deepseek_v3 qwen2_moe glm4_moe --batch 1 --replays 200 --prompts 20",
        no_gpu="--device cpu --model gemma4 deepseek_v3 --batch 1 --replays 3 --prompts 0",
    ),
}  # fmt: skip

State = Literal["done", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a benchmark."""

    state: State
    seconds: float = 0
    limit: float = 0
    why: str = ""
    left_out: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        if self.state == "skipped":
            return f"skipped: {self.why}"
        said = f"{self.state}, {self.seconds:.0f} of {self.limit:.0f} s"
        said += f": {self.why}" if self.why else ""
        return said + (f"; left out: {'; '.join(self.left_out)}" if self.left_out else "")


def run_bench(options: argparse.Namespace, suite: Mapping[str, Benchmark] = SUITE) -> int:
    """The command. Exit code: 0 all that could run here did, 1 something failed or nothing could run.

    Raises:
        InputError: a name is not one of the suite's, or files to be compared are not results.
    """
    if options.compare:
        from .compare import compare

        print(compare(*options.compare))
        return 0
    if unknown := [name for name in options.names if name not in suite]:
        raise InputError("no such benchmark", expected=", ".join(suite), came=", ".join(unknown))
    if options.list:
        for name, benchmark in suite.items():
            quick = f"{benchmark.quick:.0f}" if benchmark.quick else "-"
            needs = " and ".join([*(["a GPU"] if benchmark.no_gpu is None else []), *(["hf"] if benchmark.hf else [])])
            print(f"{name:13} {quick:>4} {benchmark.full:5.0f} s  {benchmark.what}" + (f" ({needs})" if needs else ""))
        return 0
    names = options.names or [name for name, benchmark in suite.items() if benchmark.quick or not options.quick]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.json is None or options.json.suffix == ".json" else options.json
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = run_all({name: suite[name] for name in names}, options.quick, folder, options.json)
    print("\n" + "\n".join(f"{name:13} {outcome}" for name, outcome in outcomes.items()))
    ran = [outcome for outcome in outcomes.values() if outcome.state != "skipped"]
    return 0 if ran and all(outcome.state == "done" for outcome in ran) else 1


def run_all(suite: Mapping[str, Benchmark], quick: bool, folder: Path, to: Path | None) -> dict[str, Outcome]:
    """One after the other; their JSON lies in `folder`, and `to` is written anew after each."""
    import torch

    gpu, outcomes, documents = torch.cuda.is_available(), dict[str, Outcome](), dict[str, Any]()
    for name, benchmark in suite.items():
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        if reason := _cannot(benchmark, gpu):
            outcomes[name] = Outcome("skipped", why=reason)
            print(f"== {name}: skipped: {reason}", flush=True)
        else:
            print(f"== {name}: {benchmark.what}; at most {benchmark.limit(quick):.0f} s", flush=True)
            why, seconds = run_one(benchmark.command(name, quick, gpu, path), benchmark.limit(quick))
            documents[name] = json.loads(path.read_text()) if path.exists() else {}
            path.with_name(f"{path.name}.unfinished").unlink(missing_ok=True)
            left_out = list(_left_out(documents[name].get("results", {})))
            outcomes[name] = Outcome("failed" if why else "done", seconds, benchmark.limit(quick), why, left_out)
            print(f"== {name}: {outcomes[name]}", flush=True)
        if to is not None:
            _write(to, folder, outcomes, documents)
    return outcomes


def run_one(command: list[str], limit: float) -> tuple[str, float]:
    """Run a command; why it failed, or nothing, and the seconds it took. It and all that it started end by `limit`."""
    start = time.monotonic()
    before = signal.signal(signal.SIGTERM, _stopped)
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        why = "" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        why = f"took more than {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        signal.signal(signal.SIGTERM, before)
    return why, time.monotonic() - start


def _stopped(number: int, _: FrameType | None) -> None:
    """Unwind, so that what was started is ended: it is in a session of its own, which no signal to this one reaches."""
    sys.exit(128 + number)


def _cannot(benchmark: Benchmark, gpu: bool) -> str:
    """Why it cannot run here."""
    if not gpu and benchmark.no_gpu is None:
        return "needs a GPU"
    if benchmark.hf and importlib.util.find_spec("transformers") is None:
        return "needs transformers: pip install 'auxstream[hf]'"
    return ""


def _left_out(results: Any) -> Iterable[str]:
    """All that results say was left out."""
    if not isinstance(results, dict):
        return
    for name, value in results.items():
        if name != "left out":
            yield from _left_out(value)
        elif isinstance(value, str):
            yield value.partition("\n")[0]
        else:
            yield from value


def _write(to: Path, folder: Path, outcomes: Mapping[str, Outcome], documents: Mapping[str, Any]) -> None:
    """All of it in one file; in a folder, what became of each beside their own files."""
    here = next((document["machine"] for document in documents.values() if document), None) or machine()
    written: dict[str, Any] = {
        "benchmark": "suite",
        "command": " ".join(["auxstream", *sys.argv[1:]]),
        "machine": here,
        "outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    if to == folder:
        to = folder / "suite.json"
    else:
        written["commands"] = {name: document.get("command") for name, document in documents.items()}
        written["results"] = {name: document.get("results", {}) for name, document in documents.items()}
    to.write_text(json.dumps(written, indent=2) + "\n")
