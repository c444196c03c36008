"""Compiles Triton kernels on a machine that may have no GPU, and prints their TTIR. Run by `test_triton_accesses`.

Prints one JSON object per kernel. Of the cases: also how many parameters the machine code has. Of fused kernels (all
that this project's tests of ops and patterns make): also how many inputs and outputs they have and which inputs their
source loads from; the compiler stops at the TTIR.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from compile_worker import TYPES
from compile_worker import _first as first_of_each
from one_op import bundle_of, fusion_of
from patterns import PATTERNS
from pointwise_cases import pointwise_cases
from rowwise_cases import rowwise_cases
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton_cases import CASES
from ways import fused

from auxstream.kernels import store
from auxstream.kernels.emit import Fusion
from auxstream.kernels.launch import kernel_of

ENTRY = re.compile(r"\.entry [^(]*\((.*?)\)", re.DOTALL)
HOPPER = GPUTarget("cuda", 90, 32)


def of_cases() -> Iterator[dict[str, Any]]:
    for name, case in CASES.items():
        names = case.kernel.arg_names
        signature = (
            dict.fromkeys(names, "constexpr") | dict(case.signature) | dict.fromkeys(case.constants, "constexpr")
        )
        constants = {(names.index(name),): value for name, value in case.constants.items()}
        source = ASTSource(case.kernel, signature, constants, {})
        found = triton.compile(source, target=GPUTarget("cuda", case.arch, 32))
        entry = ENTRY.search(found.asm["ptx"])
        assert entry is not None, name
        yield {"name": name, "ttir": found.asm["ttir"], "parameters": entry[1].count(".param")}


def ttir_of(kernel: Any, launch: Any, dtypes: Sequence[torch.dtype]) -> str:
    """The TTIR of a launch's kernel, as far as Triton's own pipeline takes it there."""
    names, backend, context = kernel.arg_names, make_backend(HOPPER), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    constants = {(names.index(name),): value for name, value in launch.options.items() if name in names}
    signature = dict.fromkeys(names, "constexpr") | dict(
        zip(names, (f"*{TYPES[dtype]}" for dtype in dtypes), strict=False)
    )
    for i, number in enumerate(launch.numbers, len(dtypes)):
        if number == 1:
            constants[i,] = 1
        else:
            signature[names[i]] = "i32" if abs(number) < 1 << 31 else "i64"
    source = ASTSource(kernel, signature, constants, {})
    options = backend.parse_options(
        {"num_warps": launch.options["num_warps"], "debug": launch.options.get("debug", False)}
    )
    generators, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(HOPPER, options, generators, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def of_fusion(name: str, fusion: Fusion) -> Iterator[dict[str, Any]]:
    """A fusion's kernels; and the first one once more, with what it stores in its first output stored in an input."""
    kernel, inputs = kernel_of(fusion.spec), [node.meta["val"] for node in fusion.inputs]
    outputs = kernel.fake(list(inputs), ())
    dtypes = [tensor.dtype for tensor in (*inputs, *outputs)]
    size = {"inputs": len(inputs), "outputs": len(outputs)}
    launches = kernel.candidates(inputs, outputs, ())
    for variant, launch in launches.items():
        loaded = re.findall(r"tl\.load\((in\d+)\b", source_of(launch))
        yield {"name": f"{name}, {variant}", "ttir": ttir_of(launch.kernel, launch, dtypes), "loaded": loaded, **size}
    first = next(iter(launches.values()))
    changed, count = re.subn(r"tl\.store\(out0\b", "tl.store(in0", source_of(first))
    assert count, name
    mutant = getattr(store.load(f"mutant_{fusion.spec.name}", changed), fusion.spec.title)
    yield {"name": name, "ttir": ttir_of(mutant, first, dtypes), "mutant": True, **size}


def source_of(launch: Any) -> str:
    return Path(launch.kernel.fn.__code__.co_filename).read_text()


def of_patterns() -> Iterator[dict[str, Any]]:
    for rows, width in ((16, 4096), (7, 2002), (2, 65536)):
        for name, pattern in PATTERNS.items():
            _, fusions = fused(pattern.function, pattern.make(rows, width, torch.bfloat16))
            for fusion in fusions.fusions:
                yield from of_fusion(f"{name} {rows} x {width}", fusion)


def of_ops(per_kernel: int = 12) -> Iterator[dict[str, Any]]:
    """Every op once per dtype it is tested with: pointwise ones by the dozen, the others one by one."""
    cases = first_of_each(pointwise_cases())
    for start in range(0, len(cases), per_kernel):
        some = cases[start : start + per_kernel]
        yield from of_fusion(", ".join(str(case) for case in some), bundle_of([case.call for case in some]))
    for case in first_of_each(rowwise_cases()):
        fusion = fusion_of(*case.call)
        assert fusion is not None, str(case)
        yield from of_fusion(str(case), fusion)


JOBS = {"cases": of_cases, "patterns": of_patterns, "ops": of_ops}


if __name__ == "__main__":
    for job in sys.argv[1:]:
        for line in JOBS[job]():
            print(json.dumps({"job": job, **line}), flush=True)
