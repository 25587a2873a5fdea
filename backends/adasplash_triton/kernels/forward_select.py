"""Forward, first pass: for each block of 64 query rows, a list of keys that holds every key with a weight.

    T <- max over a sample of the keys - 1, raised by Newton steps over the sample while that pays: a lower bound of tau, whatever
         the other keys are
    L <- the keys that some row of the block wants above T

The sample is the diagonal's and the range's first tiles and every ``SAMPLE``-th between: in trained models the best keys are near the
diagonal and at the start. A block whose list is too long, or finds the pool full, gets length -1 and is left to ``forward_dense``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adasplash_triton.kernels.columns import compact, mark_columns, score_margin
from adasplash_triton.kernels.evaluate import evaluate_range
from adasplash_triton.kernels.primitives import (
    block_range,
    first_c,
    give_slot,
    head_pointer,
    newton_step,
    open_rows,
    take_slot,
    threshold,
)

LENGTHS = ("q_len", "kv_len", "q_blocks", "slots", "hits_stride", "lists_size", "key_blocks", "shift", "left", "right", "mask_batch",
           "keymask_batch", "slopes_batch", "heads", "group")  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def forward_select_kernel(
    Q, K, A, LO, HI, DIAG, KEYMASK, KEY_MAX, SLOPES, T, MARGIN, HITS, SLOTS, LISTS, TOP, ENTRIES,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, mask_batch, keymask_batch, slopes_batch, heads, group, q_len, kv_len,
    q_blocks, slots, hits_stride, lists_size, key_blocks, shift, left, right, scale,
    ALPHA: tl.constexpr, PER_HEAD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr, SELECT_KEYS: tl.constexpr, SELECT_ROWS: tl.constexpr,
    SAMPLE: tl.constexpr, SAMPLE_STEPS: tl.constexpr, SAMPLE_WORTH: tl.constexpr, LIST_PERCENT: tl.constexpr, LEAST: tl.constexpr,
    LOADED: tl.constexpr, HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    groups = (q_blocks + BLOCKS_PER_PROGRAM - 1) // BLOCKS_PER_PROGRAM
    # Head by head, so that K stays in the L2 cache; in a head the longest rows of a causal mask first.
    bh = tl.program_id(0) // groups
    block = groups - 1 - tl.program_id(0) % groups
    keys_ptr = head_pointer(K, bh, heads, group, k_batch, k_head)
    keymask = KEYMASK + (bh // heads).to(tl.int64) * keymask_batch
    rows, q, h, x_scale, slope, lo, hi, diag = open_rows(
        Q, A, LO, HI, DIAG, SLOPES, bh, block, q_batch, q_head, q_stride, mask_batch, slopes_batch, heads, q_len, kv_len,
        shift, left, right, scale, ALPHA, PER_HEAD, E, BE, SELECT_ROWS, LOADED, HAS_ALIBI,
    )  # fmt: skip
    low, mid_start, mid_end, end = block_range(lo, hi, SELECT_KEYS)
    key_max = KEY_MAX + ((bh // heads) * (heads // group) + bh % heads // group).to(tl.int64) * key_blocks
    margin, finite = score_margin(q, key_max, key_blocks, x_scale, slope, tl.maximum(q_len, kv_len), E, 128)

    zero = tl.zeros((SELECT_ROWS,), tl.float32)
    _, _, m = evaluate_range(
        q, keys_ptr, keymask, k_stride, lo, hi, diag, zero, zero, h, x_scale, slope,
        low, mid_start, mid_end, end, SAMPLE, ALPHA, E, BE, SELECT_ROWS, SELECT_KEYS, HAS_KEYMASK, HAS_ALIBI, False, True,
    )  # fmt: skip
    c = first_c(h, m, ALPHA)
    some = (lo < hi) & (m > float("-inf"))
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    # Steps over a quarter of the sample cost little and tell whether more pay. Where the first one does, the sample grows to twice its
    # size as the steps over a smaller one are used up. They are only taken where the sum over a subset of the keys exceeds 1, so c
    # never passes the root.
    stride = SAMPLE * 4
    steps = 0
    while steps < SAMPLE_STEPS:
        f, s, _ = evaluate_range(
            q, keys_ptr, keymask, k_stride, lo, hi, diag, m_safe, c, h, x_scale, slope,
            low, mid_start, mid_end, end, stride, ALPHA, E, BE, SELECT_ROWS, SELECT_KEYS, HAS_KEYMASK, HAS_ALIBI, True, False,
        )  # fmt: skip
        c = tl.where(some & (f > 1.0), newton_step(c, f, s, h, ALPHA), c)
        steps += 1
        if tl.sum(tl.where(some, f, 0.0), 0) < SAMPLE_WORTH * tl.sum(some.to(tl.float32), 0):
            if (steps == 1) | (stride * 2 <= SAMPLE):
                steps = SAMPLE_STEPS
            else:
                stride = tl.where(stride > SAMPLE, SAMPLE, SAMPLE // 2)
    t_x = threshold(m, c, h, ALPHA)
    row_at = bh.to(tl.int64) * q_len + rows
    tl.store(T + row_at, t_x, mask=rows < q_len)
    tl.store(MARGIN + row_at, margin, mask=rows < q_len)

    entries = ENTRIES + (bh.to(tl.int64) * q_blocks + block * BLOCKS_PER_PROGRAM) * 2
    if finite:
        slot = take_slot(SLOTS, tl.program_id(0), slots)
        hits = HITS + slot.to(tl.int64) * (hits_stride * BLOCKS_PER_PROGRAM)
        marked = mark_columns(
            hits, hits_stride, q, keys_ptr, k_stride, t_x - margin, lo, hi, diag, x_scale, slope, low, mid_start, mid_end, end,
            E, BE, SELECT_KEYS, BLOCKS_PER_PROGRAM, ROWS, HAS_ALIBI,
        )  # fmt: skip
        limit = tl.maximum((end - low) // 100 * LIST_PERCENT, LEAST)
        marked = tl.sum(marked, 0)
        for i in tl.static_range(BLOCKS_PER_PROGRAM):
            of_block = tl.sum(tl.where(tl.arange(0, BLOCKS_PER_PROGRAM) == i, marked, 0), 0)
            base, count = compact(
                hits + i * hits_stride, keymask, LISTS, TOP, lists_size, of_block, limit, low, end, 4096, HAS_KEYMASK
            )
            if block * BLOCKS_PER_PROGRAM + i < q_blocks:
                tl.store(entries + 2 * i, base.to(tl.int32))
                tl.store(entries + 2 * i + 1, count)
        give_slot(SLOTS, slot)
    else:
        # A NaN or infinite key must reach every row that sees it, so no list may leave it out.
        for i in tl.static_range(BLOCKS_PER_PROGRAM):
            if block * BLOCKS_PER_PROGRAM + i < q_blocks:
                tl.store(entries + 2 * i + 1, -1)
