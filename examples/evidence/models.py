"""A GPT-2-class decoder whose attention can be exchanged: everything else, the weights it starts with included, stays the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adasplash_core.nn import Alpha, EntmaxAttention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Causal attention of (B, H, L, E) tensors."""


@dataclass(frozen=True)
class Size:
    """Of a decoder; ``context`` is its longest sequence."""

    vocabulary: int
    embed: int
    layers: int
    heads: int
    context: int

    @property
    def parameters(self) -> int:
        """Matrices and embeddings; biases and norms are not counted."""
        return self.embed * (self.vocabulary + self.context) + 12 * self.layers * self.embed**2


class OtherAttention(nn.Module):
    """The projections of :class:`EntmaxAttention`, in its order, around another function."""

    def __init__(self, embed: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(embed, embed) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out: torch.Tensor = self.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward. ``densities`` collects what share of its visible weights is not zero, by head."""

    def __init__(self, embed: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(embed), attention
        self.forward_norm = nn.LayerNorm(embed)
        self.up, self.down = nn.Linear(embed, 4 * embed), nn.Linear(4 * embed, embed)

    def forward(self, x: torch.Tensor, densities: list[torch.Tensor] | None = None) -> torch.Tensor:
        if densities is not None and isinstance(self.attention, EntmaxAttention):
            attended, stats = self.attention(self.attention_norm(x), return_stats=True)
            densities.append(stats.density.mean(0))
        else:
            attended = self.attention(self.attention_norm(x))
        x = x + attended
        return x + self.down(nn.functional.gelu(self.up(self.forward_norm(x)), approximate="tanh"))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A language model with learned positions and a tied head.

    Parameters
    ----------
    size: what it measures.
    attention: makes one layer's attention, from the embedding dim and the number of heads.
    checkpointed: recompute each block in the backward instead of keeping its activations.
    """

    def __init__(self, size: Size, attention: Callable[[int, int], nn.Module], *, checkpointed: bool = False) -> None:
        super().__init__()
        self.size, self.checkpointed = size, checkpointed
        self.tokens, self.positions = nn.Embedding(size.vocabulary, size.embed), nn.Embedding(size.context, size.embed)
        self.blocks = nn.ModuleList(Block(size.embed, attention(size.embed, size.heads)) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.embed)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's start: N(0, 0.02), and less where a residual is written."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(("out_proj", "down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.size.layers) if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, (nn.LayerNorm, Alpha)):
                module.reset_parameters()

    def forward(
        self, ids: torch.Tensor, targets: torch.Tensor | None = None, densities: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (B, L, vocabulary) of tokens (B, L); with targets (B, L) the mean cross-entropy."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed and self.training else block(x, densities)
        logits = nn.functional.linear(self.norm(x), self.tokens.weight)
        return logits if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def entmax_attention(**options: Any) -> Callable[[int, int], nn.Module]:
    """What :class:`Decoder` takes, for attention of this library."""
    return lambda embed, heads: EntmaxAttention(embed, heads, is_causal=True, bias=True, **options)


def other_attention(attend: Attend) -> Callable[[int, int], nn.Module]:
    """What :class:`Decoder` takes, for any other function."""
    return lambda embed, heads: OtherAttention(embed, heads, attend)


def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's fused softmax attention."""
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense_entmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """1.5-entmax from the whole score matrix, by the `entmax` package."""
    from entmax import entmax15

    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights: torch.Tensor = entmax15(scores.float().masked_fill(future, -torch.inf), dim=-1)
    return weights.to(v.dtype) @ v


def adasplash_022(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The `adasplash` package's kernels; CUDA only."""
    from adasplash import adasplash

    out: torch.Tensor = adasplash(q.contiguous(), k.contiguous(), v.contiguous(), alpha=1.5, is_causal=True)
    return out
