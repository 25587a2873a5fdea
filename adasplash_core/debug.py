"""``ADASPLASH_DEBUG=1``: check values that live on a device, which costs a host sync a call. Without it kernels clamp them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from adasplash_core.errors import DebugCheckError

if TYPE_CHECKING:
    from adasplash_core.call import Arguments

VARIABLE = "ADASPLASH_DEBUG"


def enabled() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


def check_values(args: Arguments) -> None:
    """Raise DebugCheckError for a tensor alpha, lengths or cumulative lengths out of range."""
    kv_len = args.key.shape[2]
    alpha = args.alpha.detach()
    _check("alpha must be at least 1 and at most 2.", alpha, (alpha >= 1) & (alpha <= 2))
    for name, values in (("kv_lengths", args.kv_lengths), ("kv_starts", args.kv_starts)):
        if values is not None:
            _check(f"{name} must be from 0 to the key length {kv_len}.", values, (values >= 0) & (values <= kv_len))
    for name, cumulative, total, longest in (
        ("cu_seqlens_q", args.cu_seqlens_q, args.query.shape[2], args.max_seqlen_q),
        ("cu_seqlens_k", args.cu_seqlens_k, kv_len, args.max_seqlen_k),
    ):
        if cumulative is not None:
            steps = cumulative.diff()
            _check(
                f"{name} must rise from 0 to the total length {total}.",
                cumulative[[0, -1]],
                cumulative[[0, -1]] == cumulative.new_tensor([0, total]),
            )
            rule = f"{name} must rise by 0 to max_seqlen_{name[-1]} = {longest} at each step."
            _check(rule, steps, (steps >= 0) & (steps <= longest))


def _check(rule: str, values: torch.Tensor, good: torch.Tensor) -> None:
    if not bool(good.all()):
        bad = values.reshape(-1)[~good.reshape(-1)][:5].tolist()
        raise DebugCheckError(rule, seen=f"{bad}{' (first five)' if len(bad) == 5 else ''}")
