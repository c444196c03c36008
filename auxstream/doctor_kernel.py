"""The kernel with which the doctor tries Triton: compiled anew each time, for one from a cache would show nothing."""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

BLOCK = 64
SIGNATURE = {"x": "*fp32", "out": "*fp32", "count": "i32", "BLOCK": "constexpr"}


@triton.jit
def add_one(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count) + 1, mask=at < count)


@contextmanager
def _anew() -> Generator[None]:
    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        yield


def launched(device: str) -> Tensor:
    """What the kernel makes of 0, 1, ..., 99: compiled and launched, or interpreted if TRITON_INTERPRET=1."""
    x = torch.arange(100.0, device=device)
    out = torch.zeros_like(x)
    with _anew():
        add_one[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK=BLOCK)
    return out


def compiled(capability: int) -> int:
    """Bytes of machine code for a GPU of this compute capability, which need not be here; 0 where Triton interprets."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(add_one, triton.JITFunction):
        return 0
    source = ASTSource(add_one, SIGNATURE, {(3,): BLOCK})
    with _anew():
        return len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])
