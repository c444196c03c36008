"""The `AUXSTREAM_*` environment, read once at import, in this file and nowhere else.

Enters: a mapping of environment variables. Leaves: one frozen `Settings`. A malformed value or an unknown
`AUXSTREAM_*` name raises `SettingsError`, because a misspelt kill switch that silently does nothing is worse than
none. `None` means "not set": the option given in code decides. `SETTINGS` is parsed when it is first imported, so that
`auxstream doctor`, which imports this module alone, can say of each variable what is wrong with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from .errors import SettingsError

PREFIX: Final = "AUXSTREAM_"

Verify = Literal["off", "warn", "error"]
Handoff = Literal["auto", "record"]
Fusion = Literal["on", "off"]
Overlap = Literal["on", "off", "auto", "products"]
OverlapRules = tuple[tuple[str, Overlap], ...]
"""Region globs, each with whether the branch overlaps; later entries win."""
Safety = Literal["0", "1", "auto"]
SafetyRules = tuple[tuple[str, Safety], ...]
"""Region globs, each with whether its aux branch may run fused kernels; later entries win."""

VERIFY_VALUES: Final = ("off", "warn", "error")
HANDOFF_VALUES: Final = ("auto", "record")
FUSION_VALUES: Final = ("on", "off")
OVERLAP_VALUES: Final = ("on", "off", "auto", "products")
SAFETY_VALUES: Final = ("0", "1", "auto")
_SAFE_REGION: Final = "AUXSTREAM_FUSION_SAFE_"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for.

    Attributes:
        disable: every region runs on the caller's stream (kill switch).
        nvtx: NVTX ranges on regions, captures and replays.
        handoff: `record` or `auto`, for compiled graphs; None leaves it to `Options`.
        verify: what a failed proof does; None leaves it to the call.
        token_threshold: compiled graphs do not overlap above this many tokens; None means no bound.
        dump_dir: folder for every stage's graph and report, as text; None writes nothing.
        overlap: AUXSTREAM_OVERLAP, in order.
        fusion: MLIR fusion at all; None leaves it to `Options`.
        fusion_safe: AUXSTREAM_FUSION_SAFE, in order.
        fusion_safe_regions: AUXSTREAM_FUSION_SAFE_<REGION>, by the variable's last part; they beat the list.
        cache_dir: folder for generated kernels and tuning choices; None means the user's cache.
    """

    disable: bool = False
    nvtx: bool = False
    handoff: Handoff | None = None
    verify: Verify | None = None
    token_threshold: int | None = None
    dump_dir: Path | None = None
    overlap: OverlapRules = ()
    fusion: Fusion | None = None
    fusion_safe: SafetyRules = ()
    fusion_safe_regions: tuple[tuple[str, Safety], ...] = ()
    cache_dir: Path | None = None


