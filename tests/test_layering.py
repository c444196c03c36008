"""The library's shape, read from its source: who imports whom, and what each folder may do.

Each rule is a function from a module to complaints. Every rule is tried on a snippet that breaks it and on one that
only looks as if it did, so that a rule that has gone blind shows.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Imports point down: a folder imports from itself and from folders to its right.
LAYERS = ("auxstream", "bench", "capture", "kernels", "runtime")

CUDA_DRIVER_HOMES = {"runtime/driver.py"}
ENVIRONMENT_HOME = "runtime/settings.py"
SYNCHRONIZE_FREE = ("runtime", "capture")
SYNCHRONIZE_ALLOWED: dict[str, str] = {}  # "folder/file.py" -> why the host must wait there
LAZY = ("triton", "iree", "transformers")
MOST_PUBLIC_NAMES = 14
MOST_LINES = 400


@dataclass(frozen=True, slots=True)
class Module:
    """One file of the library. `path` is relative to the repository's top level."""

    path: str
    source: str

    @property
    def folder(self) -> str:
        return self.path.partition("/")[0]

    @property
    def package(self) -> tuple[str, ...]:
        """The package a relative import of level 1 starts from: `auxstream` is the folder auxstream/ and the root."""
        parts = self.path.split("/")[:-1]
        return tuple(parts) if parts[0] == "auxstream" else ("auxstream", *parts)

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.source))


def library() -> list[Module]:
    return [
        Module(path.relative_to(ROOT).as_posix(), path.read_text())
        for layer in LAYERS
        for path in sorted((ROOT / layer).rglob("*.py"))
    ]


# --- rules ------------------------------------------------------------------------------------------------------------


def absolute_imports(module: Module) -> Iterator[str]:
    """Siblings are imported relatively: an absolute name would need a generic top-level package, or run in a circle."""
    for node in module.nodes():
        match node:
            case ast.Import(names=names):
                named = [alias.name for alias in names]
            case ast.ImportFrom(level=0, module=str(name)):
                named = [name]
            case _:
                continue
        for name in named:
            if name.partition(".")[0] in LAYERS:
                yield f"line {node.lineno}: imports {name} absolutely"


def upward_imports(module: Module) -> Iterator[str]:
    """Imports point down the layers, and stay inside the package."""
    for node in module.nodes():
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        if node.level > len(module.package):
            yield f"line {node.lineno}: climbs out of the package"
            continue
        base = (*module.package[: len(module.package) - node.level + 1], *(node.module or "").split("."))
        inside = [part for part in base[1:] if part]
        for layer in [inside[0]] if inside else [alias.name for alias in node.names]:
            target = layer if layer in LAYERS else "auxstream"
            if LAYERS.index(target) < LAYERS.index(module.folder):
                yield f"line {node.lineno}: {module.folder} imports {target}, which is above it"


def cuda_driver_imports(module: Module) -> Iterator[str]:
    """The CUDA driver is reached in few, named places."""
    if module.path in CUDA_DRIVER_HOMES:
        return
    for node in module.nodes():
        match node:
            case ast.Import(names=names):
                named = [alias.name for alias in names]
            case ast.ImportFrom(level=0, module=str(name)):
                named = [name]
            case _:
                continue
        for name in named:
            if name.partition(".")[0] == "cuda":
                yield f"line {node.lineno}: imports {name}; allowed in {', '.join(sorted(CUDA_DRIVER_HOMES))}"


def environment_reads(module: Module) -> Iterator[str]:
    """The environment is read in one file, before any hot path."""
    if module.path == ENVIRONMENT_HOME:
        return
    doors = {"environ", "environb", "getenv", "getenvb"}
    for node in module.nodes():
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in doors:
                yield f"line {node.lineno}: reads os.{name}; only {ENVIRONMENT_HOME} may"
            case ast.ImportFrom(module="os", names=names) if doors & {alias.name for alias in names}:
                yield f"line {node.lineno}: takes the environment from os; only {ENVIRONMENT_HOME} may"
            case _:
                pass


def host_waits(module: Module) -> Iterator[str]:
    """Nothing in the runtime or the capture makes the host wait: not by call, by alias, or by a name in a string."""
    if module.folder not in SYNCHRONIZE_FREE or module.path in SYNCHRONIZE_ALLOWED:
        return
    for node in module.nodes():
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.alias(name=name):
                pass
            case ast.Constant(value=str(name)):
                pass
            case _:
                continue
        if name.lower().endswith("synchronize") and " " not in name:
            yield f"line {node.lineno}: {name}: the host would wait for the device"


def module_docstring(module: Module) -> Iterator[str]:
    """Each module opens by saying what enters, what leaves and what holds."""
    if not ast.get_docstring(ast.parse(module.source)):
        yield "has no module docstring"


def public_names(module: Module) -> Iterator[str]:
    """A folder's `__init__` says what is public, and that is little. The facade gathers all folders and is exempt."""
    if not module.path.endswith("/__init__.py") or module.folder == "auxstream":
        return
    body = ast.parse(module.source).body
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=names) | ast.Tuple(elts=names)):
                if len(names) > MOST_PUBLIC_NAMES:
                    yield f"line {node.lineno}: {len(names)} public names, at most {MOST_PUBLIC_NAMES}"
                return
            case _:
                pass
    if any(not isinstance(node, ast.Expr) for node in body):
        yield "has code and no `__all__` with the names written out"


def length(module: Module) -> Iterator[str]:
    """One file, one idea."""
    lines = len(module.source.splitlines())
    if lines > MOST_LINES:
        yield f"{lines} lines, at most {MOST_LINES}: look for the second idea"


