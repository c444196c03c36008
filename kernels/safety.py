"""Which regions may run fused kernels on their auxiliary branch.

Enters: the rules of `Options` and of the environment, and the regions a graph has. Leaves: `0`, `1` or `auto` per
region. Invariant: without a rule the answer is `0`: the marker keeps the branch unfused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from ..runtime.errors import SettingsError
from ..runtime.settings import SETTINGS, Safety, SafetyRules, Settings


def variable_of(region: str) -> str:
    """The last part of a region's own variable: upper case, `_` for whatever is no letter or digit."""
    return re.sub(r"[^A-Z0-9]", "_", region.upper())


def fusion_safety(
    regions: Iterable[str], rules: SafetyRules = (), settings: Settings = SETTINGS, *, partial: bool = False
) -> Mapping[str, Safety]:
    """What holds for each region: `rules`, then AUXSTREAM_FUSION_SAFE (later entries win), then the region's variable.

    Raises SettingsError when a variable names no region, unless these are only some of a model's (`partial`), or two
    regions map to one name.
    """
    names = list(dict.fromkeys(regions))
    owners = _owners(names, settings)
    if not partial:
        refuse_unknown_regions(names, settings)
    found: dict[str, Safety] = dict.fromkeys(names, "0")
    for glob, value in (*rules, *settings.fusion_safe):
        for region in names:
            if fnmatchcase(region, glob):
                found[region] = value
    for name, value in settings.fusion_safe_regions:
        if name in owners:
            found[owners[name]] = value
    return found


def unknown_regions(regions: Iterable[str], settings: Settings = SETTINGS) -> list[str]:
    """What the environment's variables name that is none of these regions."""
    owners = set(map(variable_of, regions))
    return [name for name, _ in settings.fusion_safe_regions if name not in owners]


def refuse_unknown_regions(regions: Iterable[str], settings: Settings = SETTINGS) -> None:
    """Raise SettingsError for a variable that names none of these regions."""
    owners = set(map(variable_of, regions))
    for name in unknown_regions(owners, settings):
        raise SettingsError(
            f"AUXSTREAM_FUSION_SAFE_{name} names no region of this graph",
            expected="one of " + (", ".join(sorted(owners)) or "none: the graph has no regions"),
            came=name,
            remedy="correct the name or unset the variable",
        )


def _owners(names: Iterable[str], settings: Settings) -> dict[str, str]:
    """Regions by the last part of their variable."""
    owners: dict[str, str] = {}
    for region in names:
        other = owners.setdefault(variable_of(region), region)
        if other != region and any(name == variable_of(region) for name, _ in settings.fusion_safe_regions):
            raise SettingsError(
                f"AUXSTREAM_FUSION_SAFE_{variable_of(region)} names two regions",
                expected="a variable for one region",
                came=f"{other!r} and {region!r}",
                remedy="use the list, AUXSTREAM_FUSION_SAFE, which takes the regions' own names",
            )
    return owners
