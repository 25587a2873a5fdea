"""From an :class:`~adasplash_core.backend.AttentionCall` to the caller's tensors by role and the arguments that all kernels share."""

from __future__ import annotations

from typing import Any

import torch

from adasplash_core import layout
from adasplash_core.backend import AttentionCall
from adasplash_core.dropout import threshold
from adasplash_core.masking import row_intervals
from adasplash_triton.configs import LIST_ROWS, Precision, short_length
from adasplash_triton.program import Output, Table
from adasplash_triton.runner import INTERPRETED, Address

OPEN = 1 << 30  # a window's open side; the kernels' positions are int32
MAX_STEPS = 40
"""Newton's steps converge quadratically: 12 were the most seen. The bound only ends loops whose rows hold NaN."""
CACHE_BYTES = 32 * 2**20
"""K and V up to this size stay in the L2 cache of data-centre GPUs (40 to 60 MB) while all heads are worked on at a time."""
_ALPHA_CODES = {"1.5": 15, "2": 20}
_GENERAL_HALF = 1 if INTERPRETED or torch.version.hip else 2  # see kernels/primitives.py


def inputs_of(call: AttentionCall) -> Table:
    """The caller's tensors by role, copied where kernels could not read them: q, k, v with a contiguous last dimension, masks as
    intervals, everything else contiguous."""
    table = {"Q": dense_rows(call.query), "K": dense_rows(call.key), "V": dense_rows(call.value), "A": call.alpha.contiguous()}
    if _needs_arrays(call):
        table["LO"], table["HI"], table["DIAG"] = (x.to(torch.int32).contiguous() for x in row_intervals(call))
    if call.attn_mask is not None:
        table["KEYMASK"] = call.attn_mask.contiguous()
    if call.alibi_slopes is not None:
        table["SLOPES"] = call.alibi_slopes.contiguous()
    if call.dropout_seed is not None:
        table["SEED"] = call.dropout_seed
    return table


def shared_arguments(call: AttentionCall, table: Table, precision: Precision) -> dict[str, Any]:
    """What most kernels take, by name: addresses of the caller's tensors, numbers, and compile-time constants. Tensors that a call does
    not have are given Q's address, which no kernel reads as them."""
    query, key, value, alpha, spec = table["Q"], table["K"], table["V"], table["A"], call.spec
    heads, q_len, head_dim = query.shape[1:]
    kv_len, head_dim_v = value.shape[2:]
    loaded = "LO" in table
    shift, left, right = (0, OPEN, OPEN) if loaded else _affine(call)
    has_dropout = call.dropout_p > 0
    return {
        **{role: address(table, role) for role in ("Q", "K", "V", "A", "LO", "HI", "DIAG", "SLOPES", "SEED")},
        "KEYMASK": Address("KEYMASK", 0, torch.uint8) if "KEYMASK" in table else address(table, "Q"),
        **strides("q", query),
        **strides("k", key),
        **strides("v", value),
        "mask_batch": q_len if loaded and table["LO"].shape[0] > 1 else 0,
        "keymask_batch": kv_len if "KEYMASK" in table and table["KEYMASK"].shape[0] > 1 else 0,
        "slopes_batch": heads if "SLOPES" in table and table["SLOPES"].ndim == 2 else 0,
        "heads": heads,
        "kv_heads": key.shape[1],
        "group": heads // key.shape[1],
        "q_len": q_len,
        "kv_len": kv_len,
        "q_blocks": -(-q_len // LIST_ROWS),
        "spread": int((key.numel() + value.numel()) * key.element_size() <= CACHE_BYTES),
        "shift": shift,
        "left": left,
        "right": right,
        "scale": float(call.scale),
        "keep_from": threshold(call.dropout_p) if has_dropout else 0,
        "keep_scale": 1 / (1 - call.dropout_p),
        "tol": 1e-5 if query.dtype == torch.float32 else 2e-3,
        # The rest are compile-time constants.
        "ALPHA": _ALPHA_CODES.get(spec.alpha_class, 0 if query.dtype == torch.float32 else _GENERAL_HALF),
        "PRECISION": precision,
        "PER_HEAD": alpha.ndim == 1,
        "E": head_dim,
        "BE": padded(head_dim),
        "EV": head_dim_v,
        "BEV": padded(head_dim_v),
        "BM": LIST_ROWS,
        "LOADED": loaded,
        "HAS_KEYMASK": "KEYMASK" in table,
        "HAS_ALIBI": "SLOPES" in table,
        "HAS_DROPOUT": has_dropout,
        "GRAD": spec.needs_grad,
        "STATS": spec.return_stats,
        "ALPHA_GRAD": spec.alpha_requires_grad,
        "KEEP": spec.needs_grad and not spec.deterministic,
        "MAX_STEPS": MAX_STEPS,
    }  # fmt: skip


def address(table: Table, role: str, instead: str = "Q") -> Address:
    """Where a role's tensor starts; without one, where ``instead`` does."""
    role = role if role in table else instead
    return Address(role, 0, table[role].dtype)


def is_short(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether whole rows of scores stay on chip: then no lists are kept."""
    return key.shape[2] <= short_length(query.shape[3], value.shape[3], query.element_size())


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
    """``x``, or a copy with the same order of heads and rows in memory, whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else layout.conform(x, x)


def output_like(role: str, x: torch.Tensor, last: int | None = None) -> Output:
    """An output of shape (B, H, L, ``last`` or E) in the memory order of ``x``, as ``adasplash_core.layout.empty_like`` decides it."""
    batch, heads, length, size = x.shape
    size = size if last is None else last
    head, row = (1, heads) if x.stride(1) < x.stride(2) else (length, 1)
    return Output(role, (batch, heads, length, size), x.dtype, strides=(heads * length * size, head * size, row * size, 1))


def row_steps(prefix: str, output: Output) -> dict[str, int]:
    """The steps of a dense output from head to head and from row to row, in rows."""
    assert output.strides is not None
    _, head, row, _ = output.strides
    size = max(output.shape[-1], 1)
    return {f"{prefix}_head": head // size, f"{prefix}_row": row // size}


def strides(prefix: str, x: torch.Tensor) -> dict[str, int]:
    batch, head, row, _ = x.stride()
    return {f"{prefix}_batch": batch, f"{prefix}_head": head, f"{prefix}_stride": row}


def padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())