Rule = Callable[[Module], Iterator[str]]
RULES: tuple[Rule, ...] = (
    absolute_imports,
    upward_imports,
    cuda_driver_imports,
    environment_reads,
    host_waits,
    module_docstring,
    public_names,
    length,
)

# Per rule: a path, a snippet that breaks it, and a near miss that does not.
TWINS: tuple[tuple[Rule, str, str, str], ...] = (
    (absolute_imports, "capture/x.py", "import runtime", "from ..runtime import fork"),
    (absolute_imports, "capture/x.py", "from runtime.errors import RegionError", "from .runtime_notes import note"),
    (absolute_imports, "bench/x.py", "from capture import graph", "import torch.cuda.graphs"),
    (absolute_imports, "auxstream/x.py", "import kernels.table as table", "from .kernels import table"),
    (absolute_imports, "capture/x.py", "def f():\n    import auxstream.runtime", "from ..runtime import fork"),
    (upward_imports, "runtime/x.py", "from ..capture import graph", "from .errors import RegionError"),
    (upward_imports, "runtime/x.py", "from ..capture.hazards import Graph", "from ..runtime.errors import RegionError"),
    (upward_imports, "kernels/x.py", "from .. import capture", "from .. import runtime"),
    (upward_imports, "capture/x.py", "from .. import fork", "from ..kernels import table"),
    (upward_imports, "capture/x.py", "from ..bench.handoff import run", "from . import hazards"),
    (upward_imports, "bench/x.py", "from ..demo import main", "from ..capture import graph"),
    (upward_imports, "auxstream/x.py", "from ..capture import graph", "from .capture import graph"),
    (cuda_driver_imports, "capture/x.py", "from cuda.bindings import driver", "from torch import cuda"),
    (cuda_driver_imports, "runtime/lanes.py", "def f():\n    import cuda.bindings.driver", "from . import driver"),
    (environment_reads, "capture/x.py", "import os\nv = os.environ['A']", "import os\nv = os.getpid()"),
    (environment_reads, "runtime/x.py", "import os\nv = os.getenv('A')", "environ = {}\nv = environ.get('A')"),
    (environment_reads, "bench/x.py", "from os import environ", "from os import path"),
    (host_waits, "runtime/x.py", "torch.cuda.synchronize()", "'never calls synchronize'"),
    (host_waits, "capture/x.py", "stream.synchronize()", "stream.wait_event(event)"),
    (host_waits, "capture/x.py", "wait = event.synchronize", "is_synchronized = True"),
    (host_waits, "capture/x.py", "from torch.cuda import synchronize", "from torch.cuda import current_stream"),
    (host_waits, "runtime/x.py", "driver.cuCtxSynchronize()", "driver.cuStreamWaitEvent(a, b, 0)"),
    (host_waits, "runtime/x.py", "getattr(torch.cuda, 'synchronize')()", "getattr(torch.cuda, 'current_stream')()"),
    (module_docstring, "runtime/x.py", "'a' + 'b'", "'What enters, what leaves.'"),
    (module_docstring, "kernels/__init__.py", "", "'Kernels.'"),
    (public_names, "runtime/__init__.py", f"__all__ = {[f'n{i}' for i in range(15)]}", f"__all__ = {['n'] * 14}"),
    (public_names, "capture/__init__.py", "from .graphs import graph", "'Nothing public yet.'"),
    (length, "capture/x.py", "\n" * 401, "\n" * 400),
)


def name_of(value: object) -> str | None:
    if isinstance(value, Module):
        return value.path
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_the_library_keeps_the_rule(rule: Rule) -> None:
    complaints = [f"{module.path}: {complaint}" for module in library() for complaint in rule(module)]
    assert not complaints, f"{rule.__doc__}\n  " + "\n  ".join(complaints)


@pytest.mark.parametrize(("rule", "path", "bad", "good"), TWINS, ids=name_of)
def test_the_rule_sees_a_breach_and_only_that(rule: Rule, path: str, bad: str, good: str) -> None:
    assert list(rule(Module(path, bad)))
    assert not list(rule(Module(path, good)))


def test_every_rule_has_a_twin() -> None:
    assert {rule for rule, *_ in TWINS} == set(RULES)


def test_the_library_was_found() -> None:
    folders = {module.folder for module in library()}
    assert folders >= {"auxstream", "capture", "kernels", "runtime"}
    assert len(library()) > 20


def test_nothing_may_make_the_host_wait() -> None:
    assert not SYNCHRONIZE_ALLOWED, "a host wait needs a reason that the architecture page gives too"


def test_the_homes_of_the_exceptions_are_exempt_and_nobody_else() -> None:
    assert not list(cuda_driver_imports(Module("runtime/driver.py", "from cuda.bindings import driver")))
    assert not list(environment_reads(Module("runtime/settings.py", "import os\nv = os.environ")))
    assert list(environment_reads(Module("capture/settings.py", "import os\nv = os.environ")))


# --- what importing costs ---------------------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """The modules of LAZY that a fresh interpreter holds after `code`."""
    report = f"\nimport sys\nprint(*(name for name in {LAZY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code + report], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


def test_importing_the_facade_is_cheap() -> None:
    assert not loaded_by("import auxstream; dir(auxstream)")


def test_an_import_that_is_not_cheap_would_show() -> None:
    heavy = "import sys, types; sys.modules['triton'] = types.ModuleType('triton'); import auxstream"
    assert loaded_by(heavy) == {"triton"}
