"""Every error and warning, to catch by name: `except auxstream.errors.RaceError`.

All errors are `AuxstreamError`s. What is raised where: by `compile` TraceError, CaptureError, InputError, RaceError; by
calls of compiled models InputError, CaptureError; by `graph` CaptureError, HostReadError, RaceError; by regions
RegionError, UndeclaredAccessError; by options and the environment SettingsError; by replays of the simulated machine
SimulatedFault; by an extra that is not installed MissingDependencyError. Each can be pickled.
"""

from __future__ import annotations

from .runtime.errors import (
    AuxstreamError,
    AuxstreamWarning,
    CaptureError,
    HostReadError,
    InputError,
    MissingDependencyError,
    RaceError,
    RegionError,
    SettingsError,
    SimulatedFault,
    TraceError,
    UndeclaredAccessError,
)

__all__ = [
    "AuxstreamError",
    "AuxstreamWarning",
    "CaptureError",
    "HostReadError",
    "InputError",
    "MissingDependencyError",
    "RaceError",
    "RegionError",
    "SettingsError",
    "SimulatedFault",
    "TraceError",
    "UndeclaredAccessError",
]
