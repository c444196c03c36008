"""Decode steps of tiny models, for tests of buckets."""

from __future__ import annotations

import pytest
import tiny_models

pytest.importorskip("transformers")

from auxstream.capture.huggingface import DecodeStep, build


def serving_step(name: str, *, batch: int, context: int = tiny_models.CONTEXT) -> DecodeStep:
    """The step of a tiny model, always with the same weights."""
    return DecodeStep(build(tiny_models._config(name)), batch, context)
