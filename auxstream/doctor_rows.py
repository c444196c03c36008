"""What the doctor says of one thing, and how a list of that looks.

Enters: rows. Leaves: a table where a person reads, plain lines elsewhere, JSON for tools. Invariant: whatever did not
work has its remedy beside it. Where rich is missing, which is one of the things to be said, lines do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final, Literal

State = Literal["ok", "note", "absent", "FAILED"]
"""Works; works, but; not there, and not needed here; needed here, and does not work."""

_COLOURS: Final = {"ok": "green", "note": "yellow", "absent": "bright_black", "FAILED": "bold red"}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was looked at.

    Attributes:
        section: what kind of thing.
        says: what was found.
        remedy: what to do about it; "" where nothing is to be done.
    """

    section: str
    name: str
    state: State
    says: str
    remedy: str = ""


def show(rows: Sequence[Row]) -> None:
    """Print all rows, and a line that sums them up."""
    try:
        from rich.console import Console
    except ImportError:
        print(plain(rows))
        return
    console = Console()
    if console.is_terminal:
        for section, some in groupby(rows, key=lambda row: row.section):
            console.print(_table(section, some))
        console.print(verdict(rows), style=_COLOURS["FAILED" if failed(rows) else "ok"], markup=False)
    else:
        sys.stdout.write(plain(rows) + "\n")


def _table(section: str, rows: Iterable[Row]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, title=section, title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        says = Text(row.says)
        if row.remedy:
            says.append(f"\n-> {row.remedy}", style=_COLOURS["FAILED" if row.state == "FAILED" else "note"])
        table.add_row(Text(row.state, style=_COLOURS[row.state]), row.name, says)
    return table


def plain(rows: Sequence[Row]) -> str:
    """All rows as lines."""
    width = max(len(row.name) for row in rows)
    lines: list[str] = []
    for section, some in groupby(rows, key=lambda row: row.section):
        lines.append(section)
        for row in some:
            lines.append(f"  {row.state:<6}  {row.name:<{width}}  {row.says}")
            lines += [f"  {'':<6}  {'':<{width}}  -> {row.remedy}"] if row.remedy else []
    return "\n".join([*lines, verdict(rows)])


def failed(rows: Iterable[Row]) -> list[Row]:
    """What is needed here, and does not work."""
    return [row for row in rows if row.state == "FAILED"]


def verdict(rows: Sequence[Row]) -> str:
    """The whole in a line."""
    if broken := failed(rows):
        return f"auxstream: needed here, and not working: {', '.join(row.name for row in broken)}"
    notes = sum(row.state == "note" for row in rows)
    return f"auxstream: all that is needed here works{f', with {notes} note(s)' if notes else ''}"


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything, for tools."""
    return {"works": not failed(rows), "verdict": verdict(rows), "rows": [asdict(row) for row in rows]}
