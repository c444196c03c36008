"""The environment: every variable, its values, and what is said of anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from auxstream.runtime.errors import AuxstreamError, SettingsError
from auxstream.runtime.settings import MEANING, Settings, every_setting, read_settings

LEGAL: dict[str, dict[str, tuple[str, Any]]] = {
    "AUXSTREAM_DISABLE": {"0": ("disable", False), "1": ("disable", True)},
    "AUXSTREAM_NVTX": {"0": ("nvtx", False), "1": ("nvtx", True)},
    "AUXSTREAM_HANDOFF": {"record": ("handoff", "record"), "auto": ("handoff", "auto")},
    "AUXSTREAM_VERIFY": {value: ("verify", value) for value in ("off", "warn", "error")},
    "AUXSTREAM_TOKEN_THRESHOLD": {"0": ("token_threshold", 0), "64": ("token_threshold", 64)},
    "AUXSTREAM_DUMP_DIR": {"/some/where": ("dump_dir", Path("/some/where")), "": ("dump_dir", None)},
    "AUXSTREAM_OVERLAP": {
        "": ("overlap", ()),
        "shared": ("overlap", (("shared", "on"),)),
        "*=off, layers.*.k=products": ("overlap", (("*", "off"), ("layers.*.k", "products"))),
    },
    "AUXSTREAM_FUSION": {value: ("fusion", value) for value in ("on", "off")},
    "AUXSTREAM_FUSION_SAFE": {
        "": ("fusion_safe", ()),
        "shared": ("fusion_safe", (("shared", "1"),)),
        "layers.*.shared=auto, layers.3.*=0": ("fusion_safe", (("layers.*.shared", "auto"), ("layers.3.*", "0"))),
    },
    "AUXSTREAM_FUSION_SAFE_LAYERS_0_SHARED": {
        value: ("fusion_safe_regions", (("LAYERS_0_SHARED", value),)) for value in ("0", "1", "auto")
    },
    "AUXSTREAM_CACHE_DIR": {"/some/where": ("cache_dir", Path("/some/where")), "": ("cache_dir", None)},
}
ILLEGAL = {
    "AUXSTREAM_DISABLE": ("2", "", "true", "yes", " 1"),
    "AUXSTREAM_NVTX": ("on", "", "-1"),
    "AUXSTREAM_HANDOFF": ("", "Record", "none"),
    "AUXSTREAM_VERIFY": ("", "on", "ERROR", "strict"),
    "AUXSTREAM_TOKEN_THRESHOLD": ("", "-1", "1.5", "many", " 3", "1e3"),
    "AUXSTREAM_DUMP_DIR": (),
    "AUXSTREAM_OVERLAP": ("a=", "a=1", "=on", "a,,b", "a=on,"),
    "AUXSTREAM_FUSION": ("", "1", "On"),
    "AUXSTREAM_FUSION_SAFE": ("a=", "a=2", "=1", "a,,b", "a=1,"),
    "AUXSTREAM_FUSION_SAFE_LAYERS_0_SHARED": ("", "2", "Auto"),
    "AUXSTREAM_CACHE_DIR": (),
}


def meaning(name: str) -> str:
    """One variable per region: any name will do for its last part."""
    return "AUXSTREAM_FUSION_SAFE_<REGION>" if name.startswith("AUXSTREAM_FUSION_SAFE_") else name


def test_the_tables_cover_every_variable() -> None:
    assert set(MEANING) == set(map(meaning, LEGAL))
    assert set(MEANING) == set(map(meaning, ILLEGAL))


def test_nothing_set() -> None:
    assert read_settings({}) == Settings()
    assert read_settings({"PATH": "/bin", "auxstream_disable": "9", "XAUXSTREAM_DISABLE": "9"}) == Settings()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in LEGAL.items() for v in values])
def test_legal(name: str, value: str) -> None:
    field, expected = LEGAL[name][value]
    settings = read_settings({name: value})
    assert getattr(settings, field) == expected
    others = {f: getattr(Settings(), f) for f in Settings.__slots__ if f != field}
    assert {f: getattr(settings, f) for f in others} == others


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ILLEGAL.items() for v in values])
def test_malformed(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: value})
    text = str(caught.value)
    assert name in text
    assert MEANING[meaning(name)] in text
    assert repr(value) in text
    assert "remedy:" in text


@pytest.mark.parametrize(
    "name",
    ["AUXSTREAM_DISABEL", "AUXSTREAM_", "AUXSTREAM_disable", "AUXSTREAM_NVTX_", "AUXSTREAM_FUSION_SAFE_layers.0"],
)
def test_unknown(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: "1", "AUXSTREAM_DISABLE": "1"})
    text = str(caught.value)
    assert f"unknown environment variable {name}" in text
    assert all(f"{known} ({values})" in text for known, values in MEANING.items())
    assert isinstance(caught.value, AuxstreamError)


def test_every_setting_tells_where_it_comes_from_and_what_is_wrong_with_it() -> None:
    environ = {
        "AUXSTREAM_VERIFY": "warn",
        "AUXSTREAM_NVTX": "yes",
        "AUXSTREAM_FUSION_SAFE_A": "1",
        "AUXSTREAM_FUSION_SAFE_B": "no",
        "AUXSTREAM_DISABEL": "1",
        "PATH": "/bin",
    }
    found = {setting.name: setting for setting in every_setting(environ)}
    known = [name for name in MEANING if "<" not in name]
    assert list(found) == [*known, "AUXSTREAM_DISABEL", "AUXSTREAM_FUSION_SAFE_A", "AUXSTREAM_FUSION_SAFE_B"]
    assert {name: setting.value for name, setting in found.items() if setting.value is not None} == {
        name: value for name, value in environ.items() if name != "PATH"
    }
    faults = {name: str(setting.fault) for name, setting in found.items() if setting.fault is not None}
    assert set(faults) == {"AUXSTREAM_NVTX", "AUXSTREAM_FUSION_SAFE_B", "AUXSTREAM_DISABEL"}
    assert all(name in text and "remedy:" in text for name, text in faults.items())


LEFT_OUT = """
from auxstream.runtime import settings
found = settings.every_setting()
settings.leave_out(setting for setting in found if setting.fault is not None)
print([setting.name for setting in found if setting.fault is not None])
print(settings.SETTINGS.verify, settings.SETTINGS.nvtx, settings.others("OTHER", "AUXSTREAM_NOT_SET"))
try:
    settings.leave_out([])
except AssertionError:
    print("once")
"""


def test_faulty_ones_can_be_left_out_before_anybody_asks() -> None:
    environ = {"AUXSTREAM_NVTX": "x", "AUXSTREAM_WHAT": "1", "AUXSTREAM_VERIFY": "warn", "OTHER": "o"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AUXSTREAM_")}
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OUT], env={**inherited, **environ}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['AUXSTREAM_NVTX', 'AUXSTREAM_WHAT']\nwarn False {'OTHER': 'o'}\nonce\n"
