"""Products of few rows with weights as two ops: `auxstream::skinny_linear` and `auxstream::gated_linear`.

Enters: activations [..., K] of at most 32 rows in all, one to four weights [N, K] that share them, and a bias for each
of them or none. Leaves: [..., N] per weight; or, of one row, a gate and an up projection, act(gate) * up. Invariant: it
can be captured (grids depend on shapes, nothing is read back, workspaces are the call's own); the same inputs give the
same bits; values are rounded where eager rounds them, so results differ from eager's in the order of sums alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ..runtime.errors import AuxstreamError
from .launch import interpreting
from .on_device import on_its_device
from .products_work import Work, reference, refusal

if TYPE_CHECKING:
    from .products_plan import Products

_SCHEMAS: Final = {
    "skinny_linear": "(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]",
    "gated_linear": "(Tensor x, Tensor gate, Tensor up, Tensor[] biases, str activation) -> Tensor",
}


def _work(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str | None = None) -> Work:
    """The call, checked; rows as one dimension, columns side by side."""
    rows = x.reshape(-1, x.shape[-1])
    work = Work(rows if rows.stride(1) == 1 else rows.contiguous(), tuple(weights), tuple(biases), activation)
    if why := refusal(work):
        raise AuxstreamError("no kernel does this product", came=why, remedy="torch.nn.functional.linear does")
    return work


@functools.cache
def _products() -> Products:
    from .products_plan import Products  # imports triton

    return Products()


def _kernels(work: Work) -> list[Tensor]:
    return _products()(work)


def _on_cpu(work: Work) -> list[Tensor]:
    return _kernels(work) if interpreting() else reference(work)


def _nothing(work: Work) -> list[Tensor]:
    return work.outputs()


def _linear(run: Any) -> Any:
    def skinny_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
        return [out.view(*x.shape[:-1], out.shape[1]) for out in run(_work(x, weights, biases))]

    return skinny_linear


def _gated(run: Any) -> Any:
    def gated_linear(x: Tensor, gate: Tensor, up: Tensor, biases: list[Tensor], activation: str) -> Tensor:
        (out,) = run(_work(x, (gate, up), biases, activation))
        return out.view(*x.shape[:-1], out.shape[1])

    return gated_linear


@functools.cache
def _library() -> torch.library.Library:
    library = torch.library.Library("auxstream", "FRAGMENT")
    for (name, schema), form in zip(_SCHEMAS.items(), (_linear, _gated), strict=True):
        library.define(name + schema)
        library.impl(name, on_its_device(form(_kernels)), "CUDA")
        library.impl(name, form(_on_cpu), "CPU")
        torch.library.register_fake(f"auxstream::{name}", form(_nothing), lib=library)
    return library


def skinny_linear() -> Any:
    """The op `auxstream::skinny_linear`: products of the same rows with several weights."""
    _library()
    return torch.ops.auxstream.skinny_linear.default


def gated_linear() -> Any:
    """The op `auxstream::gated_linear`: act(x @ gate.T) * (x @ up.T) of one row, act being "silu" or "gelu_tanh"."""
    _library()
    return torch.ops.auxstream.gated_linear.default
