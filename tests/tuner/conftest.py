"""Fixtures of the tuner's tests: a database of each test's own, and the library's warnings as a list."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adasplash_core import configs
from adasplash_core.errors import AdasplashWarning
from adasplash_tuner.key import TuningKey, tuning_key
from adasplash_tuner.storage.location import DATABASE_VARIABLE
from adasplash_tuner.storage.store import TuningStore
from tests.tuner.fakes import H100, SPEC, FakeBackend, Warned


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def key(backend: FakeBackend) -> TuningKey:
    return tuning_key(backend, SPEC, H100, "forward")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database that does not exist yet, and that ``ADASPLASH_DB`` names."""
    path = tmp_path / "db" / "tuned.db"
    monkeypatch.setenv(DATABASE_VARIABLE, str(path))
    return path


@pytest.fixture
def store(database: Path) -> TuningStore:
    return TuningStore()


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Warned]:
    """Collects the library's warnings, which the test run otherwise turns into errors."""
    monkeypatch.setattr(configs, "_warned", set())
    texts = Warned()

    def collect(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, AdasplashWarning):
            texts.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", AdasplashWarning)
        monkeypatch.setattr(warnings, "showwarning", collect)
        yield texts
