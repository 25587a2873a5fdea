"""Forward, first pass: for each block of 64 query rows, a list of keys that holds every key with a weight.

    T <- max over a sample of the keys - 1, raised by Newton steps over the sample while that pays: a lower bound of tau, whatever
         the other keys are
    L <- the keys that some row of the block wants above T, which follows the running max over all keys (unless L will be short anyway)

The sample is the diagonal's and the range's first tiles and every ``SAMPLE``-th between: in trained models the best keys are near the
diagonal and at the start. A block whose list is too long, or finds the pool full, gets length -1 and is left to ``forward_dense``; so
is, before the dense pass, one whose sample lies mostly above T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash_triton.kernels.columns import compact, mark_columns, score_margin
from adasplash_triton.kernels.evaluate import evaluate_range
from adasplash_triton.kernels.primitives import (
    block_of_program,
    block_range,
    first_c,
    give_slot,
    head_pointer,
    newton_step,
    open_rows,
    take_slot,
    threshold,
)

COARSE_STEPS = tl.constexpr(4)
FEW = tl.constexpr(0.03)
"""Expected share of the keys that a block marks from which further steps over the sample pay."""
LENGTHS = ("q_len", "kv_len", "q_blocks", "spread", "slots", "hits_stride", "lists_size", "key_blocks", "shift", "left", "right",
           "mask_batch", "keymask_batch", "slopes_batch", "heads", "group")  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def forward_select_kernel(
    Q, K, A, LO, HI, DIAG, KEYMASK, KEY_MAX, SLOPES, T, MARGIN, ROW_MAX, HITS, SLOTS, LISTS, TOP, ENTRIES,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, mask_batch, keymask_batch, slopes_batch, heads, group, q_len, kv_len,
    q_blocks, spread, slots, hits_stride, lists_size, key_blocks, shift, left, right, scale,
    ALPHA: tl.constexpr, PER_HEAD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr, SELECT_KEYS: tl.constexpr, SELECT_ROWS: tl.constexpr,
    SAMPLE: tl.constexpr, SAMPLE_STEPS: tl.constexpr, SAMPLE_WORTH: tl.constexpr, FOLLOW_SHARE: tl.constexpr,
    LIST_PERCENT: tl.constexpr, LEAST: tl.constexpr, SELECT_GROUPS: tl.constexpr,
    LOADED: tl.constexpr, HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh, block = block_of_program((q_blocks + BLOCKS_PER_PROGRAM - 1) // BLOCKS_PER_PROGRAM, spread)
    keys_ptr = head_pointer(K, bh, heads, group, k_batch, k_head)
    keymask = KEYMASK + (bh // heads).to(tl.int64) * keymask_batch
    rows, q, h, x_scale, slope, lo, hi, diag = open_rows(
        Q, A, LO, HI, DIAG, SLOPES, bh, block, q_batch, q_head, q_stride, mask_batch, slopes_batch, heads, q_len, kv_len,
        shift, left, right, scale, ALPHA, PER_HEAD, E, BE, SELECT_ROWS, LOADED, HAS_ALIBI,
    )  # fmt: skip
    low, mid_start, mid_end, end = block_range(lo, hi, SELECT_KEYS)
    key_max = KEY_MAX + ((bh // heads) * (heads // group) + bh % heads // group).to(tl.int64) * key_blocks
    margin, finite = score_margin(q, key_max, key_blocks, x_scale, slope, tl.maximum(q_len, kv_len), E, 128, PRECISION)

    zero = tl.zeros((SELECT_ROWS,), tl.float32)
    _, _, _, m = evaluate_range(
        q, keys_ptr, keymask, k_stride, lo, hi, diag, zero, zero, h, x_scale, slope,
        low, mid_start, mid_end, end, SAMPLE, ALPHA, E, BE, SELECT_ROWS, SELECT_KEYS, HAS_KEYMASK, HAS_ALIBI, PRECISION,
        False, False, True,
    )  # fmt: skip
    if HAS_KEYMASK:  # noqa: SIM102
        # Where the mask hides all of a row's sample, the max of nothing bounds nothing: then all keys are looked at.
        if tl.max(((lo < hi) & (m == float("-inf"))).to(tl.int32), 0) > 0:
            _, _, _, m = evaluate_range(
                q, keys_ptr, keymask, k_stride, lo, hi, diag, zero, zero, h, x_scale, slope,
                low, mid_start, mid_end, end, 1, ALPHA, E, BE, SELECT_ROWS, SELECT_KEYS, HAS_KEYMASK, HAS_ALIBI, PRECISION,
                False, False, True,
            )  # fmt: skip
    c = first_c(h, m, ALPHA)
    some = (lo < hi) & (m > float("-inf"))
    live = tl.sum(some.to(tl.float32), 0)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    # Steps over a quarter of the sample cost little and tell whether more pay: whether the keys above T are many, and T can rise much.
    # They are only taken where the sum over a subset of the keys exceeds 1, so c never passes the root.
    stride = SAMPLE * 4
    visited = (mid_end - mid_start + stride * SELECT_KEYS - 1) // (stride * SELECT_KEYS) * SELECT_KEYS
    share = 0.0
    worth = True
    steps = 0
    while worth & (steps < COARSE_STEPS):
        f, s, above, _ = evaluate_range(
            q, keys_ptr, keymask, k_stride, lo, hi, diag, m_safe, c, h, x_scale, slope,
            low, mid_start, mid_end, end, stride, ALPHA, E, BE, SELECT_ROWS, SELECT_KEYS, HAS_KEYMASK, HAS_ALIBI, PRECISION,
            True, True, False,
        )  # fmt: skip
        c = tl.where(some & (f > 1.0), newton_step(c, f, s, h, ALPHA), c)
        share = tl.sum(tl.where(some, above, 0.0), 0) / (live * visited.to(tl.float32) + 1.0)
        worth = (tl.sum(tl.where(some, f, 0.0), 0) > SAMPLE_WORTH * live) & (share * ROWS > FEW)
        steps += 1
    dense = share * 100.0 > LIST_PERCENT
    if ((steps > 1) | worth) & ~dense:
        # Then the sample grows to four times its size as the steps over a smaller one are used up.
        stride = SAMPLE
        steps = 0
        while steps < SAMPLE_STEPS:
            f, s, _, _ = evaluate_range(
                q, keys_ptr, keymask, k_stride, lo, hi, diag, m_safe, c, h, x_scale, slope, low, mid_start, mid_end, end, stride,
                ALPHA, E, BE, SELECT_ROWS, SELECT_KEYS, HAS_KEYMASK, HAS_ALIBI, PRECISION, True, False, False,
            )  # fmt: skip
            c = tl.where(some & (f > 1.0), newton_step(c, f, s, h, ALPHA), c)
            steps += 1
            if tl.sum(tl.where(some, f, 0.0), 0) < SAMPLE_WORTH * live:
                if stride * 4 <= SAMPLE:
                    steps = SAMPLE_STEPS
                else:
                    stride = stride // 2
    t_x = threshold(m, c, h, ALPHA)
    row_at = bh.to(tl.int64) * q_len + rows
    entries = ENTRIES + (bh.to(tl.int64) * q_blocks + block * BLOCKS_PER_PROGRAM) * 2
    tl.store(MARGIN + row_at, margin, mask=rows < q_len)
    # A NaN or infinite key must reach every row that sees it, so no list may leave it out.
    if finite & ~dense:
        slot = take_slot(SLOTS, tl.program_id(0), slots)
        hits = HITS + slot.to(tl.int64) * (hits_stride * BLOCKS_PER_PROGRAM)
        follow = share * ROWS >= FOLLOW_SHARE
        width = 1.0
        if ALPHA < 15:
            width = tl.where(h > 0.0, 1.0 / tl.maximum(h, 1e-30), float("inf"))
            follow = True
        marked, m, t_x = mark_columns(
            hits, hits_stride, q, keys_ptr, keymask, k_stride, m, t_x, margin, width, follow, lo, hi, diag, x_scale, slope,
            low, mid_start, mid_end, end, E, BE, SELECT_KEYS, BLOCKS_PER_PROGRAM, ROWS, SELECT_GROUPS,
            HAS_KEYMASK, HAS_ALIBI, PRECISION,
        )  # fmt: skip
        tl.store(T + row_at, t_x, mask=rows < q_len)
        if ALPHA < 15:
            tl.store(ROW_MAX + row_at, m, mask=rows < q_len)
        limit = tl.maximum((end - low) // 100 * LIST_PERCENT, LEAST)
        marked = tl.sum(marked, 0)
        for i in tl.static_range(BLOCKS_PER_PROGRAM):
            of_block = tl.sum(tl.where(tl.arange(0, BLOCKS_PER_PROGRAM) == i, marked, 0), 0)
            base, count = compact(
                hits + i * hits_stride, keymask, LISTS, TOP, lists_size, of_block, limit, low, end, 1024, HAS_KEYMASK
            )
            if block * BLOCKS_PER_PROGRAM + i < q_blocks:
                tl.store(entries + 2 * i, base.to(tl.int32))
                tl.store(entries + 2 * i + 1, count)
        give_slot(SLOTS, slot)
    else:
        if ALPHA < 15:
            tl.store(ROW_MAX + row_at, zero + float("inf"), mask=rows < q_len)  # not known
        tl.store(T + row_at, t_x - margin, mask=rows < q_len)
        for i in tl.static_range(BLOCKS_PER_PROGRAM):
            if block * BLOCKS_PER_PROGRAM + i < q_blocks:
                tl.store(entries + 2 * i + 1, -1)
