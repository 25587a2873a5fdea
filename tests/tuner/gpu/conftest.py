"""These tests need a GPU: ``python -m pytest tests/tuner/gpu``."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
