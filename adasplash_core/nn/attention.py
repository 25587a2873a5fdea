"""EntmaxAttention: one attention layer, from the input's features to the output's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adasplash_core.api import AttentionStats, attention
from adasplash_core.call import make_call
from adasplash_core.errors import ArgumentError
from adasplash_core.masking import visible_keys
from adasplash_core.nn.alpha import Alpha
from adasplash_core.nn.cache import KVCache
from adasplash_core.nn.rotary import RotaryEmbedding
from adasplash_core.nn.scaling import LengthScaling


class EntmaxAttention(nn.Module):
    """Multi-head alpha-entmax attention with its projections: self-attention, or cross-attention to a ``context``.

    Parameters
    ----------
    embed_dim: features of the input and the output.
    num_heads: query heads.
    num_kv_heads: key and value heads, a divisor of ``num_heads`` (grouped-query attention). Default: ``num_heads``.
    head_dim: default ``embed_dim // num_heads``.
    context_dim: features of a context to attend to instead of the input. Default: ``embed_dim``.
    bias: give the four projections a bias.
    dropout: share of the attention weights dropped in training.
    is_causal: position i sees the positions up to i.
    window: (left, right), the positions kept on each side; -1 is open.
    rotary_base: turn queries and keys by their positions (:class:`RotaryEmbedding`), with this base. Default: no.
    alpha: number in [1, 2], or one a head.
    learnable_alpha: alpha = 1 + sigmoid(theta), one parameter a head, starting at ``alpha``.
    length_scaling: scale each query by how many keys it sees (:class:`LengthScaling`, ASEntmax).
    scale: factor of q . k. Default: 1 / sqrt(head_dim).
    backend: as in :func:`adasplash_core.attention`.

    Raises
    ------
    ArgumentError: for sizes that do not fit together, or an alpha out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        is_causal: bool = False,
        window: tuple[int, int] | None = None,
        rotary_base: float | None = None,
        alpha: float | list[float] = 1.5,
        learnable_alpha: bool = False,
        length_scaling: bool = False,
        scale: float | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if embed_dim < 1 or num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ArgumentError(
                "embed_dim and num_heads must be positive, and num_heads a multiple of num_kv_heads.",
                seen=f"embed_dim={embed_dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}",
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ArgumentError(
                    "embed_dim must be a multiple of num_heads.",
                    seen=f"embed_dim={embed_dim}, num_heads={num_heads}",
                    hint="or pass head_dim",
                )
            head_dim = embed_dim // num_heads
        if not 0 <= dropout < 1:
            raise ArgumentError("dropout must be at least 0 and less than 1.", seen=f"dropout={dropout}")
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.dropout, self.is_causal, self.window, self.scale, self.backend = dropout, is_causal, window, scale, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        source = embed_dim if context_dim is None else context_dim
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(source, num_kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(source, num_kv_heads * head_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **factory)
        self.alpha = Alpha(alpha, heads=num_heads, learnable=learnable_alpha, device=device)
        self.rotary = None if rotary_base is None else RotaryEmbedding(head_dim, rotary_base, device=device)
        self.length_scaling = LengthScaling(embed_dim, num_heads, **factory) if length_scaling else None

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
        kv_starts: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
        return_stats: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, AttentionStats]:
        """Attend.

        Parameters
        ----------
        x: (B, L, embed_dim).
        context: (B, Lk, context_dim), what to attend to. Default: x.
        attn_mask: as in :func:`adasplash_core.attention`, broadcastable to (B, H, L, Lk). Not where the layer is causal.
        kv_lengths, kv_starts: integer (B,): right and left padding of what is attended to.
        cu_seqlens, max_seqlen: packed sequences: x is (1, total, embed_dim), integers (S + 1,) say where each starts.
        cache: keys and values of earlier tokens, which x continues and is appended to; for causal layers.
        return_stats: also return the weights' :class:`adasplash_core.AttentionStats`.

        Returns
        -------
        (B, L, embed_dim), or that and the stats.

        Raises
        ------
        ArgumentError: what is given cannot be combined; and whatever :func:`adasplash_core.attention` raises.
        """
        if x.ndim != 3:
            raise ArgumentError("x must be (batch, length, embed_dim).", seen=f"shape {tuple(x.shape)}")
        if cache is not None:
            self._check_cache(context, attn_mask, kv_lengths, cu_seqlens)
        source = x if context is None else context
        query, key, value = self._heads(self.q_proj(x)), self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        if self.rotary is not None:
            query, key = self._rotate(query, key, 0 if cache is None else cache.position)
        masks: dict[str, Any] = {
            "attn_mask": attn_mask, "is_causal": self.is_causal, "window": self.window, "kv_lengths": kv_lengths, "kv_starts": kv_starts
        }  # fmt: skip
        if cu_seqlens is not None or max_seqlen is not None:
            masks |= {
                "cu_seqlens_q": cu_seqlens,
                "cu_seqlens_k": cu_seqlens,
                "max_seqlen_q": max_seqlen,
                "max_seqlen_k": max_seqlen,
            }
        if cache is not None:
            key, value, offset = cache.append(key, value)
            if (
                isinstance(offset, torch.Tensor) or offset
            ):  # none at the start: a plain causal call has more kernels to choose from
                masks["query_offset"] = offset
        enable_gqa = self.num_heads != self.num_kv_heads
        if self.length_scaling is not None:
            visible = visible_keys(make_call(query, key, value, needs_grad=False, enable_gqa=enable_gqa, **masks))
            query = (query * self.length_scaling(x, visible)).to(query.dtype)
        result = attention(
            query,
            key,
            value,
            **masks,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=enable_gqa,
            alpha=self.alpha(),
            return_stats=return_stats,
            backend=self.backend,
        )
        out, stats = result if isinstance(result, tuple) else (result, None)
        projected: torch.Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected if stats is None else (projected, stats)

    def extra_repr(self) -> str:
        words = [f"{self.embed_dim}, num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            words.append(f"num_kv_heads={self.num_kv_heads}")
        words += [f"{name}={value}" for name in ("dropout", "is_causal", "window") if (value := getattr(self, name))]
        return ", ".join(words)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, heads * head_dim) as (B, heads, L, head_dim), a view."""
        split: torch.Tensor = x.unflatten(-1, (-1, self.head_dim))
        return split.transpose(1, 2)

    def _rotate(self, query: torch.Tensor, key: torch.Tensor, start: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Only distances matter, so padding and packing need no positions of their own.
        assert self.rotary is not None
        longest = max(query.shape[2], key.shape[2])
        positions = torch.arange(longest, device=query.device) + start
        return self.rotary(query, positions[: query.shape[2]]), self.rotary(key, positions[: key.shape[2]])

    def _check_cache(self, context: object, attn_mask: object, kv_lengths: object, cu_seqlens: object) -> None:
        if not self.is_causal:
            raise ArgumentError(
                "A cache continues a causal sequence.", seen="a layer with is_causal=False", hint="build it with is_causal=True"
            )
        given = {"context": context, "attn_mask": attn_mask, "kv_lengths": kv_lengths, "cu_seqlens": cu_seqlens}
        clashing = [name for name, x in given.items() if x is not None]
        if clashing:
            raise ArgumentError(
                "With a cache, the only mask is kv_starts.",
                seen=", ".join(clashing),
                hint="pad prompts on the left, and pass kv_starts",
            )
