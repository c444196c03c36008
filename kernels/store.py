"""Generated files on disk: kernels by content, choices by key.

Enters: text and the name its content gave it. Leaves: an imported module. Invariant: a module is made from exactly the
text that would be generated now, and a file appears under its name complete or not at all; so a corrupted or
half-written file is replaced, concurrent writers cannot hurt each other, and no lock is needed.
"""

from __future__ import annotations

import functools
import json
import linecache
import os
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from ..runtime.errors import AuxstreamWarning
from ..runtime.settings import SETTINGS


def folder() -> Path:
    """Where generated files live: AUXSTREAM_CACHE_DIR, or `~/.cache/auxstream`."""
    home = os.path.expanduser("~")
    own = Path(tempfile.gettempdir() if home == "~" else home) / ".cache" / "auxstream"  # "~": a user without a home
    return SETTINGS.cache_dir or own


@functools.cache
def load(name: str, source: str) -> ModuleType:
    """The module with this source. It has a file, which debuggers and profilers open, but what runs and what Triton
    reads is `source` itself: no bytecode cache trusted by its time stamp, and no file somebody just changed."""
    path = str(_placed(Path("kernels") / f"{name}.py", source))
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = ModuleType(f"auxstream_generated.{name}")
    module.__file__ = path
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def read_choice(key: str) -> Any:
    """A choice made earlier, or None where there is none or its file is damaged."""
    text = _read(folder() / "choices" / f"{key}.json")
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None


def write_choice(key: str, choice: Any) -> None:
    """Keep a choice (anything JSON can hold) for later processes."""
    _placed(Path("choices") / f"{key}.json", json.dumps(choice))


def _placed(place: Path, text: str) -> Path:
    """A file that holds `text`: at its place in the folder, or in a temporary one if that cannot be written."""
    path = folder() / place
    if _read(path) == text:
        return path
    try:
        _write(path, text)
    except OSError as error:
        path = _instead(f"{folder()} cannot be written ({error.strerror})") / place
        _write(path, text)
    return path


@functools.cache
def _instead(reason: str) -> Path:
    warnings.warn(
        f"the cache folder {reason}: generated kernels go to a temporary one, and the next process makes them again. "
        "Set AUXSTREAM_CACHE_DIR to a folder that can be written.",
        AuxstreamWarning,
        stacklevel=4,
    )
    return Path(tempfile.mkdtemp(prefix="auxstream-"))


def _read(path: Path) -> str | None:
    """The file's text, or None where there is none that can be read."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None


def _write(path: Path, text: str) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
