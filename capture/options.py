"""`Options`: what `compile` does, as one frozen value; the environment overrides it, in one place.

Enters: keyword arguments or a YAML file, and `Settings`. Leaves: the options in force.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import yaml

from ..runtime.errors import SettingsError
from ..runtime.settings import HANDOFF_VALUES, SETTINGS, VERIFY_VALUES, Handoff, Settings, Verify, parse_safety


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
        mlir_elementwise_fusion: fuse elementwise and row-reduction chains into Triton kernels, through MLIR.
        fusion_safe: regions whose aux branch may run fused kernels, as AUXSTREAM_FUSION_SAFE writes them
            (`layers.*.shared=auto,layers.3.*=0`); the default keeps them off.
    """

    multi_stream_moe: bool = True
    mlir_elementwise_fusion: bool = True
    fusion_safe: str = ""
    handoff: Handoff = "auto"
    verify: Verify = "error"
    token_threshold: int | None = None
    warmup: int = 2
    dump_dir: str | Path | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("handoff", self.handoff, HANDOFF_VALUES),
            ("verify", self.verify, VERIFY_VALUES),
        ):
            if value not in allowed:
                raise SettingsError(f"malformed option {name}", expected=", ".join(allowed), came=repr(value))
        # Compared as they came: a YAML file may hold anything.
        for name, count in (("warmup", self.warmup), ("token_threshold", self.token_threshold or 0)):
            if type(count) is not int or count < 0:
                raise SettingsError(f"malformed option {name}", expected="an integer >= 0", came=repr(count))
        for name in ("multi_stream_moe", "mlir_elementwise_fusion"):
            if type(getattr(self, name)) is not bool:
                raise SettingsError(
                    f"malformed option {name}", expected="true or false", came=repr(getattr(self, name))
                )
        parse_safety(self.fusion_safe, "option fusion_safe")
        if self.dump_dir is not None and not isinstance(self.dump_dir, str | Path):  # pyright: ignore
            raise SettingsError("malformed option dump_dir", expected="a folder", came=repr(self.dump_dir))

    @staticmethod
    def from_yaml(path: str | Path) -> Options:
        """Options from a YAML file: a mapping from their names to values.

        A switch may also be written as TensorRT-LLM writes it: `multi_stream_moe: {enabled: true}`.

        Raises:
            SettingsError: the file holds something else, or a name or value that no option has.
        """
        try:
            read: Any = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise SettingsError(f"{path} is no YAML", came=str(error)) from error
        if not isinstance(read, Mapping | None):
            raise SettingsError(f"{path} is no mapping", expected="`option: value` lines", came=type(read).__name__)
        given = {str(name): value for name, value in cast("Mapping[Any, Any]", read or {}).items()}
        known = [field.name for field in fields(Options)]
        if unknown := [name for name in given if name not in known]:
            raise SettingsError(f"unknown option {unknown[0]!r} in {path}", expected="one of " + ", ".join(known))
        for name, value in given.items():
            if isinstance(value, Mapping) and list(cast("Mapping[Any, Any]", value)) == ["enabled"]:
                given[name] = value["enabled"]
        if isinstance(given.get("dump_dir"), str):
            given["dump_dir"] = Path(given["dump_dir"])
        return Options(**given)

    def in_force(self, settings: Settings = SETTINGS) -> Options:
        """These options with the environment's word on top."""
        return replace(
            self,
            mlir_elementwise_fusion=self.mlir_elementwise_fusion
            if settings.fusion is None
            else settings.fusion == "on",
            handoff=settings.handoff or self.handoff,
            verify=settings.verify or self.verify,
            token_threshold=self.token_threshold if settings.token_threshold is None else settings.token_threshold,
            dump_dir=settings.dump_dir or self.dump_dir,
        )
