"""The contract made executable: a float64 oracle, input generators, and the conformance suite that plugin authors run.

``class TestMyBackend(AttentionConformance): backend = MyBackend()`` in a pytest file, or ``adasplash backends check NAME``.
"""

from __future__ import annotations

from adasplash_core.testing.conformance import AttentionConformance, CheckResult, run_conformance

__all__ = ["AttentionConformance", "CheckResult", "run_conformance"]
