"""A Triton kernel that can write what it is only to read. Apart, because importing it needs triton."""

import triton
import triton.language as tl


@triton.jit
def double(x, out, n, WRONG: tl.constexpr):
    offsets = tl.arange(0, 1024)
    mask = offsets < n
    value = tl.load(x + offsets, mask) * 2
    tl.store(out + offsets, value, mask)
    if WRONG:
        tl.store(x + offsets, value, mask)
