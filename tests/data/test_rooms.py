"""The files of the data room import each other one way."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import qratk.data

FILES = {path.stem: path for path in Path(qratk.data.__file__).parent.glob("*.py") if path.stem != "__init__"}


def imported(path: Path) -> set[str]:
    """Files of the room that a file imports, for types too."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {node.module or "" for node in nodes}
    return {name.removeprefix("qratk.data.") for name in names if name.startswith("qratk.data.")}


def test_no_circle_of_imports_not_even_for_types() -> None:
    order = list(TopologicalSorter({name: imported(path) for name, path in FILES.items()}).static_order())
    assert set(order) == set(FILES)


def test_classes_can_be_read_in_one_go() -> None:
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno < 200, f"{path.name}: {node.name}"
