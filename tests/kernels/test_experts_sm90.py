"""The experts' kernels compiled for sm_90, with or without a GPU: what they touch, and how wide they read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from auxstream.kernels.triton_accesses import analyse

HERE = Path(__file__).parent
MOST_SHARED = 227 * 1024
TOUCHED = {
    "experts_up_one": {"x": "r", "chosen": "r", "w": "r", "bias": "r", "act": "w"},
    "experts_down_one": {"act": "r", "chosen": "r", "scale": "r", "w": "r", "bias": "r", "out": "w"},
    "experts_up_few": {"x": "r", "chosen": "r", "w": "r", "bias": "r", "act": "w"},
    "experts_down_few": {"act": "r", "chosen": "r", "scale": "r", "w": "r", "bias": "r", "part": "w"},
    "experts_group": {"chosen": "r", "order": "w", "start": "w"},
    "experts_up_many": {"x": "r", "order": "r", "start": "r", "w": "r", "bias": "r", "act": "w"},
    "experts_down_many": {
        "act": "r", "order": "r", "start": "r", "scale": "r", "w": "r", "bias": "r", "part": "w",
    },
    "experts_sum": {"part": "r", "chosen": "r", "out": "w"},
}  # fmt: skip
Kernels = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """By case and kernel, from a child: Triton compiles nothing in a process in which it interprets."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = tmp_path_factory.mktemp("experts") / "triton"
    environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "experts_worker.py"]
    done = subprocess.run(command, cwd=HERE, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(kernel["case"], kernel["kernel"]): kernel for kernel in found}


def told(kernel: dict[str, Any], *starts: str) -> int:
    """How many of a kernel's instructions start so."""
    return sum(count for name, count in kernel["told"].items() if name.startswith(starts))


def test_every_form_compiles_and_fits(kernels: Kernels) -> None:
    assert {name for _, name in kernels} == set(TOUCHED)
    assert all(kernel["shared"] <= MOST_SHARED for kernel in kernels.values())


def test_the_proof_knows_what_is_read_and_written(kernels: Kernels) -> None:
    """Nothing has to be assumed. A bias that is not there is not read, nor choices where every pair has a row."""
    for (case, name), kernel in kernels.items():
        found = analyse(kernel["ttir"])
        assert not found.assumed
        expected = dict(TOUCHED[name])
        if "bias" in expected and not case.startswith("gpt_oss"):
            expected["bias"] = ""
        if name == "experts_sum" and case == "gemma4 512":
            expected["chosen"] = ""
        assert {p.name: "r" * p.reads + "w" * p.writes for p in found.parameters} == expected


def test_weights_of_one_token_move_in_wide_words_all_in_flight(kernels: Kernels) -> None:
    """Sixteen bytes at a time (loads of weights carry a cache policy, so a dot ends what is counted), and no barrier
    but those of the last sums."""
    up, down = kernels["gemma4 1", "experts_up_one"], kernels["gemma4 1", "experts_down_one"]
    assert (up["told"]["ld.global.v4.b32"], up["told"]["ld.global."]) == (2816 // 128, 2 * 2816 // 128)
    assert (down["told"]["ld.global.v4.b32"], down["told"]["ld.global."]) == (6, 6)
    assert told(up, "bar.sync") == 1
    assert told(down, "bar.sync") <= 2


@pytest.mark.parametrize("case", ["gemma4 8", "gemma4 512", "gpt_oss 1"])
def test_weights_of_several_tokens_are_copied_ahead(kernels: Kernels, case: str) -> None:
    for name in ("up", "down"):
        kernel = kernels[case, f"experts_{name}_{'many' if case == 'gemma4 512' else 'few'}"]
        assert told(kernel, "cp.async.cg.shared.global"), kernel["told"]
        assert not told(kernel, "ld.global.b16") or case == "gpt_oss 1"  # whose biases take turns
        assert told(kernel, "wgmma.mma_async" if case == "gemma4 512" else "mma.sync")
