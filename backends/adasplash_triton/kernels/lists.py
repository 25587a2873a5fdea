"""Exact entmax of a block of rows over a list of keys that holds all of their supports.

``sweep``    sums a Newton step over the list and marks the entries above the threshold that it starts from; the rest may go.
``on_chip``  for short lists: the score tile stays in registers, so K is gathered once and V once.
``solve_list`` and ``output_list``: for longer ones, a pass over the list for each Newton step and one for the output.

``on_chip`` and ``output_list`` find the keys that at least one row really weighs, which are what the backward walks.
"""

import triton
import triton.language as tl

from adasplash_triton.kernels.columns import any_not_negative, fold_sums, raw_scores, raw_units
from adasplash_triton.kernels.evaluate import (
    any_row,
    evaluate_list,
    listed_keys,
    mark_listed,
    mask_listed,
    solve_tile,
)
from adasplash_triton.kernels.primitives import (
    allocate,
    dropout_factor,
    load_rows,
    newton_step,
    residual_after,
    scores,
    threshold,
    visible,
    weights,
)


@triton.jit
def sweep(
    q, K, LIST, count, first, last, k_stride, lo, hi, diag, m, c, margin, h, x_scale, slope,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(sum p, sum u), each (BM,), at (m, c), which must lie at or below the solution. Marks the entries above that threshold."""
    q_t, bias, inverse, size = raw_units(q, x_scale, slope)
    t_raw = tl.where(lo < hi, (threshold(m, c, h, ALPHA) - margin) * inverse, float("inf"))
    f = tl.zeros((GROUPS, 8, BM), tl.float32)
    s = tl.zeros((GROUPS, 8, BM), tl.float32)
    ahead = listed_keys(LIST, 0, count, BK)
    for j in range(0, count, BK):
        keys = ahead
        ahead = listed_keys(LIST, j + BK, count, BK)
        k = load_rows(K, keys, k_stride, 0, E, BE, False)
        raw = raw_scores(k, q_t, keys, diag, bias, HAS_ALIBI, PRECISION)
        if (j < first) | (j + BK > last):
            again = listed_keys(LIST, j, count, BK)
            inside = (j + tl.arange(0, BK) < count)[:, None]
            raw = tl.where(visible(again[:, None], lo[None, :], hi[None, :]) & inside, raw, float("-inf"))
        mark_listed(LIST, keys, tl.reshape(any_not_negative(raw - t_raw[None, :], BK, 1, BM), (BK,)) != 0, j, count, BK)
        p, u = weights(raw * size, m[None, :], c[None, :], h, ALPHA)
        f += fold_sums(p, GROUPS)
        s += fold_sums(u, GROUPS)
    tl.debug_barrier()
    return tl.sum(tl.sum(f, 0), 0), tl.sum(tl.sum(s, 0), 0)


@triton.jit
def solve_list(
    q, K, LIST, count, first, last, k_stride, lo, hi, diag, m, c, c_before, s_before, h, x_scale, slope, tol, max_steps,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """c to a residual of at most ``tol``; s_before: sum u at c_before, from where the last step came."""
    row_keys = tl.minimum(hi - lo, count).to(tl.float32)
    steps = 0
    residual = 1.0
    while (residual > tol) & (steps < max_steps):
        f, s = evaluate_list(
            q, K, LIST, count, first, last, k_stride, lo, hi, diag, m, c, h, x_scale, slope, ALPHA, E, BE, BM, BK,
            HAS_ALIBI, PRECISION,
        )  # fmt: skip
        new = newton_step(c, f, s, h, ALPHA)
        residual = tl.max(tl.where(lo < hi, residual_after(c, new, f, s, c_before, s_before, row_keys, ALPHA, STATS), 0.0), 0)
        c_before = c
        s_before = s
        c = new
        steps += 1
    return c


@triton.jit
def output_list(
    q, K, V, LIST, count, first, last, k_stride, v_stride, lo, hi, diag, m, c, h, x_scale, slope,
    rows, head, SEED, keep_from, keep_scale,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """(O sum p, O2 sum u, sum p, sum u, support). Marks the entries that some row weighs."""
    o = tl.zeros((BM, BEV), tl.float32)
    o2 = tl.zeros((BM, BEV), tl.float32)
    sum_p = tl.zeros((BM,), tl.float32)
    sum_u = tl.zeros((BM,), tl.float32)
    support = tl.zeros((BM,), tl.int32)
    ahead = listed_keys(LIST, 0, count, BK)
    for j in range(0, count, BK):
        keys = ahead
        ahead = listed_keys(LIST, j + BK, count, BK)
        k = load_rows(K, keys, k_stride, 0, E, BE, False)
        v = load_rows(V, keys, v_stride, 0, EV, BEV, False)
        x = scores(q, k, keys, diag, x_scale, slope, HAS_ALIBI, PRECISION)
        x = mask_listed(x, LIST, j, count, first, last, lo, hi, BK)
        p, u = weights(x, m[:, None], c[:, None], h, ALPHA)
        sum_p += tl.sum(p, 1)
        sum_u += tl.sum(u, 1)
        support += tl.sum((p > 0.0).to(tl.int32), 1)
        if GRAD:
            mark_listed(LIST, keys, any_row(u != 0.0) != 0, j, count, BK)
        if HAS_DROPOUT:
            keep = dropout_factor(tl.load(SEED), keep_from, keep_scale, rows[:, None], keys[None, :], head)
            p = p * keep
            u = u * keep
        o += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        if GRAD:
            o2 += tl.dot(u.to(v.dtype), v, input_precision=PRECISION)
    return o, o2, sum_p, sum_u, support


@triton.jit
def on_chip(
    q, K, V, LIST, count, k_stride, v_stride, lo, hi, diag, h, x_scale, slope, tol, max_steps, rows, head, SEED, keep_from, keep_scale,
    POOL, POOL_TOP, pool_size,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr, GRAD: tl.constexpr, KEEP: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    """(O sum p, O2 sum u, sum p, sum u, support, m, c, base, kept) of a list of at most BS keys. With ``KEEP`` the ``kept`` keys that
    some row weighs stand in the pool from ``base`` on; -1 if it is full."""
    keys = listed_keys(LIST, 0, count, BS)
    k = load_rows(K, keys, k_stride, 0, E, BE, False)
    x = scores(q, k, keys, diag, x_scale, slope, HAS_ALIBI, PRECISION)
    x = mask_listed(x, LIST, 0, count, 1, 0, lo, hi, BS)
    m, c = solve_tile(x, count, h, tol, max_steps, ALPHA, STATS)
    v = load_rows(V, keys, v_stride, 0, EV, BEV, False)
    p, u = weights(x, m[:, None], c[:, None], h, ALPHA)
    sum_p = tl.sum(p, 1)
    sum_u = tl.sum(u, 1)
    support = tl.sum((p > 0.0).to(tl.int32), 1)
    base = tl.zeros((), tl.int64)
    kept = -1
    if KEEP:
        hit = tl.where(tl.arange(0, BS) < count, any_row(u != 0.0), 0)
        kept = tl.sum(hit, 0)
        base = allocate(POOL_TOP, kept, pool_size)
        if base < 0:
            base = tl.zeros((), tl.int64)
            kept = -1
        else:
            tl.store(POOL + base + tl.cumsum(hit, 0) - 1, keys, mask=hit != 0)
    if HAS_DROPOUT:
        keep = dropout_factor(tl.load(SEED), keep_from, keep_scale, rows[:, None], keys[None, :], head)
        p = p * keep
        u = u * keep
    o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    if GRAD:
        o2 = tl.dot(u.to(v.dtype), v, input_precision=PRECISION)
    else:
        o2 = tl.zeros((BM, BEV), tl.float32)
    return o, o2, sum_p, sum_u, support, m, c, base, kept
