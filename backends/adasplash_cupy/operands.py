"""From an :class:`~adasplash_core.backend.AttentionCall` to the caller's tensors by role, and the parameters that all kernels share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.dropout import threshold
from adasplash_core.masking import row_intervals
from adasplash_cupy.instances import ROWS
from adasplash_cupy.program import Address, Output, Table

OPEN = 1 << 30  # a window's open side; the kernels' positions are int32

Values = dict[str, int | float | Address]
"""Fields of ``Params`` by name."""


def inputs_of(call: AttentionCall) -> Table:
    """The caller's tensors by role: q, k, v and alpha as they are, masks as intervals, everything else as kernels read it."""
    table = {"q": call.query, "k": call.key, "v": call.value, "alpha": call.alpha}
    if _needs_arrays(call):
        table["lo"], table["hi"], table["diag"] = (x.to(torch.int32).contiguous() for x in row_intervals(call))
    if call.spec.mask == "key":
        assert call.attn_mask is not None
        table["key_mask"] = call.attn_mask.contiguous().view(torch.uint8)
    if call.alibi_slopes is not None:
        table["slopes"] = call.alibi_slopes.to(torch.float32).contiguous()
    if call.dropout_p > 0:
        assert call.dropout_seed is not None
        table["seed"] = call.dropout_seed
    return table


def converted(table: Table) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The conversions that a program for such tensors does in each call; done here in ``table``."""
    conversions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for role in ("q", "k", "v", "d_out"):
        if role in table and not has_aligned_rows(table[role]):
            conversions[role] = _packed
    if table["alpha"].dtype != torch.float64 or not table["alpha"].is_contiguous():
        conversions["alpha"] = _doubles
    for role, convert in conversions.items():
        table[role] = convert(table[role])
    return conversions


def shared_values(call: AttentionCall, table: Table) -> Values:
    """What most kernels take, of converted tensors."""
    query, key, value = table["q"], table["k"], table["v"]
    batch, heads, q_len, head_dim = query.shape
    values: Values = {
        "batch": batch,
        "heads": heads,
        "group": heads // key.shape[1],
        "q_len": q_len,
        "kv_len": key.shape[2],
        "q_blocks": -(-q_len // ROWS),
        "head_dim": head_dim,
        "head_dim_v": value.shape[3],
        "alpha_head": call.alpha.ndim,
        "keep_scale": 1.0,
        "scale": call.scale,
        "tol": 1e-5 if query.dtype == torch.float32 else 2e-3,
    }
    for role, x in table.items():
        values[role] = Address(role)
        if role in ("q", "k", "v", "d_out"):
            values.update(steps(role, x.stride()))
    if "lo" in table:
        values["mask_batch"] = table["lo"].shape[1] if table["lo"].shape[0] > 1 else 0
    else:
        values.update(zip(("shift", "left", "right"), _affine(call), strict=True))
    if "key_mask" in table:
        mask = table["key_mask"]
        values["key_mask_batch"] = mask.shape[1] if mask.shape[0] > 1 else 0
    if "slopes" in table:
        values["slopes_batch"] = heads if table["slopes"].ndim == 2 else 0
    if call.dropout_p > 0:
        values["keep_from"] = threshold(call.dropout_p)
        values["keep_scale"] = 1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0.0
    return values


def steps(name: str, strides: tuple[int, ...]) -> dict[str, int]:
    """The strides of a 4-d tensor, in elements, by the names of their fields."""
    return {f"{name}_batch": strides[0], f"{name}_head": strides[1], f"{name}_row": strides[2]}


def add_output(values: Values, output: Output) -> Output:
    """Hand over an output by its role's name, a 4-d one that has fields for its strides with them."""
    values[output.role] = Address(output.role)
    if output.role in ("out", "d_q", "d_k", "d_v"):
        values.update(steps(output.role, output.strides))
    return output


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


def has_aligned_rows(x: torch.Tensor) -> bool:
    """Whether rows are contiguous, start at multiples of 16 bytes, which the kernels copy at a time, and lie less than 4 GiB apart."""
    size = x.element_size()
    strides = [stride for stride, length in zip(x.stride()[:-1], x.shape[:-1], strict=True) if length > 1]
    near = x.shape[-2] <= 1 or x.stride(-2) * size < 2**32
    return near and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in strides)


def _packed(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _doubles(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64).contiguous()
