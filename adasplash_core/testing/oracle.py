"""The oracle: entmax attention in float64, dense and plain, to which every backend is compared.

It shares no code with the backends and none with ``adasplash_core.masking``: masks are dense booleans built from the written rules,
thresholds come from sorting (alpha = 1.5 and 2; Peters et al. 2019, arXiv 1905.05702) or from bisection to the last bit of float64
(any other alpha), and gradients from torch's autograd around one hand-written derivative, that of the transform.

Near alpha = 1 the textbook form p = [(alpha-1) s - tau]^(1/(alpha-1)) loses as many digits as alpha-1 has zeros. With a = alpha - 1,
d_j = max(s) - s_j and L = -ln p_max, which lies in [0, ln n], the same p is

    p_j = exp(log1p(-a d_j e^(aL)) / a - L),      tau = a max(s) - e^(-aL)

and loses none; a -> 0 gives softmax with L = logsumexp(-d). The derivative with respect to alpha has the same trouble and cure:
with u = p^(2-alpha) and x = a ln p (Correia et al. 2019, arXiv 1909.00015, rearranged)

    dp_j/dalpha = u_j (phi_j - sum u phi / sum u),      phi = -(1 - (1-x) e^x) / a^2 = -(ln p)^2 (1/2 + x/3 + x^2/8 + ...)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from adasplash_core import dropout
from adasplash_core.backend import AttentionCall, Gradients

_BISECTIONS = 64  # halvings of [0, ln n]: below the spacing of float64 for every n that fits in memory
_SERIES_BELOW = 0.25  # |x| under which phi is summed as a series
_SERIES_TERMS = 16


class OracleResult(NamedTuple):
    """float64 ``out`` (B, H, R, Ev) and ``tau`` (B, H, R) in z units, int64 ``support`` (B, H, R); R rows, all of Lq unless sampled.

    For alpha = 1 ``tau`` is the log-sum-exp of the scores. Rows that see no key are 0 in all three.
    """

    out: torch.Tensor
    tau: torch.Tensor
    support: torch.Tensor


def attention(call: AttentionCall, rows: torch.Tensor | Sequence[int] | None = None) -> OracleResult:
    """What ``call`` should give.

    Parameters
    ----------
    rows: indices of the query rows to compute, all by default. Memory: about ten times B * H * len(rows) * Lk float64 numbers.
    """
    return Solution(call, rows, requires_grad=False).result


def gradients(call: AttentionCall, grad_out: torch.Tensor, rows: torch.Tensor | Sequence[int] | None = None) -> Gradients:
    """float64 gradients of sum(out * grad_out), in the shapes of the inputs.

    ``alpha`` and ``attn_mask`` are given where ``call.spec`` asks for them. With ``rows``, ``grad_out`` is (B, H, len(rows), Ev)
    and stands for a gradient that is zero in all other rows.
    """
    return Solution(call, rows).gradients(grad_out)[0]


class Solution:
    """The oracle's answer to a call, kept so that gradients can be asked for.

    Attributes
    ----------
    result: output, tau and support of the rows.
    scores: float64 (B, H, R, Lk) with every bias added; -inf where a key is not seen.
    """

    def __init__(
        self, call: AttentionCall, rows: torch.Tensor | Sequence[int] | None = None, requires_grad: bool = True
    ) -> None:
        self.call = call
        self._operands = _Operands.of(call, rows, requires_grad)
        with torch.set_grad_enabled(requires_grad):
            scores, value = _scores(self._operands, call)
            p, tau = _entmax(scores.flatten(0, 2), self._operands.alpha.flatten())
            p, tau = p.view(scores.shape), tau.view(scores.shape[:-1])
            self._out = _dropped(p, self._operands.rows, call) @ value
        self.scores = scores.detach()
        self.result = OracleResult(self._out.detach(), tau.detach(), (p > 0).sum(-1))

    def gradients(self, grad_out: torch.Tensor) -> tuple[Gradients, torch.Tensor]:
        """Gradients, and every row's own part of alpha's, (B, H, R): they may cancel in the sum. May be called again."""
        operands, spec = self._operands, self.call.spec
        wanted = {"query": operands.query, "key": operands.key, "value": operands.value, "alpha": operands.alpha}
        if spec.mask_requires_grad and operands.bias is not None:
            wanted["attn_mask"] = operands.bias
        grads = torch.autograd.grad(
            self._out, tuple(wanted.values()), grad_out.double(), retain_graph=True, materialize_grads=True
        )
        found = dict(zip(wanted, grads, strict=True))
        by_row, alpha = found["alpha"], None
        if spec.alpha_requires_grad:
            alpha = by_row.sum((0, 2)) if self.call.alpha.ndim == 1 else by_row.sum()
        return Gradients(found["query"], found["key"], found["value"], alpha, found.get("attn_mask")), by_row


def transform(x: torch.Tensor, alpha: torch.Tensor | float, dim: int = -1) -> torch.Tensor:
    """alpha-entmax of ``x`` over ``dim``, float64, differentiable once with respect to ``x`` and ``alpha``.

    ``alpha`` is a number or a tensor broadcastable to ``x`` with size 1 in ``dim``. Entries of -inf get 0.
    """
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=x.device)
    while 0 < alpha.ndim < x.ndim:
        alpha = alpha[None]
    x = x.double().movedim(dim, -1)
    alpha = (alpha.movedim(dim, -1) if alpha.ndim else alpha).expand(*x.shape[:-1], 1)
    p, _ = _entmax(x.reshape(-1, x.shape[-1]), alpha.reshape(-1))
    return p.reshape(x.shape).movedim(-1, dim)


def visible(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Which keys the masks let ``rows`` see, an additive mask's -inf apart: bool, (B, H or 1, R, Lk)."""
    batch, kv_len, device = call.query.shape[0], call.key.shape[2], call.query.device
    key = torch.arange(kv_len, device=device)
    seen = torch.ones(batch, 1, len(rows), kv_len, dtype=torch.bool, device=device)
    if call.kv_lengths is not None:
        seen &= (key < call.kv_lengths.view(batch, 1))[:, None, None]
    if call.kv_starts is not None:
        seen &= (key >= call.kv_starts.view(batch, 1))[:, None, None]
    if call.cu_seqlens_q is not None:
        seen &= _same_sequence(call, rows, key)
    distance = key - diagonal(call, rows)[..., None]  # of each key to the right of its row's diagonal
    left, right = call.window
    if call.spec.causal:
        seen = seen & (distance <= 0)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    mask = call.attn_mask
    if call.spec.mask == "key":
        assert mask is not None
        seen = seen & mask[:, None, None, :]
    elif call.spec.mask == "bool":
        assert mask is not None
        seen = seen & _rows_of(mask, rows)
    return seen


