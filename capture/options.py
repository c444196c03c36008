"""`Options`: what `compile` does, as one frozen value; the environment overrides it, in one place.

Enters: keyword arguments, and `Settings`. Leaves: the options in force.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..runtime.errors import SettingsError
from ..runtime.settings import HANDOFF_VALUES, SETTINGS, VERIFY_VALUES, Handoff, Settings, Verify


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is compiled.

    Attributes:
        multi_stream_moe: run MoE shared-expert branches on auxiliary streams.
        handoff: `auto` proves lifetimes from the FX graph and records the rest; `record` calls `record_stream` on
            every tensor that crosses.
        verify: what a failed proof does: `error`, `warn` or `off`.
        token_threshold: no overlap above this many tokens (elements of the first integer input); None: no bound.
        warmup: eager runs before the capture, on the capture's streams (GPU only).
        dump_dir: folder for every stage's graph and the report, as text.
    """

    multi_stream_moe: bool = True
    handoff: Handoff = "auto"
    verify: Verify = "error"
    token_threshold: int | None = None
    warmup: int = 2
    dump_dir: Path | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("handoff", self.handoff, HANDOFF_VALUES),
            ("verify", self.verify, VERIFY_VALUES),
        ):
            if value not in allowed:
                raise SettingsError(f"malformed option {name}", expected=", ".join(allowed), came=repr(value))
        for name, count in (("warmup", self.warmup), ("token_threshold", self.token_threshold or 0)):
            if count < 0:
                raise SettingsError(f"malformed option {name}", expected="an integer >= 0", came=str(count))

    def in_force(self, settings: Settings = SETTINGS) -> Options:
        """These options with the environment's word on top."""
        return replace(
            self,
            handoff=settings.handoff or self.handoff,
            verify=settings.verify or self.verify,
            token_threshold=self.token_threshold if settings.token_threshold is None else settings.token_threshold,
            dump_dir=settings.dump_dir or self.dump_dir,
        )
