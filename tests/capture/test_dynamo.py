"""`torch.compile(model, backend=dynamo.auxstream)`: Dynamo's graphs over the model's own weights and caches."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import tomllib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxstream
from auxstream.capture import dynamo
from auxstream.runtime.errors import CaptureError, InputError, SettingsError

SLOTS = 8
Arguments = tuple[Tensor, Tensor]


class Step(nn.Module):
    """Writes a cache in place, as a decode step does; breaks the graph in the middle if asked to."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.breaks = breaks
        self.inner = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(SLOTS, 4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        y = self.inner(x)
        self.cache.index_copy_(0, slots, y)
        if self.breaks:
            torch._dynamo.graph_break()
        for layer in self.layers:
            y = layer(y) + x.shape[0]
        return y + self.cache.sum(0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[auxstream.CompiledModel]:
    """What the backend has compiled so far."""
    found: list[auxstream.CompiledModel] = []

    def counted(*args: Any, **kwargs: Any) -> auxstream.CompiledModel:
        found.append(auxstream.compile(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(dynamo, "compile", counted)
    return found


def call(rows: int) -> Arguments:
    return torch.randn(rows, 4), torch.randperm(SLOTS)[:rows]


def assert_alike(fast: Callable[..., Tensor], model: Step, reference: Step, rows: int) -> None:
    cache = model.cache
    arguments = call(rows)
    torch.testing.assert_close(fast(*arguments), reference(*arguments))
    assert model.cache is cache
    torch.testing.assert_close(cache, reference.cache)


def pair(**how: Any) -> tuple[Step, Step]:
    model = Step(**how)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("breaks", [False, True], ids=["fullgraph", "graph break"])
def test_calls_equal_the_models_and_caches_are_written_in_place(
    breaks: bool, dynamic: bool, made: list[auxstream.CompiledModel]
) -> None:
    model, reference = pair(breaks=breaks)
    fast = torch.compile(model, backend=dynamo.auxstream, dynamic=dynamic, fullgraph=not breaks)
    for rows in (3, 3, 5, 3):
        assert_alike(fast, model, reference, rows)
    assert len(made) == (4 if breaks else 2)  # one for each graph and size
    assert all(compiled.report.ok for compiled in made)
    assert {len(compiled.calls.static.leaves) for compiled in made} <= {1, 2}  # weights and caches are no inputs


def test_outputs_last() -> None:
    fast = torch.compile(Block(), backend=dynamo.auxstream)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    first = fast(x)
    kept = first.clone()
    fast(y)
    assert torch.equal(first, kept)
    fast = torch.compile(Block(), backend=dynamo.auxstream, options={"copy_outputs": False})
    first = fast(x)
    kept = first.clone()
    fast(y)
    assert not torch.equal(first, kept)


def test_modules_of_the_same_code_have_their_own_weights(made: list[auxstream.CompiledModel]) -> None:
    blocks = [Block() for _ in range(3)]
    x = torch.randn(2, 4)
    expected = blocks[2](blocks[1](blocks[0](x)))
    for block in blocks:
        block.compile(backend=dynamo.auxstream)
    for _ in range(2):
        y = x
        for block in blocks:
            y = block(y)
        torch.testing.assert_close(y, expected)
    assert len(made) == 3


def replace_by_parameter(model: Step) -> None:
    model.inner.weight = nn.Parameter(torch.ones(4, 4))


def replace_data(model: Step) -> None:
    model.inner.weight.data = torch.ones(4, 4)


def assign_state(model: Step) -> None:
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()}, assign=True)


def write_in_place(model: Step) -> None:
    model.inner.weight.data.copy_(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("change", "captures"),
    [(replace_by_parameter, 2), (replace_data, 2), (assign_state, 2), (write_in_place, 1)],
    ids=["another parameter", "another memory", "assigned state", "in place"],
)
def test_weights_that_change(
    change: Callable[[Step], None], captures: int, made: list[auxstream.CompiledModel]
) -> None:
    model, reference = pair()
    fast = torch.compile(model, backend=dynamo.auxstream)
    assert_alike(fast, model, reference, 3)
    old = weakref.ref(made[0])
    change(model)
    change(reference)
    arguments = call(3)
    torch.testing.assert_close(fast(*arguments), reference(*arguments))
    assert len(made) == captures
    made.clear()
    gc.collect()
    assert (old() is None) == (captures == 2), "what was captured for weights that are gone goes with them"


def test_buckets_serve_sizes_that_dynamo_left_open(made: list[auxstream.CompiledModel]) -> None:
    model = Block()
    reference = copy.deepcopy(model)
    fast = torch.compile(model, backend=dynamo.auxstream, dynamic=True, options={"buckets": [2, 4, 6]})
    for rows in (6, 5, 2, 3, 6):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(fast(x), reference(x))
    assert len(made) == 1
    assert len(made[0].graphs) == 3


def test_buckets_need_their_largest_call_first() -> None:
    fast = torch.compile(Block(), backend=dynamo.auxstream, dynamic=True, options={"buckets": [2, 6]})
    with pytest.raises(InputError, match="not of the largest"):
        fast(torch.randn(4, 4))


def test_a_graph_for_every_size_is_said(made: list[auxstream.CompiledModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "MANY_SIZES", 2)
    fast = torch.compile(Block(), backend=dynamo.auxstream, dynamic=True)
    for rows in (2, 3):
        fast(torch.randn(rows, 4))
    with pytest.warns(auxstream.AuxstreamWarning, match="buckets"):
        fast(torch.randn(4, 4))
    assert len(made) == 3


class Scaled(Block):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale + scale


@pytest.mark.parametrize("numbers", [(1.5, 2.5, 0.0, -0.0, 2.5), (2, 3, 5, 3, 2)], ids=["floats", "integers"])
def test_numbers_that_vary_get_a_graph_each(numbers: tuple[Any, ...], made: list[auxstream.CompiledModel]) -> None:
    model = Scaled()
    reference = copy.deepcopy(model)
    fast = torch.compile(model, backend=dynamo.auxstream)
    for _ in range(2):
        for number in numbers:
            x = torch.randn(3, 4)
            found, expected = fast(x, number), reference(x, number)
            torch.testing.assert_close(found, expected)
            assert torch.equal(found.signbit(), expected.signbit())
    assert len(made) <= len(set(map(str, numbers))) + 1  # Dynamo takes the first one for a constant


def test_a_graph_for_every_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo, "MANY_SIZES", 2)
    fast = torch.compile(Scaled(), backend=dynamo.auxstream)
    for number in (1.5, 2.5, 3.5):
        fast(torch.randn(3, 4), number)
    with pytest.warns(auxstream.AuxstreamWarning, match="pass numbers as tensors"):
        fast(torch.randn(3, 4), 4.5)


def test_training_is_refused() -> None:
    fast = torch.compile(Block(), backend=dynamo.auxstream)
    with torch.enable_grad(), pytest.raises(CaptureError, match="no gradients"):
        fast(torch.randn(2, 4))
    model = Block()
    fast = torch.compile(model.requires_grad_(False), backend=dynamo.auxstream)
    x = torch.randn(2, 4)
    with torch.enable_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_options_come_from_code_and_from_a_file(tmp_path: Path, made: list[auxstream.CompiledModel]) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(f"mlir_elementwise_fusion: {{enabled: false}}\ndump_dir: {tmp_path / 'a'}\n")
    fast = torch.compile(
        Block(), backend=dynamo.auxstream, options={"config": str(config), "dump_dir": str(tmp_path / "b")}
    )
    fast(torch.randn(2, 4))
    assert made[0].fusion is None
    assert (tmp_path / "b" / "1-traced.txt").exists()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("how", [{"options": {"bucket": [2]}}, {"mode": "reduce-overhead"}])
def test_what_is_no_option_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="auxstream") as caught:
        torch.compile(Block(), backend=dynamo.auxstream, **how)(torch.randn(2, 4))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), SettingsError)


SCRIPT = """
import sys, torch
model = torch.nn.Linear(4, 4).requires_grad_(False)
x = torch.randn(2, 4)
print("auxstream" in torch._dynamo.list_backends(), "auxstream" in sys.modules)
print(torch.allclose(torch.compile(model, backend="auxstream")(x), model(x)), "auxstream.capture.dynamo" in sys.modules)
"""


def by_name(folder: Path, entry_points: str) -> subprocess.CompletedProcess[str]:
    """SCRIPT, where the package's metadata says this, whether or not it is installed."""
    info = folder / "auxstream-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: auxstream\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AUXSTREAM_")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-c", SCRIPT]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ)


def test_the_backend_is_found_by_name_without_an_import(tmp_path: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (group, points), *more = project["entry-points"].items()
    assert not more
    entries = "".join(f"{name} = {target}\n" for name, target in points.items())
    done = by_name(tmp_path, f"[{group}]\n{entries}")
    assert done.stdout.split() == ["True", "False", "True", "True"], done.stderr


def test_without_the_entry_point_it_is_not(tmp_path: Path) -> None:
    done = by_name(tmp_path, "")
    assert done.returncode != 0
    assert "Invalid backend" in done.stderr
