"""Leaves out the test files that need hypothesis where it is not installed (say, on an offline GPU machine)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent

if importlib.util.find_spec("hypothesis") is None:
    collect_ignore = [
        str(path.relative_to(HERE))
        for path in HERE.rglob("test_*.py")
        if any(line.startswith(("import hypothesis", "from hypothesis")) for line in path.read_text().splitlines())
    ]
