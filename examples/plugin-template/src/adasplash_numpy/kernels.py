"""Entmax attention on arrays.

With z = (alpha - 1) * scale * q.k, p = [z - tau]_+ ^ (1 / (alpha - 1)) and sum p = 1. For alpha = 1.5 and 2 the threshold tau
follows from the sorted z (Martins and Astudillo 2016; Peters et al. 2019). Backward, with u = p^(2 - alpha) on the support:

    dS = u * (dP - sum(u * dP) / sum(u)),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO

z and tau are counted from each row's maximum, so that large scores lose no digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    """query (B, H, Lq, E), key (B, H, Lk, E), value (B, H, Lk, Ev); row i of sequence b sees the keys low[b, i] <= j < high[b, i]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    low: np.ndarray  # (B or 1, Lq)
    high: np.ndarray
    sparsemax: bool  # alpha = 2, else 1.5
    scale: float
    rows: int

    def chunks(self) -> Iterator[tuple[int, int, slice, slice]]:
        """(sequence, head, query rows, the keys that any of them sees)."""
        batch, heads, q_len, _ = self.query.shape
        for b in range(batch):
            for start in range(0, q_len, self.rows):
                rows = slice(start, min(start + self.rows, q_len))
                low, high = self._bounds(b, rows)
                seen = high > low
                if seen.any():
                    keys = slice(int(low[seen].min()), int(high[seen].max()))
                    yield from ((b, h, rows, keys) for h in range(heads))

    def z(self, b: int, h: int, rows: slice, keys: slice) -> np.ndarray:
        """z of a chunk less each row's maximum, (rows, keys); -inf where a row does not see a key."""
        low, high = self._bounds(b, rows)
        place = np.arange(keys.start, keys.stop)
        seen = (place >= low[:, None]) & (place < high[:, None])
        with np.errstate(invalid="ignore"):  # NaN and infinity are the business of the row that brings them
            scores = self.query[b, h, rows] @ self.key[b, h, keys].T
            scores *= self.scale if self.sparsemax else self.scale / 2
            scores[~seen] = -np.inf
            top = scores.max(-1, keepdims=True)
            top[top == -np.inf] = 0  # rows without a key
            return scores - top

    def _bounds(self, b: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return self.low[b % len(self.low), rows], self.high[b % len(self.high), rows]


def forward(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """out (B, H, Lq, Ev), and tau (B, H, Lq)."""
    batch, heads, q_len, _ = problem.query.shape
    out = np.zeros((batch, heads, q_len, problem.value.shape[3]), problem.query.dtype)
    tau = np.zeros((batch, heads, q_len), problem.query.dtype)
    for b, h, rows, keys in problem.chunks():
        z = problem.z(b, h, rows, keys)
        tau[b, h, rows] = _threshold(z, problem.sparsemax)
        out[b, h, rows] = _weights(z, tau[b, h, rows], problem.sparsemax) @ problem.value[b, h, keys]
    return out, tau


def backward(problem: Problem, grad_out: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients to query, key and value."""
    grad_query, grad_key, grad_value = (np.zeros(x.shape, x.dtype) for x in (problem.query, problem.key, problem.value))
    for b, h, rows, keys in problem.chunks():
        z = problem.z(b, h, rows, keys)
        p = _weights(z, tau[b, h, rows], problem.sparsemax)
        u = (p > 0).astype(p.dtype) if problem.sparsemax else np.sqrt(p)
        total = u.sum(-1, keepdims=True)
        grad_p = grad_out[b, h, rows] @ problem.value[b, h, keys].T
        mean = (u * grad_p).sum(-1, keepdims=True) / np.where(total > 0, total, 1)
        grad_scores = u * (grad_p - mean) * problem.scale
        grad_query[b, h, rows] = grad_scores @ problem.key[b, h, keys]
        grad_key[b, h, keys] += grad_scores.T @ problem.query[b, h, rows]
        grad_value[b, h, keys] += p.T @ grad_out[b, h, rows]
    return grad_query, grad_key, grad_value


def _threshold(z: np.ndarray, sparsemax: bool) -> np.ndarray:
    """tau of every row, (rows,): the support is the longest prefix of the sorted row whose tau stays below its last z."""
    # Entries at -1 or below have no weight, whatever the rest of the row is; clipping keeps -inf out of the sums.
    ordered = -np.sort(-np.maximum(z.astype(np.float64), -2.0), axis=-1)
    count = np.arange(1, z.shape[-1] + 1)
    mean = ordered.cumsum(-1) / count
    if sparsemax:
        tau = mean - 1 / count
    else:
        spread = (ordered**2).cumsum(-1) / count - mean**2
        tau = mean - np.sqrt(np.maximum(1 / count - spread, 0))
    support = np.maximum((tau < ordered).sum(-1, keepdims=True), 1)
    found = np.take_along_axis(tau, support - 1, -1)[:, 0]
    return np.where(np.isnan(z).any(-1), np.nan, found).astype(z.dtype)


def _weights(z: np.ndarray, tau: np.ndarray, sparsemax: bool) -> np.ndarray:
    above = np.maximum(z - tau[:, None], 0)
    return above if sparsemax else above * above
