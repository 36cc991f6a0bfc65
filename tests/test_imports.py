"""Who imports whom: no circles, no floor a higher one, no test a test, and nothing that is not declared."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lossmeta"

# From the lowest to the highest; the package itself, "", stands where its own imports put it.
FLOORS = (
    (
        "_batches",
        "_build",
        "_checks",
        "_core",
        "_files",
        "_model_state",
        "_optimizers",
        "_safetensors",
        "_source_folder",
    ),
    ("ops",),
    ("", "_info"),
    ("plot",),
    ("data", "losses", "metrics", "models"),
    ("diagnosis",),
    ("landscape",),
    ("adalfl", "ala", "tuneloss"),
    ("integrations",),
    ("experiments",),
    ("comparison",),
    ("recipes",),
    ("cli", "__main__"),
)
# The import name and the distribution differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "pytorch_metric_learning": "pytorch-metric-learning",
}
# What is imported only where it is there, and the extra that brings it.
OPTIONAL = {
    "accelerate": "integrations",
    "optuna": "integrations",
    "lightning": "integrations",
    "matplotlib": "plot",
    "pillow": "data",
    "pooch": "data",
    "pytorch-metric-learning": "integrations",
    "skorch": "integrations",
    "torchmetrics": "integrations",
    "transformers": "integrations",
}
INSTEAD = {"pytorch_lightning": "lightning"}  # the same under an older name, where that is what is installed


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, *, type_checking: bool = True) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every import of a file, lazy ones too: the module, and the names that are taken from it."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield str(node.module), tuple(alias.name for alias in node.names)
        elif type_checking or not is_type_checking(node):
            pending.extend(ast.iter_child_nodes(node))


def edges(module: str) -> set[str]:
    """The modules of the package that this one imports.

    The package itself names its parts for type checkers and loads them when they are first used: no import.
    """
    found: set[str] = set()
    for target, names in imports(SOURCES[module], type_checking=module != "lossmeta"):
        if target.split(".")[0] != "lossmeta":
            continue
        parts = [f"{target}.{name}" for name in names]
        known = {part for part in parts if part in SOURCES or part == "lossmeta._core"}
        found |= known if known and len(known) == len(parts) else {target, *known}
    return found - {module}


GRAPH = {module: edges(module) for module in SOURCES}


def part(module: str) -> str:
    return (module + ".").split(".")[1]


def floor(module: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part(module) in parts)


def test_every_part_has_a_floor() -> None:
    assert {part(module) for module in SOURCES} - {p for parts in FLOORS for p in parts} == set()


def circle_from(module: str, graph: dict[str, set[str]], path: tuple[str, ...] = ()) -> tuple[str, ...]:
    if module in path:
        return (*path[path.index(module) :], module)
    found = (circle_from(other, graph, (*path, module)) for other in sorted(graph.get(module, ())))
    return next((circle for circle in found if circle), ())


def test_finds_a_circle() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circle_from("d", graph) == ("b", "c", "b")
    assert circle_from("d", {**graph, "c": set()}) == ()


def test_no_circles() -> None:
    done: dict[str, set[str]] = dict(GRAPH)
    while leaves := [module for module, needs in done.items() if not needs & done.keys()]:
        for module in leaves:
            del done[module]
    assert not done, " -> ".join(circle_from(next(iter(done)), done))


@pytest.mark.parametrize("module", SOURCES)
def test_no_floor_imports_a_higher_one(module: str) -> None:
    assert [other for other in GRAPH[module] if floor(other) > floor(module)] == []


def test_experiments_know_no_method() -> None:
    """They stand above the methods, for recipes bring both together, but import none."""
    methods = {"adalfl", "ala", "tuneloss", "landscape", "losses"}
    for module in SOURCES:
        if part(module) == "experiments":
            assert {part(other) for other in GRAPH[module]} & methods == set(), module


def test_tests_import_no_tests() -> None:
    """What several tests share is in a module of its own, such as contract.py."""
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for module, names in imports(path):
                for name in (*module.split("."), *names):
                    assert not re.fullmatch(r"test_\w+|conftest", name), f"{path} imports {module}"


# ---- Dependencies.


def imported() -> set[str]:
    tops = {
        module.split(".")[0] for path in SOURCES.values() for module, _ in imports(path, type_checking=False)
    }
    names = {**DISTRIBUTIONS, **INSTEAD}
    return {names.get(top, top) for top in tops - set(sys.stdlib_module_names) - {"lossmeta"}}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_-]", requirement)[0] for requirement in requirements}


def test_what_is_declared_is_what_is_imported() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert names(project["dependencies"]) == imported() - OPTIONAL.keys()
    assert imported() >= OPTIONAL.keys()
    for name, extra in OPTIONAL.items():
        assert name in names(project["optional-dependencies"][extra])


# ---- What a user sees.


def output(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_quick() -> None:
    slow = [
        "accelerate",
        "clarabel",
        "cvxpy",
        "daqp",
        "lightning",
        "osqp",
        "matplotlib",
        "pooch",
        "rich",
        "safetensors",
        "scipy",
        "sklearn",
        "skorch",
        "torchmetrics",
        "transformers",
        "typer",
    ]
    lazy = [
        "lossmeta.adalfl",
        "lossmeta.comparison",
        "lossmeta.diagnosis",
        "lossmeta.recipes",
        "lossmeta.experiments",
        "lossmeta.data",
    ]
    assert output(f"import sys, lossmeta; print([m for m in {slow + lazy} if m in sys.modules])") == "[]"


def test_parts_are_attributes() -> None:
    code = "import lossmeta\nfor name in lossmeta.__all__: print(name, getattr(lossmeta, name).__name__)"
    shown = dict(line.split() for line in output(code).splitlines())
    functions = ["compare", "diagnose", "info"]
    assert [shown.pop(name) for name in functions] == functions
    parts = (
        "adalfl",
        "ala",
        "comparison",
        "data",
        "diagnosis",
        "experiments",
        "integrations",
        "landscape",
        "losses",
        "metrics",
        "models",
        "ops",
        "recipes",
        "tuneloss",
    )
    assert shown == {name: f"lossmeta.{name}" for name in parts}


def test_parts_are_listed_before_they_are_loaded() -> None:
    code = (
        "import lossmeta; print(set(lossmeta.__all__) <= set(dir(lossmeta)), '__version__' in dir(lossmeta))"
    )
    assert output(code) == "True True"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import lossmeta

    with pytest.raises(AttributeError, match=r"^module 'lossmeta' has no attribute 'tunelos'$"):
        lossmeta.tunelos  # noqa: B018
    assert not hasattr(lossmeta, "__wrapped__")


def test_operators_are_registered_with_the_package() -> None:
    code = "import torch, lossmeta; print(torch.ops.lossmeta.perturb.default._schema.name)"
    assert output(code) == "lossmeta::perturb"
