"""Every test runs against a database of its own run: the user's is never touched."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="adasplash-tests-")
os.environ["ADASPLASH_DB"] = f"sqlite:///{Path(_HOME.name) / 'tests.db'}"
os.environ.pop("ADASPLASH_PLUGINS", None)
os.environ.pop("ADASPLASH_DEBUG", None)
os.environ.pop("ADASPLASH_CACHE_MODE", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, as of this one below


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> Iterator[None]:
    """The suite runs several workers on few cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_LONG = (
    "test_ahead_of_time.py",
    "test_warpgroups.py",
    "test_conformance.py",
    "test_interpreted.py",
    "test_marking.py",
    "test_solve.py",
    "test_compile.py",
    "test_demo.py",
    "test_tuning_workers.py",
    "test_distributed.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests take longest first: workers that take whole files would otherwise meet them last, one alone."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


def pytest_collection_finish() -> None:
    """What was imported stays: collections that look at it again take a twentieth of the run."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries would report what lives at the end as leaks
