"""Which regions may run fused kernels: rules in order, the environment on top, a region's own variable above all."""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase

import pytest

from auxstream.kernels.safety import fusion_safety, variable_of
from auxstream.runtime.errors import SettingsError
from auxstream.runtime.settings import SAFETY_VALUES, SafetyRules, Settings, parse_safety, read_settings

REGIONS = ["layers.0.shared", "layers.3.shared", "layers.13.shared", "tail"]


def safety(rules: SafetyRules = (), **environment: str) -> dict[str, str]:
    settings = read_settings({f"AUXSTREAM_FUSION_{name}": value for name, value in environment.items()})
    return dict(fusion_safety(REGIONS, rules, settings))


def test_nothing_said_means_unfused() -> None:
    assert safety() == dict.fromkeys(REGIONS, "0")
    assert fusion_safety([], (), Settings()) == {}


def test_the_list_in_order() -> None:
    assert safety(SAFE="layers.*.shared=auto,layers.3.*=0") == {
        "layers.0.shared": "auto",
        "layers.3.shared": "0",
        "layers.13.shared": "auto",
        "tail": "0",
    }
    assert set(safety(SAFE="layers.3.*=0,layers.*.shared").values()) == {"0", "1"}
    assert safety(SAFE="layers.3.*=0,*")["layers.3.shared"] == "1", "later entries win"
    assert safety(SAFE="tail,nothing.like.it=auto")["tail"] == "1", "a bare glob means 1"


def test_environment_over_rules_and_variable_over_list() -> None:
    assert safety((("tail", "1"),), SAFE="tail=0")["tail"] == "0"
    assert safety((("tail", "1"),))["tail"] == "1"
    assert safety((("*", "1"),), SAFE="*=0", SAFE_LAYERS_3_SHARED="auto") == {
        **dict.fromkeys(REGIONS, "0"),
        "layers.3.shared": "auto",
    }


@pytest.mark.parametrize("entries", range(1, 4))
def test_any_rules(entries: int) -> None:
    """Against the definition, entry by entry."""
    globs = ["*", "layers.*", "layers.?.shared", "layers.[03].*", "tail", "LAYERS.*"]
    for rules in itertools.islice(
        itertools.product(itertools.product(globs, SAFETY_VALUES), repeat=entries), 0, 4000, 1 if entries < 3 else 7
    ):
        expected = dict.fromkeys(REGIONS, "0")
        for glob, value in rules:
            expected |= {region: value for region in REGIONS if fnmatchcase(region, glob)}
        assert fusion_safety(REGIONS, rules, Settings()) == expected
        text = ",".join(f"{glob}={value}" for glob, value in rules)
        assert fusion_safety(REGIONS, parse_safety(text), Settings()) == expected


def test_variables() -> None:
    assert variable_of("layers.0.shared") == "LAYERS_0_SHARED"
    assert variable_of("moe-a/b c") == "MOE_A_B_C"
    assert variable_of("Müll.1") == "M_LL_1"


def test_a_variable_for_no_region() -> None:
    with pytest.raises(SettingsError) as caught:
        safety(SAFE_LAYERS_7_SHARED="1")
    text = str(caught.value)
    assert "AUXSTREAM_FUSION_SAFE_LAYERS_7_SHARED names no region" in text
    assert all(variable_of(region) in text for region in REGIONS)
    with pytest.raises(SettingsError, match="has no regions"):
        fusion_safety([], (), read_settings({"AUXSTREAM_FUSION_SAFE_TAIL": "1"}))


def test_two_regions_of_one_variable() -> None:
    regions = ["moe.a", "moe-a"]
    settings = read_settings({"AUXSTREAM_FUSION_SAFE_MOE_A": "1"})
    with pytest.raises(SettingsError) as caught:
        fusion_safety(regions, (), settings)
    assert "names two regions" in str(caught.value)
    assert "moe.a" in str(caught.value)
    assert "moe-a" in str(caught.value)
    assert fusion_safety(regions, (("moe.a", "1"),), Settings()) == {"moe.a": "1", "moe-a": "0"}, "told apart"
    assert fusion_safety(["moe.a", "moe.a"], (), settings) == {"moe.a": "1"}, "one region, named twice"
