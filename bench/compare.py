"""Two files of results side by side: what was measured in both, the ratio, and whether that is more than the spread.

Enters: two files or folders as benchmarks and `auxstream bench --json` write them. Leaves: a table as text. A figure is
outside the spread if the middle halves of its samples do not meet; a number without a spread is only divided.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..runtime.errors import InputError

_DESCRIBED: Final = ("date", "gpu", "driver", "torch", "triton")


@dataclass(frozen=True, slots=True)
class Measured:
    """A number, and the middle half around it where there were samples."""

    median: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.median:,.2f} {self.unit}".strip()


def compare(first: Path, second: Path) -> str:
    """The table. Raises InputError if a file holds no results, or the two have nothing in common."""
    (machine, a), (other, b) = _load(first), _load(second)
    shared = [name for name in a if name in b]
    if not shared:
        raise InputError(
            "the two results have nothing in common",
            expected="results of one benchmark at least in both",
            came=f"{', '.join(sorted({name[0] for name in a}))} and {', '.join(sorted({name[0] for name in b}))}",
        )
    lines = [f"A: {first}: {_described(machine)}", f"B: {second}: {_described(other)}"]
    if machine.get("gpu") != other.get("gpu"):
        lines.append("not the same card: ratios say nothing about the code")
    width = max(len(" / ".join(name[1:])) for name in shared)
    last = ""
    for name in shared:
        if name[0] != last:
            last = name[0]
            lines.append(f"{last:{width + 2}} {'A':>16} {'B':>16}    B/A")
        ratio = f"{b[name].median / a[name].median:6.3f}" if a[name].median else "     -"
        lines.append(
            f"  {' / '.join(name[1:]):{width}} {a[name]!s:>16} {b[name]!s:>16} {ratio}  {_said(a[name], b[name])}"
        )
    for which, only in (("A", [name for name in a if name not in b]), ("B", [name for name in b if name not in a])):
        if only:
            rest = f"; and {len(only) - 5} more" if len(only) > 5 else ""
            lines.append(f"only in {which}: " + "; ".join(" / ".join(name) for name in only[:5]) + rest)
    return "\n".join(line.rstrip() for line in lines)


def _said(a: Measured, b: Measured) -> str:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return "no spread"
    return "outside the spread" if a.high < b.low or b.high < a.low else "within"


def _load(path: Path) -> tuple[Mapping[str, str], dict[tuple[str, ...], Measured]]:
    """The machine, and all numbers by the names that lead to them, the benchmark's first."""
    if path.is_dir():
        suite, machine = _read(path / "suite.json")
        files = {name: path / f"{name}.json" for name in suite.get("outcomes", {})}
        results = {name: _read(file)[0].get("results", {}) for name, file in files.items() if file.exists()}
    else:
        document, machine = _read(path)
        results = document.get("results", {})
        if document["benchmark"] != "suite":
            results = {document["benchmark"]: results}
    return machine, {(name, *names): value for name, values in results.items() for names, value in _numbers(values)}


def _read(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file of results, and the machine they are of."""
    try:
        document: Any = json.loads(file.read_text())
        return {"benchmark": document["benchmark"], **document}, document["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} holds no results of a benchmark",
            expected="a file or folder that `auxstream bench --json` wrote",
            came=f"{type(error).__name__}: {error}",
        ) from error


def _numbers(values: Any) -> Iterator[tuple[tuple[str, ...], Measured]]:
    """Numbers and figures in nested results. Lists are details, such as kernels: left out."""
    if isinstance(values, bool):
        return
    if isinstance(values, int | float):
        yield (), Measured(values)
    elif isinstance(values, dict) and "median" in values and "unit" in values:
        yield (), Measured(values["median"], values.get("low"), values.get("high"), values["unit"])
    elif isinstance(values, dict):
        for name, inner in values.items():
            yield from (((name, *names), value) for names, value in _numbers(inner))


def _described(machine: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {machine[name]}" for name in _DESCRIBED if name in machine)
