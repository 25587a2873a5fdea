"""The whole conformance suite on the GPU."""

from __future__ import annotations

from adasplash_core.testing.conformance import AttentionConformance
from adasplash_cupy.backend import CupyBackend


class TestCupy(AttentionConformance):
    backend = CupyBackend()
    devices = ("cuda",)
