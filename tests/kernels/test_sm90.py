"""Kernels compiled for sm_90, with or without a GPU: every op and every pattern; how they touch memory, and round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from patterns import PATTERNS
from pointwise_cases import pointwise_cases
from rowwise_cases import rowwise_cases

HERE = Path(__file__).parent
Kernels = list[dict[str, Any]]


def started(folder: Path, jobs: Sequence[str]) -> subprocess.Popen[str]:
    """A child that compiles: Triton compiles nothing in a process in which it interprets."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "AUXSTREAM_CACHE_DIR": str(folder / "auxstream")}
    command = [sys.executable, "compile_worker.py", *jobs]
    return subprocess.Popen(command, cwd=HERE, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    jobs = (["aligned", "arithmetic", "many"], ["ops", "odd", "long"])
    children = [started(tmp_path_factory.mktemp("compiled"), some) for some in jobs]
    found: Kernels = []
    for child in children:
        lines, errors = child.communicate(timeout=280)
        assert child.returncode == 0, errors
        found += [json.loads(line) for line in lines.splitlines()]
    return found


def of(kernels: Kernels, job: str) -> Kernels:
    return [kernel for kernel in kernels if kernel["job"] == job]


def told(kernel: dict[str, Any], *starts: str) -> int:
    """How many of a kernel's instructions start so."""
    return sum(count for name, count in kernel["told"].items() if name.startswith(starts))


def narrow(kernel: dict[str, Any]) -> int:
    """Loads and stores of one element of 16 bits."""
    return told(kernel, "ld.global.b16", "st.global.b16")


def flushing(kernel: dict[str, Any]) -> list[str]:
    """Instructions that flush subnormal numbers, but for the one CUDA's own exponential is made of."""
    return [name for name in kernel["told"] if ".ftz" in name and not name.startswith("ex2")]


@pytest.mark.parametrize("job", ["aligned", "many", "odd", "long"])
def test_every_pattern_compiles(kernels: Kernels, job: str) -> None:
    assert {kernel["name"] for kernel in of(kernels, job)} == set(PATTERNS)
    assert all(kernel["cubin"] for kernel in of(kernels, job))


def test_every_op_compiles(kernels: Kernels) -> None:
    names = "; ".join(kernel["name"] for kernel in of(kernels, "ops"))
    wanted = {str(case.target).removeprefix("aten.") for case in (*pointwise_cases(), *rowwise_cases())}
    assert not {target for target in wanted if f"{target}(" not in names}
    assert all(kernel["cubin"] for kernel in of(kernels, "ops"))


def test_aligned_rows_move_in_wide_words(kernels: Kernels) -> None:
    """Of 4,096 columns: two or four 32-bit words at a time."""
    for kernel in of(kernels, "aligned"):
        if "4096" not in kernel["variant"] and kernel["name"] in ("gemma_norm", "scaled_by_choice"):
            continue  # the 4,096 numbers of a weight, for which there are enough threads; four columns
        assert told(kernel, "ld.global.v"), kernel
        assert not narrow(kernel), kernel


def test_long_rows_move_in_the_widest(kernels: Kernels) -> None:
    for kernel in of(kernels, "long"):
        if "1 x 4," not in kernel["variant"]:
            assert told(kernel, "ld.global.v4.b32", "ld.global.v2.b64"), kernel
            assert not narrow(kernel), kernel


def test_rows_that_are_not_aligned_do_not(kernels: Kernels) -> None:
    """The count above sees narrow words where there are some."""
    assert sum(map(narrow, of(kernels, "odd"))) > len(PATTERNS)


def test_a_few_rows_are_read_before_anything_waits(kernels: Kernels) -> None:
    """Of many rows, weights are read behind the reduction: others of a multiprocessor's programs hide that."""
    ahead = [kernel for kernel in of(kernels, "aligned") if kernel["variant"].startswith("ahead")]
    assert {"rms_norm", "layer_norm", "softmax"} <= {kernel["name"] for kernel in ahead}
    picked = ("embedded", "scaled_by_choice")  # what is read depends on what was read, and on a check of it
    assert not [kernel for kernel in ahead if kernel["late"] and kernel["name"] not in picked]
    resident = [kernel for kernel in of(kernels, "many") if kernel["variant"].startswith("resident")]
    assert [kernel for kernel in resident if kernel["name"] == "layer_norm" and kernel["late"]]


def test_a_softmax_of_few_rows_divides_once_a_row(kernels: Kernels) -> None:
    found = [
        kernel
        for kernel in of(kernels, "aligned")
        if kernel["name"] == "softmax" and kernel["variant"].startswith("ahead")
    ]
    assert found
    assert all(told(kernel, "div.") == 1 for kernel in found)


def test_arithmetic_is_eagers(kernels: Kernels) -> None:
    ours, *_ = of(kernels, "arithmetic")
    assert told(ours, "div.rn.f32")
    assert told(ours, "sqrt.rn.f32")
    assert not told(ours, "div.full", "div.approx", "sqrt.approx")
    assert not flushing(ours)


def test_contraction_would_show(kernels: Kernels) -> None:
    ours, fast, _ = of(kernels, "arithmetic")
    assert told(fast, "fma.rn") > told(ours, "fma.rn")
    assert flushing(fast)
