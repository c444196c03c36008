"""docs/troubleshooting.md against the code: every error class has its section, and every message it quotes is said."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
LIBRARY = ("runtime", "capture", "kernels")
ROOTS = {"AuxstreamError", "AuxstreamWarning"}


@functools.cache
def trees() -> tuple[ast.Module, ...]:
    return tuple(ast.parse(path.read_text()) for folder in LIBRARY for path in sorted((ROOT / folder).glob("*.py")))


@functools.cache
def error_classes() -> frozenset[str]:
    """The library's exceptions and warnings, the root left out, which is never raised itself."""
    bases: Mapping[str, set[str]] = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found, more = set[str](), set(ROOTS)
    while more:
        found |= more
        more = {name for name, parents in bases.items() if parents & found} - found
    return frozenset(found - {"AuxstreamError"})


@functools.cache
def said() -> str:
    """All text of the library; what f-strings put in between is a blank."""
    texts: list[str] = []
    for tree in trees():
        for node in ast.walk(tree):
            match node:
                case ast.JoinedStr(values=values):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in values]
                    texts.append("".join(map(str, parts)))
                case ast.Constant(value=str(text)):
                    texts.append(text)
                case _:
                    pass
    return "\n".join(texts)


def sections(page: str) -> set[str]:
    return set(re.findall(r"^### `(\w+)`$", page, re.MULTILINE))


def quoted(page: str) -> Iterator[str]:
    """Messages: `code` in the first column of a table that begins with one, and at the start of a section's text."""
    for table in re.findall(r"^\| (?:message|unattributed) \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE):
        for row in table.splitlines():
            yield from re.findall(r"`([^`]+)`", row.split("|")[1])
    for start in re.findall(r"^### `\w+`\n\n((?:`[^`]+`(?:, )?)+)", page, re.MULTILINE):
        yield from re.findall(r"`([^`]+)`", start)


def complaints(page: str) -> list[str]:
    found = [f"no section for {name}" for name in sorted(error_classes() - sections(page))]
    found += [f"a section for {name}, which is no error" for name in sorted(sections(page) - error_classes())]
    return found + [f"nothing says {text!r}" for text in quoted(page) if text not in said()]


def test_every_error_has_a_section_and_every_message_is_said() -> None:
    assert complaints(PAGE) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("### `HostReadError`", "### `HostError`", "no section for HostReadError"),
        ("### `HostReadError`", "### `HostError`", "a section for HostError, which is no error"),
        ("`reads a tensor's values on the host`", "`reads values`", "nothing says 'reads values'"),
        ("| `lie on several devices`", "| `lie on many devices`", "nothing says 'lie on many devices'"),
    ],
)
def test_a_gap_would_show(old: str, new: str, says: str) -> None:
    assert PAGE.count(old) == 1
    assert says in complaints(PAGE.replace(old, new))


def test_the_errors_were_found() -> None:
    assert {"SettingsError", "HostReadError", "ReplayRaceError", "LoweringError", "AuxstreamWarning"} < error_classes()
    assert len(list(quoted(PAGE))) > 60
