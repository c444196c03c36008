"""The kernels of products of few rows compiled for sm_90: how they touch memory, and what the proof makes of them."""

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


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """By a child: Triton compiles nothing in a process in which it interprets."""
    folder = tmp_path_factory.mktemp("products")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "AUXSTREAM_CACHE_DIR": str(folder / "auxstream")}
    command = [sys.executable, "products_worker.py"]
    done = subprocess.run(command, cwd=HERE, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(kernels: Kernels, kernel: str) -> Kernels:
    found = [one for one in kernels if one["kernel"] == kernel]
    assert found
    return found


def told(kernel: dict[str, Any], *starts: str) -> int:
    """How many of a kernel's instructions start so."""
    return sum(count for name, count in kernel["told"].items() if name.startswith(starts))


def test_every_size_compiles(kernels: Kernels) -> None:
    assert len({kernel["case"] for kernel in kernels}) == 6
    assert all(kernel["cubin"] for kernel in kernels)


def test_weights_move_in_the_widest_words(kernels: Kernels) -> None:
    """16 bytes a thread, though which weight it is a program finds out by its number."""
    for kernel in of(kernels, "product_one"):
        assert not told(kernel, "ld.global.b16", "ld.global.b32"), kernel["case"]
        assert told(kernel, "ld.global") == len(kernel["order"]) - kernel["order"].count("bar.sync")
    for kernel in of(kernels, "product_few"):
        assert told(kernel, "cp.async.cg.shared.global"), kernel["case"]
        assert not told(kernel, "cp.async.ca.shared.global"), kernel["case"]


def test_narrow_words_would_show(kernels: Kernels) -> None:
    """A bias is read one by one, by kernels that add it themselves."""
    biased = [one for one in of(kernels, "product_few") if one["case"].endswith(" 8") and "splits" not in one["tile"]]
    assert biased
    assert all(told(kernel, "ld.global.b16") for kernel in biased)


def test_all_weights_are_asked_for_before_anything_waits(kernels: Kernels) -> None:
    ahead = [kernel for kernel in of(kernels, "product_one") if kernel["tile"].endswith("ahead")]
    assert ahead
    for kernel in ahead:
        barrier = kernel["order"].index("bar.sync")
        assert all("evict_first" in load for load in kernel["order"][:barrier]), kernel["case"]
        assert not any("evict_first" in load for load in kernel["order"][barrier:]), kernel["case"]


def test_the_proof_knows_what_is_read_and_written(kernels: Kernels) -> None:
    """Nothing is assumed; parameters stand for weights that are not there as well."""
    for kernel in kernels:
        found = analyse(kernel["ttir"])
        assert not found.assumed, kernel["case"]
        does = {one.name: "r" * one.reads + "w" * one.writes for one in found.parameters}
        reads = {name for name, how in does.items() if how == "r"}
        writes = {name for name, how in does.items() if how == "w"}
        biased = kernel["case"].endswith(" 8")
        outs, biases = {"o0", "o1", "o2", "o3"}, {"b0", "b1", "b2", "b3"}
        split = kernel["kernel"] == "product_few" and "splits" in kernel["tile"]
        assert writes == ({"part"} if split else outs), (kernel["case"], does)
        wanted = {"part"} if kernel["kernel"] == "product_sum" else {"x", "w0", "w1", "w2", "w3"}
        assert reads == wanted | (biases if biased and not split else set()), (kernel["case"], does)
