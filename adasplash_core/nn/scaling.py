"""ASEntmax's length-adaptive scaling: how sharp a query's attention is may grow with the number of keys it sees."""

from __future__ import annotations

import torch
from torch import nn


class LengthScaling(nn.Module):
    """The factor that ASEntmax gives each query (Vasylenko et al. 2025, arXiv 2506.16640), from the query's own input x:

        delta + softplus(w_beta . x) * log(n + 1) ^ (2 tanh(w_gamma . x))

    n is the number of keys that the masks let the query see: its position + 1 where attention is causal. With softmax or a fixed
    scale, attention over more keys is flatter; here each head can learn to keep it sharp. Zero weights give delta + log 2.

    It is log(n + 1), not log n, so that the first query, which sees one key, has a positive base: 0 to a negative power is
    infinite. Computed in float32 whatever the dtype of x.

    Parameters
    ----------
    embed_dim, heads: of x, and of the factors.
    delta: what remains where a head turns the rest off.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        *,
        delta: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.delta = delta
        self.beta = nn.Linear(embed_dim, heads, bias=False, device=device, dtype=dtype)
        self.gamma = nn.Linear(embed_dim, heads, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Factors (B, H, L, 1), float32 (float64 for such an x), from x (B, L, embed_dim) and counts broadcastable to (B, H, L)."""
        beta, gamma = self.beta(x).transpose(1, 2), self.gamma(x).transpose(1, 2)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        base = torch.log(visible.clamp(min=1).to(wide) + 1)
        grown = torch.exp(2 * torch.tanh(gamma.to(wide)) * torch.log(base))
        # softplus; torch 2.13's own breaks compiled models: its backward has other strides traced than run.
        positive = torch.logaddexp(beta.to(wide), torch.zeros((), dtype=wide, device=x.device))
        return (self.delta + positive * grown).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"delta={self.delta}"
