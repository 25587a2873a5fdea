"""docs/plugins.md tells what is there: its listings are the template's, and its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adasplash_core import hookspecs
from adasplash_core.backend import AttentionBackend
from adasplash_core.spec import FEATURES

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "examples" / "plugin-template"
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
LISTINGS = re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', PAGE, flags=re.M | re.S)


@pytest.mark.parametrize(("path", "listing"), LISTINGS, ids=lambda x: x if "/" in x or x.endswith("toml") else "")
def test_listings_are_the_templates_own(path: str, listing: str) -> None:
    assert listing in (TEMPLATE / path).read_text(encoding="utf-8")


def test_every_file_of_the_template_is_named() -> None:
    files = {path.relative_to(TEMPLATE).as_posix() for path in TEMPLATE.rglob("*") if path.suffix in {".py", ".toml"}}
    assert {name for name in files if not name.endswith("__init__.py")} == set(
        re.findall(r"^(\S+\.(?:py|toml))  ", PAGE, flags=re.M)
    )


def test_every_feature_is_in_the_table() -> None:
    assert (
        dict(
            re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.partition("Features:\n")[2].partition("\nWhat a class")[0], flags=re.M)
        )
        == FEATURES
    )


def test_every_declaration_is_in_the_table() -> None:
    declared = set(AttentionBackend.__annotations__)
    described = set(re.findall(r"^\| `(\w+)` \|", PAGE.partition("| attribute |")[2].partition("Features:")[0], flags=re.M))
    assert declared == described


def test_every_hook_has_a_section_with_its_arguments() -> None:
    for name, hook in vars(hookspecs).items():
        if name.startswith("adasplash_"):
            arguments = ", ".join(n for n in hook.__annotations__ if n != "return")
            assert f"### `{name}({arguments})`" in PAGE


def test_names_of_the_testing_package_exist() -> None:
    import importlib

    named = re.findall(r"^\| `adasplash_core\.([\w.]+)[(`]", PAGE, flags=re.M)
    assert len(named) > 5
    for dotted in named:
        module, _, name = dotted.rpartition(".")
        assert hasattr(importlib.import_module(f"adasplash_core.{module}"), name), dotted
