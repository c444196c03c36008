"""Regions drawn at random over programs drawn at random: whatever is cut out, the numbers are those of one stream."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from random_programs import RandomProgram
from random_regions import copy_of, draw_regions
from torch import Tensor, nn

import auxstream
from auxstream.capture.schedule import insert_regions
from auxstream.capture.trace import trace
from auxstream.runtime.errors import RegionError


class TwoInputs(nn.Module):
    """A random program with work on a second input of the same shape, so that mixing up the two would not raise."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.program = RandomProgram(seed)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        head = y * 2
        found = self.program(x)
        return (*found, head + x, (head.t() + found[0]).exp().clamp(max=3))


@pytest.mark.parametrize("block", range(8))
def test_any_regions_of_any_program(block: int) -> None:
    inserted = 0
    for seed in range(12 * block, 12 * block + 12):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        gm = trace(TwoInputs(seed), (x, y)).graph_module
        reference, regional = copy_of(gm), copy_of(gm)
        options: dict[str, Any] = {
            "handoff": draw.choice(["auto", "record"]),
            "order": draw.choice(["caller_first", "aux_first"]),
            "fork_at": draw.choice(["live_in", "first_product"]),
        }
        try:
            plans = insert_regions(regional, draw_regions(regional, draw), **options)
        except RegionError:  # regions with holes, or which wait for each other
            continue
        inserted += len(plans)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            with auxstream.graph(f"seed {seed}", device="cpu") as g:
                got = regional(x, y)
            for _ in range(8):
                x.normal_()
                y.normal_()
                rng = torch.get_rng_state()
                g.replay()
                torch.set_rng_state(rng)
                expected = reference(x, y)
                state = zip(regional.buffers(), reference.buffers(), strict=True)
                for one, other in (*zip(got, expected, strict=True), *state):
                    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert inserted > 3
