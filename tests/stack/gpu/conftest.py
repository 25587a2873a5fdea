"""These tests need a GPU: ``make gpu-test``, or ``python -m pytest tests/stack/gpu``.

They can be tried without one, interpreted, with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os

import torch

collect_ignore_glob = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
