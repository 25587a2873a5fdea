"""What a mask says, read off the mask itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class MaskFacts(NamedTuple):
    """A mask in the words of :func:`adasplash_core.attention`'s arguments."""

    is_causal: bool = False
    window: tuple[int, int] | None = None
    kv_starts: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None


def mask_facts(mask: torch.Tensor) -> MaskFacts:
    """The simplest rules that explain a mask entry by entry, or the mask itself where none do.

    ``mask``: (B, 1 or H, Lq, Lk), boolean (True: visible) or additive.
    """
    import torch

    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return MaskFacts(attn_mask=mask)
    visible = mask[:, 0]
    batch, q_len, kv_len = visible.shape
    counts = visible.sum(-1)
    first = visible.to(torch.uint8).argmax(-1)
    end = kv_len - visible.flip(-1).to(torch.uint8).argmax(-1)
    seen = counts > 0
    if not seen.any() or not (end - first == counts)[seen].all():  # nothing to go by, or a row with a hole
        return MaskFacts(attn_mask=mask)
    row = torch.arange(q_len, device=mask.device).expand(batch, -1)
    starts = first.masked_fill(~seen, kv_len).amin(-1)
    lengths = end.masked_fill(~seen, 0).amax(-1)
    reach_left = max(int((row - first)[seen].max()), 0)
    reach_right = max(int((end - 1 - row)[seen].max()), 0)

    for left in (-1, reach_left):
        for right in (-1, reach_right):
            lo = starts[:, None] if left < 0 else torch.maximum(starts[:, None], row - left)
            hi = lengths[:, None] if right < 0 else torch.minimum(lengths[:, None], row + right + 1)
            lo, hi = lo.expand_as(first), hi.expand_as(end)
            if torch.equal(hi > lo, seen) and torch.equal(lo[seen], first[seen]) and torch.equal(hi[seen], end[seen]):
                return MaskFacts(
                    is_causal=right == 0,
                    window=None if left < 0 and right <= 0 else (left, right),
                    kv_starts=starts.to(torch.int32) if starts.any() else None,
                    kv_lengths=lengths.to(torch.int32) if (lengths < kv_len).any() else None,
                )
    return MaskFacts(attn_mask=mask)