MEANING: Final[Mapping[str, str]] = {
    "AUXSTREAM_DISABLE": "0 or 1",
    "AUXSTREAM_NVTX": "0 or 1",
    "AUXSTREAM_HANDOFF": "record or auto",
    "AUXSTREAM_VERIFY": "off, warn or error",
    "AUXSTREAM_TOKEN_THRESHOLD": "an integer >= 0 (tokens)",
    "AUXSTREAM_DUMP_DIR": "a folder",
    "AUXSTREAM_OVERLAP": "region globs with commas between, each with =on, =off, =auto or =products",
    "AUXSTREAM_FUSION": "on or off",
    "AUXSTREAM_FUSION_SAFE": "region globs with commas between, each bare or with =0, =1 or =auto",
    "AUXSTREAM_FUSION_SAFE_<REGION>": "0, 1 or auto",
    "AUXSTREAM_CACHE_DIR": "a folder",
}
"""Every variable and the values it takes."""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Parse `environ`. Raises SettingsError on an unknown `AUXSTREAM_*` name or a malformed value."""
    unknown = sorted(
        name
        for name in environ
        if name.startswith(PREFIX) and name not in MEANING and not re.fullmatch(_SAFE_REGION + "[A-Z0-9_]+", name)
    )
    if unknown:
        raise SettingsError(
            f"unknown environment variable {unknown[0]}",
            expected="one of " + "; ".join(f"{name} ({values})" for name, values in MEANING.items()),
            came=f"{unknown[0]}={environ[unknown[0]]!r}",
            remedy="correct the name or unset it",
        )
    return Settings(
        disable=_flag(environ, "AUXSTREAM_DISABLE"),
        nvtx=_flag(environ, "AUXSTREAM_NVTX"),
        handoff=cast("Handoff | None", _choice(environ, "AUXSTREAM_HANDOFF", HANDOFF_VALUES)),
        verify=cast("Verify | None", _choice(environ, "AUXSTREAM_VERIFY", VERIFY_VALUES)),
        token_threshold=_count(environ, "AUXSTREAM_TOKEN_THRESHOLD"),
        dump_dir=_folder(environ, "AUXSTREAM_DUMP_DIR"),
        overlap=parse_overlap(environ.get("AUXSTREAM_OVERLAP", "")),
        fusion=cast("Fusion | None", _choice(environ, "AUXSTREAM_FUSION", FUSION_VALUES)),
        fusion_safe=parse_safety(environ.get("AUXSTREAM_FUSION_SAFE", "")),
        fusion_safe_regions=tuple(
            (name.removeprefix(_SAFE_REGION), _safety(name, value))
            for name, value in sorted(environ.items())
            if name.startswith(_SAFE_REGION)
        ),
        cache_dir=_folder(environ, "AUXSTREAM_CACHE_DIR"),
    )


def parse_safety(text: str, where: str = "environment variable AUXSTREAM_FUSION_SAFE") -> SafetyRules:
    """The rules of `layers.*.shared=auto,layers.3.*=0`; a bare glob means 1. Raises SettingsError, naming `where`."""
    entries = _rules(text, where, SAFETY_VALUES, "AUXSTREAM_FUSION_SAFE", "layers.*.shared=auto,layers.3.*=0")
    return tuple((glob, cast(Safety, value or "1")) for glob, value in entries)


def parse_overlap(text: str, where: str = "environment variable AUXSTREAM_OVERLAP") -> OverlapRules:
    """The rules of `*=off,layers.*.shared=on`; a bare glob means on. Raises SettingsError, naming `where`."""
    entries = _rules(text, where, OVERLAP_VALUES, "AUXSTREAM_OVERLAP", "*=off,layers.*.shared=on")
    return tuple((glob, cast(Overlap, value or "on")) for glob, value in entries)


def _rules(text: str, where: str, allowed: tuple[str, ...], variable: str, example: str) -> Iterator[tuple[str, str]]:
    """Globs, each with its value, "" for a bare one."""
    for entry in text.split(",") if text.strip() else ():
        glob, equals, value = entry.strip().partition("=")
        if not glob or (equals and value not in allowed):
            raise SettingsError(
                f"malformed {where}",
                expected=MEANING[variable],
                came=repr(text),
                remedy=f"write it like {example}, or leave it out",
            )
        yield glob, value


def _safety(name: str, value: str) -> Safety:
    if value not in SAFETY_VALUES:
        raise _malformed(name, value)
    return value


def _folder(environ: Mapping[str, str], name: str) -> Path | None:
    return Path(environ[name]) if environ.get(name) else None


def _malformed(name: str, value: str) -> SettingsError:
    return SettingsError(
        f"malformed environment variable {name}",
        expected=MEANING[_SAFE_REGION + "<REGION>" if name.startswith(_SAFE_REGION) else name],
        came=repr(value),
        remedy=f"set {name} to one of the values above, or unset it",
    )


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "0")
    if value not in ("0", "1"):
        raise _malformed(name, value)
    return value == "1"


def _choice(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    value = environ.get(name)
    if value is not None and value not in allowed:
        raise _malformed(name, value)
    return value


def _count(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise _malformed(name, value)
    return int(value)


@dataclass(frozen=True, slots=True)
class Setting:
    """One variable, as the environment has it.

    Attributes:
        value: None where it is not set.
        fault: what is wrong with it.
    """

    name: str
    value: str | None
    fault: SettingsError | None


_environ: Final = dict(os.environ)

SETTINGS: Settings
"""The settings in force in this process."""


def __getattr__(name: str) -> Settings:
    if name != "SETTINGS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = settings = read_settings(_environ)
    return settings


def every_setting(environ: Mapping[str, str] = _environ) -> tuple[Setting, ...]:
    """All variables that there are, and all `AUXSTREAM_*` names that are set."""
    known = [name for name in MEANING if "<" not in name]
    others = sorted(name for name in environ if name.startswith(PREFIX) and name not in MEANING)
    return tuple(Setting(name, environ.get(name), _fault(environ, name)) for name in (*known, *others))


def _fault(environ: Mapping[str, str], name: str) -> SettingsError | None:
    try:
        read_settings({name: environ[name]} if name in environ else {})
    except SettingsError as error:
        return error
    return None


def leave_out(faulty: Iterable[Setting]) -> None:
    """Settle `SETTINGS` as if these were not set: for `auxstream doctor`, which reports them and goes on."""
    assert "SETTINGS" not in globals(), "settings are read once"
    for setting in faulty:
        del _environ[setting.name]


def others(*names: str) -> dict[str, str]:
    """Variables of other libraries, those that are set."""
    return {name: _environ[name] for name in names if name in _environ}
