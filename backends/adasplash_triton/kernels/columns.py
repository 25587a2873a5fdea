"""Which keys does any query of a block want? The one dense pass of a sparse row.

For a lower bound T of tau, a key with x <= T has weight 0. Keys lie on the M side of the product K Q^T, so that "some query wants this
key" is a reduction along the thread's own axis: one byte a key and block of LIST_ROWS queries, then compacted to an ascending list.
The two orientations of the product may round differently, so T is lowered by a margin that bounds the difference.
"""

import triton
import triton.language as tl

from adasplash_triton.kernels.primitives import allocate, edge_tile, edge_tiles, load_tile, visible


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
def raw_units(q, x_scale, slope):
    """(q^T, slope / scale, 1 / scale, scale) so that products need no factor: a negative scale turns q."""
    q_t = tl.trans(q)
    if x_scale < 0:
        q_t = -q_t
    size = tl.maximum(tl.abs(x_scale), 1e-30)
    return q_t, slope / size, 1.0 / size, size


@triton.jit
def raw_scores(k, q_t, keys, diag, bias, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr):
    """Scores over the scale, (BN, BM): keys on the M side."""
    s = tl.dot(k, q_t, input_precision=PRECISION)
    if HAS_ALIBI:
        s -= bias * tl.abs(diag[None, :] - keys[:, None]).to(tl.float32)
    return s


