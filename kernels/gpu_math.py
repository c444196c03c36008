"""The device functions of generated kernels on a GPU: what eager's own kernels call, in full precision.

Enters and leaves: Triton tensors. `libdevice` is CUDA's math library, the one eager's kernels are linked with.
Invariant: one rounding per function where IEEE asks for it; reductions carry NaN.
"""

# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


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
def share(part, total):
    """part / total, total from 1 on: a product with the reciprocal, and what that leaves over.

    The nearest float32, but for parts below 2**-100, where it may be the one beside it. CUDA's division looks for
    exponents that this one cannot meet, and branches.
    """
    inverse = div(1.0, total)
    product = part * inverse
    return fma(fma(product, total * -1.0, part), inverse, product)


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
def to_f32(x):
    return x.to(tl.float32)


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
