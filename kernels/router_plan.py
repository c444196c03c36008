"""How the router's product is cut into programs.

Enters: the numbers of tokens, experts and columns, and the types. Leaves: a `Plan`. Invariant: it depends on nothing
else, so that the same shapes give the same bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .variants import next_power_of_two

Operands = Literal["half", "split", "wide"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Programs of `block_e` experts, `block_t` tokens and `span` columns, taken `block_k` at a time.

    `many`: the tokens at once, on tensor cores; else one after the other, and `block_k` covers `span`.
    """

    many: bool
    block_e: int
    block_t: int
    span: int
    block_k: int
    warps: int
    stages: int = 1
    select_warps: int = 1

    def splits(self, width: int) -> int:
        return -(-width // self.span)

    def grid(self, tokens: int, experts: int, width: int, normed: bool) -> tuple[int, int, int]:
        """With a norm, the programs behind the last experts sum squares."""
        return -(-experts // self.block_e) + normed, self.splits(width), -(-tokens // self.block_t)

    def __str__(self) -> str:
        kind = "many" if self.many else "few"
        return (
            f"{kind} {self.block_e}x{self.block_t}, span {self.span}/{self.block_k}, "
            f"{self.warps} warps, {self.stages} stages; select {self.select_warps}"
        )


def plan(tokens: int, experts: int, width: int, operands: Operands) -> Plan:
    """The plan for a step of so many tokens: measured for 128 experts, 2816 columns and bfloat16 (docs/router.md)."""
    select_warps = 1 if experts <= 256 else 2
    if tokens <= 4:
        span, warps = (256, 4) if width <= 22 * 256 else (512, 8)
        span = min(span, _span(width, 1))
        return Plan(False, 4, next_power_of_two(tokens), span, next_power_of_two(span), warps, 1, select_warps)
    if tokens <= 64:
        block_t = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        if operands == "half":
            return Plan(True, 16, block_t, 256, 256, 4, 1, select_warps)
        return Plan(True, 16, block_t, _span(width, 22), 128, 4, 2, select_warps)
    wide = operands == "wide"
    span = _span(width, max(1, 1024 // tokens))
    return Plan(True, 32 if wide else min(128, max(16, next_power_of_two(experts))), 64, span, 64, 4, 3, select_warps)


def _span(width: int, splits: int) -> int:
    """Columns per program, a multiple of 64."""
    return max(64, -(-width // (splits * 64)) * 64)
