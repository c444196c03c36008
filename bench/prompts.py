"""Prompts of every length on one stream and on several: the same bits, in logits and in caches.

Enters: an architecture, a device. Leaves: a `Row`. A prompt runs in pieces that are captured for two buckets, with
attention between them; lengths lie on both edges of the buckets and between. Each prompt is compared with one stream of
the same kernels, over caches of its own that are the same before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from ..capture.compiler import compile
from ..capture.huggingface import DecodeStep, PrefillStep
from ..capture.options import Options
from ..runtime.errors import InputError
from .architectures import MODELS, VOCABULARY
from .lab import Row, count_differing, differs, verdict_of

CONTEXT: Final = 32
SEQUENCES: Final = 2
BUCKETS: Final = (8, 16)
LENGTHS: Final = (1, 5, 8, 9, 16)
ONE: Final = Options(
    mode="piecewise",
    buckets=BUCKETS,
    pad={"position": CONTEXT - 1},
    multi_stream_moe=False,
    mlir_elementwise_fusion=False,
)


def check_prompts(name: str, prompts: int, device: torch.device) -> tuple[int, Row] | None:
    """How many regions the largest bucket has, and how the bits of so many prompts compared; None for a model without
    a shared expert, or that no prompt can be given to at once."""
    model = MODELS[name].build(device)
    steps = [DecodeStep(model, SEQUENCES, CONTEXT) for _ in range(2)]
    most = max(BUCKETS)
    tokens = torch.arange(most, device=device)
    slot, last = (torch.full((1,), value, dtype=torch.int64, device=device) for value in (1, 0))
    example = tokens[None], tokens, slot, last
    try:
        prefills = [PrefillStep(step) for step in steps]
    except InputError:
        return None
    one = compile(prefills[0], example, ONE, name=name)
    two = compile(prefills[1], example, replace(ONE, multi_stream_moe=True, overlap="*=on"), name=name)
    if not two.regions:
        return None
    row = Row("prompt", "aux", checker=verdict_of(two.report))
    caches = [[buffer for state in step.caches() for buffer in state.values()] for step in steps]
    names = ["logits", *(f"{kind}_{i}" for i, state in enumerate(steps[0].caches()) for kind in state)]
    draw = torch.Generator().manual_seed(0)
    flags: list[torch.Tensor] = []
    for turn in range(prompts):
        count = LENGTHS[turn % len(LENGTHS)]
        ids = torch.randint(VOCABULARY, (1, count), generator=draw)
        start = int(torch.randint(CONTEXT - count, (1,), generator=draw))
        where = torch.tensor([turn % SEQUENCES]), torch.tensor([count - 1])
        given = [tensor.to(device) for tensor in (ids, torch.arange(start, start + count), *where)]
        expected, got = one(*given).clone(), two(*given)
        flags.append(differs([expected, *caches[0]], [got, *caches[1]]))
        for mine, right in zip(caches[1], caches[0], strict=True):
            mine.copy_(right)
    count_differing(row, flags, names)
    return len(two.regions), row
