"""Device functions of generated kernels, for the GPU and for Triton's interpreter.

On a GPU: what eager's own kernels call, in full precision (`libdevice` is CUDA's math library). In the interpreter,
which computes with numpy on the CPU: torch's CPU functions, so that kernels can be compared with eager bit for bit on
a machine with no GPU. Which of the two this module holds is decided when triton is imported (TRITON_INTERPRET).
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED: bool = triton.knobs.runtime.interpret

if INTERPRETED:
    from triton.runtime.interpreter import TensorHandle

    def _wrap(data: np.ndarray, like: Any) -> Any:
        return tl.core.tensor(TensorHandle(data, like.dtype.scalar), like.type)

    def _of_torch(compute: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        def run(*operands: Any) -> Any:
            first = next(x for x in operands if isinstance(x, tl.core.tensor))
            arrays = np.broadcast_arrays(*(x.handle.data if isinstance(x, tl.core.tensor) else x for x in operands))
            given = [torch.from_numpy(np.array(a, dtype=first.handle.data.dtype)) for a in arrays]
            result = compute(*given).numpy()
            shaped = next(
                (x for x in operands if isinstance(x, tl.core.tensor) and x.handle.data.shape == result.shape), None
            )
            if shaped is None:  # scalars meet, or shapes broadcast
                kind = tl.core.block_type(first.dtype.scalar, list(result.shape)) if result.shape else first.dtype
                return tl.core.tensor(TensorHandle(result, first.dtype.scalar), kind)
            return _wrap(result, shaped)

        return run

    div = _of_torch(torch.div)
    fmod = _of_torch(torch.fmod)
    maximum = _of_torch(torch.maximum)
    minimum = _of_torch(torch.minimum)
    ceil = _of_torch(torch.ceil)
    floor = _of_torch(torch.floor)
    trunc = _of_torch(torch.trunc)
    round_even = _of_torch(torch.round)
    copysign = _of_torch(torch.copysign)
    cos = _of_torch(torch.cos)
    sin = _of_torch(torch.sin)
    erf = _of_torch(torch.erf)
    exp = _of_torch(torch.exp)
    exp2 = _of_torch(torch.exp2)
    expm1 = _of_torch(torch.expm1)
    log = _of_torch(torch.log)
    log1p = _of_torch(torch.log1p)
    log2 = _of_torch(torch.log2)
    pow = _of_torch(torch.pow)
    rsqrt = _of_torch(torch.rsqrt)
    sqrt = _of_torch(torch.sqrt)
    tanh = _of_torch(torch.tanh)
    div_trunc = _of_torch(lambda x, y: torch.div(x, y, rounding_mode="trunc"))
    div_floor = _of_torch(lambda x, y: torch.div(x, y, rounding_mode="floor"))
    rem_trunc = _of_torch(torch.fmod)

    def fma(x: Any, y: Any, z: Any) -> Any:
        wide = [v.handle.data.astype(np.float64) if isinstance(v, tl.core.tensor) else v for v in (x, y, z)]
        return _wrap((wide[0] * wide[1] + wide[2]).astype(np.float32), x)

    def to_bf16(x: Any) -> Any:
        """The interpreter truncates: round to nearest even first."""
        if x.dtype.scalar != tl.float32:
            return x.to(tl.bfloat16)
        rounded = torch.from_numpy(np.array(x.handle.data)).to(torch.bfloat16).to(torch.float32).numpy()
        return _wrap(rounded, x).to(tl.bfloat16)

    def to_f16(x: Any) -> Any:
        return x.to(tl.float16)

    def row_sum(x: Any) -> Any:
        """Over the columns, [ROWS, BLOCK] -> [ROWS, 1]."""
        return tl.sum(x, axis=1, keep_dims=True)

    def _row_extreme(x: Any, reduce: Any) -> Any:
        data = reduce(x.handle.data, axis=1, keepdims=True)  # numpy's max and min carry NaN
        return tl.core.tensor(TensorHandle(data, x.dtype.scalar), tl.core.block_type(x.dtype.scalar, list(data.shape)))

    def row_max(x: Any) -> Any:
        return _row_extreme(x, np.max)

    def row_min(x: Any) -> Any:
        return _row_extreme(x, np.min)

else:

    @triton.jit
    def div(x, y):
        return tl.math.div_rn(x, y)

    @triton.jit
    def fmod(x, y):
        return libdevice.fmod(x, y)

    @triton.jit
    def maximum(x, y):
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def minimum(x, y):
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def ceil(x):
        return libdevice.ceil(x)

    @triton.jit
    def floor(x):
        return libdevice.floor(x)

    @triton.jit
    def trunc(x):
        return libdevice.trunc(x)

    @triton.jit
    def round_even(x):
        return libdevice.nearbyint(x)

    @triton.jit
    def copysign(x, y):
        return libdevice.copysign(x, y)

    @triton.jit
    def cos(x):
        return libdevice.cos(x)

    @triton.jit
    def sin(x):
        return libdevice.sin(x)

    @triton.jit
    def erf(x):
        return libdevice.erf(x)

    @triton.jit
    def exp(x):
        return libdevice.exp(x)

    @triton.jit
    def exp2(x):
        return libdevice.exp2(x)

    @triton.jit
    def expm1(x):
        return libdevice.expm1(x)

    @triton.jit
    def log(x):
        return libdevice.log(x)

    @triton.jit
    def log1p(x):
        return libdevice.log1p(x)

    @triton.jit
    def log2(x):
        return libdevice.log2(x)

    @triton.jit
    def pow(x, y):
        return libdevice.pow(x, y)

    @triton.jit
    def rsqrt(x):
        return libdevice.rsqrt(x)

    @triton.jit
    def sqrt(x):
        return tl.math.sqrt_rn(x)

    @triton.jit
    def tanh(x):
        return libdevice.tanh(x)

    @triton.jit
    def fma(x, y, z):
        return tl.fma(x, y, z)

    @triton.jit
    def div_trunc(x, y):
        return x // y

    @triton.jit
    def div_floor(x, y):
        quotient = x // y
        inexact = (quotient * y != x) & ((x < 0) != (y < 0))
        return quotient - inexact.to(quotient.dtype)

    @triton.jit
    def rem_trunc(x, y):
        return x % y

    @triton.jit
    def to_bf16(x):
        return x.to(tl.bfloat16)

    @triton.jit
    def to_f16(x):
        return x.to(tl.float16)

    @triton.jit
    def row_sum(x):
        """Over the columns, [ROWS, BLOCK] -> [ROWS, 1]."""
        return tl.sum(x, axis=1, keep_dims=True)

    @triton.jit
    def _max_with_nan(x, y):
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _min_with_nan(x, y):
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def row_max(x):
        return tl.reduce(x, 1, _max_with_nan, keep_dims=True)

    @triton.jit
    def row_min(x):
        return tl.reduce(x, 1, _min_with_nan, keep_dims=True)
