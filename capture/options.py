"""`Options`: what `compile` does, as one frozen value; the environment overrides it, in one place.

Enters: keyword arguments or a YAML file, and `Settings`. Leaves: the options in force.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import yaml

from ..runtime.errors import SettingsError
from ..runtime.settings import (
    HANDOFF_VALUES,
    SETTINGS,
    VERIFY_VALUES,
    Handoff,
    Settings,
    Verify,
    parse_overlap,
    parse_safety,
)

Mode = Literal["none", "full", "full_decode_only", "piecewise", "full_and_piecewise"]
MODES: Final = ("none", "full", "full_decode_only", "piecewise", "full_and_piecewise")


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is compiled.

    Attributes:
        mode: `full` captures whole graphs; `piecewise` captures pieces, with attention run eagerly between them; `none`
            captures nothing and runs the same steps op by op. Of a model with a prefill phase, `full_decode_only` runs
            that phase eagerly, and `full_and_piecewise` captures it in pieces.
        buckets: token counts (batch sizes, in decode) to capture graphs for; the example inputs have the largest. A
            call runs the smallest that holds it, padded. Empty: one graph, of the example's shapes.
        token_dims: by input name, which dimension counts tokens, or None for an input that has none. What is not said
            here is found, where the model leaves no choice.
        pad: by input name, what padded rows hold; by default they repeat the call's last row. A model that writes
            caches needs it, to send what padded rows write to memory that nobody reads.
        split_ops: ops that pieces are split at besides attention, by name: `mylib.paged_attention`.
        prefill_buckets: what `buckets` is for the prefill phase.
        copy_outputs: outputs are copies that last. By default they are the graph's own memory, until the next call.
        multi_stream_moe: run branches on auxiliary streams at all.
        overlap: which branches: `*=off,layers.*.shared=on`, region globs of which later ones win, with `on`, `off`,
            `products` (on, from the branch's first product to its last) or `auto`, which holds where nothing is said:
            what is faster, as measured for each bucket; without a GPU, shared experts.
        handoff: `auto` proves lifetimes from the FX graph and records the rest; `record` calls `record_stream` on
            every tensor that crosses.
        verify: what a failed proof does: `error`, `warn` or `off`.
        token_threshold: no overlap above this many tokens (elements of the first integer input); None: no bound.
        warmup: eager runs before the capture, on the capture's streams (GPU only).
        progress: a bar over the captures, on stderr; None: if that is a terminal.
        dump_dir: folder for every stage's graph and the report, as text.
        mlir_elementwise_fusion: fuse elementwise and row-reduction chains into Triton kernels, through MLIR.
        decode_attention: attention of one query per row as kernels that read only what its mask lets it see, where that
            is faster; None: on a GPU. See docs/attention.md.
        router_kernels: what routes tokens to experts as one op of two kernels; None: on a GPU. See docs/router.md.
        product_kernels: products of few rows by kernels of our own, where these are faster than cuBLAS; None: on a GPU.
            See docs/products.md.
        fusion_safe: regions whose aux branch may run fused kernels, as AUXSTREAM_FUSION_SAFE writes them
            (`layers.*.shared=auto,layers.3.*=0`); the default keeps them off.
    """

    multi_stream_moe: bool = True
    overlap: str = ""
    mlir_elementwise_fusion: bool = True
    fusion_safe: str = ""
    handoff: Handoff = "auto"
    verify: Verify = "error"
    token_threshold: int | None = None
    warmup: int = 2
    dump_dir: str | Path | None = None
    mode: Mode = "full"
    buckets: tuple[int, ...] = ()
    token_dims: Mapping[str, int | None] = field(default_factory=dict[str, int | None])
    pad: Mapping[str, bool | int | float] = field(default_factory=dict[str, bool | int | float])
    copy_outputs: bool = False
    progress: bool | None = None
    split_ops: tuple[str, ...] = ()
    prefill_buckets: tuple[int, ...] = ()
    decode_attention: bool | None = None
    router_kernels: bool | None = None
    product_kernels: bool | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("mode", self.mode, MODES),
            ("handoff", self.handoff, HANDOFF_VALUES),
            ("verify", self.verify, VERIFY_VALUES),
        ):
            if value not in allowed:
                raise SettingsError(f"malformed option {name}", expected=", ".join(allowed), came=repr(value))
        # Compared as they came: a YAML file may hold anything.
        for name, count in (("warmup", self.warmup), ("token_threshold", self.token_threshold or 0)):
            if type(count) is not int or count < 0:
                raise SettingsError(f"malformed option {name}", expected="an integer >= 0", came=repr(count))
        for name in ("multi_stream_moe", "mlir_elementwise_fusion", "copy_outputs"):
            if type(getattr(self, name)) is not bool:
                raise SettingsError(
                    f"malformed option {name}", expected="true or false", came=repr(getattr(self, name))
                )
        for name in ("progress", "decode_attention", "router_kernels", "product_kernels"):
            if type(getattr(self, name)) not in (bool, type(None)):
                raise SettingsError(
                    f"malformed option {name}", expected="true, false, null", came=repr(getattr(self, name))
                )
        parse_safety(self.fusion_safe, "option fusion_safe")
        parse_overlap(self.overlap, "option overlap")
        for name in ("buckets", "prefill_buckets"):
            _check_buckets(name, getattr(self, name))
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        _check_ops(self.split_ops)
        object.__setattr__(self, "split_ops", tuple(self.split_ops))
        _check_names("token_dims", self.token_dims, (int, type(None)), "a dimension, or null")
        _check_names("pad", self.pad, (bool, int, float), "a number")
        if self.dump_dir is not None and not isinstance(self.dump_dir, str | Path):  # pyright: ignore
            raise SettingsError("malformed option dump_dir", expected="a folder", came=repr(self.dump_dir))

    @staticmethod
    def of(given: Options | None) -> Options:
        """These options, or the defaults. Raises SettingsError for anything else."""
        match cast("object", given):
            case None:
                return Options()
            case Options() as options:
                return options
            case Mapping() as entries:
                remedy = f"auxstream.Options(**{dict(cast('Mapping[Any, Any]', entries))!r})"
            case _:
                remedy = "auxstream.Options(buckets=(1, 2, 4, 8)), say; example inputs go in one argument, as a tuple"
        came = type(given).__name__
        raise SettingsError("the options are no Options", expected="auxstream.Options", came=came, remedy=remedy)

    @staticmethod
    def from_yaml(path: str | Path) -> Options:
        """Options from a YAML file: a mapping from their names to values.

        A switch may also be written as TensorRT-LLM writes it: `multi_stream_moe: {enabled: true}`.

        Args:
            path: the file.

        Returns:
            the options it names, the others at their defaults.

        Raises:
            SettingsError: no such file, or it holds something else, or a name or value that no option has.
        """
        try:
            read: Any = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"options cannot be read from {path}",
                expected="a YAML file of `option: value` lines",
                came=str(error),
                remedy=f"a path from the current folder, {Path.cwd()}, or an absolute one",
            ) from error
        except yaml.YAMLError as error:
            raise SettingsError(f"{path} is no YAML", came=str(error)) from error
        if not isinstance(read, Mapping | None):
            raise SettingsError(f"{path} is no mapping", expected="`option: value` lines", came=type(read).__name__)
        given = {str(name): value for name, value in cast("Mapping[Any, Any]", read or {}).items()}
        known = [field.name for field in fields(Options)]
        if unknown := [name for name in given if name not in known]:
            raise SettingsError(f"unknown option {unknown[0]!r} in {path}", expected="one of " + ", ".join(known))
        for name, value in given.items():
            switch = name not in ("token_dims", "pad") and isinstance(value, Mapping)
            if switch and list(cast("Mapping[Any, Any]", value)) == ["enabled"]:
                given[name] = value["enabled"]
        if isinstance(given.get("dump_dir"), str):
            given["dump_dir"] = Path(given["dump_dir"])
        return Options(**given)

    def in_force(self, settings: Settings = SETTINGS) -> Options:
        """These options with the environment's word on top.

        Args:
            settings: the environment, as this process read it.

        Returns:
            the options that hold. Rules of globs (`overlap`, `fusion_safe`) are not among what is replaced: the
            environment's come behind these, and later ones win.
        """
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


def _check_buckets(option: str, buckets: Any) -> None:
    counts = list(buckets) if isinstance(buckets, tuple | list) else [None]
    if any(type(count) is not int or count < 1 for count in counts) or len(set(counts)) < len(counts):
        raise SettingsError(
            f"malformed option {option}", expected="different integers >= 1, as in [1, 2, 4, 8]", came=repr(buckets)
        )


def _check_ops(names: Any) -> None:
    if not isinstance(names, tuple | list) or any(type(name) is not str for name in cast("list[Any]", names)):
        raise SettingsError(
            "malformed option split_ops", expected="names of ops, as in ['mylib.paged_attention']", came=repr(names)
        )


def _check_names(option: str, given: Any, kinds: tuple[type, ...], what: str) -> None:
    entries = cast("Mapping[Any, Any]", given).items() if isinstance(given, Mapping) else [(None, None)]
    if any(type(name) is not str or type(value) not in kinds for name, value in entries):
        raise SettingsError(f"malformed option {option}", expected=f"input names, each with {what}", came=repr(given))
