"""alpha-entmax over the last dimension of any tensor, in chunks of rows."""

from __future__ import annotations

import math

import torch

from adasplash_torch.entries import find_entries
from adasplash_torch.solver import Rule, rule_for, ties_at_infinity
from adasplash_torch.tiles import host_reads_are_free

_CHUNK = 1 << 20  # values worked on at a time
_GROUP = 16
_ITERATIONS = 32


def transform_forward(x: torch.Tensor, alpha: torch.Tensor, alpha_class: str) -> torch.Tensor:
    """alpha-entmax of ``x`` (..., n) over its last dimension, in its dtype (float16 and bfloat16 are computed in float32).

    ``alpha`` is () or broadcastable to ``x`` with size 1 in the last dimension, clamped to [1, 2]. Entries of -inf get 0, rows with
    nothing else are 0, entries of +inf share the row's weight, and NaN fills its row.
    """
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    n = x.shape[-1]
    on_host = host_reads_are_free(x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    number = _number(alpha, alpha_class, on_host)
    rows = x.reshape(-1, n)
    alphas = alpha.expand(*x.shape[:-1], 1).reshape(-1, 1)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK // n) if on_host else len(rows)
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        rule = rule_for(number if number is not None else alphas[chunk], dtype, early_stop=on_host)
        scores = rows[chunk].to(dtype)
        _chunk(scores, rule, on_host and not rule.is_dense() and n >= 8 * _GROUP, out[chunk])
    return out.view(x.shape)


def _number(alpha: torch.Tensor, alpha_class: str, on_host: bool) -> float | None:
    """The one alpha of all rows, where the host may know it."""
    known = {"1": 1.0, "1.5": 1.5, "2": 2.0}.get(alpha_class)
    if known is not None:
        return known
    if on_host and bool((alpha == alpha.flatten()[0]).all()):
        return float(alpha.flatten()[0])
    return None


def _chunk(scores: torch.Tensor, rule: Rule, look_for_entries: bool, out: torch.Tensor) -> None:
    row_max = scores.amax(-1, keepdim=True)
    poisoned, infinite = row_max.isnan(), row_max == math.inf
    if not look_for_entries or not bool(row_max.isfinite().all()):
        row_max = torch.where(row_max.isfinite(), row_max, 0.0)
        drop = row_max - torch.where(infinite, ties_at_infinity(scores), scores)
        drop.masked_fill_(poisoned, math.inf)
        peak = rule.solve(drop, _ITERATIONS).peak
        out.copy_(rule.weights(drop, peak, out=drop).masked_fill_(poisoned, math.nan))
        return
    columns = scores.shape[-1]
    scores = torch.nn.functional.pad(scores, (0, -columns % _GROUP), value=-math.inf)
    group_max = scores.view(len(scores), _GROUP, -1).amax(1)
    reach = rule.bound(row_max - group_max, steps=3)
    entries = find_entries(scores, row_max, group_max, reach, dense_above=0.4)
    if entries is None:
        drop = row_max - scores[:, :columns]
        peak = rule.solve(drop, _ITERATIONS, reach).peak
        out.copy_(rule.weights(drop, peak, out=drop))
        return
    peak = rule.solve(entries.padded(), _ITERATIONS, reach).peak
    p = rule.weights(entries.drop, peak[entries.row, 0], out=torch.empty_like(entries.drop))
    out.zero_()[entries.row, entries.column] = p.to(out.dtype)
