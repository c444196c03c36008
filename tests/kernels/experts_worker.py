"""Compiles the experts' kernels for sm_90 on a machine that may have no GPU. Run by `test_experts_sm90`.

Prints one JSON object per kernel, in the tile that is likely to be fastest: the case, the kernel, its TTIR, its PTX
instructions, and its shared memory.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
import triton
from compile_worker import TYPES
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from auxstream.kernels import experts_few as few
from auxstream.kernels import experts_many as many
from auxstream.kernels.experts_few import Launch
from auxstream.kernels.experts_plan import down_tiles, form_of, tokens_of, up_tiles
from auxstream.kernels.experts_work import Activation, Work

TOLD = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*)", re.MULTILINE)


def work_of(tokens: int, experts: int, width: int, inner: int, choices: int, activation: Activation, odd: bool) -> Work:
    """A call without memory; `odd`: transposed, interleaved and with biases."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    up, down = empty(experts, 2 * inner, width), empty(experts, width, inner)
    if odd:
        up, down = empty(experts, width, 2 * inner).mT, empty(experts, inner, width).mT
    return Work(
        empty(tokens, width), empty(tokens, choices, dtype=torch.int64), empty(tokens, choices, dtype=torch.float32),
        up, down, empty(experts, 2 * inner) if odd else None, empty(experts, width) if odd else None, activation, odd,
    )  # fmt: skip


GEMMA = (128, 2816, 704, 8, Activation("gelu_tanh"), False)
CASES = {
    **{f"gemma4 {tokens}": work_of(tokens, *GEMMA) for tokens in (1, 8, 512)},
    "gpt_oss 1": work_of(1, 32, 2880, 2880, 4, Activation(alpha=1.702, limit=7.0, shift=1.0), True),
}


def launches(work: Work) -> Iterator[Launch]:
    """Every kernel of a call."""
    form, act, part, out = form_of(work), few.activations(work), few.parts(work), torch.empty_like(work.hidden)
    order, start = many.groups(work)
    up, down, tokens = up_tiles(work, form)[0], down_tiles(work, form)[0], tokens_of(work)
    if form == "one":
        yield few.up_one(work, act, up)
        yield few.down_one(work, act, out, down)
        return
    if form == "few":
        yield few.up_few(work, act, up)
        yield few.down_few(work, act, part, down)
    else:
        yield many.group(work, order, start)
        yield many.up_many(work, order, start, act, up, tokens)
        yield many.down_many(work, order, start, act, part, down, tokens)
    yield few.sum_of(work, part, out, once=form == "few")


def compiled(launch: Launch) -> Any:
    """Specialised as Triton would for these arguments, tensors at aligned addresses."""
    kernel = launch.kernel
    names, unspecialised = kernel.arg_names, kernel.do_not_specialize
    signature, attributes = dict.fromkeys(names, "constexpr"), dict[Any, Any]()
    constants = {(names.index(name),): value for name, value in launch.options.items() if name in names}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        plain = name in unspecialised
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif value == 1 and not plain:
            constants[i,] = 1
            continue
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (value % 16 == 0 and not plain):
            attributes[i,] = [["tt.divisibility", 16]]
    chosen = {name: value for name, value in launch.options.items() if name not in names}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=chosen)


def main() -> None:
    for name, work in CASES.items():
        for launch in launches(work):
            made = compiled(launch)
            facts = {
                "case": name, "kernel": launch.kernel.fn.__name__, "ttir": made.asm["ttir"],
                "told": collections.Counter(TOLD.findall(made.asm["ptx"])), "shared": made.metadata.shared,
                "tile": [launch.options.get(name) for name in ("ROWS", "COLS", "num_warps", "STAGES", "TOKENS")],
            }  # fmt: skip
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
