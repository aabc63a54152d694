"""`import qratk` offers what users in Python and plugins need, and they need nothing else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import qratk

ROOT = Path(qratk.__file__).parent
TOP = ROOT.parent
PLUGINS = [path for glob in ("plugins/*/src/**/*.py", "plugins/*/tests/*.py") for path in sorted(TOP.glob(glob))]
PLUGINS.append(TOP / "tests/test_third_party.py")
PUBLIC = ("qratk", "qratk.testing")


def imported(text: str) -> set[tuple[str, str]]:
    """Module and name of each `from qratk... import name` in a source text, and (module, "") of plain imports."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qratk":
            found |= {(node.module or "", alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "qratk"}
    return found


def contract(kind: str) -> tuple[ast.Module, str]:
    """Syntax tree and text of the module that holds the contract of a kind."""
    text = ROOT.joinpath(*kind.split("."), "base.py").read_text()
    return ast.parse(text), text


def annotations(tree: ast.Module) -> list[ast.expr]:
    """What functions take and return and classes hold, as it is annotated."""
    found: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found += [argument.annotation for argument in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
        if isinstance(node, ast.AnnAssign):
            found.append(node.annotation)
    return [annotation for annotation in found if annotation is not None]


def for_type_checkers() -> dict[str, str]:
    """Where the names come from, as type checkers read it."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "qratk"
        for alias in node.names
        if node.module
    }


@pytest.mark.parametrize("name", sorted({*qratk.__all__} - {"__version__"}))
def test_public_name_is_there(name):
    assert getattr(qratk, name) is not None


def test_type_checkers_see_the_names_that_are_there_at_run_time():
    assert for_type_checkers() == qratk._HOME


def test_every_public_name_comes_from_where_it_is_defined():
    for name, module in qratk._HOME.items():
        value = getattr(importlib.import_module(module), name)
        if inspect.isclass(value) or inspect.isfunction(value):  # what an alias stands for is defined elsewhere
            defined = value.__module__
            assert defined == module or module == "qratk.loop", f"{name} is of {defined}, not of {module}"


@pytest.mark.parametrize("kind", sorted(qratk.REGISTRIES))
def test_front_door_offers_a_contract_and_all_that_its_methods_take_return_and_raise(kind):
    tree, text = contract(kind)
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    own |= {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}  # type: ignore[attr-defined]
    from_qratk = {name for _, name in imported(text)} | own
    named = {node.id for annotation in annotations(tree) for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    wanted = (
        {qratk.REGISTRIES[kind].base} | (named & from_qratk - {"Registry"}) | set(re.findall(r"`(\w+Error)`", text))
    )
    assert wanted <= set(qratk.__all__)


@pytest.mark.parametrize("kind", sorted(qratk.REGISTRIES))
def test_every_contract_has_a_suite(kind):
    suites = {name.removesuffix("Contract") for name in qratk.testing.__all__ if name.endswith("Contract")}
    assert any(suite in qratk.REGISTRIES[kind].base for suite in suites)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Serch'"):
        _ = qratk.Serch


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: str(path.relative_to(TOP)))
def test_plugin_imports_from_the_front_door_alone(path):
    for module, name in imported(path.read_text()):
        assert module in PUBLIC, f"{path.name} imports {name} from {module}"
        assert not name.startswith("_"), f"{path.name} imports the private {name}"


def test_readme_imports_from_the_front_door_alone():
    blocks = re.findall(r"```python\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)
    assert blocks
    for module, name in set().union(*map(imported, blocks)):
        assert module in PUBLIC, f"README imports {name} from {module}"
