"""Compiles attention's kernels for sm_90 on a machine that may have no GPU. Run by `test_attention_sm90`.

Prints one JSON object per kernel: the case, the kernel, its TTIR, its shared memory in bytes, and its PTX instructions.
"""

from __future__ import annotations

import collections
import json

import torch
from router_worker import TOLD, compiled

from auxstream.kernels.attention import Work, settle

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = {  # batch, heads of keys, queries to each, keys, numbers in a key, in a value, type, mask, softcap
    "gemma4 sliding 1": (1, 8, 2, 1024, 256, 256, BF16, torch.bool, None),
    "gemma4 sliding 32": (32, 8, 2, 1024, 256, 256, BF16, torch.bool, None),
    "gemma4 full 1": (1, 2, 8, 1024, 512, 512, BF16, torch.bool, None),
    "gemma4 full 8": (8, 2, 8, 8192, 512, 512, BF16, torch.bool, None),
    "qwen3": (8, 4, 8, 8192, 128, 128, BF16, torch.bool, None),
    "latent": (8, 16, 1, 8192, 192, 128, BF16, torch.bool, None),
    "gemma2": (8, 8, 2, 4096, 256, 256, F16, F16, 50.0),
    "no mask": (1, 4, 4, 512, 64, 64, BF16, None, None),
    "float32": (1, 2, 8, 8192, 512, 512, F32, torch.bool, None),
}


def main() -> None:
    for name, (batch, kv_heads, group, keys, d, dv, dtype, mask, softcap) in CASES.items():
        with torch.device("meta"):
            q = torch.empty(batch, kv_heads * group, 1, d, dtype=dtype)
            k, v = (torch.empty(batch, kv_heads, keys, size, dtype=dtype) for size in (d, dv))
            seen = None if mask is None else torch.empty(batch, 1, 1, keys, dtype=mask)
            work = Work(q, k, v, seen, d**-0.5, softcap)
            found, out = settle(work), work.out()
            parts = found.workspace(work, out)
        kernels = [(found.part, [q, k, v, seen, *parts, work.scale, *found.numbers], found.part_options)]
        if found.whole is not None:
            kernels.append((found.whole, [*parts, out, found.splits], found.whole_options))
        for kernel, arguments, options in kernels:
            made = compiled(kernel, arguments, options)
            told = collections.Counter(TOLD.findall(made.asm["ptx"]))
            facts = {"ttir": made.asm["ttir"], "shared": made.metadata.shared, "told": told}
            print(json.dumps({"case": name, "kernel": kernel.fn.__name__, **facts}), flush=True)


if __name__ == "__main__":
    main()
