"""The documentation against the repository: links lead somewhere, every page is listed, commands and targets exist, the
README's example runs, and its figures are those of the evidence."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from auxstream.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")]
)


# --- links ------------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """What headings can be linked by, as GitHub and mkdocs make it."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> Iterator[str]:
    text = re.sub(r"\[`[^`\n]*`[^\]\n]*\]", "[]", text)
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (page.parent / path) if path else page
        if not target.exists():
            yield f"{page.relative_to(ROOT)}: {link}"
        elif anchor and anchor not in anchors(text if target == page else target.read_text()):
            yield f"{page.relative_to(ROOT)}: {link}, which has no such heading"


def test_links_lead_somewhere() -> None:
    assert [dead for page in PAGES for dead in dead_links(page, page.read_text())] == []


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[a](docs/no_such_page.md)", 1),
        ("![a](docs/no_such_picture.svg)", 1),
        ("[a](docs/settings.md#no-such-heading)", 1),
        ("[`a`](docs/no_such_page.md)", 1),
        ("[a](#two)\n\n## One\n", 1),
        ("[a](docs/settings.md#the-dump), [b](#one), [c](https://pytorch.org)\n\n## One\n", 0),
        ("`[a](docs/no_such_page.md)`\n\n    [a](docs/no_such_page.md)\n", 0),
    ],
)
def test_a_dead_link_would_show(text: str, dead: int) -> None:
    assert len(list(dead_links(ROOT / "README.md", text))) == dead


def test_every_page_is_listed_and_in_the_navigation() -> None:
    listed, navigation = (ROOT / "docs" / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "README.md":
            assert f"({page.name})" in listed, f"docs/README.md does not list {page.name}"
        assert f"docs/{page.name}\n" in navigation, f"mkdocs.yml does not list {page.name}"


# --- the reference ----------------------------------------------------------------------------------------------------

REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def test_every_public_name_is_in_the_reference() -> None:
    import auxstream
    from auxstream import capture, kernels, runtime

    described = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)}
    for module in (auxstream, capture, kernels, runtime, auxstream.errors):
        missing = set(module.__all__) - described - {"runtime", "capture", "kernels", "errors"}
        assert not missing, f"docs/reference.md lacks {', '.join(sorted(missing))} of {module.__name__}"


def undescribed(function: Callable[..., Any]) -> list[str]:
    """What a docstring leaves out of a function's arguments and result."""
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    names = [name for name in signature.parameters if name != "self"]
    missing = [name for name in names if not re.search(rf"^ +{name}: ", text, re.MULTILINE)]
    if signature.return_annotation not in ("None", None, signature.empty) and not re.search(
        r"^(Returns|Yields):$" if names else r"\S", text, re.MULTILINE
    ):
        missing.append("what it returns")
    return missing


def test_functions_of_the_reference_are_described() -> None:
    found: dict[str, list[str]] = {}
    entry = re.compile(r"^::: (\S+)$(?:\n    options:\n      members: \[(.*)\])?", re.MULTILINE)
    for path, members in entry.findall(REFERENCE):
        home, _, name = path.rpartition(".")
        thing = getattr(importlib.import_module(home), name)
        if inspect.isclass(thing):
            parts = [inspect.getattr_static(thing, member) for member in members.split(", ") if member]
            functions = [getattr(part, "__func__", part) for part in parts if not isinstance(part, property)]
        else:
            functions = [thing] if callable(thing) else []
        found |= {f"{path}: {f.__qualname__}": undescribed(f) for f in functions if undescribed(f)}
    assert found == {}


def test_a_gap_in_a_docstring_would_show() -> None:
    def bare(x: int, y: int) -> int:
        """Adds.

        Args:
            x: one.
        """
        return x + y

    assert undescribed(bare) == ["y", "what it returns"]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^    |`)make ([a-z]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, f"{page.name}: make {named - targets}"


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^    |^    \$ |`|-m )auxstream ([a-z]+)\b", page.read_text(), re.MULTILINE))
        assert named <= commands, f"{page.name}: auxstream {named - commands}"


def test_modules_that_are_run_exist() -> None:
    for page in PAGES:
        for module in re.findall(r"python -m auxstream\.([\w.]+)", page.read_text()):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or path.is_dir(), f"{page.name}: python -m auxstream.{module}"


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_the_example_runs_and_is_proved(capsys: pytest.CaptureFixture[str]) -> None:
    code = README.partition("## In ten lines\n\n```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert "no race" in capsys.readouterr().out
    names["x"].normal_()
    names["g"].replay()
    with torch.no_grad():
        h = names["norm"](names["x"])
        expected = names["x"] + names["experts"](h) + names["mlp"](h)
    torch.testing.assert_close(names["y"], expected, rtol=0, atol=0)


FIGURES = {
    "Hugging Face's model in one CUDA graph": ("decode-30-layers", "ms per step: HF, one CUDA graph"),
    "auxstream, torch's experts, attention and products, one stream": ("decode-30-layers", "ms per step: serial"),
    "torch.compile, reduce-overhead": ("decode-30-layers-rival", "ms per step: torch.compile reduce-overhead"),
    "auxstream, own kernels, one stream": ("decode-30-layers", "ms per step: own kernels, serial"),
}
OVERLAPPED = ("chosen by measuring", "own kernels, chosen")


def measured(file: str, key: str) -> float:
    results = json.loads((ROOT / "docs" / "evidence" / f"{file}.json").read_text())["results"]
    return float(results["decode, batch 1"][key]["median"])


def test_the_figures_are_those_of_the_evidence() -> None:
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if re.match(r"\| .* \| \d+\.\d\d \|", line)]
    overlapped = iter(OVERLAPPED)
    for what, shown, *_ in rows:
        if what.startswith("the same, overlapped"):
            source = "decode-30-layers", f"ms per step: {next(overlapped)}"
        else:
            source = FIGURES[what]
        assert shown == f"{measured(*source):.2f}", what
    assert len(rows) == len(FIGURES) + len(OVERLAPPED)
    beside = measured("decode-30-layers-rival", "ms per step: own kernels, chosen, beside it")
    assert f"which took {beside:.2f} there" in README
