"""Everything a backend must do, from what it declares."""

from __future__ import annotations

from adasplash_numpy.backend import NumpyBackend

from adasplash_core.testing import AttentionConformance


class TestNumpyBackend(AttentionConformance):
    backend = NumpyBackend()
