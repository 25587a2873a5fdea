"""The tuner's rooms: which of them may import which, so that no two need each other and a look-up stays light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import adasplash_tuner

HOME = Path(adasplash_tuner.__file__).parent

MAY_IMPORT = {
    "key": set(),
    "shapes": set(),
    "storage": {"key"},
    "measure": {"key", "shapes", "storage"},
    "search": {"key", "shapes", "storage", "measure"},
    "report": {"key", "shapes", "storage", "measure", "search"},
    "provider": {"key", "shapes", "storage"},
    "plugin": {"provider"},
}


def sources(part: str) -> list[Path]:
    return sorted((HOME / part).rglob("*.py")) or [HOME / f"{part}.py"]


def imported(node: ast.AST) -> Iterator[str]:
    """The parts of the tuner that code imports when it runs, at its top or in a function."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    modules = []
    if isinstance(node, ast.ImportFrom):
        modules = [
            node.module or "",
            *(f"{node.module}.{alias.name}" for alias in node.names if node.module == "adasplash_tuner"),
        ]
    elif isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    for module in modules:
        package, _, inner = module.partition(".")
        if package == "adasplash_tuner" and inner:
            yield inner.partition(".")[0]
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def test_every_part_has_its_place() -> None:
    parts = {p.name for p in HOME.iterdir() if p.is_dir()} | {p.stem for p in HOME.glob("*.py")}
    assert parts - {"__init__", "__pycache__", "pretuned"} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_those_below_it(part: str) -> None:
    found = {name for file in sources(part) for name in imported(ast.parse(file.read_text(encoding="utf-8")))}
    assert found - {part} <= MAY_IMPORT[part]


@pytest.mark.parametrize("room", sorted(p.parent.name for p in HOME.glob("*/__init__.py")))
def test_entering_a_room_imports_nothing(room: str) -> None:
    (docstring,) = ast.parse((HOME / room / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
