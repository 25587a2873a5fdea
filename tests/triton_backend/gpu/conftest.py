"""These tests need a GPU: ``python -m pytest -n 12 tests/triton_backend/gpu`` (most of the time goes into compiling kernels)."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
