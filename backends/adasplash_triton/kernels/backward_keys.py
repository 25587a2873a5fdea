"""Backward, a program per block of keys: dK and dV of the query blocks that kept no list, in a fixed order.

    dK = scale ds^T Q,  dV = p^T dO,  summed over the query heads that share the key head.

Starts from what ``backward_rows`` added by atomics (if lists were kept) and writes the gradients in their own dtype; with no
lists at all (``LISTS`` off) the result is the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash_triton.kernels.backward_rows import score_gradient
from adasplash_triton.kernels.primitives import (
    alpha_minus_one,
    first_row,
    load_rows,
    load_tile,
    row_interval,
    scores,
    store_rows,
    visible,
)

LENGTHS = ("dk_head", "dk_row", "dv_head", "dv_row", "q_len", "kv_len", "q_blocks", "shift", "left", "right", "mask_batch",
           "keymask_batch", "slopes_batch", "heads", "group", "keep_from")  # fmt: skip


@triton.jit
def count_dense(BLOCKS, first, last, BLOCK: tl.constexpr):
    """How many of the query blocks first .. last kept no list."""
    total = 0
    for i in range(first, last, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.sum((tl.load(BLOCKS + at * 2 + 1, mask=at < last, other=0) < 0).to(tl.int32), 0)
    return total


@triton.jit
def list_dense(BLOCKS, DENSE, first, last, BLOCK: tl.constexpr):
    """Writes a head's query blocks that kept no list, in order, and returns the places of the first and past the last of those in
    first .. last. All programs of a head write the same numbers to the same places."""
    before = 0
    total = 0
    for i in range(0, last, BLOCK):
        at = i + tl.arange(0, BLOCK)
        dense = (tl.load(BLOCKS + at * 2 + 1, mask=at < last, other=0) < 0).to(tl.int32)
        tl.store(DENSE + total + tl.cumsum(dense, 0) - 1, at, mask=dense != 0)
        before += tl.sum(tl.where(at < first, dense, 0), 0)
        total += tl.sum(dense, 0)
    tl.debug_barrier()
    return before, total


@triton.jit
def add_block(
    dk, dv, k, v, keys, allowed, n, Q, DO, M, C, DELTA, LO, HI, DIAG, SEED, q_stride, do_stride, mask_batch, b, bh, block, q_len,
    kv_len, shift, left, right, h, x_scale, slope, scale, keep_from, keep_scale,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LOADED: tl.constexpr, HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """(dk, dv) with what a block of queries adds; Q, DO, M, C and DELTA point at its head."""
    rows = block * BM + tl.arange(0, BM)
    q = load_rows(Q, rows, q_stride, q_len, E, BE, True)
    do = load_rows(DO, rows, do_stride, q_len, EV, BEV, True)
    m = tl.load(M + rows, mask=rows < q_len, other=0.0)
    c = tl.load(C + rows, mask=rows < q_len, other=0.0)
    delta = tl.load(DELTA + rows, mask=rows < q_len, other=0.0)
    lo, hi, diag = row_interval(LO, HI, DIAG, mask_batch, b, rows, q_len, kv_len, shift, left, right, LOADED)
    x = scores(q, k, keys, diag, x_scale, slope, HAS_ALIBI, PRECISION)
    if (tl.max(lo, 0) > n) | (tl.min(hi, 0) < n + BN):
        x = tl.where(visible(keys[None, :], lo[:, None], hi[:, None]), x, float("-inf"))
    if HAS_KEYMASK:
        x = tl.where(allowed[None, :], x, float("-inf"))
    zero = tl.zeros((BM,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    ds, p, _, _ = score_gradient(
        x, v, do, delta, m, c, h, rows, keys, bh, SEED, keep_from, keep_scale, sums, ALPHA, PRECISION, HAS_DROPOUT, False
    )
    dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION) * scale
    dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def backward_keys_kernel(
    Q, K, V, DO, M, C, DELTA, BLOCKS, DENSE, A, LO, HI, DIAG, KEYMASK, SLOPES, SEED, DK_SUM, DV_SUM, DK, DV,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, do_batch, do_head, do_stride,
    dk_head, dk_row, dv_head, dv_row,
    mask_batch, keymask_batch, slopes_batch, heads, group, q_len, kv_len, q_blocks, shift, left, right, scale, keep_from, keep_scale,
    ALPHA: tl.constexpr, PER_HEAD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    LOADED: tl.constexpr, HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN
    kv_heads = heads // group
    b = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    keys = n + tl.arange(0, BN)
    kv_at = tl.program_id(1).to(tl.int64) * kv_len
    if LISTS:
        dk = load_rows(DK_SUM + kv_at * E, keys, E, kv_len, E, BE, True)
        dv = load_rows(DV_SUM + kv_at * EV, keys, EV, kv_len, EV, BEV, True)
    else:
        dk = tl.zeros((BN, BE), tl.float32)
        dv = tl.zeros((BN, BEV), tl.float32)
    first = 0
    last = q_blocks
    if not LOADED:
        first = tl.maximum(n - shift - right, 0) // BM
        last = tl.minimum(tl.maximum(n + BN + left - shift + BM - 1, 0) // BM, q_blocks)
    wanted = kv_len
    if LISTS:
        # Of sparse rows nothing is left to add: then K and V are not read.
        left_over = 0
        for g in range(group):
            left_over += count_dense(BLOCKS + (b * heads + kv_head * group + g).to(tl.int64) * q_blocks * 2, first, last, 1024)
        wanted = tl.where(left_over > 0, kv_len, 0)
    k = load_tile(K + b.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head, n, k_stride, 0, wanted, E, BE, BN, True)
    v = load_tile(V + b.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head, n, v_stride, 0, wanted, EV, BEV, BN, True)
    allowed = keys < kv_len
    if HAS_KEYMASK:
        allowed = allowed & (tl.load(KEYMASK + b.to(tl.int64) * keymask_batch + keys, mask=keys < kv_len, other=0) != 0)
    for g in range(tl.where(wanted > 0, group, 0)):
        head = kv_head * group + g
        bh = b * heads + head
        h = alpha_minus_one(A, head, PER_HEAD, ALPHA)
        x_scale = scale
        if ALPHA >= 15:
            x_scale *= h
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(SLOPES + b.to(tl.int64) * slopes_batch + head).to(tl.float32)
            if ALPHA >= 15:
                slope *= h
        row_at = bh.to(tl.int64) * q_len
        blocks = BLOCKS + bh.to(tl.int64) * q_blocks * 2
        q_ptr = Q + b.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        do_ptr = DO + b.to(tl.int64) * do_batch + head.to(tl.int64) * do_head
        if LOADED:
            stop = last
            if LISTS:  # noqa: SIM102
                if count_dense(blocks, first, last, 1024) == 0:
                    stop = first
            for block in range(first, stop):
                lo, hi, _ = row_interval(
                    LO, HI, DIAG, mask_batch, b, block * BM + tl.arange(0, BM), q_len, kv_len, shift, left, right, LOADED
                )
                some = lo < hi
                seen = (tl.max(tl.where(some, hi, 0), 0) > n) & (tl.min(tl.where(some, lo, kv_len), 0) < n + BN)
                if LISTS:
                    seen = seen & (tl.load(blocks + block * 2 + 1) < 0)
                if seen:
                    dk, dv = add_block(
                        dk, dv, k, v, keys, allowed, n, q_ptr, do_ptr, M + row_at, C + row_at, DELTA + row_at, LO, HI, DIAG, SEED,
                        q_stride, do_stride, mask_batch, b, bh, block, q_len, kv_len, shift, left, right, h, x_scale, slope, scale,
                        keep_from, keep_scale, ALPHA, E, BE, EV, BEV, BM, BN, LOADED, HAS_KEYMASK, HAS_ALIBI, PRECISION, HAS_DROPOUT,
                    )  # fmt: skip
        else:
            # Triton only overlaps a loop's loads with its products where no branch stands around them: so blocks are listed first, and
            # each one's number is read a block early.
            start = first
            stop = last
            ahead = first
            if LISTS:
                dense = DENSE + bh.to(tl.int64) * q_blocks
                stop = first
                if count_dense(blocks, first, last, 1024) > 0:
                    start, stop = list_dense(blocks, dense, first, last, 1024)
                    ahead = tl.load(dense + start)
            for j in range(start, stop):
                block = j
                if LISTS:
                    block = ahead
                    ahead = tl.load(dense + j + 1, mask=j + 1 < stop, other=0)
                dk, dv = add_block(
                    dk, dv, k, v, keys, allowed, n, q_ptr, do_ptr, M + row_at, C + row_at, DELTA + row_at, LO, HI, DIAG, SEED,
                    q_stride, do_stride, mask_batch, b, bh, block, q_len, kv_len, shift, left, right, h, x_scale, slope, scale,
                    keep_from, keep_scale, ALPHA, E, BE, EV, BEV, BM, BN, LOADED, HAS_KEYMASK, HAS_ALIBI, PRECISION, HAS_DROPOUT,
                )  # fmt: skip
    dk_at = first_row(b, kv_head, kv_heads, kv_len, dk_head)
    dv_at = first_row(b, kv_head, kv_heads, kv_len, dv_head)
    store_rows(DK + dk_at * E, dk.to(DK.dtype.element_ty), keys, dk_row * E, kv_len, E, BE)
    store_rows(DV + dv_at * EV, dv.to(DV.dtype.element_ty), keys, dv_row * EV, kv_len, EV, BEV)
