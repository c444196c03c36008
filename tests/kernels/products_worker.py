"""Compiles the kernels of products of few rows for sm_90. Run by `test_products_sm90`.

Prints one JSON object per kernel: the case, the kernel, its TTIR, the size of its cubin, its PTX's loads of weights in
order among the barriers and the rest, and how many instructions of each kind there are.
"""

from __future__ import annotations

import collections
import json
import re

import torch
from router_worker import TOLD, compiled

from auxstream.kernels.products_launch import launches
from auxstream.kernels.products_tiles import likely
from auxstream.kernels.products_work import Work

SIZES = {
    "qkv": (2816, (4096, 2048, 2048), None, (1, 8)),
    "o": (8192, (2816,), None, (8, 32)),
    "down": (2112, (2816,), None, (1,)),
    "gated": (2816, (2112, 2112), "gelu_tanh", (1,)),
}


def main() -> None:
    for name, (summed, widths, activation, numbers) in SIZES.items():
        for rows in numbers:
            biased = rows == 8
            x, *weights = (torch.empty(n, summed, dtype=torch.bfloat16, device="meta") for n in (rows, *widths))
            biases = tuple(x.new_empty(n) for n in widths) if biased else ()
            work = Work(x, tuple(weights), biases, activation)
            tiles = likely(work)
            for tile in (tiles[0], tiles[-1]):
                for launch in launches(work, work.outputs(), tile):
                    made = compiled(launch.kernel, list(launch.arguments), dict(launch.options))
                    told = collections.Counter(TOLD.findall(made.asm["ptx"]))
                    order = re.findall(r"(ld\.global\S*evict_first|ld\.global|bar\.sync)", made.asm["ptx"])
                    facts = {"ttir": made.asm["ttir"], "cubin": len(made.asm["cubin"]), "told": told, "order": order}
                    which = {"case": f"{name} {rows}", "tile": str(tile), "kernel": launch.kernel.fn.__name__}
                    print(json.dumps(which | facts), flush=True)


if __name__ == "__main__":
    main()
