"""Imports point one way, and what must be fast to import loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
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
FLOORS = (
    ("core",),
    ("registry", "run", "data", "programs"),
    ("quantizers", "repairs", "surrogates", "reporters"),
    ("bank", "mutations", "embedded"),
    ("adapters",),
    ("backbone",),
    ("peaks", "exporters"),
    ("training",),
    ("estimators",),
    ("evaluators",),
    ("searchers", "executors"),
    ("refiners",),
    ("components", "loop"),
    ("settings", "plan"),
    ("testing", "compare"),
    ("cli",),
    ("__main__",),
    ("__init__",),
)
"""The house from the cellar up: a part imports itself and what lies on floors below it, for type checkers too."""

FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
OPEN_SETS = (
    "adapters", "estimators", "evaluators", "executors", "exporters", "mutations", "quantizers", "refiners", "repairs",
    "reporters", "searchers", "surrogates",
)  # fmt: skip


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


def all_imported(tree: ast.AST) -> list[tuple[str, int]]:
    """Modules of qratk that any import statement names, those within functions and for type checkers too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qratk":
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def own_parts(names: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(name.split(".")[1], line) for name, line in names if name.startswith("qratk.")]


def test_every_part_has_its_floor():
    assert {part(path) for path in modules()} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_part_imports_only_what_lies_below_it(name):
    for path in (path for path in modules() if part(path) == name):
        for other, line in own_parts(all_imported(ast.parse(path.read_text()))):
            below = other == name or FLOOR.get(other, -1) < FLOOR[name]  # `__version__` is no part
            assert below, f"{path.relative_to(ROOT)}:{line} imports qratk.{other}"


def arrows() -> dict[str, set[str]]:
    """For each module of qratk the modules that it imports anywhere."""
    named = {
        ".".join(("qratk", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in modules()
    }
    found: dict[str, set[str]] = {}
    for module, path in named.items():
        targets = (
            name if name in named else name.rpartition(".")[0] for name, _ in all_imported(ast.parse(path.read_text()))
        )
        found[module] = {target for target in targets if target in named} - {module, "qratk"}
    return found


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_no_private_name_crosses_a_package():
    for path in modules():
        for name, line in all_imported(ast.parse(path.read_text())):
            _, package, *rest = name.split(".")
            private = any(word.startswith("_") and not word.startswith("__") for word in (package, *rest))
            assert not private or package == part(path), f"{path.relative_to(ROOT)}:{line} imports {name}"


@pytest.mark.parametrize("path", [p for p in modules() if part(p) == "loop"], ids=lambda p: p.name)
def test_loop_sees_only_the_contracts(path):
    """No strategy is imported by the loop: only `base` modules, and the proposer that all of them share."""
    for name, line in all_imported(ast.parse(path.read_text())):
        words = name.split(".")
        if words[1] in OPEN_SETS:
            assert words[2] in ("base", "proposer"), f"{path.name}:{line} imports {name}"


def is_light(path: Path) -> bool:
    """Whether a module must import fast: the registries import every module of the open sets to list names."""
    inside = path.relative_to(ROOT).parts
    if inside[0] == "testing" and inside[-1].startswith("_torch"):
        return False  # suites of strategies that need torch, imported when asked for
    if inside[0] in ("core", "run", "registry.py", "components.py", "loop", "__init__.py", "testing"):
        return True
    if inside[:2] == ("adapters", "starts"):
        return True
    if inside[0] not in OPEN_SETS or len(inside) != 2:
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
    assert own_parts(all_imported(tree)) == [("loop", 2)]
    assert top_level(tree) == []
    assert top_level(ast.parse("import torch.nn")) == [("torch.nn", 1)]


def test_files_of_tests_have_different_names():
    tests = Path(__file__).parent
    places = [tests, *tests.parent.glob("plugins/*/tests")]
    found = Counter(path.name for place in places for path in place.rglob("test_*.py"))
    assert [name for name, count in found.items() if count > 1] == [], "pytest would collect only one of each"
