"""`Options`: from code, from YAML, and under the environment's word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import auxstream
from auxstream import Options
from auxstream.runtime.errors import SettingsError
from auxstream.runtime.settings import Settings


def from_text(folder: Path, text: str) -> Options:
    path = folder / "options.yaml"
    path.write_text(text)
    return Options.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Options()),
        ("multi_stream_moe: {enabled: false}", Options(multi_stream_moe=False)),
        ("multi_stream_moe:\n  enabled: true\nverify: warn", Options(verify="warn")),
        ("multi_stream_moe: no\nwarmup: 3\ntoken_threshold: 64", Options(False, warmup=3, token_threshold=64)),
        ("token_threshold: null\nhandoff: record", Options(handoff="record")),
        ("dump_dir: out/stages", Options(dump_dir=Path("out/stages"))),
        ("mode: none\ncopy_outputs: true", Options(mode="none", copy_outputs=True)),
        ("buckets: [8, 1, 4]", Options(buckets=(1, 4, 8))),
        ("token_dims: {mask: 1, table: null}", Options(token_dims={"mask": 1, "table": None})),
        ("pad: {enabled: 0}\ntoken_dims: {enabled: 0}", Options(pad={"enabled": 0}, token_dims={"enabled": 0})),
        ("pad: {slots: -1, mask: false, x: 0.5}", Options(pad={"slots": -1, "mask": False, "x": 0.5})),
    ],
)
def test_from_yaml(tmp_path: Path, text: str, expected: Options) -> None:
    assert from_text(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("multi_stream_moe: {", "no YAML"),
        ("- multi_stream_moe", "no mapping"),
        ("multi_stream_mo: true", "multi_stream_moe"),
        ("multi_stream_moe: {enabled: true, lanes: 2}", "true or false"),
        ("multi_stream_moe: {enable: true}", "true or false"),
        ("multi_stream_moe: 1", "true or false"),
        ("warmup: two", "an integer >= 0"),
        ("warmup: -1", "an integer >= 0"),
        ("token_threshold: 1.5", "an integer >= 0"),
        ("token_threshold: true", "an integer >= 0"),
        ("verify: loud", "off, warn, error"),
        ("handoff: {enabled: true}", "auto, record"),
        ("mode: eager", "none, full, full_decode_only, piecewise, full_and_piecewise"),
        ("mode: {enabled: true}", "none, full"),
        ("copy_outputs: 1", "true or false"),
        ("buckets: 8", "different integers >= 1"),
        ("buckets:", "different integers >= 1"),
        ("buckets: [4, 4]", "different integers >= 1"),
        ("buckets: [0]", "different integers >= 1"),
        ("buckets: [true]", "different integers >= 1"),
        ("buckets: [2.0]", "different integers >= 1"),
        ("token_dims: [0]", "input names, each with a dimension"),
        ("token_dims: {x: true}", "input names, each with a dimension"),
        ("token_dims: {0: 0}", "input names, each with a dimension"),
        ("pad: {x: zero}", "input names, each with a number"),
        ("pad: 0", "input names, each with a number"),
    ],
)
def test_what_no_option_has_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        from_text(tmp_path, text)


def test_buckets_are_kept_in_order() -> None:
    assert Options(buckets=[8, 2, 4]).buckets == (2, 4, 8)  # pyright: ignore
    assert Options().in_force(Settings()).buckets == ()


def test_the_environment_has_the_last_word() -> None:
    options = Options(verify="warn", handoff="auto", token_threshold=8, dump_dir=Path("a"))
    assert options.in_force(Settings()) == options
    environment = Settings(verify="off", handoff="record", token_threshold=0, dump_dir=Path("b"))
    assert options.in_force(environment) == Options(
        verify="off", handoff="record", token_threshold=0, dump_dir=Path("b")
    )


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"buckets": (2, 8)}, "auxstream.Options(**{'buckets': (2, 8)})"),
        ({}, "auxstream.Options(**{})"),
        (torch.ones(2), "example inputs go in one argument, as a tuple"),
    ],
)
def test_options_that_are_no_options_are_refused(given: Any, remedy: str) -> None:
    with pytest.raises(SettingsError, match="no Options") as caught:
        auxstream.compile(torch.nn.Linear(2, 2), torch.ones(1, 2), given)
    assert caught.value.expected == "auxstream.Options"
    assert caught.value.came == type(given).__name__
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["nope.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be read from") as caught:
        Options.from_yaml(tmp_path / name)
    error = caught.value
    assert str(tmp_path / name) in error.what
    assert error.came
    assert str(Path.cwd()) in error.remedy
