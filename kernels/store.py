"""Generated files on disk: kernels by content, choices by key.

Enters: text and the name its content gave it. Leaves: an imported module. Invariant: a file is used only if it holds
exactly the text that would be generated now, and appears under its name complete or not at all; so a corrupted or
half-written file is replaced, concurrent writers cannot hurt each other, and no lock is needed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from ..runtime.errors import AuxstreamWarning
from ..runtime.settings import SETTINGS


@functools.cache
def folder() -> Path:
    """Where generated files live: AUXSTREAM_CACHE_DIR, `~/.cache/auxstream`, or a temporary folder if neither can be
    written (said once)."""
    wanted = SETTINGS.cache_dir or Path.home() / ".cache" / "auxstream"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError as error:
        instead = Path(tempfile.mkdtemp(prefix="auxstream-"))
        warnings.warn(
            f"the cache folder {wanted} cannot be written ({error.strerror}): generated kernels go to {instead} and "
            "are made again by the next process. Set AUXSTREAM_CACHE_DIR to a folder that can be written.",
            AuxstreamWarning,
            stacklevel=2,
        )
        return instead


@functools.cache
def load(name: str, source: str) -> ModuleType:
    """The module with this source, from a real file (Triton reads its kernels' files)."""
    path = folder() / "kernels" / f"{name}.py"
    if read(path) != source:
        write(path, source)
    spec = importlib.util.spec_from_file_location(f"auxstream_generated.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> str | None:
    """The file's text, or None where there is none that can be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def write(path: Path, text: str) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def read_choice(key: str) -> Any:
    """A choice made earlier, or None where there is none or its file is damaged."""
    text = read(folder() / "choices" / f"{key}.json")
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None


def write_choice(key: str, choice: Any) -> None:
    """Keep a choice (anything JSON can hold) for later processes."""
    write(folder() / "choices" / f"{key}.json", json.dumps(choice))
