"""Every launch of these tests runs in the emulator; those under ``gpu/`` use the device instead."""

from __future__ import annotations

import pytest

from adasplash_core.programs import Programs
from adasplash_cupy import launch
from tests.cupy_backend import emulator
from tests.cupy_backend.fake_machine import machine

__all__ = ["machine"]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "gpu" not in request.path.parts:
        monkeypatch.setattr(launch, "prepare", emulator.prepare)
        for cache in ("_forwards", "_backwards", "_transforms"):  # tests change what programs are built from
            monkeypatch.setattr(launch, cache, Programs())


@pytest.fixture
def _lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of keys however short the sequence."""
    monkeypatch.setattr(launch, "uses_lists", lambda *_: True)
    monkeypatch.setattr(launch, "short_tile", lambda *_: 0)
