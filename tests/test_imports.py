"""Imports point one way, and what must be fast to import loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qratk

ROOT = Path(qratk.__file__).parent
HEAVY = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "hqq",
    "botorch",
    "gpytorch",
    "pymoo",
    "datasets",
    "sklearn",
)
OPEN_SETS = (
    "estimators", "mutations", "repairs", "surrogates", "searchers", "refiners", "quantizers", "evaluators",
    "executors", "exporters", "reporters", "adapters",
)  # fmt: skip
STRATEGIES = {"estimators", "mutations", "repairs", "surrogates", "searchers", "refiners", "quantizers", "adapters"}
MODEL = ("adapters", "bank", "backbone", "training", "peaks")
NEVER = {"cli", "__main__", "loop", "compare"}
BELOW: dict[str, set[str]] = {
    "core": {"core"},
    "registry": {"core", "registry"},
    "run": {"core", "run"},
    "components": {"registry", *OPEN_SETS},
    **{part: {"core", "registry", "quantizers", "embedded", *MODEL} for part in MODEL},
    "data": {"core", "registry", "quantizers", "data"},
}
"""What each part may import of qratk; parts that are not named may import all but what comes after them."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    """The folder or module directly under qratk that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    """Absolute names that import statements load when they run, and their lines; not those for type checkers only."""
    found: list[tuple[str, int]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found.append((node.module or "", node.lineno))
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names if node.module == "qratk"]
        else:
            found += imported(node)
    return found


def top_level(tree: ast.Module) -> list[tuple[str, int]]:
    """Imports that run when the module is imported: not those within functions."""
    shallow = ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], [])
    return imported(shallow)


def own_parts(names: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(name.split(".")[1], line) for name, line in names if name.startswith("qratk.")]


@pytest.mark.parametrize("name", sorted(BELOW))
def test_part_imports_only_what_lies_below_it(name):
    files = [path for path in modules() if part(path) == name]
    assert files
    for path in files:
        for other, line in own_parts(imported(ast.parse(path.read_text()))):
            assert other in BELOW[name], f"{path.relative_to(ROOT)}:{line} imports qratk.{other}"


@pytest.mark.parametrize("name", OPEN_SETS)
def test_open_set_does_not_import_the_loop_or_the_commands(name):
    for path in (path for path in modules() if part(path) == name):
        for other, line in own_parts(imported(ast.parse(path.read_text()))):
            assert other not in NEVER, f"{path.relative_to(ROOT)}:{line} imports qratk.{other}"


def test_strategies_do_not_import_the_evaluators():
    for path in (path for path in modules() if part(path) in STRATEGIES):
        for other, line in own_parts(imported(ast.parse(path.read_text()))):
            assert other != "evaluators", f"{path.relative_to(ROOT)}:{line} imports qratk.{other}"


@pytest.mark.parametrize("path", [p for p in modules() if part(p) == "loop"], ids=lambda p: p.name)
def test_loop_sees_only_the_contracts(path):
    """No strategy is imported by the loop: only `base` modules, and the proposer that all of them share."""
    names = imported(ast.parse(path.read_text()))
    for name, line in names:
        words = name.split(".")
        if words[0] == "qratk" and len(words) > 2 and words[1] in OPEN_SETS:
            assert words[2] in ("base", "proposer"), f"{path.name}:{line} imports {name}"
    parts = {other for other, _ in own_parts(names)}
    assert not parts & {"cli", "__main__", "compare", "data", "exporters", *MODEL}


def test_only_the_command_imports_the_comparison():
    for path in (path for path in modules() if part(path) not in ("compare", "cli")):
        for other, line in own_parts(imported(ast.parse(path.read_text()))):
            assert other != "compare", f"{path.relative_to(ROOT)}:{line} imports qratk.{other}"


def is_light(path: Path) -> bool:
    """Whether a module must import fast: the registries import every module of the open sets to list names."""
    inside = path.relative_to(ROOT).parts
    if inside[0] == "testing" and inside[-1].startswith("_torch"):
        return False  # suites of strategies that need torch, imported when asked for
    if inside[0] in ("core", "run", "registry.py", "components.py", "loop", "__init__.py", "testing"):
        return True
    if inside[:2] == ("adapters", "starts"):
        return True
    if inside[0] not in {*STRATEGIES, "evaluators", "executors", "exporters", "reporters"} or len(inside) != 2:
        return False
    return not inside[1].startswith("_")  # helpers may be heavy, and no registry imports them


@pytest.mark.parametrize("path", [p for p in modules() if is_light(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_light_module_imports_nothing_heavy_at_its_top(path):
    for name, line in top_level(ast.parse(path.read_text())):
        assert name.split(".")[0] not in HEAVY, f"line {line} imports {name}"


@pytest.mark.parametrize(
    "statement",
    [
        "import qratk",
        "import qratk.core",
        "import qratk.components",
        "from qratk.components import REGISTRIES\nfor registry in REGISTRIES.values(): registry.names()",
        "from qratk.testing import ToyEvaluator, toy_problem\ntoy_problem()",
        "import qratk.loop",
        "import qratk.cli.compare, qratk.compare.figures",
    ],
    ids=["package", "core", "components", "names of all components", "toy problem", "loop", "comparison"],
)
def test_fast_import_loads_nothing_heavy(statement):
    code = f"{statement}\nimport sys\nprint(*sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == []


def test_core_needs_only_numpy():
    for path in (path for path in modules() if part(path) == "core"):
        for name, line in imported(ast.parse(path.read_text())):
            package = name.split(".")[0]
            allowed = package in ("qratk", "numpy") or package in sys.stdlib_module_names
            assert allowed, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_guard_sees_a_wrong_import():
    tree = ast.parse("def f():\n    from qratk.loop import SearchLoop\n    import torch\n")
    assert own_parts(imported(tree)) == [("loop", 2)]
    assert top_level(tree) == []
    assert top_level(ast.parse("import torch.nn")) == [("torch.nn", 1)]
