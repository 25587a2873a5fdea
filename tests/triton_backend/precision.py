"""PyTorch's settings for TF32, set for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    with restored():
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        yield


@contextmanager
def restored() -> Iterator[None]:
    """Leaves the settings as they were found, whichever of them are set within."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(
            "high" if before == "tf32" else "highest"
        )  # the older two, which would else contradict
        torch.backends.cuda.matmul.fp32_precision = before
