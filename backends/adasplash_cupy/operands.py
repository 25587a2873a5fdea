"""From an :class:`~adasplash_core.backend.AttentionCall` to the parameters that all kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.dropout import threshold
from adasplash_core.masking import row_intervals
from adasplash_cupy.instances import ROWS

OPEN = 1 << 30  # a window's open side; the kernels' positions are int32


@dataclass
class Operands:
    """Tensors as the kernels read them, and ``values`` for :func:`adasplash_cupy.params.pack`.

    ``kept`` holds what the addresses among the values belong to.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    values: dict[str, int | float]
    kept: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, call: AttentionCall) -> Operands:
        query, key, value = (aligned_rows(x) for x in (call.query, call.key, call.value))
        batch, heads, q_len, head_dim = query.shape
        kv_len = key.shape[2]
        found = cls(
            query,
            key,
            value,
            {
                "batch": batch,
                "heads": heads,
                "group": heads // key.shape[1],
                "q_len": q_len,
                "kv_len": kv_len,
                "q_blocks": -(-q_len // ROWS),
                "head_dim": head_dim,
                "head_dim_v": value.shape[3],
                "alpha_head": call.alpha.ndim,
                "keep_scale": 1.0,
                "scale": call.scale,
                "tol": 1e-5 if query.dtype == torch.float32 else 2e-3,
            },
        )
        found.point("alpha", call.alpha.to(torch.float64).contiguous())
        for name, x in (("q", query), ("k", key), ("v", value)):
            found.view(name, x)
        found._masks(call)
        if call.alibi_slopes is not None:
            found.point("slopes", call.alibi_slopes.to(torch.float32).contiguous())
            found.values["slopes_batch"] = heads if call.alibi_slopes.ndim == 2 else 0
        if call.dropout_p > 0:
            assert call.dropout_seed is not None
            found.point("seed", call.dropout_seed)
            found.values["keep_from"] = threshold(call.dropout_p)
            found.values["keep_scale"] = 1 / (1 - call.dropout_p) if call.dropout_p < 1 else 0.0
        return found

    def _masks(self, call: AttentionCall) -> None:
        if _needs_arrays(call):
            lo, hi, diagonal = (x.to(torch.int32).contiguous() for x in row_intervals(call))
            for name, x in (("lo", lo), ("hi", hi), ("diag", diagonal)):
                self.point(name, x)
            self.values["mask_batch"] = lo.shape[1] if lo.shape[0] > 1 else 0
        else:
            self.values.update(zip(("shift", "left", "right"), _affine(call), strict=True))
        if call.spec.mask == "key":
            assert call.attn_mask is not None
            mask = call.attn_mask.contiguous().view(torch.uint8)
            self.point("key_mask", mask)
            self.values["key_mask_batch"] = mask.shape[1] if mask.shape[0] > 1 else 0

    def point(self, name: str, x: torch.Tensor | None) -> None:
        """Hand over a contiguous tensor by its address; None leaves the null pointer."""
        if x is not None:
            self.values[name] = x.data_ptr()
            self.kept.append(x)

    def view(self, name: str, x: torch.Tensor) -> None:
        """Hand over a 4-d tensor with its strides."""
        self.point(name, x)
        for axis, stride in zip(("batch", "head", "row"), x.stride(), strict=False):
            self.values[f"{name}_{axis}"] = stride


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


def _affine(call: AttentionCall) -> Sequence[int]:
    """(shift, left, right) with row i seeing max(0, i + shift - left) <= j < min(Lk, i + shift + right + 1)."""
    assert isinstance(call.query_offset, int)
    left, right = call.window
    if call.spec.causal:
        right = 0 if right < 0 else min(right, 0)
    shift = call.key.shape[2] - call.query.shape[2] if call.spec.causal_alignment == "bottom_right" else call.query_offset
    return shift, OPEN if left < 0 else min(left, OPEN), OPEN if right < 0 else min(right, OPEN)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where its rows are contiguous and start at multiples of 16 bytes, which the kernels copy at a time; else a copy."""
    size = x.element_size()
    steps = [stride for stride, length in zip(x.stride()[:-1], x.shape[:-1], strict=True) if length > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)