def diagonal(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Key position at which each row stands, int64 (B or 1, 1, R): causality, windows and ALiBi count from it."""
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    bottom_right = call.spec.causal_alignment == "bottom_right"
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        place = torch.zeros_like(rows)
        for q_start, q_end, k_start, k_end in _sequences(call):
            first = k_start + ((k_end - k_start) - (q_end - q_start) if bottom_right else 0)
            inside = (rows >= q_start) & (rows < q_end)
            place = torch.where(inside, first + rows - q_start, place)
        return place[None, None]
    if bottom_right:
        lengths = (
            torch.tensor([kv_len], device=rows.device) if call.kv_lengths is None else call.kv_lengths.long().clamp(0, kv_len)
        )
        offset = lengths - q_len
    else:
        offset = torch.as_tensor(call.query_offset, device=rows.device).long().view(-1)
    return (rows + offset[:, None])[:, None]


def _same_sequence(call: AttentionCall, rows: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    same = torch.zeros(len(rows), len(key), dtype=torch.bool, device=rows.device)
    for q_start, q_end, k_start, k_end in _sequences(call):
        same |= ((rows >= q_start) & (rows < q_end))[:, None] & ((key >= k_start) & (key < k_end))
    return same


def _sequences(call: AttentionCall) -> list[tuple[int, int, int, int]]:
    assert call.cu_seqlens_q is not None
    assert call.cu_seqlens_k is not None
    q, k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    return list(zip(q[:-1], q[1:], k[:-1], k[1:], strict=True))


def _rows_of(mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


@dataclass
class _Operands:
    """The tensors of a call in float64, as leaves of a new graph."""

    query: torch.Tensor  # (B, H, Lq, E)
    key: torch.Tensor
    value: torch.Tensor
    alpha: torch.Tensor  # (B, H, R): one for every row, so that rows' gradients can be told apart
    bias: torch.Tensor | None  # the additive mask
    rows: torch.Tensor  # (R,)

    @classmethod
    def of(cls, call: AttentionCall, rows: torch.Tensor | Sequence[int] | None, requires_grad: bool = False) -> _Operands:
        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().double().clone().requires_grad_(requires_grad)

        batch, heads, q_len, _ = call.query.shape
        device = call.query.device
        chosen = torch.arange(q_len, device=device) if rows is None else torch.as_tensor(rows, dtype=torch.int64, device=device)
        alpha = call.alpha.detach().double().clamp(1, 2).view(1, -1, 1).expand(batch, heads, len(chosen))
        bias = leaf(call.attn_mask) if call.spec.mask == "additive" and call.attn_mask is not None else None
        return cls(leaf(call.query), leaf(call.key), leaf(call.value), leaf(alpha), bias, chosen)


def _scores(operands: _Operands, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked scores, and the values (B, H, Lk, Ev) of each query head."""
    rows, kv_len, device = operands.rows, call.key.shape[2], call.query.device
    batch, heads = call.query.shape[:2]
    group = heads // max(call.key.shape[1], 1)
    seen = visible(call, rows).expand(batch, heads, -1, -1)
    unread = ~seen.any(2)  # what such a key holds must not matter, NaN included
    query = operands.query[:, :, rows]
    key = operands.key.repeat_interleave(group, 1).masked_fill(unread[..., None], 0)
    value = operands.value.repeat_interleave(group, 1).masked_fill(unread[..., None], 0)
    scores = call.scale * (query @ key.mT)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.double().expand(batch, heads)[..., None, None]
        distance = (torch.arange(kv_len, device=device) - diagonal(call, rows)[..., None]).abs()
        scores = scores - slopes * distance
    if operands.bias is not None:
        scores = scores + _rows_of(operands.bias, rows)
    return scores.masked_fill(~seen, -torch.inf), value


def _dropped(p: torch.Tensor, rows: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    if call.dropout_p == 0:
        return p
    assert call.dropout_seed is not None
    batch, heads, _, kv_len = p.shape
    head = torch.arange(batch * heads, device=p.device).view(batch, heads, 1, 1)
    kept = dropout.keep(call.dropout_seed, head, rows[:, None], torch.arange(kv_len, device=p.device), call.dropout_p)
    return p * kept / (1 - call.dropout_p)


def _entmax(scores: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, n) scores and (R,) alphas to (R, n) weights, differentiable in both, and (R,) thresholds, which are not."""
    p, tau = _Entmax.apply(scores, alpha)  # type: ignore[no-untyped-call]
    return p, tau


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, tau = _solve(scores, alpha)
        ctx.save_for_backward(p, alpha)
        ctx.mark_non_differentiable(tau)
        return p, tau

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_p: torch.Tensor, _grad_tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, alpha = ctx.saved_tensors
        a = (alpha - 1)[:, None]
        positive = p > 0
        u = torch.where(positive | p.isnan(), p ** (1 - a), 0.0)
        share = u / u.sum(-1, keepdim=True).masked_fill(~positive.any(-1, keepdim=True), 1)
        grad_scores = u * (grad_p - (share * grad_p).sum(-1, keepdim=True))
        phi = torch.where(positive, _phi(torch.where(positive, p, 1.0).log(), a), 0.0)
        grad_alpha = (grad_p * u * (phi - (share * phi).sum(-1, keepdim=True))).sum(-1)
        return grad_scores, grad_alpha


def _phi(log_p: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    x = a * log_p
    small = torch.where(x.abs() < _SERIES_BELOW, x, 0.0)
    series = torch.zeros_like(x)
    for k in range(_SERIES_TERMS, 1, -1):
        series = series * small + (k - 1) / math.factorial(k)
    direct = (1 - (1 - x) * x.exp()) / torch.where(a == 0, 1.0, a) ** 2
    return -torch.where(x.abs() < _SERIES_BELOW, log_p**2 * series, direct)


def _solve(scores: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p, tau = torch.zeros_like(scores), torch.zeros_like(alpha)
    if scores.shape[-1] == 0:
        return p, tau
    some = ~(scores == -torch.inf).all(-1)  # rows with a key; NaN counts as one
    one, half, two = alpha == 1, alpha == 1.5, alpha == 2
    rules = ((_softmax, one), (_by_sorting_15, half), (_by_sorting_2, two), (_by_bisection, ~(one | half | two)))
    for rule, where in rules:
        where = where & some
        if where.any():
            p[where], tau[where] = rule(scores[where], alpha[where, None])
    return p, tau


def _softmax(scores: torch.Tensor, _alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.softmax(-1), scores.logsumexp(-1)


def _by_sorting_15(scores: torch.Tensor, _alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    highest = scores.amax(-1, keepdim=True)
    # tau >= max - 1 in z units, so scores further down than that change nothing, and clamping keeps -inf out of the sums.
    z = ((scores - highest) / 2).clamp(min=-2)
    ordered = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = ordered.cumsum(-1) / k
    mean_square = ordered.square().cumsum(-1) / k
    tau = mean - ((1 - k * (mean_square - mean.square())) / k).clamp(min=0).sqrt()
    count = (tau <= ordered).sum(-1, keepdim=True).clamp(min=1)
    threshold = tau.gather(-1, count - 1)
    return (z - threshold).clamp(min=0).square(), (threshold + highest / 2).squeeze(-1)


def _by_sorting_2(scores: torch.Tensor, _alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    highest = scores.amax(-1, keepdim=True)
    z = (scores - highest).clamp(min=-2)
    ordered = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    tau = (ordered.cumsum(-1) - 1) / k
    count = (tau < ordered).sum(-1, keepdim=True).clamp(min=1)
    threshold = tau.gather(-1, count - 1)
    return (z - threshold).clamp(min=0), (threshold + highest).squeeze(-1)


def _by_bisection(scores: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = alpha - 1
    highest = scores.amax(-1, keepdim=True)
    gap = highest - scores

    def log_ratio(neg_log_top: torch.Tensor) -> torch.Tensor:  # ln (p_j / p_max)
        return torch.log1p(-(a * gap * torch.exp(a * neg_log_top)).clamp(max=1)) / a

    low, high = torch.zeros_like(highest), torch.full_like(highest, math.log(scores.shape[-1]))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_low = log_ratio(middle).exp().sum(-1, keepdim=True) > middle.exp()
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    neg_log_top = (low + high) / 2
    p = (log_ratio(neg_log_top) - neg_log_top).exp()
    return p, (a * highest - torch.exp(-a * neg_log_top)).squeeze(-1)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``exact`` (alone, where ``exact`` is 0); NaN in one and not in the other is inf."""
    actual, exact = actual.detach().double(), exact.detach().double()
    if not torch.equal(actual.isnan(), exact.isnan()):
        return math.inf
    same = (actual == exact) | exact.isnan()  # equal infinities differ by NaN
    difference = torch.where(same, 0.0, actual - exact).norm()
    size = torch.where(exact.isfinite(), exact, 0.0).norm()
    return float(difference / size) if size > 0 else float(difference)


def rounded_ideal(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """The relative error of a computation whose only fault is that it rounds its result to ``dtype``: no bound can be below this."""
    return relative_error(exact.to(dtype), exact)
