"""The cache of generated files: what is damaged is made again, what cannot be written is done without."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import stat
import sys
import warnings
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from auxstream.kernels import store
from auxstream.runtime.errors import AuxstreamWarning
from auxstream.runtime.settings import SETTINGS

SOURCE = '"""A kernel."""\n\n\ndef value() -> int:\n    return 41\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A cache folder of the test's own, as AUXSTREAM_CACHE_DIR would name it."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(store, "SETTINGS", replace(SETTINGS, cache_dir=folder))
    forget()
    yield folder
    forget()


def forget() -> None:
    """As a new process would."""
    store.load.cache_clear()
    store._instead.cache_clear()


def test_a_module_and_its_file(cache: Path) -> None:
    module = store.load("answer", SOURCE)
    path = cache / "kernels" / "answer.py"
    assert module.value() == 41
    assert path.read_text() == SOURCE
    assert module.__file__ == str(path)
    assert inspect.getsource(module.value) in SOURCE, "Triton reads its kernels' source"
    assert [entry.name for entry in path.parent.iterdir()] == ["answer.py"], "no temporary file, no bytecode"
    assert store.load("answer", SOURCE) is module


def test_a_file_that_is_there_is_not_written_again(cache: Path) -> None:
    store.load("answer", SOURCE)
    path = cache / "kernels" / "answer.py"
    before = path.stat()
    forget()
    assert store.load("answer", SOURCE).value() == 41
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        SOURCE[:30].encode(),
        b"raise SystemExit",
        b"\xff\xfe\x00",
        SOURCE.replace("41", "42").encode(),
        SOURCE.replace("\n", "\r\n").encode(),
    ],
    ids=["empty", "half", "other code", "no text", "same length", "other line ends"],
)
def test_a_damaged_file_is_made_again(cache: Path, damage: bytes) -> None:
    store.load("answer", SOURCE)
    path = cache / "kernels" / "answer.py"
    path.write_bytes(damage)
    forget()
    assert store.load("answer", SOURCE).value() == 41
    assert path.read_bytes() == SOURCE.encode()


def test_a_stale_bytecode_file_is_not_trusted(cache: Path) -> None:
    """Same name, size and second: what Python's own import would take for unchanged."""
    first = SOURCE.replace("41", "42")
    store.load("answer", first)
    path = cache / "kernels" / "answer.py"
    moment = path.stat()
    forget()
    assert store.load("answer", SOURCE).value() == 41
    os.utime(path, ns=(moment.st_atime_ns, moment.st_mtime_ns))
    forget()
    module = store.load("answer", SOURCE)
    assert module.value() == 41
    assert "41" in inspect.getsource(module.value)


def test_a_folder_in_a_files_place(cache: Path) -> None:
    (cache / "kernels" / "answer.py").mkdir(parents=True)
    with pytest.warns(AuxstreamWarning, match="cannot be written"):
        module = store.load("answer", SOURCE)
    assert module.value() == 41
    assert not [entry for entry in (cache / "kernels").iterdir() if entry.name != "answer.py"], (
        "no temporary file stays"
    )


@pytest.mark.parametrize("kind", ["a file", "under a file", "not allowed"])
def test_an_unwritable_folder(kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache
    if kind == "not allowed":
        if os.geteuid() == 0:
            folder = Path("/proc/self/cache")  # root may write anywhere else
        else:
            cache.mkdir()
            cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    else:
        cache.write_text("")
        folder = cache if kind == "a file" else cache / "below"
    monkeypatch.setattr(store, "SETTINGS", replace(SETTINGS, cache_dir=folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = store.load("answer", SOURCE), store.load("other", SOURCE + "\n")
        store.write_choice("key", "resident")
    assert first.value() == second.value() == 41
    assert [warning.category for warning in caught] == [AuxstreamWarning], "said once"
    assert str(folder) in str(caught[0].message)
    assert "AUXSTREAM_CACHE_DIR" in str(caught[0].message)
    assert Path(str(first.__file__)).exists()
    assert not Path(str(first.__file__)).is_relative_to(cache)
    assert store.read_choice("key") is None, "the next process measures again"


def test_a_file_that_vanishes(cache: Path) -> None:
    module = store.load("answer", SOURCE)
    (cache / "kernels" / "answer.py").unlink()
    assert inspect.getsource(module.value) in SOURCE
    forget()
    assert store.load("answer", SOURCE).value() == 41


def test_choices(cache: Path) -> None:
    assert store.read_choice("key") is None
    store.write_choice("key", {"block": 128, "warps": [1, 2]})
    assert store.read_choice("key") == {"block": 128, "warps": [1, 2]}
    path = cache / "choices" / "key.json"
    for damage in ("", "{", "\x00"):
        path.write_text(damage)
        assert store.read_choice("key") is None
    path.write_bytes(b"\xff\xff")
    assert store.read_choice("key") is None
    store.write_choice("key", 1)
    assert store.read_choice("key") == 1


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SETTINGS", replace(SETTINGS, cache_dir=None))
    monkeypatch.setenv("HOME", "/somewhere")
    assert store.folder() == Path("/somewhere/.cache/auxstream")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert store.folder().is_absolute()


def write_many(folder: Path, own: int, gate: object, failures: object) -> None:
    """A process that loads the same kernels as others do, and damages what it finds now and then."""
    store.SETTINGS = replace(SETTINGS, cache_dir=folder)
    gate.wait()  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for turn in range(120):
                forget()
                name = f"k{turn % 3}"
                source = SOURCE.replace("41", str(turn % 3)) + "#" * 20_000
                assert store.load(name, source).value() == turn % 3
                store.write_choice("key", own)
                assert store.read_choice("key") in range(4)
                if own == 0 and turn % 5 == 0:
                    (folder / "kernels" / f"{name}.py").write_text("half a fi")
    except BaseException as error:
        failures.put(repr(error))  # type: ignore[attr-defined]
        raise


def test_concurrent_writers(cache: Path) -> None:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    gate, failures = context.Barrier(4), context.Queue()
    processes = [context.Process(target=write_many, args=(cache, own, gate, failures)) for own in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0] * 4
    left = sorted(entry.name for entry in (cache / "kernels").iterdir())
    assert left == ["k0.py", "k1.py", "k2.py"], "no temporary file stays"
    forget()
    for kind in range(3):
        assert store.load(f"k{kind}", SOURCE.replace("41", str(kind)) + "#" * 20_000).value() == kind