@triton.jit
def fold_keys(top, s, GROUPS: tl.constexpr):
    """max(top, s) with the keys of s (BN, BM) that one thread holds folded together: top is (GROUPS, 8, BM).

    On the tensor cores' layout this needs no exchange; on any other it is merely slower.
    """
    BN: tl.constexpr = s.shape[0]
    BM: tl.constexpr = s.shape[1]
    folded = tl.max(tl.reshape(s, (BN // 16, 2, 8, BM)), 1)
    if BN // 16 > GROUPS:
        folded = tl.max(tl.reshape(folded, (BN // 16 // GROUPS, GROUPS, 8, BM)), 0)
    return tl.maximum(top, folded)


@triton.jit
def fold_sums(x, GROUPS: tl.constexpr):
    """Sums of the keys of x (BN, BM) that one thread holds, (GROUPS, 8, BM); see :func:`fold_keys`."""
    BN: tl.constexpr = x.shape[0]
    BM: tl.constexpr = x.shape[1]
    folded = tl.sum(tl.reshape(x, (BN // 16, 2, 8, BM)), 1)
    if BN // 16 > GROUPS:
        folded = tl.sum(tl.reshape(folded, (BN // 16 // GROUPS, GROUPS, 8, BM)), 0)
    return folded


@triton.jit
def mark_tile(
    HITS, hits_stride, q_t, t_raw, K, KEYMASK, n, k_stride, low, end, diag, bias,
    E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mark a tile that all rows see: its scores (BN, BM) and its marks, int32 (BN, BLOCKS)."""
    keys = n + tl.arange(0, BN)
    k = load_tile(K, n, k_stride, low, end, E, BE, BN, False)
    s = raw_scores(k, q_t, keys, diag, bias, HAS_ALIBI, PRECISION)
    if HAS_KEYMASK:
        s = tl.where((tl.load(KEYMASK + keys, mask=keys < end, other=0) != 0)[:, None], s, float("-inf"))
    hit = any_not_negative(s - t_raw[None, :], BN, BLOCKS, ROWS)
    tl.store(HITS + keys[:, None] + (tl.arange(0, BLOCKS) * hits_stride)[None, :], hit)
    return s, hit.to(tl.int32)


@triton.jit
def mark_columns(
    HITS, hits_stride, q, K, KEYMASK, k_stride, m, t_x, margin, width, follow, lo, hi, diag, x_scale, slope,
    low, mid_start, mid_end, end,
    E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a byte a key for low <= key < end (rounded to tiles) and block of rows: is x above the threshold for some row?

    The threshold starts at t_x - margin. With ``follow`` it rises with the running max to m - width - margin (``width`` is the max
    minus the least possible tau) between runs of tiles, each as long as all before it. Returns the number of keys marked, (BN, BLOCKS)
    int32 to be summed over the first axis, the row max (without ``follow`` that of a part) and the last threshold.
    """
    q_t, bias, inverse, size = raw_units(q, x_scale, slope)
    some = lo < hi
    below = (width + margin) * inverse
    # Rows without keys want nothing.
    t_raw = tl.where(some, (t_x - margin) * inverse, float("inf"))
    blocks = tl.arange(0, BLOCKS)
    marked = tl.zeros((BN, BLOCKS), tl.int32)
    top = tl.full((GROUPS, 8, BLOCKS * ROWS), float("-inf"), tl.float32)
    for t in range(edge_tiles(low, mid_start, mid_end, end, BN)):
        n = edge_tile(t, low, mid_start, mid_end, BN)
        keys = n + tl.arange(0, BN)
        k = load_tile(K, n, k_stride, low, end, E, BE, BN, True)
        s = raw_scores(k, q_t, keys, diag, bias, HAS_ALIBI, PRECISION)
        s = tl.where(visible(keys[:, None], lo[None, :], hi[None, :]), s, float("-inf"))
        if HAS_KEYMASK:
            s = tl.where((tl.load(KEYMASK + keys, mask=keys < end, other=0) != 0)[:, None], s, float("-inf"))
        hit = any_not_negative(s - t_raw[None, :], BN, BLOCKS, ROWS)
        marked += hit.to(tl.int32)
        tl.store(HITS + keys[:, None] + (blocks * hits_stride)[None, :], hit)
        top = fold_keys(top, s, GROUPS)
    if follow:
        start = mid_start
        run = tl.maximum((mid_end - mid_start) // (4 * BN), 8) * BN
        while start < mid_end:
            t_raw = tl.maximum(t_raw, tl.max(tl.max(top, 0), 0) - below)
            stop = tl.minimum(start + run, mid_end)
            for n in range(start, stop, BN):
                s, hit = mark_tile(
                    HITS, hits_stride, q_t, t_raw, K, KEYMASK, n, k_stride, low, end, diag, bias,
                    E, BE, BN, BLOCKS, ROWS, HAS_KEYMASK, HAS_ALIBI, PRECISION,
                )  # fmt: skip
                marked += hit
                top = fold_keys(top, s, GROUPS)
            start = stop
            run = tl.maximum(run, stop - mid_start)
    else:
        for n in range(mid_start, mid_end, BN):
            _, hit = mark_tile(
                HITS, hits_stride, q_t, t_raw, K, KEYMASK, n, k_stride, low, end, diag, bias,
                E, BE, BN, BLOCKS, ROWS, HAS_KEYMASK, HAS_ALIBI, PRECISION,
            )  # fmt: skip
            marked += hit
    tl.debug_barrier()
    m_raw = tl.max(tl.max(top, 0), 0)
    t_raw = tl.maximum(t_raw, m_raw - below)
    return marked, tl.maximum(m, m_raw * size), t_raw * size


@triton.jit
def compact(HITS, KEYMASK, POOL, TOP, pool_size, marked, limit, low, end, BLOCK: tl.constexpr, HAS_KEYMASK: tl.constexpr):
    """(base, count): the at most ``marked`` marked and allowed keys as an ascending list in the pool; count -1 if ``marked`` is over
    ``limit`` or the pool is full. Bytes are taken four at a time, since most are 0."""
    base = tl.zeros((), tl.int64)
    count = -1
    if marked <= limit:
        base = allocate(TOP, marked, pool_size)
        if base >= 0:
            count = 0
            words = HITS.to(tl.pointer_type(tl.int32))
            for n in range(low // 4, (end + 3) // 4, BLOCK):
                at = n + tl.arange(0, BLOCK)
                word = tl.load(words + at, mask=at * 4 < end, other=0)
                key = at * 4
                # Tiles were marked whole, so bytes outside low .. end are 0.
                hits = ()
                total = tl.zeros((BLOCK,), tl.int32)
                for i in tl.static_range(4):
                    hit = (word >> (8 * i)) & 1
                    if HAS_KEYMASK:
                        hit = tl.where(tl.load(KEYMASK + key + i, mask=hit != 0, other=0) != 0, 1, 0)
                    hits = hits + (hit,)  # noqa: RUF005
                    total += hit
                to = POOL + base + count + tl.cumsum(total, 0) - total
                for i in tl.static_range(4):
                    tl.store(to, key + i, mask=hits[i] != 0)
                    to += hits[i]
                count += tl.sum(total, 0)
    return base, count


@triton.jit
def row_size(x, PRECISION: tl.constexpr):
    """Of each row of x (N, BE), fp32: max |x|, or for TF32 the norm; inf where an entry is NaN or infinite."""
    top = tl.max(tl.abs(x), 1)
    if PRECISION == "tf32":
        unit = x / tl.where(top > 0.0, top, 1.0)[:, None]  # squares of very large or small numbers leave fp32's range
        top *= tl.sqrt(tl.sum(unit * unit, 1))
        top = tl.where(top == top, top, float("inf"))
    return top


@triton.jit
def score_margin(
    q, KEY_MAX, blocks, x_scale, slope, length, E: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(margin in units of x (BM,), whether every key is finite): bounds how far two roundings of one score may differ.

    Each lies within 2^-22 sum_d |q_d k_d| of the exact score, and the sum is at most E max|q| max|k|. The tensor cores may drop TF32's
    low bits in one product and round them in the other: then scores, and the threshold found from them, move by up to
    2^-9 sum_d |q_d k_d| <= 2^-9 |q| |k| each.
    """
    k_max = 0.0
    for n in range(0, blocks, BLOCK):
        at = n + tl.arange(0, BLOCK)
        part = tl.load(KEY_MAX + at, mask=at < blocks, other=0.0)
        k_max = tl.maximum(k_max, tl.max(tl.where(part == part, part, float("inf")), 0))
    q_max = row_size(q.to(tl.float32), PRECISION)
    finite = k_max < float("inf")
    share: tl.constexpr = 4e-3 if PRECISION == "tf32" else E * 4.8e-7
    margin = q_max * (tl.where(finite, k_max, 0.0) * tl.abs(x_scale) * share) + 1e-6
    return margin + tl.abs(slope) * length.to(tl.float32) * 2.4e-7, finite


@triton.jit(do_not_specialize=("kv_len", "kv_heads", "key_blocks", "counters"))
def key_max_kernel(
    K,
    KEY_MAX,
    COUNTERS,
    k_batch,
    k_head,
    k_stride,
    kv_len,
    kv_heads,
    key_blocks,
    counters,
    E: tl.constexpr,
    BE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The largest :func:`row_size` of each block of keys, (B * Hkv, blocks) fp32. One program zeroes the counters of later kernels."""
    block = tl.program_id(0)
    bh = tl.program_id(1)
    if (block == 0) & (bh == 0):
        for i in range(0, counters, 1024):
            at = i + tl.arange(0, 1024)
            tl.store(COUNTERS + at, 0, mask=at < counters)
    head = K + (bh // kv_heads).to(tl.int64) * k_batch + (bh % kv_heads).to(tl.int64) * k_head
    k = tl.abs(load_tile(head, block * KEY_BLOCK, k_stride, 0, kv_len, E, BE, KEY_BLOCK, True).to(tl.float32))
    k = tl.where(k == k, k, float("inf"))
    tl.store(KEY_MAX + bh.to(tl.int64) * key_blocks + block, tl.max(row_size(k, PRECISION), 0))
