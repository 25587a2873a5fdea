"""Exact entmax of a block of rows over all keys of its range: for rows that are not sparse.

``solve_range`` takes a pass over the keys for each Newton step, after some over a sample of them, ``output_range`` one for the output.
"""

import triton
import triton.language as tl

from adasplash_triton.kernels.evaluate import evaluate_range, range_scores
from adasplash_triton.kernels.primitives import (
    dropout_factor,
    edge_tile,
    edge_tiles,
    load_tile,
    newton_step,
    residual_after,
    weights,
)

ESTIMATED_TILES = tl.constexpr(16)
"""Middles of fewer tiles are not estimated: four are looked at, and of long ones every sixteenth."""


@triton.jit
def estimate_range(
    q, K, KEYMASK, k_stride, lo, hi, diag, m, c, h, x_scale, slope, low, mid_start, mid_end, end,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c near the solution, on either side of it, from the lower bound c: Newton on sums over the edges and some tiles of the middle.

    Sums are zero at the greatest of the scores looked at, and a step ends below it: every row keeps a key above its threshold.
    """
    tiles = (mid_end - mid_start) // BN
    if tiles >= ESTIMATED_TILES:
        step = tl.minimum(tiles // 4, 16)
        live = tl.sum((lo < hi).to(tl.float32), 0)
        bound = c
        steps = 0
        off = 1.0
        while (off > 0.1) & (steps < 6):
            f, s, _, _ = evaluate_range(
                q, K, KEYMASK, k_stride, lo, hi, diag, m, c, h, x_scale, slope, low, mid_start, mid_end, end, step,
                ALPHA, E, BE, BM, BN, HAS_KEYMASK, HAS_ALIBI, PRECISION, True, False, True, True,
            )  # fmt: skip
            c = tl.minimum(newton_step(c, f, s, h, ALPHA), bound)
            off = tl.sum(tl.where((lo < hi) & (s > 0.0), tl.abs(f - 1.0), 0.0), 0) / live
            steps += 1
    return c


@triton.jit
def solve_range(
    q, K, KEYMASK, k_stride, lo, hi, diag, m, c, h, x_scale, slope, low, mid_start, mid_end, end, tol, max_steps,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """c to a residual of at most ``tol`` from the lower bound c of tau; m need only be near the row max."""
    row_keys = (hi - lo).to(tl.float32)
    if ALPHA >= 15:
        c = estimate_range(
            q, K, KEYMASK, k_stride, lo, hi, diag, m, c, h, x_scale, slope, low, mid_start, mid_end, end,
            ALPHA, E, BE, BM, BN, HAS_KEYMASK, HAS_ALIBI, PRECISION,
        )  # fmt: skip
    c_before = c
    s_before = tl.zeros_like(c)
    steps = 0
    residual = 1.0
    while (residual > tol) & (steps < max_steps):
        f, s, _, _ = evaluate_range(
            q, K, KEYMASK, k_stride, lo, hi, diag, m, c, h, x_scale, slope, low, mid_start, mid_end, end, 1,
            ALPHA, E, BE, BM, BN, HAS_KEYMASK, HAS_ALIBI, PRECISION, True, False, True,
        )  # fmt: skip
        new = tl.where(lo < hi, newton_step(c, f, s, h, ALPHA), c)
        residual = tl.max(tl.where(lo < hi, residual_after(c, new, f, s, c_before, s_before, row_keys, ALPHA, STATS), 0.0), 0)
        c_before = c
        s_before = s
        c = new
        steps += 1
    return c


@triton.jit
def output_range_tile(
    q, K, V, KEYMASK, n, k_stride, v_stride, low, end, lo, hi, diag, m, c, h, x_scale, slope,
    o, o2, sum_p, sum_u, support, rows, head, SEED, keep_from, keep_scale,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr, BN: tl.constexpr,
    HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, GRAD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    x = range_scores(
        q, K, KEYMASK, n, k_stride, low, end, lo, hi, diag, x_scale, slope, E, BE, BN, HAS_KEYMASK, HAS_ALIBI, PRECISION, EDGE
    )
    v = load_tile(V, n, v_stride, low, end, EV, BEV, BN, EDGE)
    p, u = weights(x, m[:, None], c[:, None], h, ALPHA)
    sum_p += tl.sum(p, 1)
    sum_u += tl.sum(u, 1)
    support += tl.sum((p > 0.0).to(tl.int32), 1)
    if HAS_DROPOUT:
        keep = dropout_factor(tl.load(SEED), keep_from, keep_scale, rows[:, None], (n + tl.arange(0, BN))[None, :], head)
        p = p * keep
        u = u * keep
    o += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    if GRAD:
        o2 += tl.dot(u.to(v.dtype), v, input_precision=PRECISION)
    return o, o2, sum_p, sum_u, support


@triton.jit
def output_range(
    q, K, V, KEYMASK, k_stride, v_stride, lo, hi, diag, m, c, h, x_scale, slope, low, mid_start, mid_end, end,
    rows, head, SEED, keep_from, keep_scale,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """(O sum p, O2 sum u, sum p, sum u, support)."""
    o = tl.zeros((BM, BEV), tl.float32)
    o2 = tl.zeros((BM, BEV), tl.float32)
    sum_p = tl.zeros((BM,), tl.float32)
    sum_u = tl.zeros((BM,), tl.float32)
    support = tl.zeros((BM,), tl.int32)
    for t in range(edge_tiles(low, mid_start, mid_end, end, BN)):
        n = edge_tile(t, low, mid_start, mid_end, BN)
        o, o2, sum_p, sum_u, support = output_range_tile(
            q, K, V, KEYMASK, n, k_stride, v_stride, low, end, lo, hi, diag, m, c, h, x_scale, slope, o, o2, sum_p, sum_u, support,
            rows, head, SEED, keep_from, keep_scale, ALPHA, E, BE, EV, BEV, BN, HAS_KEYMASK, HAS_ALIBI, PRECISION,
            HAS_DROPOUT, GRAD, True,
        )  # fmt: skip
    for n in range(mid_start, mid_end, BN):
        o, o2, sum_p, sum_u, support = output_range_tile(
            q, K, V, KEYMASK, n, k_stride, v_stride, low, end, lo, hi, diag, m, c, h, x_scale, slope, o, o2, sum_p, sum_u, support,
            rows, head, SEED, keep_from, keep_scale, ALPHA, E, BE, EV, BEV, BN, HAS_KEYMASK, HAS_ALIBI, PRECISION,
            HAS_DROPOUT, GRAD, False,
        )  # fmt: skip
    return o, o2, sum_p, sum_u, support
