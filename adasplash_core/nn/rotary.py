"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from adasplash_core.errors import ArgumentError


class RotaryEmbedding(nn.Module):
    """Turns pairs of a head's features by angles that grow with the position (Su et al. 2021, arXiv 2104.09864).

    Feature i is paired with feature i + head_dim / 2, the order of Llama and GPT-NeoX checkpoints, and turned by
    position * base ^ (-2 i / head_dim). Angles are float32 and stay so when a model is cast.

    Parameters
    ----------
    head_dim: even.
    base: larger for longer contexts.
    """

    frequencies: torch.Tensor

    def __init__(self, head_dim: int, base: float = 10000.0, device: torch.device | str | None = None) -> None:
        super().__init__()
        if head_dim % 2:
            raise ArgumentError("Rotary embeddings need an even head dim.", seen=f"head_dim={head_dim}")
        self.head_dim, self.base = head_dim, base
        self.register_buffer("frequencies", self._frequencies(device), persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (B, H, L, head_dim) at ``positions``, integers broadcastable to (B, L)."""
        angles = (positions.to(torch.float32).unsqueeze(-1) * self.frequencies).unsqueeze(-3)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}"

    def _frequencies(self, device: torch.device | str | None) -> torch.Tensor:
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        return self.base ** (-steps / self.head_dim)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.frequencies = self._frequencies(self.frequencies.device)
        return self
