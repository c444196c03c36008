"""The `AUXSTREAM_*` environment, read once at import, in this file and nowhere else.

Enters: a mapping of environment variables. Leaves: one frozen `Settings`. A malformed value or an unknown
`AUXSTREAM_*` name raises `SettingsError`, because a misspelt kill switch that silently does nothing is worse than
none. `None` means "not set": the option given in code decides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from .errors import SettingsError

PREFIX: Final = "AUXSTREAM_"

Verify = Literal["off", "warn", "error"]
Handoff = Literal["auto", "record"]

VERIFY_VALUES: Final = ("off", "warn", "error")
HANDOFF_VALUES: Final = ("auto", "record")


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
    """

    disable: bool = False
    nvtx: bool = False
    handoff: Handoff | None = None
    verify: Verify | None = None
    token_threshold: int | None = None
    dump_dir: Path | None = None


MEANING: Final[Mapping[str, str]] = {
    "AUXSTREAM_DISABLE": "0 or 1",
    "AUXSTREAM_NVTX": "0 or 1",
    "AUXSTREAM_HANDOFF": "record or auto",
    "AUXSTREAM_VERIFY": "off, warn or error",
    "AUXSTREAM_TOKEN_THRESHOLD": "an integer >= 0 (tokens)",
    "AUXSTREAM_DUMP_DIR": "a folder",
}
"""Every variable and the values it takes."""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Parse `environ`. Raises SettingsError on an unknown `AUXSTREAM_*` name or a malformed value."""
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in MEANING)
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
        dump_dir=Path(environ["AUXSTREAM_DUMP_DIR"]) if environ.get("AUXSTREAM_DUMP_DIR") else None,
    )


def _malformed(name: str, value: str) -> SettingsError:
    return SettingsError(
        f"malformed environment variable {name}",
        expected=MEANING[name],
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


SETTINGS: Final = read_settings(os.environ)
"""The settings in force in this process."""
