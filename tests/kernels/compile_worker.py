"""Compiles kernels for sm_90 on a machine that may have no GPU, and says what came out. Run by `test_sm90`.

Prints one JSON object per kernel: its name, the size of its cubin, and its PTX instructions that touch global memory or
round, with their counts; how many loads come behind a barrier.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from one_op import bundle_of, fusion_of
from op_values import Case
from patterns import PATTERNS, randn
from pointwise_cases import pointwise_cases
from rowwise_cases import rowwise_cases
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ways import fused

from auxstream.kernels.emit import Fusion
from auxstream.kernels.launch import kernel_of

TYPES = {
    torch.bool: "i1", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
}  # fmt: skip


TOLD = re.compile(r"\b((?:ld|st)\.global\S*|(?:fma|div|sqrt)\.\S*|\S*\.ftz\S*)")


def compiled(launch: Any, dtypes: Sequence[torch.dtype], **options: Any) -> Any:
    """A launch's kernel, specialised as Triton would for tensors at aligned addresses."""
    kernel, names = launch.kernel, launch.kernel.arg_names
    constants = {(names.index(name),): value for name, value in launch.options.items() if name in names}
    signature, attributes = dict.fromkeys(names, "constexpr"), dict[Any, Any]()
    for i, dtype in enumerate(dtypes):
        signature[names[i]] = f"*{TYPES[dtype]}"
        attributes[i,] = [["tt.divisibility", 16]]
    for i, number in enumerate(launch.numbers, len(dtypes)):
        if number == 1:
            constants[i,] = 1
            continue
        signature[names[i]] = "i32" if abs(number) < 1 << 31 else "i64"
        if number % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    chosen = {name: value for name, value in launch.options.items() if name not in names}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=chosen | options)


def report(name: str, fusion: Fusion, every: bool = False, **options: Any) -> Iterator[dict[str, Any]]:
    """What becomes of a fusion's kernel: of all its variants, or of the likeliest."""
    kernel, inputs = kernel_of(fusion.spec), [node.meta["val"] for node in fusion.inputs]
    outputs = kernel.fake(list(inputs), ())
    candidates = kernel.candidates(inputs, outputs, ())
    for variant, launch in itertools.islice(candidates.items(), None if every else 1):
        found = compiled(launch, [tensor.dtype for tensor in (*inputs, *outputs)], **options)
        told = collections.Counter(TOLD.findall(found.asm["ptx"]))
        late = found.asm["ptx"].partition("bar.sync")[2].count("ld.global")
        yield {"name": name, "variant": str(variant), "cubin": len(found.asm["cubin"]), "told": told, "late": late}


def of_patterns(rows: int, width: int, every: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Every pattern; of those named in `every`, every variant."""
    for name, pattern in PATTERNS.items():
        _, fusions = fused(pattern.function, pattern.make(rows, width, torch.bfloat16))
        for fusion in fusions.fusions:
            yield from report(name, fusion, name in every)


def _first(cases: Iterator[Case]) -> list[Case]:
    """Per overload one case for each kind of dtype, and for each half precision."""
    chosen: dict[Any, Case] = {}
    for case in cases:
        dtypes = [value.dtype for value in case.args if isinstance(value, Tensor)]
        kind = [str(dtype) if dtype.is_floating_point else str(dtype)[6:9] for dtype in dtypes[:1]]
        chosen.setdefault((case.target, *kind), case)
    return list(chosen.values())


def of_ops(per_kernel: int = 12) -> Iterator[dict[str, Any]]:
    """Pointwise rows by the dozen, the others one by one."""
    cases = _first(pointwise_cases())
    for start in range(0, len(cases), per_kernel):
        some = cases[start : start + per_kernel]
        fusion = bundle_of([case.call for case in some])
        yield from report(", ".join(str(case) for case in some), fusion)
    for case in _first(rowwise_cases()):
        fusion = fusion_of(*case.call)
        assert fusion is not None, str(case)
        yield from report(str(case), fusion)


def of_arithmetic() -> Iterator[dict[str, Any]]:
    """A product and a sum, a quotient, a root, an exponential; and what an option for speed would make of them."""
    args = [randn(64, 64, dtype=torch.float32, seed=i) for i in range(3)]
    _, fusions = fused(lambda x, y, z: ((x * y + z) / y).sqrt() + x.exp(), args)
    yield from report("eager's", fusions.fusions[0])
    yield from report("contracted", fusions.fusions[0], enable_fp_fusion=True, enable_reflect_ftz=True)
    _, fusions = fused(lambda x: x.abs().pow(1e-42) + 1, args[:1])
    yield from report("subnormal constant", fusions.fusions[0])


JOBS = {
    "aligned": lambda: of_patterns(16, 4096, ("residual_and_norm", "softmax", "swiglu", "rope")),
    "many": lambda: of_patterns(200, 4096),
    "odd": lambda: of_patterns(7, 2002),
    "long": lambda: of_patterns(2, 65536),
    "ops": of_ops,
    "arithmetic": of_arithmetic,
}


if __name__ == "__main__":
    for job in sys.argv[1:]:
        for line in JOBS[job]():
            print(json.dumps({"job": job, **line}), flush=True)
