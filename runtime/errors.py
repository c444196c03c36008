"""Every error and warning of auxstream.

An exception keeps its facts as fields and renders them in one form: what was expected, what came, the remedy.
All of them descend from `AuxstreamError`, so `except auxstream.AuxstreamError` catches the library's own refusals
and nothing else.
"""

from __future__ import annotations

import copyreg
from typing import Any


class AuxstreamError(Exception):
    """Root of the library's errors; `str` of one shows all four fields, a line each.

    Attributes:
        what: what happened, with the region, op or input by name.
        expected: what would have been right; may be empty, as may the two below.
        came: what was found instead.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, expected: str = "", came: str = "", remedy: str = "") -> None:
        super().__init__(what, expected, came, remedy)
        self.what = what
        self.expected = expected
        self.came = came
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # pyright: ignore

    def __str__(self) -> str:
        parts = [self.what]
        if self.expected:
            parts.append(f"  expected: {self.expected}")
        if self.came:
            parts.append(f"  came:     {self.came}")
        if self.remedy:
            parts.append(f"  remedy:   {self.remedy}")
        return "\n".join(parts)


class SettingsError(AuxstreamError):
    """A malformed or unknown `AUXSTREAM_*` environment variable, or a malformed option."""


class RegionError(AuxstreamError):
    """An illegal step in the life of a region, or a tensor a region cannot take."""


class UndeclaredAccessError(RegionError):
    """A region's branch touched a tensor that `fork` did not declare, where the handoff cannot be made good."""


class CaptureError(AuxstreamError):
    """Work that cannot be captured, or a capture that ended with a region open."""


class HostReadError(CaptureError):
    """The host asked for a tensor's values while they are only being recorded."""


class TraceError(AuxstreamError):
    """A model that cannot be turned into one graph."""


class InputError(AuxstreamError):
    """An input whose structure, shape, dtype or device differs from the captured one."""


class RaceError(AuxstreamError):
    """A graph whose proof failed; it was not made ready to be replayed.

    Attributes:
        report: the `Report` with the races.
    """

    def __init__(self, what: str, report: object) -> None:
        super().__init__(
            what, remedy="declare what the branch reads in fork(), and join the region before its results are used"
        )
        self.report = report


class SimulatedFault(AuxstreamError):
    """An op of a replayed program failed on values that a race corrupted (on a GPU: an illegal access)."""


class MissingDependencyError(AuxstreamError):
    """An optional part is not installed; the remedy names what to install."""


class AuxstreamWarning(UserWarning):
    """Something was made good, or could not be proved; the text says which."""
