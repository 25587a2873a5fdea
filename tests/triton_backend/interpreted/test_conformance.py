"""The conformance suite on interpreted kernels; float32 alone, because the interpreter is slow."""

from __future__ import annotations

from adasplash_core.testing.conformance import AttentionConformance
from adasplash_triton.backend import TritonBackend


class _Float32(TritonBackend):
    dtypes = frozenset({"float32"})


class TestInterpreted(AttentionConformance):
    backend = _Float32()
    devices = ("cpu",)
    quick = True
