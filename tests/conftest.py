"""Keeps generated kernels out of the user's cache, and leaves out what this machine cannot run: files that need
hypothesis where it is not installed (say, on an offline GPU machine), and tests marked `gpu` where there is none."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

# How Triton runs is decided when it is imported, and files of any folder may bring it in (torch's own modules do).
_kernels = importlib.util.spec_from_file_location("triton_mode", HERE / "kernels" / "conftest.py")
assert _kernels is not None
assert _kernels.loader is not None
_kernels.loader.exec_module(importlib.util.module_from_spec(_kernels))

if "OMP_NUM_THREADS" not in os.environ:
    # Models are tiny, and test files run side by side: threads that wait for one another would take most of the time.
    os.environ["OMP_NUM_THREADS"] = "1"  # of child processes
    torch.set_num_threads(1)

os.environ.setdefault("AUXSTREAM_CACHE_DIR", str(HERE.parent / "build" / "test-cache"))  # not the user's

if importlib.util.find_spec("hypothesis") is None:
    collect_ignore = [
        str(path.relative_to(HERE))
        for path in HERE.rglob("test_*.py")
        if any(line.startswith(("import hypothesis", "from hypothesis")) for line in path.read_text().splitlines())
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a GPU."""
    if torch.cuda.is_available():
        return
    reason = "needs an NVIDIA GPU: torch.cuda.is_available() is False here"
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What is imported, and what other files left alive, is out of the garbage collector's sight: each compilation
    collects, and half of the tests' time would go into walks through torch and transformers."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What is frozen outlives the interpreter, and native modules complain of it."""
    gc.unfreeze()
