"""Texts from packages: found, parted for good, tokenized without loss of separators."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from .conftest import EVIDENCE


@pytest.fixture(scope="module")
def texts() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EVIDENCE))
    try:
        import texts

        yield texts
    finally:
        sys.path.remove(str(EVIDENCE))
        sys.modules.pop("texts", None)


def test_news_have_titles_and_bodies(texts: ModuleType) -> None:
    documents = list(texts.news())
    assert len(documents) > 3700
    assert sum(bool(d.title) for d in documents) > 0.98 * len(documents)


def test_the_split_depends_on_the_text_alone(texts: ModuleType) -> None:
    documents = [texts.Document(f"text {i}", title=f"{i}") for i in range(4000)]
    validation = {d.text for d in documents if d.split == "validation"}
    assert 140 < len(validation) < 260  # 5 %
    assert {d.text for d in documents[::-2] if texts.Document(d.text).split == "validation"} <= validation


def test_tables_of_orange(texts: ModuleType, tmp_path: Path) -> None:
    rows = ["Category\tText", "d\tstring", "class\t", "", "a\tfirst text", "b\tsecond"]
    (tmp_path / "20newsgroups-train.tab").write_text("\n".join(rows) + "\n", encoding="utf-8")
    documents = list(texts.newsgroups("train", tmp_path))
    assert [(d.label, d.text) for d in documents] == [("a", "first text"), ("b", "second")]


def test_a_missing_file_names_the_package(texts: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pip install --no-deps some-package"):
        texts.find("some-package", "file.tab", tmp_path)


def test_streams_survive_a_file_and_begin_each_document_with_a_separator(texts: ModuleType, tmp_path: Path) -> None:
    tokens = texts.tokenize(("news",), 400, limit=40)
    tokens.save(tmp_path / "tokens.npz")
    again = texts.Tokens.load(tmp_path / "tokens.npz")
    assert np.array_equal(again.train, tokens.train)
    assert (again.vocabulary, again.sources, again.bytes_a_token) == (tokens.vocabulary, tokens.sources, tokens.bytes_a_token)
    documents = [d for _, d in zip(range(40), texts.news(), strict=False)]
    assert (tokens.train == tokens.train[0]).sum() == sum(d.split == "train" for d in documents)
    assert 1 < tokens.bytes_a_token < 6
