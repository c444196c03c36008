"""The device functions of generated kernels in Triton's interpreter, which computes with numpy on the CPU.

Enters: the interpreter's tensors and Python numbers. Leaves: its tensors. Each function is torch's CPU function, so
that kernels can be compared with eager bit for bit on a machine with no GPU. Invariant: lanes behind a mask hold
anything, and raise nothing.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def _data(x: Any) -> Any:
    return x.handle.data if isinstance(x, tl.core.tensor) else x


def _tensor(data: np.ndarray, dtype: Any, *operands: Any) -> Any:
    """A tensor computed from `operands`: a tile, or a scalar if they are (the interpreter keeps arrays of both)."""
    tiled = any(isinstance(x, tl.core.tensor) and x.type != x.dtype.scalar for x in operands)
    return tl.core.tensor(TensorHandle(data, dtype), tl.core.block_type(dtype, list(data.shape)) if tiled else dtype)


def _of_torch(compute: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A function of the interpreter's tensors from one of torch's; numbers take the tensors' dtype."""

    def run(*operands: Any) -> Any:
        like = next((x for x in operands if isinstance(x, tl.core.tensor)), None)
        if like is None:
            return compute(*(torch.tensor(x) for x in operands)).item()
        arrays = np.broadcast_arrays(*map(_data, operands))
        given = [torch.from_numpy(np.array(array, dtype=_data(like).dtype)) for array in arrays]
        return _tensor(compute(*given).numpy(), like.dtype.scalar, *operands)

    return run


def _divided(rounding_mode: str) -> Callable[..., Any]:
    return _of_torch(lambda x, y: torch.div(x, torch.where(y == 0, 1, y), rounding_mode=rounding_mode))


def _fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x.double() * y.double() + z.double()).float()


def share_of(part: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`gpu_math.share`, step by step."""
    inverse = 1 / total
    product = part * inverse
    return _fma(_fma(product, -total, part), inverse, product)


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
fma = _of_torch(_fma)
share = _of_torch(share_of)
div_trunc = _divided("trunc")
div_floor = _divided("floor")
rem_trunc = _of_torch(lambda x, y: torch.fmod(x, torch.where(y == 0, 1, y)))


def to_f32(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return _tensor(np.array(_data(x), dtype=np.float32), tl.float32, x)
    bits = torch.from_numpy(np.array(_data(x)).view(np.int16))
    return _tensor(bits.view(torch.bfloat16).to(torch.float32).numpy(), tl.float32, x)


def to_bf16(x: Any) -> Any:
    """The interpreter keeps bfloat16 as bits; its own cast truncates, and flushes what is subnormal."""
    rounded = torch.from_numpy(np.array(_data(x))).to(torch.bfloat16)
    return _tensor(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16, x)


def to_f16(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return _tensor(np.array(_data(x)).astype(np.float16), tl.float16, x)


def row_sum(x: Any) -> Any:
    """Over the columns, [ROWS, BLOCK] -> [ROWS, 1]."""
    return tl.sum(x, axis=1, keep_dims=True)


def row_max(x: Any) -> Any:
    return _tensor(np.max(_data(x), axis=1, keepdims=True), x.dtype.scalar, x)  # numpy's max and min carry NaN


def row_min(x: Any) -> Any:
    return _tensor(np.min(_data(x), axis=1, keepdims=True), x.dtype.scalar, x)
