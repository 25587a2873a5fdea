"""These tests need a GPU and CuPy: ``python -m pytest tests/cupy_backend/gpu``."""

from __future__ import annotations

import torch

from adasplash_cupy.backend import CupyBackend

collect_ignore_glob = [] if torch.cuda.is_available() and not CupyBackend().unavailable_reasons() else ["test_*.py"]
