"""Compiles the router's kernels for sm_90 on a machine that may have no GPU. Run by `test_router_sm90`.

Prints one JSON object per kernel: the job, the case, the kernel, its TTIR, the size of its cubin, and its PTX
instructions.
"""

from __future__ import annotations

import collections
import json
import re
from typing import Any

import torch
from compile_worker import TYPES
from router_cases import BF16, CASES, F32, GEMMA, SIGMOID, SOFTMAX, Case, replace
from triton import compile as compiled_by_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from auxstream.kernels.router import fake, settle

SIZES = [
    Case(f"{name} {tokens}", tokens, experts, width, rules, weight=weight, scaled=rules.eps is not None, biased=biased)
    for name, experts, width, rules, weight, biased in (
        ("gemma4", 128, 2816, replace(GEMMA, top_k=8), BF16, False),
        ("qwen2_moe", 60, 2048, replace(SOFTMAX, out=BF16), BF16, False),
        ("glm4_moe", 128, 4096, replace(SIGMOID, top_k=8), F32, True),
        ("deepseek_v3", 256, 7168, replace(SIGMOID, top_k=8, groups=8, kept=4), F32, True),
    )
    for tokens in (1, 8, 64, 2048)
]
TOLD = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]*)", re.MULTILINE)


def compiled(kernel: Any, given: list[Any], options: dict[str, Any]) -> Any:
    """A kernel specialised as Triton would for these arguments, tensors at aligned addresses."""
    names, unspecialised = kernel.arg_names, kernel.do_not_specialize
    signature, constants, attributes = dict.fromkeys(names, "constexpr"), dict[Any, Any](), dict[Any, Any]()
    for i, (name, value) in enumerate(zip(names, given, strict=False)):
        if value is None:
            constants[i,] = None
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (name not in unspecialised and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    constants |= {(names.index(name),): value for name, value in options.items() if name in names}
    source = ASTSource(kernel, signature, constants, attributes)
    chosen = {name: value for name, value in options.items() if name not in names}
    return compiled_by_triton(source, target=GPUTarget("cuda", 90, 32), options=chosen)


JOBS = {"sizes": SIZES, "cases": [case for case in CASES if case.tokens]}


def main() -> None:
    for job, case in ((job, case) for job, cases in JOBS.items() for case in cases):
        given, rules = case.given(), case.rules
        found = settle(given, rules)
        index, weights = fake(given, rules)
        partial, squares = found.workspace(given)
        hidden, weight, scale, bias, expert_scale = given.all()
        kernels = (
            (found.product, [hidden, weight, scale, partial, squares, *found.numbers], found.product_options),
            (found.select, [partial, squares, bias, expert_scale, index, weights, *found.terms], found.select_options),
        )
        for kernel, arguments, options in kernels:
            made = compiled(kernel, arguments, options)
            told = collections.Counter(TOLD.findall(made.asm["ptx"]))
            facts = {"ttir": made.asm["ttir"], "cubin": len(made.asm["cubin"]), "told": told}
            print(json.dumps({"job": job, "case": case.name, "kernel": kernel.fn.__name__, **facts}), flush=True)


if __name__ == "__main__":
    main()
