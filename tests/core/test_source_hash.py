"""Tuned configs are tied to the code that was measured, not to its comments."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from adasplash_core.backend import source_hash


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "somekernels").mkdir()
    (tmp_path / "somekernels/__init__.py").write_text("")
    (tmp_path / "somekernels/kernel.py").write_text("x = 1  # one\n\n\ny = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "somekernels", raising=False)
    importlib.invalidate_caches()
    return tmp_path / "somekernels"


def hash_of(name: str = "somekernels") -> str:
    source_hash.cache_clear()
    return source_hash(name)


def test_comments_and_blank_lines_do_not_count_and_code_does(package: Path) -> None:
    before = hash_of()
    (package / "kernel.py").write_text("x = 1\ny = 2  # two\n")
    assert hash_of() == before
    (package / "kernel.py").write_text("x = 1\ny = 3\n")
    assert hash_of() != before


@pytest.mark.parametrize(
    ("code", "other"),
    [
        ('x = "#1"', 'x = "#2"'),
        ('x = """\n#1"""', 'x = """\n#2"""'),
        (r'x = "\\"  # "one', r'x = "\\" * 2  # "one'),
        ("x = 1\nif y:\n    z = 1", "x = 1\nif y:\n    z = 1\n    x = 2"),
        ("if y:\n    x = 1\n    z = 1", "if y:\n    x = 1\nz = 1"),
    ],
)
def test_what_only_looks_like_a_comment_counts_and_so_does_indentation(package: Path, code: str, other: str) -> None:
    (package / "kernel.py").write_text(code)
    before = hash_of()
    (package / "kernel.py").write_text(other)
    assert hash_of() != before


def test_cuda_sources_count(package: Path) -> None:
    before = hash_of()
    (package / "pass.cuh").write_text("int x;")
    assert hash_of() != before


def test_a_script_and_a_missing_module_have_a_hash_too() -> None:
    assert len(hash_of("__main__")) == len(hash_of("no_such_module_anywhere")) == 16
