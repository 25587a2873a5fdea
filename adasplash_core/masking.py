"""The one rule by which all structural masks reduce to an interval of keys per query row.

Causal masks with either alignment, query offsets, sliding windows, left and right padding and packed sequences all say the same
thing: row i of sequence b sees the keys lo <= j < hi, and its diagonal (for windows, causality and ALiBi) lies at key position d.

    d  = i + offset_b           offset_b: query_offset, or kv_end_b - Lq under "bottom_right", or 0
    lo = max(kv_start_b, d - left)
    hi = min(kv_end_b, d + right + 1)      causal: right = 0

Packed sequences are the same with i, d and the bounds counted inside each sequence and shifted to its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from adasplash_core.backend import AttentionCall


class RowIntervals(NamedTuple):
    """Per query row: visible keys ``lo <= j < hi`` (empty where hi <= lo) and the diagonal; int64, (B or 1, Lq), on the device."""

    lo: torch.Tensor
    hi: torch.Tensor
    diagonal: torch.Tensor


def row_intervals(call: AttentionCall) -> RowIntervals:
    """Intervals of every row; no host sync, values on the device are clamped to the key length."""
    q_len, kv_len, device = call.query.shape[-2], call.key.shape[-2], call.query.device
    row = torch.arange(q_len, device=device)[None]
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        start, end, diagonal = _packed(call, call.cu_seqlens_q, call.cu_seqlens_k, row, kv_len)
    else:
        start, end, diagonal = _padded(call, row, kv_len)
    left, right = call.window
    if call.spec.causal:
        right = 0 if right < 0 else min(right, 0)
    lo = start if left < 0 else torch.maximum(start, diagonal - left)
    hi = end if right < 0 else torch.minimum(end, diagonal + right + 1)
    lo, hi, diagonal = torch.broadcast_tensors(lo, hi, diagonal)
    return RowIntervals(lo.clamp(0, kv_len), hi.clamp(0, kv_len), diagonal)


def _padded(call: AttentionCall, row: torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    start = _column(call.kv_starts, row, default=0).clamp(0, kv_len)
    end = _column(call.kv_lengths, row, default=kv_len).clamp(0, kv_len)
    if call.spec.causal_alignment == "bottom_right":
        offset = end - call.query.shape[-2]
    elif isinstance(call.query_offset, torch.Tensor):
        offset = call.query_offset.to(torch.int64).reshape(-1, 1)
    else:
        offset = torch.full_like(row[:, :1], call.query_offset)
    return start, end, row + offset


def _packed(
    call: AttentionCall, cu_q: torch.Tensor, cu_k: torch.Tensor, row: torch.Tensor, kv_len: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cu_q, cu_k = cu_q.to(torch.int64), cu_k.to(torch.int64).clamp(0, kv_len)
    sequence = torch.searchsorted(cu_q, row, right=True) - 1
    inside = (sequence >= 0) & (sequence < cu_q.shape[0] - 1)  # rows before the first or after the last sequence see nothing
    sequence = sequence.clamp(0, max(cu_q.shape[0] - 2, 0))
    start, end = cu_k[sequence], torch.where(inside, cu_k[sequence + 1], cu_k[sequence])
    local = row - cu_q[sequence]
    if call.spec.causal_alignment == "bottom_right":
        local = local + (end - start) - (cu_q[sequence + 1] - cu_q[sequence])
    return start, end, start + local


def _column(values: torch.Tensor | None, row: torch.Tensor, default: int) -> torch.Tensor:
    """(B,) values as int64 (B, 1); without them the default as (1, 1)."""
    return torch.full_like(row[:, :1], default) if values is None else values.to(torch.int64).reshape(-1, 1)


def visible_keys(call: AttentionCall) -> torch.Tensor:
    """How many keys the masks let each row see: int64, broadcastable to (B, H, Lq)."""
    lo, hi, _ = row_intervals(call)
    mask = call.attn_mask
    if mask is None:
        return (hi - lo).clamp(min=0)[:, None]
    # A prefix sum over keys turns "allowed keys inside [lo, hi)" into two look-ups.
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    if call.spec.mask == "key":
        allowed = allowed[:, None, None]
    counts = torch.nn.functional.pad(allowed.to(torch.int64).cumsum(-1), (1, 0))
    if counts.shape[-1] == 2 and call.key.shape[-2] != 1:  # broadcast over keys: all or none of the interval
        return (hi - lo).clamp(min=0)[:, None] * counts[..., 1]
    batch = max(counts.shape[0], lo.shape[0])
    counts = counts.expand(batch, -1, lo.shape[-1], -1)
    lo, hi = (bound[:, None, :, None].expand(batch, counts.shape[1], -1, 1) for bound in (lo, torch.maximum(lo, hi)))
    return (counts.gather(-1, hi) - counts.gather(-1, lo)).squeeze(-1)
