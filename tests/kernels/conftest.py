"""Kernels run on a GPU where there is one, else in Triton's interpreter, on CPU tensors.

Triton decides that when it is imported. Child processes decide for themselves: the variable is taken back.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language

    triton.knobs.runtime.interpret = True  # for whatever is decorated from now on
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels run as torch ops, as they do without a GPU by themselves: a hundred times faster than in Triton's
    interpreter."""
    monkeypatch.setattr("auxstream.kernels.launch.interpreting", lambda: False)
