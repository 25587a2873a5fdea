"""These tests need a GPU: ``make gpu-test``, or ``python -m pytest -n 16 tests/triton_backend/gpu`` (most of it is compiling).

``test_features.py`` and ``test_transform.py`` can be tried without one, small and interpreted: with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os

import torch

_TRIABLE = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = (
    [] if torch.cuda.is_available() else ["test_at_size.py", "test_conformance.py"] if _TRIABLE else ["test_*.py"]
)
