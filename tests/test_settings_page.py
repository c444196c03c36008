"""docs/settings.md against the code: every variable and every option, its default, its values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

import auxstream
from auxstream.capture.options import MODES
from auxstream.runtime.settings import (
    FUSION_VALUES,
    HANDOFF_VALUES,
    MEANING,
    OVERLAP_VALUES,
    SAFETY_VALUES,
    VERIFY_VALUES,
)

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "settings.md").read_text()
FLAGS = ("0", "1")
VALUES = {
    "AUXSTREAM_DISABLE": FLAGS,
    "AUXSTREAM_NVTX": FLAGS,
    "AUXSTREAM_HANDOFF": HANDOFF_VALUES,
    "AUXSTREAM_VERIFY": VERIFY_VALUES,
    "AUXSTREAM_FUSION": FUSION_VALUES,
    "AUXSTREAM_OVERLAP": OVERLAP_VALUES,
    "AUXSTREAM_FUSION_SAFE": SAFETY_VALUES,
    "AUXSTREAM_FUSION_SAFE_<REGION>": SAFETY_VALUES,
    "mode": MODES,
    "handoff": HANDOFF_VALUES,
    "verify": VERIFY_VALUES,
}
Row = tuple[str, ...]


def rows(page: str, heading: str) -> dict[str, Row]:
    """The cells behind the first one, which is `code`, of the table under a heading."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = [re.split(r"\s*\|\s*", line.strip("| ")) for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): tuple(cells[1:]) for cells in found}


def complaints(page: str, variables: Mapping[str, str], options: Mapping[str, object]) -> list[str]:
    """What the page says wrong or leaves out."""
    found: list[str] = []
    for heading, names in (("The environment", set(variables)), ("`Options`", set(options))):
        table = rows(page, heading)
        found += [f"{heading} lacks {name}" for name in sorted(names - set(table))]
        found += [f"{heading} has {name}, which is not there" for name in sorted(set(table) - names)]
        for name in sorted(names & set(table)):
            row = " ".join(table[name])
            found += [f"{name} lacks the value {value}" for value in VALUES.get(name, ()) if f"{value}`" not in row]
            if name in options and table[name][0] != f"`{options[name]!r}`":
                found.append(f"{name}: default {table[name][0]}, and it is {options[name]!r}")
    return found


OPTIONS = {field.name: getattr(auxstream.Options(), field.name) for field in fields(auxstream.Options)}


def test_the_page_has_every_setting_with_its_default_and_values() -> None:
    assert complaints(PAGE, MEANING, OPTIONS) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("| `AUXSTREAM_NVTX` |", "| AUXSTREAM_NVTX |", "The environment lacks AUXSTREAM_NVTX"),
        ("| `warmup` |", "| warmup |", "`Options` lacks warmup"),
        ("| `warmup` | `2` |", "| `warmup` | `3` |", "warmup: default `3`, and it is 2"),
        ("| `warmup` |", "| `warm_up` |", "`Options` has warm_up, which is not there"),
        ("`=auto` or `=products`", "`=auto`", "AUXSTREAM_OVERLAP lacks the value products"),
    ],
)
def test_a_gap_would_show(old: str, new: str, says: str) -> None:
    assert PAGE.count(old) == 1
    assert says in complaints(PAGE.replace(old, new), MEANING, OPTIONS)


def test_every_variable_of_make_is_there() -> None:
    assert set(rows(PAGE, "`make`")) == set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
