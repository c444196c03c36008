"""Decode steps that serve every batch up to the one their caches are made for."""

from __future__ import annotations

from typing import Any, cast

import pytest
import tiny_models
import torch
from torch import Tensor

Cache = pytest.importorskip("transformers.cache_utils").Cache

from auxstream.capture import huggingface  # noqa: E402
from auxstream.capture.huggingface import DecodeStep  # noqa: E402


class ServingStep(DecodeStep):
    """A `DecodeStep` for any batch up to `batch`: rows in the order of the caches, each at a position of its own.

    The last position of a row is nobody's: `pad={"position": context - 1}` sends what padded rows write there.
    """

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        rows = input_ids.shape[0]
        states = [{kind: buffer[:rows] for kind, buffer in state.items()} for state in self.caches()]
        layers = [huggingface._bound(state, position) for state in states]
        output = self.model(
            input_ids=input_ids,
            position_ids=position[:, None],
            attention_mask=self._masks(position),
            past_key_values=Cache(layers=cast(Any, layers)),
            use_cache=True,
        )
        return output.logits[:, -1]

    def _mask(self, kind: str, position: Tensor, config: Any) -> Tensor:
        keys = torch.arange(self.context, device=position.device)
        return huggingface._LAYER_MASKS[kind](keys[None, :], position[:, None], config)[:, None, None, :]


def serving_step(name: str, *, batch: int, context: int = tiny_models.CONTEXT) -> ServingStep:
    """The step of a tiny model, always with the same weights."""
    return ServingStep(huggingface.build(tiny_models._config(name)), batch, context)
