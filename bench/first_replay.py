"""Time to the first replay: a process of its own, from its start to the first result of a compiled decode step.

    python -m auxstream.bench.first_replay [--layers N] [--batch B] [--size full|tiny] [--device cuda|cpu] [--json PATH]

Measures: seconds of each stage, first with empty folders for generated and for compiled kernels, then with the same
folders again: imports, making the weights, the step's caches, `compile`, the first call and its end on the device.
Does not measure: reading weights from disk (they are random). Needs a GPU, or `--device cpu --size tiny` to try it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .command import CommandLine
from .harness import write

WEIGHTS = "weights"


def first_replays(options: argparse.Namespace, limit: float, found: dict[str, Any]) -> None:
    """Fill in the seconds per stage with empty caches, and with warm ones. Raises subprocess.TimeoutExpired behind
    `limit` s."""
    end = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        for caches in ("cold", "warm"):
            figures = Path(folder) / "figures.json"
            settings = [f"AUXSTREAM_CACHE_DIR={folder}/auxstream", f"TRITON_CACHE_DIR={folder}/triton"]
            command = ["env", *settings, sys.executable, "-m", "auxstream.bench.first_replay", "--json", str(figures)]
            command += ["--layers", str(options.layers), "--batch", str(options.batch), "--since", str(time.time())]
            command += ["--size", options.size, "--device", options.device]
            subprocess.run(command, check=True, timeout=max(1.0, end - time.monotonic()))
            stages: dict[str, float] = json.loads(figures.read_text())["results"]
            whole = sum(stages.values())
            found[caches] = {**stages, "whole": whole, "whole but for the weights": whole - stages[WEIGHTS]}
            told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found[caches].items())
            print(f"first replay, caches {caches}, s: {told}", flush=True)


def staged(options: argparse.Namespace) -> dict[str, float]:
    """What this process takes for each stage, since it was started."""
    stages: dict[str, float] = {}
    last = options.since or time.time()

    def done(stage: str) -> None:
        nonlocal last
        now = time.time()
        stages[stage], last = now - last, now

    import torch

    from ..capture.compiler import compile
    from ..capture.huggingface import DecodeStep, build, gemma4_config

    device = torch.device(options.device)
    done("imports")
    model = build(gemma4_config(options.layers, options.size), device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    done(WEIGHTS)
    step = DecodeStep(model, options.batch, options.context)
    ids = torch.zeros(options.batch, 1, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    done("caches")
    compiled = compile(step, (ids, position))
    done("compile")
    result = compiled(ids, position)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert result.shape[0] == options.batch
    done("first call")
    return stages


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = CommandLine(__doc__, rounds=None, limit=300, quick={"layers": 2}, devices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--since", type=float, help="this is the process to be measured, started at that time")
    options = parser.options(arguments)
    results: dict[str, Any] = {}
    try:
        if options.since is None:
            first_replays(options, options.limit, results)
        else:
            results |= staged(options)
    finally:
        write(options.json, "first_replay", results)
    return results


if __name__ == "__main__":
    main()
