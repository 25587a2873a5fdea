"""Forward, second pass: exact tau, O and O2 of the blocks of rows that have a list.

A long list is swept first, perhaps several times: the keys found while T was still rising drop out, and T takes a Newton step. A list
that fits is then solved with its scores on chip, a longer one with a pass over it for each step; one that still holds most of the keys
is left to ``forward_dense``. The keys that some row really weighs are kept for the backward, as long as the pool has room.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash_triton.kernels.evaluate import collect_marked, count_marked, whole_entries
from adasplash_triton.kernels.lists import on_chip, output_list, solve_list, sweep
from adasplash_triton.kernels.primitives import (
    allocate,
    block_of_program,
    block_range,
    head_pointer,
    newton_step,
    open_rows,
    start_of_row,
    store_result,
    threshold,
)

LENGTHS = ("out_head", "out_row", "q_len", "kv_len", "q_blocks", "spread", "pool_size", "shift", "left", "right", "mask_batch",
           "slopes_batch", "heads", "group", "keep_from")  # fmt: skip
LONG_TILES = tl.constexpr(12)
"""Lists of more tiles are swept again."""


@triton.jit(do_not_specialize=LENGTHS)
def forward_lists_kernel(
    Q, K, V, OUT, O2, M, C, TAU, SUPPORT, A, LO, HI, DIAG, SLOPES, SEED, T, MARGIN, ROW_MAX, LISTS, ENTRIES, POOL, POOL_TOP, BLOCKS,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, out_head, out_row,
    mask_batch, slopes_batch, heads, group, q_len, kv_len, q_blocks, spread, pool_size, shift, left, right, scale,
    keep_from, keep_scale, tol,
    ALPHA: tl.constexpr, PER_HEAD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, DENSE_PERCENT: tl.constexpr, LEAST: tl.constexpr, SWEEPS: tl.constexpr,
    LIST_GROUPS: tl.constexpr, MAX_STEPS: tl.constexpr,
    LOADED: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    GRAD: tl.constexpr, STATS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    bh, block = block_of_program(q_blocks, spread)
    at = (bh.to(tl.int64) * q_blocks + block) * 2
    count = tl.load(ENTRIES + at + 1)
    kept = -1
    base = tl.zeros((), tl.int64)
    if count >= 0:
        keys_ptr = head_pointer(K, bh, heads, group, k_batch, k_head)
        values_ptr = head_pointer(V, bh, heads, group, v_batch, v_head)
        rows, q, h, x_scale, slope, lo, hi, diag = open_rows(
            Q, A, LO, HI, DIAG, SLOPES, bh, block, q_batch, q_head, q_stride, mask_batch, slopes_batch, heads, q_len, kv_len,
            shift, left, right, scale, ALPHA, PER_HEAD, E, BE, BM, LOADED, HAS_ALIBI,
        )  # fmt: skip
        list_ = LISTS + tl.load(ENTRIES + at)
        m = tl.zeros((BM,), tl.float32)
        c = m
        c_before = m
        s = m
        if count > BS:
            row_at = bh.to(tl.int64) * q_len + rows
            margin = tl.load(MARGIN + row_at, mask=rows < q_len, other=0.0)
            m, c = start_of_row(T, ROW_MAX, row_at, rows < q_len, h, ALPHA)
            sweeps = 0
            worth = count > BS
            while worth & (sweeps < SWEEPS):
                before = count
                first, last = whole_entries(list_, count, lo, hi, BK)
                f, s = sweep(
                    q, keys_ptr, list_, count, first, last, k_stride, lo, hi, diag, m, c, margin, h, x_scale, slope,
                    ALPHA, E, BE, BM, BK, LIST_GROUPS, HAS_ALIBI, PRECISION,
                )  # fmt: skip
                count = collect_marked(list_, count, list_, 1024)
                c_before = c
                c = tl.where((f > 1.0) & (f < float("inf")), newton_step(c, f, s, h, ALPHA), c)
                sweeps += 1
                # What a long list keeps costs the passes over all keys. A shorter one is better solved, unless it may come to fit.
                fits_soon = (count <= 2 * BS) & (count * 8 <= before * 7)
                worth = (count > BS) & ((count > LONG_TILES * BK) | fits_soon)
            low, _, _, end = block_range(lo, hi, 1)
            if count > tl.maximum((end - low) // 100 * DENSE_PERCENT, LEAST):
                tl.store(ENTRIES + at + 1, -1)
                if ALPHA >= 15:  # as far as the sweeps came, for the passes over all keys
                    tl.store(T + row_at, threshold(m, c, h, ALPHA), mask=rows < q_len)
                count = -1
        if count >= 0:
            if count <= BS:
                o, o2, sum_p, sum_u, support, m, c, base, kept = on_chip(
                    q, keys_ptr, values_ptr, list_, count, k_stride, v_stride, lo, hi, diag, h, x_scale, slope, tol, MAX_STEPS,
                    rows, bh, SEED, keep_from, keep_scale, POOL, POOL_TOP, pool_size,
                    ALPHA, E, BE, EV, BEV, BM, BS, HAS_ALIBI, PRECISION, HAS_DROPOUT, GRAD, KEEP, STATS,
                )  # fmt: skip
            else:
                first, last = whole_entries(list_, count, lo, hi, BK)
                c = solve_list(
                    q, keys_ptr, list_, count, first, last, k_stride, lo, hi, diag, m, c, c_before, s, h, x_scale, slope, tol,
                    MAX_STEPS, ALPHA, E, BE, BM, BK, HAS_ALIBI, PRECISION, STATS,
                )  # fmt: skip
                o, o2, sum_p, sum_u, support = output_list(
                    q, keys_ptr, values_ptr, list_, count, first, last, k_stride, v_stride, lo, hi, diag, m, c, h, x_scale, slope,
                    rows, bh, SEED, keep_from, keep_scale, ALPHA, E, BE, EV, BEV, BM, BK, HAS_ALIBI, PRECISION, HAS_DROPOUT, GRAD,
                )  # fmt: skip
                if KEEP:
                    tl.debug_barrier()
                    kept = count_marked(list_, count, 1024)
                    base = allocate(POOL_TOP, kept, pool_size)
                    if base < 0:
                        base = tl.zeros((), tl.int64)
                        kept = -1
                    else:
                        collect_marked(list_, count, POOL + base, 1024)
            store_result(
                OUT, O2, M, C, TAU, SUPPORT, q, o, o2, sum_p, sum_u, support, m, c, h, lo, hi, rows, bh, heads, q_len, out_head,
                out_row, ALPHA, EV, BEV, GRAD, STATS,
            )  # fmt: skip
    if KEEP:
        tl.store(BLOCKS + at, base.to(tl.int32))
        tl.store(BLOCKS + at + 1, kept)
