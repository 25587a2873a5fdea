"""From an :class:`~adasplash_core.backend.AttentionCall` to the arguments that all kernels share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.dropout import threshold
from adasplash_core.masking import row_intervals
from adasplash_triton.configs import LIST_ROWS, short_length
from adasplash_triton.runner import plan, speciality

OPEN = 1 << 30  # a window's open side; the kernels' positions are int32
MAX_STEPS = 40
"""Newton's steps converge quadratically: 12 were the most seen. The bound only ends loops whose rows hold NaN."""
_CONSTANTS = (
    "ALPHA",
    "PER_HEAD",
    "E",
    "EV",
    "LOADED",
    "HAS_KEYMASK",
    "HAS_ALIBI",
    "HAS_DROPOUT",
    "GRAD",
    "STATS",
    "ALPHA_GRAD",
    "KEEP",
)
_ALPHA_CODES = {"1.5": 15, "2": 20}


@dataclass
class Operands:
    """What the kernels take: tensors with a contiguous last dimension, masks as intervals, and all arguments by name."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    arguments: dict[str, Any]
    plan: int  # see adasplash_triton.runner.plan
    q_blocks: int

    @classmethod
    def of(cls, call: AttentionCall, *others: torch.Tensor) -> Operands:
        """``others``: further tensors that the kernels read and this backend did not allocate in this call."""
        query, key, value = (dense_rows(x) for x in (call.query, call.key, call.value))
        _, heads, q_len, head_dim = query.shape
        kv_len, head_dim_v = value.shape[2], value.shape[3]
        loaded = _needs_arrays(call)
        if loaded:
            lo, hi, diagonal = (x.to(torch.int32).contiguous() for x in row_intervals(call))
            mask_batch = q_len if lo.shape[0] > 1 else 0
            shift, left, right = 0, OPEN, OPEN
        else:
            lo = hi = diagonal = query
            mask_batch = 0
            shift, left, right = _affine(call)
        keymask, keymask_batch = query, 0
        if call.spec.mask == "key":
            assert call.attn_mask is not None
            keymask = call.attn_mask.contiguous().view(torch.uint8)
            keymask_batch = kv_len if keymask.shape[0] > 1 else 0
        slopes, slopes_batch = query, 0
        if call.alibi_slopes is not None:
            slopes = call.alibi_slopes.contiguous()
            slopes_batch = heads if slopes.ndim == 2 else 0
        has_dropout = call.dropout_p > 0
        q_blocks = -(-q_len // LIST_ROWS)
        arguments: dict[str, Any] = {
            "Q": query,
            "K": key,
            "V": value,
            "A": call.alpha if call.alpha.ndim == 0 else call.alpha.contiguous(),
            "LO": lo,
            "HI": hi,
            "DIAG": diagonal,
            "KEYMASK": keymask,
            "SLOPES": slopes,
            "SEED": call.dropout_seed if has_dropout else query,
            **strides("q", query),
            **strides("k", key),
            **strides("v", value),
            "mask_batch": mask_batch,
            "keymask_batch": keymask_batch,
            "slopes_batch": slopes_batch,
            "heads": heads,
            "group": heads // key.shape[1],
            "q_len": q_len,
            "kv_len": kv_len,
            "q_blocks": q_blocks,
            "shift": shift,
            "left": left,
            "right": right,
            "scale": float(call.scale),
            "keep_from": threshold(call.dropout_p) if has_dropout else 0,
            "keep_scale": 1 / (1 - call.dropout_p),
            # The rest are compile-time constants.
            "ALPHA": _ALPHA_CODES.get(call.spec.alpha_class, 0 if query.dtype == torch.float32 else 1),
            "PER_HEAD": call.alpha.ndim == 1,
            "E": head_dim,
            "BE": padded(head_dim),
            "EV": head_dim_v,
            "BEV": padded(head_dim_v),
            "BM": LIST_ROWS,
            "LOADED": loaded,
            "HAS_KEYMASK": call.spec.mask == "key",
            "HAS_ALIBI": call.alibi_slopes is not None,
            "HAS_DROPOUT": has_dropout,
            "GRAD": call.spec.needs_grad,
            "STATS": call.spec.return_stats,
            "ALPHA_GRAD": call.spec.alpha_requires_grad,
            "KEEP": call.spec.needs_grad and not call.spec.deterministic,
            "MAX_STEPS": MAX_STEPS,
            "tol": 1e-5 if query.dtype == torch.float32 else 2e-3,
        }
        strided = (query, key, value, *others[:1])
        tensors = (query, key, value, arguments["A"], lo, keymask, slopes, arguments["SEED"], *others)
        number = plan(
            call.config,
            query.get_device(),
            query.dtype,
            arguments["A"].dtype,
            slopes.dtype,
            *[arguments[name] for name in _CONSTANTS],
            *[speciality(size) for x in strided for size in x.stride()[:3]],
            *[x.data_ptr() & 15 for x in tensors],
        )
        return cls(query, key, value, arguments, number, q_blocks)

    def is_short(self) -> bool:
        """Whether whole rows of scores stay on chip: then no lists are kept."""
        return self.key.shape[2] <= short_length(self.query.shape[3], self.value.shape[3], self.query.element_size())


def _needs_arrays(call: AttentionCall) -> bool:
    """Whether the intervals depend on tensors, or on numbers too large for the kernels' int32 rule."""
    return (
        call.kv_lengths is not None
        or call.kv_starts is not None
        or call.cu_seqlens_q is not None
        or not isinstance(call.query_offset, int)
        or abs(call.query_offset) >= OPEN // 4
        or max(call.query.shape[2], call.key.shape[2]) >= OPEN // 4
    )


def _affine(call: AttentionCall) -> tuple[int, int, int]:
    """(shift, left, right) with row i seeing max(0, i + shift - left) <= j < min(Lk, i + shift + right + 1)."""
    assert isinstance(call.query_offset, int)
    left, right = call.window
    if call.spec.causal:
        right = 0 if right < 0 else min(right, 0)
    shift = call.key.shape[2] - call.query.shape[2] if call.spec.causal_alignment == "bottom_right" else call.query_offset
    return shift, OPEN if left < 0 else min(left, OPEN), OPEN if right < 0 else min(right, OPEN)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(prefix: str, x: torch.Tensor) -> dict[str, int]:
    batch, head, row, _ = x.stride()
    return {f"{prefix}_batch": batch, f"{prefix}_head": head, f"{prefix}_stride": row}


def padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())
