"""Random query, key and value for tests of the kernels."""

from __future__ import annotations

import torch


def draw(
    q_len: int,
    kv_len: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    dim: int = 16,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
) -> list[torch.Tensor]:
    """Standard normal, the query times ``spread``. With ``seed=None`` of torch's own generator: other numbers at each call."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [query * spread, key, value]
