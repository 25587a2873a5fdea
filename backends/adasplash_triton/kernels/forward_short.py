"""Forward for short sequences: all scores of a block of rows on chip, one launch.

    x = Q K^T scores as TILES register tiles (BM, BT)   ->   m, c by Newton over the tiles   ->   O = P V / sum p,  O2 = U V / sum u

Tiles that no row of the block sees (a causal mask's upper half) are neither loaded nor visited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash_triton.kernels.primitives import (
    block_range,
    dropout_factor,
    first_c,
    head_pointer,
    load_tile,
    newton_step,
    open_rows,
    residual_after,
    scores,
    store_result,
    visible,
    weights,
)

LENGTHS = ("out_head", "out_row", "q_len", "kv_len", "q_blocks", "shift", "left", "right", "mask_batch", "keymask_batch",
           "slopes_batch", "heads", "group", "keep_from")  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def forward_short_kernel(
    Q, K, V, OUT, O2, M, C, TAU, SUPPORT, A, LO, HI, DIAG, KEYMASK, SLOPES, SEED,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, out_head, out_row,
    mask_batch, keymask_batch, slopes_batch, heads, group, q_len, kv_len, q_blocks, shift, left, right, scale,
    keep_from, keep_scale, tol,
    ALPHA: tl.constexpr, PER_HEAD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr, MAX_STEPS: tl.constexpr,
    LOADED: tl.constexpr, HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    GRAD: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % q_blocks
    bh = tl.program_id(0) // q_blocks
    keys_ptr = head_pointer(K, bh, heads, group, k_batch, k_head)
    values_ptr = head_pointer(V, bh, heads, group, v_batch, v_head)
    keymask = KEYMASK + (bh // heads).to(tl.int64) * keymask_batch
    rows, q, h, x_scale, slope, lo, hi, diag = open_rows(
        Q, A, LO, HI, DIAG, SLOPES, bh, block, q_batch, q_head, q_stride, mask_batch, slopes_batch, heads, q_len, kv_len,
        shift, left, right, scale, ALPHA, PER_HEAD, E, BE, BM, LOADED, HAS_ALIBI,
    )  # fmt: skip
    low, mid_start, mid_end, end = block_range(lo, hi, BT)
    # All of K is on its way before the first product, all of V before the first that needs it.
    loaded = ()
    for i in tl.static_range(TILES):
        loaded = loaded + (load_tile(keys_ptr, i * BT, k_stride, low, end, E, BE, BT, True),)  # noqa: RUF005
    # Entries are summed over tiles first and along rows once: a reduction along rows takes barriers.
    tiles = ()
    tops = tl.full((BM, BT), float("-inf"), tl.float32)
    for i in tl.static_range(TILES):
        x = tl.full((BM, BT), float("-inf"), tl.float32)
        if (low < (i + 1) * BT) & (end > i * BT):
            keys = i * BT + tl.arange(0, BT)
            x = scores(q, loaded[i], keys, diag, x_scale, slope, HAS_ALIBI, PRECISION)
            if (mid_start > i * BT) | (mid_end < (i + 1) * BT):
                x = tl.where(visible(keys[None, :], lo[:, None], hi[:, None]), x, float("-inf"))
            if HAS_KEYMASK:
                x = tl.where((tl.load(keymask + keys, mask=keys < end, other=0) != 0)[None, :], x, float("-inf"))
        tops = tl.maximum(tops, x)
        tiles = tiles + (x,)  # noqa: RUF005
    m = tl.max(tops, 1)
    m = tl.where(m == float("-inf"), 0.0, m)
    below = ()  # x - m, so that the steps need not subtract again
    for i in tl.static_range(TILES):
        below = below + (tiles[i] - m[:, None],)  # noqa: RUF005

    zeros = tl.zeros((BM, BT), tl.float32)
    c = first_c(h, m, ALPHA)
    c_before = c
    s_before = tl.zeros_like(c)
    row_keys = (hi - lo).to(tl.float32)
    steps = 0
    residual = 1.0
    while (residual > tol) & (steps < MAX_STEPS):
        ps = zeros
        us = zeros
        for i in tl.static_range(TILES):
            if (low < (i + 1) * BT) & (end > i * BT):
                p, u = weights(below[i], 0.0, c[:, None], h, ALPHA)
                ps += p
                us += u
        f = tl.sum(ps, 1)
        s = tl.sum(us, 1)
        new = newton_step(c, f, s, h, ALPHA)
        residual = tl.max(tl.where(lo < hi, residual_after(c, new, f, s, c_before, s_before, row_keys, ALPHA, STATS), 0.0), 0)
        c_before = c
        s_before = s
        c = new
        steps += 1

    loaded = ()
    for i in tl.static_range(TILES):
        loaded = loaded + (load_tile(values_ptr, i * BT, v_stride, low, end, EV, BEV, BT, True),)  # noqa: RUF005
    o = tl.zeros((BM, BEV), tl.float32)
    o2 = tl.zeros((BM, BEV), tl.float32)
    ps = zeros
    us = zeros
    support = tl.zeros((BM,), tl.int32)
    for i in tl.static_range(TILES):
        if (low < (i + 1) * BT) & (end > i * BT):
            p, u = weights(below[i], 0.0, c[:, None], h, ALPHA)
            ps += p
            us += u
            if STATS:
                support += tl.sum((p > 0.0).to(tl.int32), 1)
            if HAS_DROPOUT:
                keep = dropout_factor(
                    tl.load(SEED), keep_from, keep_scale, rows[:, None], (i * BT + tl.arange(0, BT))[None, :], bh
                )
                p = p * keep
                u = u * keep
            v = loaded[i]
            o += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            if GRAD:
                o2 += tl.dot(u.to(v.dtype), v, input_precision=PRECISION)
    sum_p = tl.sum(ps, 1)
    sum_u = tl.sum(us, 1)
    store_result(
        OUT, O2, M, C, TAU, SUPPORT, q, o, o2, sum_p, sum_u, support, m, c, h, lo, hi, rows, bh, heads, q_len, out_head, out_row,
        ALPHA, EV, BEV, GRAD, STATS,
    )  # fmt: skip
