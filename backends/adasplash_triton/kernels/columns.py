"""Which keys does any query of a block want? The one dense pass of a sparse row.

For a lower bound T of tau, a key with x <= T has weight 0. Keys lie on the M side of the product K Q^T, so that "some query wants this
key" is a reduction along the thread's own axis: one byte a key and block of LIST_ROWS queries, then compacted to an ascending list.
The two orientations of the product may round differently, so T is lowered by a margin that bounds the difference.
"""

import triton
import triton.language as tl

from adasplash_triton.kernels.primitives import allocate, edge_tile, edge_tiles, load_tile


@triton.jit
def both(a, b):
    return a & b


@triton.jit
def any_not_negative(x, BN: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Per key and block of rows, whether some entry of x (BN, BLOCKS * ROWS) is >= 0: anding the sign bits takes half the
    instructions of a maximum. int8 (BN, BLOCKS)."""
    signs = tl.reshape(x.to(tl.int32, bitcast=True), (BN, BLOCKS, ROWS))
    return (tl.reduce(signs, 2, both) >= 0).to(tl.int8)


@triton.jit
def raw_threshold(q, t_x, lo, hi, x_scale, slope):
    """(q^T, T, slope) divided by the scale, so that products need none; a negative scale turns q. Rows without keys want nothing."""
    q_t = tl.trans(q)
    if x_scale < 0:
        q_t = -q_t
    inverse = 1.0 / tl.maximum(tl.abs(x_scale), 1e-30)
    return q_t, tl.where(lo < hi, t_x * inverse, float("inf")), slope * inverse


@triton.jit
def over_threshold(k, q_t, keys, diag, t_raw, bias, HAS_ALIBI: tl.constexpr):
    """Score minus threshold, (BN, BM): keys on the M side."""
    s = tl.dot(k, q_t, input_precision="ieee")
    if HAS_ALIBI:
        s -= bias * tl.abs(diag[None, :] - keys[:, None]).to(tl.float32)
    return s - t_raw[None, :]


@triton.jit
def mark_columns(
    HITS, hits_stride, q, K, k_stride, t_x, lo, hi, diag, x_scale, slope, low, mid_start, mid_end, end,
    E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """Write a byte a key for low <= key < end (rounded to tiles) and block of rows: is x > t_x (BLOCKS * ROWS,) for some row?

    Returns the number of keys marked, (BN, BLOCKS) int32 to be summed over the first axis.
    """
    q_t, t_raw, bias = raw_threshold(q, t_x, lo, hi, x_scale, slope)
    blocks = tl.arange(0, BLOCKS)
    marked = tl.zeros((BN, BLOCKS), tl.int32)
    for t in range(edge_tiles(low, mid_start, mid_end, end, BN)):
        n = edge_tile(t, low, mid_start, mid_end, BN)
        keys = n + tl.arange(0, BN)
        k = load_tile(K, n, k_stride, low, end, E, BE, BN, True)
        seen = (keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :])
        over = tl.where(seen, over_threshold(k, q_t, keys, diag, t_raw, bias, HAS_ALIBI), -1.0)
        hit = any_not_negative(over, BN, BLOCKS, ROWS)
        marked += hit.to(tl.int32)
        tl.store(HITS + keys[:, None] + (blocks * hits_stride)[None, :], hit)
    for n in range(mid_start, mid_end, BN):
        keys = n + tl.arange(0, BN)
        k = load_tile(K, n, k_stride, low, end, E, BE, BN, False)
        over = over_threshold(k, q_t, keys, diag, t_raw, bias, HAS_ALIBI)
        hit = any_not_negative(over, BN, BLOCKS, ROWS)
        marked += hit.to(tl.int32)
        tl.store(HITS + keys[:, None] + (blocks * hits_stride)[None, :], hit)
    tl.debug_barrier()
    return marked


@triton.jit
def compact(HITS, KEYMASK, POOL, TOP, pool_size, marked, limit, low, end, BLOCK: tl.constexpr, HAS_KEYMASK: tl.constexpr):
    """(base, count): the at most ``marked`` marked and allowed keys as an ascending list in the pool; count -1 if ``marked`` is over
    ``limit`` or the pool is full."""
    base = tl.zeros((), tl.int64)
    count = -1
    if marked <= limit:
        base = allocate(TOP, marked, pool_size)
        if base >= 0:
            count = 0
            for n in range(low, end, BLOCK):
                keys = n + tl.arange(0, BLOCK)
                hit = tl.load(HITS + keys, mask=keys < end, other=0).to(tl.int32)
                if HAS_KEYMASK:
                    hit = tl.where(tl.load(KEYMASK + keys, mask=keys < end, other=0) != 0, hit, 0)
                tl.store(POOL + base + count + tl.cumsum(hit, 0) - 1, keys, mask=hit != 0)
                count += tl.sum(hit, 0)
    return base, count


@triton.jit
def score_margin(q, KEY_MAX, blocks, x_scale, slope, length, E: tl.constexpr, BLOCK: tl.constexpr):
    """(margin in units of x (BM,), whether every key is finite): bounds how far two roundings of one score may differ.

    Each lies within 2^-22 sum_d |q_d k_d| of the exact score, and the sum is at most E max|q| max|k|.
    """
    k_max = 0.0
    for n in range(0, blocks, BLOCK):
        at = n + tl.arange(0, BLOCK)
        part = tl.load(KEY_MAX + at, mask=at < blocks, other=0.0)
        k_max = tl.maximum(k_max, tl.max(tl.where(part == part, part, float("inf")), 0))
    q_max = tl.max(tl.abs(q.to(tl.float32)), 1)
    finite = k_max < float("inf")
    margin = q_max * (tl.where(finite, k_max, 0.0) * tl.abs(x_scale) * (E * 4.8e-7)) + 1e-6
    return margin + tl.abs(slope) * length.to(tl.float32) * 2.4e-7, finite


@triton.jit(do_not_specialize=("kv_len", "kv_heads", "key_blocks"))
def key_max_kernel(
    K,
    KEY_MAX,
    k_batch,
    k_head,
    k_stride,
    kv_len,
    kv_heads,
    key_blocks,
    E: tl.constexpr,
    BE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """max |k| of each block of keys, (B * Hkv, blocks) fp32; NaN counts as inf."""
    block = tl.program_id(0)
    bh = tl.program_id(1)
    head = K + (bh // kv_heads).to(tl.int64) * k_batch + (bh % kv_heads).to(tl.int64) * k_head
    k = tl.abs(load_tile(head, block * KEY_BLOCK, k_stride, 0, kv_len, E, BE, KEY_BLOCK, True).to(tl.float32))
    k = tl.where(k == k, k, float("inf"))
    tl.store(KEY_MAX + bh.to(tl.int64) * key_blocks + block, tl.max(tl.max(k, 1), 0))
