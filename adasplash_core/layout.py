"""The two memory layouts of 4-d outputs and gradients, decided by the input alone so that tracing can foretell them.

A transformer hands over transposed views of (B, L, H, E) memory; an output in the same order makes its ``transpose(1, 2)`` free.
"""

from __future__ import annotations

import torch


def empty_like(x: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """Uninitialised (B, H, L, ``last`` or E), dense, with the order of ``x``'s head and length dimensions in memory."""
    batch, heads, length, size = x.shape
    size = size if last is None else last
    if _length_first(x):
        return x.new_empty((batch, length, heads, size)).transpose(1, 2)
    return x.new_empty((batch, heads, length, size))


def conform(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``y`` itself if it has the layout of :func:`empty_like` for ``x``, else a copy that does."""
    if _length_first(x):
        return y.transpose(1, 2).contiguous().transpose(1, 2)
    return y.contiguous()


def _length_first(x: torch.Tensor) -> bool:
    return bool(x.stride(1) < x.stride(2))
