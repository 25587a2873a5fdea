"""The conformance suite on a GPU, in every dtype."""

from __future__ import annotations

from adasplash_core.testing.conformance import AttentionConformance
from adasplash_triton.backend import TritonBackend


class TestOnGpu(AttentionConformance):
    backend = TritonBackend()
    devices = ("cuda",)
