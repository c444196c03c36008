"""Attention's kernels compiled for sm_90, with or without a GPU: how they touch memory, and what is known of that."""

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
Kernels = list[dict[str, Any]]
DIRECT, NO_MASK = ("gemma4 sliding 32",), ("no mask",)
"""Cases in which one program sees all keys of a row and head; in which all keys are seen."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """By a child: Triton compiles nothing in a process in which it interprets."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "attention_worker.py"]
    done = subprocess.run(command, cwd=HERE, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(kernels: Kernels, kernel: str) -> Kernels:
    return [found for found in kernels if found["kernel"] == kernel]


def told(kernel: dict[str, Any], *starts: str) -> int:
    """How many of a kernel's instructions start so."""
    return sum(count for name, count in kernel["told"].items() if name.startswith(starts))


def test_every_case_compiles(kernels: Kernels) -> None:
    parts, wholes = ({one["case"] for one in of(kernels, name)} for name in ("attention_part", "attention_whole"))
    assert len(parts) == 9
    assert parts - wholes == set(DIRECT)
    assert all(one["shared"] <= 227 * 1024 for one in kernels)


def test_keys_and_values_move_in_wide_words(kernels: Kernels) -> None:
    for one in of(kernels, "attention_part"):
        assert told(one, "ld.global.v4.b32", "cp.async.cg.shared.global"), one["case"]


def test_products_run_on_tensor_cores(kernels: Kernels) -> None:
    for one in of(kernels, "attention_part"):
        assert bool(told(one, "mma.sync")) == (one["case"] != "float32"), one["case"]


def test_the_proof_knows_what_is_read_and_written(kernels: Kernels) -> None:
    for one in kernels:
        found = analyse(one["ttir"])
        assert not found.assumed, one["case"]
        touched = {parameter.name: "r" * parameter.reads + "w" * parameter.writes for parameter in found.parameters}
        touched = {name: how for name, how in touched.items() if how}
        if one["kernel"] == "attention_whole":
            assert touched == {"parts": "r", "peaks": "r", "totals": "r", "out": "w"}
            continue
        expected = {"q": "r", "k": "r", "v": "r", "out": "w"}
        expected |= {} if one["case"] in DIRECT else {"peaks": "w", "totals": "w"}
        assert touched == expected | ({} if one["case"] in NO_MASK else {"mask": "r"}), one["case"]
