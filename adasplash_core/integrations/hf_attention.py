"""The attention function that transformers' models call under the name "entmax"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers.utils import output_capturing

from adasplash_core.api import attention
from adasplash_core.configs import warn_once
from adasplash_core.errors import ArgumentError, ArgumentTypeError
from adasplash_core.integrations.hf_alpha import alpha_of
from adasplash_core.integrations.hf_masks import StructuredMask, boundaries

_REFUSED: Mapping[str, str] = {
    "softcap": "capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias on the scores that it makes inside attention",
    "attention_bias": "a bias on the scores that it makes inside attention",
    "head_mask": "masked heads",
    "layer_head_mask": "masked heads",
    "cross_attn_head_mask": "masked heads",
    "indices": "its own choice of keys",
    "block_indices": "its own choice of keys",
    "block_table": "a paged cache",
    "cache": "a cache that attention itself must fill",
    "past_key_values": "a cache that attention itself must fill",
    "past_key_value": "a cache that attention itself must fill",
}
"""Keyword arguments that change the result and that softmax kernels of transformers know."""

_HARMLESS = frozenset({
    "cache_params", "cache_position", "debug_io", "debug_io_dir", "encoder_attention_mask", "encoder_hidden_states",
    "interpolate_pos_encoding", "kernel_options", "labels", "layer_idx", "logits_to_keep", "mm_token_type_ids", "num_items_in_batch",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings", "return_dict", "return_loss",
    "seq_idx", "token_type_ids",
})  # fmt: skip
"""Keyword arguments that models hand down to attention and that mean nothing there."""


def entmax_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | StructuredMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    deterministic: bool | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """alpha-entmax attention with the signature of transformers' attention interface.

    alpha comes from ``module.entmax_alpha`` (see :func:`~adasplash_core.integrations.transformers.set_alpha`), else from
    ``module.config.entmax_alpha``, else it is 1.5; the backend from ``module.config.entmax_backend``, else "auto".

    Parameters
    ----------
    query, key, value: (B, H, Lq, E), (B, Hkv, Lk, E), (B, Hkv, Lk, Ev).
    attention_mask: what :func:`~.hf_masks.entmax_mask` made, or the user's own (B, 1 or H, Lq or 1, Lk), boolean or additive.
    cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences in a batch of one row.
    Others: as in transformers' ``sdpa_attention_forward``.

    Returns
    -------
    (B, Lq, H, Ev), contiguous, and None in place of the weights, which are never whole in memory.

    Raises
    ------
    ArgumentError, ArgumentTypeError: for keyword arguments that would change the result in a way that is not implemented, masks
    that leave open what they mean, and whatever :func:`adasplash_core.attention` refuses.
    """
    _check_keywords(others)
    config = getattr(module, "config", None)
    backend = getattr(config, "entmax_backend", None) or "auto"
    if not isinstance(backend, str):
        raise ArgumentTypeError("config.entmax_backend must be the name of a backend.", seen=repr(backend))
    operands = _Operands(
        query,
        key,
        value,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
        alpha=alpha_of(module),
        deterministic=True if deterministic else None,
        backend=backend,
    )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        window = _window_beside_packing(attention_mask, causal, sliding_window)
        # Only integers are known here; the total length bounds the longest, too.
        longest_q = max_length_q if isinstance(max_length_q, int) else query.shape[2]
        longest_k = max_length_k if isinstance(max_length_k, int) else key.shape[2]
        out = operands.packed(window, cu_seq_lens_q, cu_seq_lens_k, longest_q, longest_k)
    elif isinstance(attention_mask, StructuredMask):
        cu_seqlens = attention_mask.cu_seqlens
        if cu_seqlens is None and use_cache and position_ids is not None:
            cu_seqlens = _packed_positions(position_ids, attention_mask, query, key)
        out = _structured(operands, attention_mask, cu_seqlens)
    elif attention_mask is not None:
        out = _masked(operands, attention_mask)
    else:
        out = _unmasked(operands, causal, sliding_window)
    return out.transpose(1, 2).contiguous(), None


class _Operands:
    """Query, key and value, and what is the same for every kind of mask."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **shared: Any) -> None:
        self.query, self.key, self.value, self.shared = query, key, value, shared

    def attend(self, **arguments: Any) -> torch.Tensor:
        return cast(torch.Tensor, attention(self.query, self.key, self.value, **self.shared, **arguments))

    def windowed(self, left: int, right: int, **arguments: Any) -> torch.Tensor:
        """Row i sees the keys from ``left`` before to ``right`` behind its diagonal; -1 is open."""
        return self.attend(is_causal=right == 0, window=(left, -1 if right == 0 else right), **arguments)

    def packed(
        self, window: tuple[int, int], cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, longest_q: int, longest_k: int
    ) -> torch.Tensor:
        return self.windowed(*window, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k)

    def flattened(self) -> _Operands:
        """(B, H, L, E) as (1, H, B * L, E): views of what projections make, which is (B, L, H, E) in memory."""
        flat = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (self.query, self.key, self.value))
        return _Operands(*flat, **self.shared)


