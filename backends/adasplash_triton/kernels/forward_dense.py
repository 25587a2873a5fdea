"""Forward, last pass: the blocks of rows whose lists would hold most of the keys, or found no room.

A pass over all keys for each Newton step from the bound T and one for the output; general alpha first needs the row max, if it is not
known. Programs of all other blocks end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash_triton.kernels.evaluate import evaluate_range
from adasplash_triton.kernels.primitives import (
    block_of_program,
    block_range,
    bounded_c,
    head_pointer,
    open_rows,
    start_of_row,
    store_result,
)
from adasplash_triton.kernels.ranges import output_range, solve_range

LENGTHS = ("out_head", "out_row", "q_len", "kv_len", "q_blocks", "spread", "shift", "left", "right", "mask_batch", "keymask_batch",
           "slopes_batch", "heads", "group", "keep_from")  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def forward_dense_kernel(
    Q, K, V, OUT, O2, M, C, TAU, SUPPORT, A, LO, HI, DIAG, KEYMASK, SLOPES, SEED, T, ROW_MAX, ENTRIES,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, out_head, out_row,
    mask_batch, keymask_batch, slopes_batch, heads, group, q_len, kv_len, q_blocks, spread,
    shift, left, right, scale, keep_from, keep_scale, tol,
    ALPHA: tl.constexpr, PER_HEAD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, MAX_STEPS: tl.constexpr,
    LOADED: tl.constexpr, HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    GRAD: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    bh, block = block_of_program(q_blocks, spread)
    entry = ENTRIES + (bh.to(tl.int64) * q_blocks + block) * 2
    if tl.load(entry + 1) < 0:
        keys_ptr = head_pointer(K, bh, heads, group, k_batch, k_head)
        values_ptr = head_pointer(V, bh, heads, group, v_batch, v_head)
        keymask = KEYMASK + (bh // heads).to(tl.int64) * keymask_batch
        rows, q, h, x_scale, slope, lo, hi, diag = open_rows(
            Q, A, LO, HI, DIAG, SLOPES, bh, block, q_batch, q_head, q_stride, mask_batch, slopes_batch, heads, q_len, kv_len,
            shift, left, right, scale, ALPHA, PER_HEAD, E, BE, BM, LOADED, HAS_ALIBI,
        )  # fmt: skip
        low, mid_start, mid_end, end = block_range(lo, hi, BD)
        row_at = bh.to(tl.int64) * q_len + rows
        m, c = start_of_row(T, ROW_MAX, row_at, rows < q_len, h, ALPHA)
        if ALPHA < 15:  # noqa: SIM102
            if tl.max(m, 0) == float("inf"):
                zero = tl.zeros((BM,), tl.float32)
                _, _, _, m = evaluate_range(
                    q, keys_ptr, keymask, k_stride, lo, hi, diag, zero, zero, h, x_scale, slope,
                    low, mid_start, mid_end, end, 1, ALPHA, E, BE, BM, BD, HAS_KEYMASK, HAS_ALIBI, PRECISION, False, False, True,
                )  # fmt: skip
                m = tl.where(m == float("-inf"), 0.0, m)
                c = bounded_c(m, tl.load(T + row_at, mask=rows < q_len, other=0.0), h, ALPHA)
        c = solve_range(
            q, keys_ptr, keymask, k_stride, lo, hi, diag, m, c, h, x_scale, slope, low, mid_start, mid_end, end, tol, MAX_STEPS,
            ALPHA, E, BE, BM, BD, HAS_KEYMASK, HAS_ALIBI, PRECISION, STATS,
        )  # fmt: skip
        o, o2, sum_p, sum_u, support = output_range(
            q, keys_ptr, values_ptr, keymask, k_stride, v_stride, lo, hi, diag, m, c, h, x_scale, slope,
            low, mid_start, mid_end, end, rows, bh, SEED, keep_from, keep_scale,
            ALPHA, E, BE, EV, BEV, BM, BD, HAS_KEYMASK, HAS_ALIBI, PRECISION, HAS_DROPOUT, GRAD,
        )  # fmt: skip
        store_result(
            OUT, O2, M, C, TAU, SUPPORT, q, o, o2, sum_p, sum_u, support, m, c, h, lo, hi, rows, bh, heads, q_len, out_head, out_row,
            ALPHA, EV, BEV, GRAD, STATS,
        )  # fmt: skip
