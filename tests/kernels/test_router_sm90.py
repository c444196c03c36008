"""The router's kernels compiled for sm_90, with or without a GPU: how they touch memory, and what they wait for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from router_cases import CASES, Case

from auxstream.kernels.triton_accesses import analyse

HERE = Path(__file__).parent
Kernels = list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """By a child: Triton compiles nothing in a process in which it interprets."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "router_worker.py"]
    done = subprocess.run(command, cwd=HERE, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def kernels(compiled: Kernels) -> Kernels:
    """Of sizes that models have."""
    return [kernel for kernel in compiled if kernel["job"] == "sizes"]


def told(kernel: dict[str, Any], *starts: str) -> int:
    """How many of a kernel's instructions start so."""
    return sum(count for name, count in kernel["told"].items() if name.startswith(starts))


def of(kernels: Kernels, kernel: str, case: str = "") -> Kernels:
    return [found for found in kernels if found["kernel"].startswith(kernel) and found["case"].startswith(case)]


def test_every_size_compiles(kernels: Kernels) -> None:
    assert len(of(kernels, "router_product")) == len(of(kernels, "router_select")) == 16
    assert all(kernel["cubin"] for kernel in kernels)


def test_every_case_compiles(compiled: Kernels) -> None:
    found = [kernel for kernel in compiled if kernel["job"] == "cases"]
    assert {kernel["case"] for kernel in found} == {case.name for case in CASES if case.tokens}
    assert all(kernel["cubin"] for kernel in found)
    for kernel in found:
        case = next(case for case in CASES if case.name == kernel["case"])
        assert touched(kernel) == expected(case, kernel["kernel"])


def touched(kernel: dict[str, Any]) -> dict[str, str]:
    """What the proof takes the kernel to read and write; nothing may have to be assumed."""
    found = analyse(kernel["ttir"])
    assert not found.assumed
    return {parameter.name: "r" * parameter.reads + "w" * parameter.writes for parameter in found.parameters}


def expected(case: Case, kernel: str) -> dict[str, str]:
    """What its source says."""
    normed = {"squares": "w" if kernel.startswith("router_product") else "r"} if case.rules.eps is not None else {}
    if kernel.startswith("router_product"):
        return {"hidden": "r", "weight": "r", "partial": "w"} | normed | ({"scale": "r"} if case.scaled else {})
    own = ({"bias": "r"} if case.biased else {}) | ({"expert_scale": "r"} if case.scaled else {})
    return {"partial": "r", "index": "w", "weights": "w"} | normed | own


def test_the_proof_knows_what_is_read_and_written(kernels: Kernels) -> None:
    for kernel in of(kernels, "router", "gemma4"):
        normed = {"squares": "w" if kernel["kernel"].startswith("router_product") else "r"}
        own = {"hidden": "r", "weight": "r", "scale": "r", "partial": "w"}
        if kernel["kernel"] == "router_select":
            own = {"partial": "r", "expert_scale": "r", "index": "w", "weights": "w"}
        assert touched(kernel) == normed | own


def test_weights_move_in_wide_words(kernels: Kernels) -> None:
    for kernel in of(kernels, "router_product"):
        assert told(kernel, "ld.global.v4.b32", "cp.async.cg.shared.global"), kernel


def test_a_selection_is_one_warp_that_waits_for_no_other(kernels: Kernels) -> None:
    """Of up to 128 experts: no barrier, no shared memory, and the largest key found in one instruction."""
    small = [kernel for kernel in of(kernels, "router_select") if not kernel["case"].startswith("deepseek")]
    assert len(small) == 12
    for kernel in small:
        assert told(kernel, "redux.sync"), kernel
        assert not told(kernel, "bar.sync", "st.shared", "ld.shared"), kernel


def test_a_product_of_several_warps_does_wait(kernels: Kernels) -> None:
    """The count above sees barriers where there are some."""
    assert all(told(kernel, "bar.sync") for kernel in of(kernels, "router_product_many"))


def test_half_precision_chooses_with_one_search_per_expert(kernels: Kernels) -> None:
    """Key and index in one number; in float32 the index is looked for by itself."""
    (half,), (whole,) = of(kernels, "router_select", "gemma4 1"), of(kernels, "router_select", "glm4_moe 1")
    assert (told(half, "redux.sync.max"), told(half, "redux.sync.min")) == (9, 0)  # one for the softmax
    assert (told(whole, "redux.sync.max"), told(whole, "redux.sync.min")) == (8, 8)