# -- the kinds of masks ---------------------------------------------------------------------------------------------------------


def _structured(operands: _Operands, mask: StructuredMask, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    if cu_seqlens is not None:
        batch, heads, length, _ = operands.query.shape
        out = operands.flattened().packed((mask.left, mask.right), cu_seqlens, cu_seqlens, length, length)
        return out.view(heads, batch, length, out.shape[-1]).transpose(0, 1)
    offset = None if isinstance(mask.query_offset, int) and mask.query_offset == 0 else mask.query_offset
    if mask.keys is None:
        return operands.windowed(mask.left, mask.right, query_offset=offset)
    # is_causal excludes a mask: beside one, causality is a window
    return operands.attend(attn_mask=mask.keys[:, None, None], window=(mask.left, mask.right), query_offset=offset)


def _masked(operands: _Operands, mask: torch.Tensor) -> torch.Tensor:
    """The mask says everything, as in transformers' SDPA."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        seen = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ArgumentError(
            "A mask that reaches attention must have four dimensions, (batch, heads, queries, keys).",
            seen=seen,
            hint="this model makes its masks without transformers.masking_utils, which the entmax attention needs",
        )
    return operands.attend(attn_mask=mask)


def _unmasked(operands: _Operands, causal: bool, sliding_window: int | None) -> torch.Tensor:
    """No mask was made: the model needs none, or it makes none through transformers.masking_utils."""
    left, right = _sliding(causal, sliding_window)
    queries, keys = operands.query.shape[2], operands.key.shape[2]
    if queries == 1 and (causal or sliding_window is not None):
        return operands.attend(causal_alignment="bottom_right", window=(left, -1))
    if causal and queries != keys:
        raise ArgumentError(
            "Causal attention over a cache needs a mask that says where the queries stand.",
            seen=f"{queries} queries, {keys} keys and no mask",
            hint="this model makes its masks without transformers.masking_utils, which the entmax attention needs",
        )
    return operands.windowed(left, right)


def _window_beside_packing(mask: Any, causal: bool, sliding_window: int | None) -> tuple[int, int]:
    """cu_seq_lens say more exactly what position ids say, and replace what was made of those; they go with no other mask."""
    if mask is None:
        return _sliding(causal, sliding_window)
    only_window = (
        isinstance(mask, StructuredMask)
        and mask.keys is None
        and isinstance(mask.query_offset, int)
        and mask.query_offset == 0
    )  # fmt: skip
    if not only_window:
        raise ArgumentError(
            "Packed sequences (cu_seq_lens_q, cu_seq_lens_k) already say which keys belong to which query.",
            seen="an attention_mask or a filled cache with them",
            hint="call the model without attention_mask, and with use_cache=False",
        )
    return mask.left, mask.right


def _packed_positions(
    position_ids: torch.Tensor, mask: StructuredMask, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """Position ids that start anew mark packed sequences. transformers looks for them only where there is no cache."""
    batch, _, length, _ = query.shape
    if mask.keys is not None or mask.right != 0 or length == 1 or key.shape[2] != length:
        return None
    if position_ids.shape != (batch, length):  # one row for the whole batch is what models make for themselves
        return None
    starts = torch.cat([torch.ones_like(position_ids[:, :1], dtype=torch.bool), position_ids.diff(dim=1) != 1], dim=1)
    return boundaries(starts)


def _sliding(causal: bool, sliding_window: int | None) -> tuple[int, int]:
    """(left, right) of transformers' ``sliding_window``, which counts the query's own position."""
    if sliding_window is None:
        return -1, 0 if causal else -1
    return sliding_window - 1, 0 if causal else sliding_window - 1


# -- keyword arguments ----------------------------------------------------------------------------------------------------------


def _check_keywords(others: Mapping[str, Any]) -> None:
    if others.get("output_attentions") or _weights_are_collected():
        raise ArgumentError(
            "The entmax attention never has the whole matrix of weights, so it cannot return it.",
            seen="output_attentions=True",
            hint="adasplash_core.attention(..., return_stats=True) tells how sparse the weights are",
        )
    for name, given in others.items():
        if given is None or given is False or name in _HARMLESS:
            continue
        if (what := _REFUSED.get(name)) is not None:
            raise ArgumentError(
                f"The entmax attention does not do what the keyword argument {name!r} asks for: {what}.",
                seen=f"{name} of type {type(given).__name__}",
                hint='use another attn_implementation for this model, like "eager"',
            )
        _warn_of_unknown(name)


def _warn_of_unknown(name: str) -> None:
    warn_once(
        f"The entmax attention does not know the keyword argument {name!r} that a model hands to attention; it has no effect."
    )


_warn_of_unknown._dynamo_marked_constant = True  # type: ignore[attr-defined]  # warns once a trace


def _weights_are_collected() -> bool:
    """Some models keep ``output_attentions`` from their attention and collect the weights it returns by a hook."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in name for name in collector.get() or ())
