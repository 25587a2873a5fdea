"""These tests need kernels that were defined under Triton's interpreter: ``tests/triton_backend/test_interpreted.py`` runs them in a
process of its own."""

from __future__ import annotations

import os

collect_ignore_glob = ["test_*.py"]
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton_backend.interpreted import faster

    faster.install()
    collect_ignore_glob = []
