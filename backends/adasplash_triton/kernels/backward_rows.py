"""Backward, a program per block of 64 query rows: dQ, and over lists dK and dV as well.

With p, u = p^(2-alpha) recomputed from the saved (m, c), in score units (AdaSplash, arXiv 2502.12082, App. A):

    dp = dO V^T          delta = dO . O2,  O2 = U V / sum u          ds = u (dp - delta)
    dQ = scale ds K      dK = scale ds^T Q                           dV = p^T dO

A dropped entry is absent from O2, dp and the p of dV, and stays in u. A block whose support was saved as a list walks the list and
adds to dK and dV by fp32 atomics; the others walk their whole range and leave dK and dV to ``backward_keys``.

d alpha of a row, with L = ln p, g = (e^(-h L) - 1 + h L) / h^2 and S = sum u (Correia et al. 2019, without its cancellation at h = 0):

    -(1/S) sum_j dp_j p_j [ (g_j - G) + h (L_j G - g_j E) ],   G = sum p g,  E = sum p L.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash_triton.kernels.evaluate import listed_keys, mask_listed, range_scores, whole_entries
from adasplash_triton.kernels.primitives import (
    block_of_program,
    block_range,
    dropout_factor,
    edge_tile,
    edge_tiles,
    first_row,
    head_pointer,
    load_rows,
    load_tile,
    log1p_ratio,
    open_rows,
    scores,
    store_rows,
    weights,
)

LENGTHS = ("dq_head", "dq_row", "q_len", "kv_len", "q_blocks", "spread", "shift", "left", "right", "mask_batch", "keymask_batch",
           "slopes_batch", "heads", "group", "keep_from")  # fmt: skip


@triton.jit
def alpha_terms(sums, x, p, dp, m, c, h):
    """Add a tile to (sum p g, sum p L, sum dp p, sum dp p g, sum dp p L, sum u)."""
    y = (x - m[:, None]) * tl.exp(h * c)[:, None]
    some = p > 0.0
    log_p = tl.where(some, log1p_ratio(tl.where(some, y, 0.0), h) - c[:, None], 0.0)
    t = -h * log_p
    # (e^t - 1 - t) / t^2: its series where the quotient cancels.
    series = 0.5 + t * (1.0 / 6 + t * (1.0 / 24 + t * (1.0 / 120 + t * (1.0 / 720 + t * (1.0 / 5040 + t * (1.0 / 40320))))))
    g = log_p * log_p * tl.where(t > 0.5, (tl.exp(t) - 1.0 - t) / tl.where(t > 0.5, t * t, 1.0), series)
    pg, pl, dpp = p * g, p * log_p, dp * p
    return (
        sums[0] + tl.sum(pg, 1),
        sums[1] + tl.sum(pl, 1),
        sums[2] + tl.sum(dpp, 1),
        sums[3] + tl.sum(dpp * g, 1),
        sums[4] + tl.sum(dpp * log_p, 1),
        sums[5] + tl.sum(p * tl.exp(t), 1),
    )


@triton.jit
def score_gradient(x, v, do, delta, m, c, h, rows, keys, head, SEED, keep_from, keep_scale, sums,
                   ALPHA: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALPHA_GRAD: tl.constexpr):  # fmt: skip
    """(ds, p as dV needs it, u, the d alpha sums) of a tile."""
    p, u = weights(x, m[:, None], c[:, None], h, ALPHA)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if HAS_DROPOUT:
        keep = dropout_factor(tl.load(SEED), keep_from, keep_scale, rows[:, None], keys[None, :], head)
        dp = dp * keep
    if ALPHA_GRAD:
        sums = alpha_terms(sums, x, p, dp, m, c, h)
    if HAS_DROPOUT:
        p = p * keep
    # Not merely u * (...): beside a key that does not exist, whatever its memory holds, 0 must stay 0.
    return tl.where(u == 0.0, 0.0, u * (dp - delta[:, None])), p, u, sums


@triton.jit
def add_product(dq, ds, k, ALPHA: tl.constexpr, PRECISION: tl.constexpr):
    """dq + ds K. Sparsemax weighs all keys of the support alike, so over long ones the roundings of ds add up: there ds is taken in two
    parts."""
    high = ds.to(k.dtype)
    dq += tl.dot(high, k, input_precision=PRECISION)
    if ALPHA == 20:
        dq += tl.dot((ds - high.to(tl.float32)).to(k.dtype), k, input_precision=PRECISION)
    return dq


@triton.jit
def add_range_tile(
    dq, uk, rest, total, sums, q, do, keys_ptr, values_ptr, keymask, n, k_stride, v_stride, low, end, lo, hi, diag, delta,
    m, c, h, x_scale, slope, rows, head, SEED, keep_from, keep_scale,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr, BD: tl.constexpr,
    HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ALPHA_GRAD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(ds K, u K, sum ds, sum u, the d alpha sums) with a tile added."""
    x = range_scores(
        q, keys_ptr, keymask, n, k_stride, low, end, lo, hi, diag, x_scale, slope, E, BE, BD,
        HAS_KEYMASK, HAS_ALIBI, PRECISION, EDGE,
    )  # fmt: skip
    v = load_tile(values_ptr, n, v_stride, low, end, EV, BEV, BD, EDGE)
    ds, _, u, sums = score_gradient(
        x, v, do, delta, m, c, h, rows, n + tl.arange(0, BD), head, SEED, keep_from, keep_scale, sums, ALPHA, PRECISION,
        HAS_DROPOUT, ALPHA_GRAD,
    )  # fmt: skip
    k = load_tile(keys_ptr, n, k_stride, low, end, E, BE, BD, EDGE)
    dq = add_product(dq, ds, k, ALPHA, PRECISION)
    uk += tl.dot(u.to(k.dtype), k, input_precision=PRECISION)
    return dq, uk, rest + tl.sum(ds, 1), total + tl.sum(u, 1), sums


@triton.jit(do_not_specialize=LENGTHS)
def backward_rows_kernel(
    Q, K, V, DO, O2, M, C, POOL, BLOCKS, A, LO, HI, DIAG, KEYMASK, SLOPES, SEED, DQ, DK_SUM, DV_SUM, DELTA, DALPHA,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, do_batch, do_head, do_stride, dq_head, dq_row,
    mask_batch, keymask_batch, slopes_batch, heads, group, q_len, kv_len, q_blocks, spread, shift, left, right, scale,
    keep_from, keep_scale,
    ALPHA: tl.constexpr, PER_HEAD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    LOADED: tl.constexpr, HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    LISTS: tl.constexpr, ALPHA_GRAD: tl.constexpr,
):  # fmt: skip
    bh, block = block_of_program(q_blocks, spread)
    b = bh // heads
    head = bh % heads
    keys_ptr = head_pointer(K, bh, heads, group, k_batch, k_head)
    values_ptr = head_pointer(V, bh, heads, group, v_batch, v_head)
    keymask = KEYMASK + b.to(tl.int64) * keymask_batch
    rows, q, h, x_scale, slope, lo, hi, diag = open_rows(
        Q, A, LO, HI, DIAG, SLOPES, bh, block, q_batch, q_head, q_stride, mask_batch, slopes_batch, heads, q_len, kv_len,
        shift, left, right, scale, ALPHA, PER_HEAD, E, BE, BM, LOADED, HAS_ALIBI,
    )  # fmt: skip
    do = load_rows(DO + b.to(tl.int64) * do_batch + head.to(tl.int64) * do_head, rows, do_stride, q_len, EV, BEV, True)
    row_at = bh.to(tl.int64) * q_len
    # Rows that see no key get no gradient: masks are not applied to them where all other rows need none.
    do = tl.where((lo < hi)[:, None], do, 0.0).to(do.dtype)
    o2 = load_rows(O2 + row_at * EV, rows, EV, q_len, EV, BEV, True)
    delta = tl.sum(do.to(tl.float32) * o2.to(tl.float32), 1)
    m = tl.load(M + row_at + rows, mask=rows < q_len, other=0.0)
    c = tl.load(C + row_at + rows, mask=rows < q_len, other=0.0)
    count = -1
    base = tl.zeros((), tl.int64)
    if LISTS:
        entry = BLOCKS + (bh.to(tl.int64) * q_blocks + block) * 2
        base = tl.load(entry).to(tl.int64)
        count = tl.load(entry + 1)
    dq = tl.zeros((BM, BE), tl.float32)
    zero = tl.zeros((BM,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    if LISTS:
        cols = tl.arange(0, BE)
        cols_v = tl.arange(0, BEV)
        kv_at = (b * (heads // group) + head // group).to(tl.int64) * kv_len
        first, last = whole_entries(POOL + base, count, lo, hi, BK)
        ahead = listed_keys(POOL + base, 0, count, BK)
        for j in range(0, count, BK):
            keys = ahead
            ahead = listed_keys(POOL + base, j + BK, count, BK)
            k = load_rows(keys_ptr, keys, k_stride, 0, E, BE, False)
            v = load_rows(values_ptr, keys, v_stride, 0, EV, BEV, False)
            x = scores(q, k, keys, diag, x_scale, slope, HAS_ALIBI, PRECISION)
            x = mask_listed(x, POOL + base, j, count, first, last, lo, hi, BK)
            ds, p, _, sums = score_gradient(
                x, v, do, delta, m, c, h, rows, keys, bh, SEED, keep_from, keep_scale, sums, ALPHA, PRECISION, HAS_DROPOUT,
                ALPHA_GRAD,
            )  # fmt: skip
            ds = ds.to(q.dtype)
            dq += tl.dot(ds, k, input_precision=PRECISION)
            live = (j + tl.arange(0, BK) < count)[:, None]
            at = (kv_at + keys)[:, None]
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
            tl.atomic_add(DK_SUM + at * E + cols[None, :], dk, mask=live & (cols < E)[None, :], sem="relaxed")
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
            tl.atomic_add(DV_SUM + at * EV + cols_v[None, :], dv, mask=live & (cols_v < EV)[None, :], sem="relaxed")
    if count < 0:
        low, mid_start, mid_end, end = block_range(lo, hi, BD)
        # O2 was rounded to the inputs' dtype. Over a handful of keys that is lost in the noise; over thousands with equal weights it is
        # one bias that all of them add up: sum ds is not 0 then, but tells it, and u K takes it out of dQ.
        uk = tl.zeros((BM, BE), tl.float32)
        rest = zero
        total = zero
        for t in range(edge_tiles(low, mid_start, mid_end, end, BD)):
            n = edge_tile(t, low, mid_start, mid_end, BD)
            dq, uk, rest, total, sums = add_range_tile(
                dq, uk, rest, total, sums, q, do, keys_ptr, values_ptr, keymask, n, k_stride, v_stride, low, end, lo, hi, diag, delta,
                m, c, h, x_scale, slope, rows, bh, SEED, keep_from, keep_scale,
                ALPHA, E, BE, EV, BEV, BD, HAS_KEYMASK, HAS_ALIBI, PRECISION, HAS_DROPOUT, ALPHA_GRAD, True,
            )  # fmt: skip
        for n in range(mid_start, mid_end, BD):
            dq, uk, rest, total, sums = add_range_tile(
                dq, uk, rest, total, sums, q, do, keys_ptr, values_ptr, keymask, n, k_stride, v_stride, low, end, lo, hi, diag, delta,
                m, c, h, x_scale, slope, rows, bh, SEED, keep_from, keep_scale,
                ALPHA, E, BE, EV, BEV, BD, HAS_KEYMASK, HAS_ALIBI, PRECISION, HAS_DROPOUT, ALPHA_GRAD, False,
            )  # fmt: skip
        bias = rest / tl.where(total > 0.0, total, 1.0)
        dq -= bias[:, None] * uk
        delta += bias
    some = lo < hi
    dq = tl.where(some[:, None], dq * scale, 0.0)
    dq_at = first_row(b, head, heads, q_len, dq_head)
    store_rows(DQ + dq_at * E, dq.to(DQ.dtype.element_ty), rows, dq_row * E, q_len, E, BE)
    tl.store(DELTA + row_at + rows, delta, mask=rows < q_len)
    if ALPHA_GRAD:
        g_sum, l_sum, dp_p, dp_pg, dp_pl, u_sum = sums
        d_alpha = -(dp_pg - dp_p * g_sum + h * (dp_pl * g_sum - dp_pg * l_sum)) / tl.where(u_sum > 0.0, u_sum, 1.0)
        tl.store(DALPHA + bh.to(tl.int64) * q_blocks + block, tl.sum(tl.where(some, d_alpha, 0.0), 0))
