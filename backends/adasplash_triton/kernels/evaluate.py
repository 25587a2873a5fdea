"""One look at the keys of a block of rows: sum p, sum u and max x, for given (m, c).

Over all keys (``evaluate_range``: whole tiles, the middle without masks, or only every ``step``-th tile of it, which bounds the
sums and the max from below) or over a list of keys (``evaluate_list``: rows of K are gathered by index).
"""

import triton
import triton.language as tl

from adasplash_triton.kernels.primitives import (
    OPEN,
    edge_tile,
    edge_tiles,
    first_c,
    load_rows,
    load_tile,
    newton_step,
    residual_after,
    scores,
    visible,
    weights,
)


@triton.jit
def range_scores(
    q, K, KEYMASK, n, k_stride, low, end, lo, hi, diag, x_scale, slope,
    E: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """x (BM, BN) of the tile of keys that starts at n, -inf where masked."""
    keys = n + tl.arange(0, BN)
    k = load_tile(K, n, k_stride, low, end, E, BE, BN, EDGE)
    x = scores(q, k, keys, diag, x_scale, slope, HAS_ALIBI, PRECISION)
    if EDGE:
        x = tl.where(visible(keys[None, :], lo[:, None], hi[:, None]), x, float("-inf"))
    if HAS_KEYMASK:
        allowed = tl.load(KEYMASK + keys, mask=keys < end, other=0) != 0
        x = tl.where(allowed[None, :], x, float("-inf"))
    return x


@triton.jit
def evaluate_range(
    q, K, KEYMASK, k_stride, lo, hi, diag, m, c, h, x_scale, slope, low, mid_start, mid_end, end, step,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_KEYMASK: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    SUMS: tl.constexpr, COUNT: tl.constexpr, EDGES: tl.constexpr, ESTIMATE: tl.constexpr = False,
):  # fmt: skip
    """(sum p, sum u, entries above the threshold, max x), each (BM,): the sums with ``SUMS``, the count with ``COUNT``, the max without
    ``SUMS``, otherwise 0. ``EDGES``: whether the edge tiles take part. ``ESTIMATE``: the middle's sums are scaled to all its tiles."""
    f = tl.zeros((BM,), tl.float32)
    s = tl.zeros((BM,), tl.float32)
    above = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    if EDGES:
        for t in range(edge_tiles(low, mid_start, mid_end, end, BN)):
            n = edge_tile(t, low, mid_start, mid_end, BN)
            x = range_scores(
                q, K, KEYMASK, n, k_stride, low, end, lo, hi, diag, x_scale, slope, E, BE, BN,
                HAS_KEYMASK, HAS_ALIBI, PRECISION, True,
            )  # fmt: skip
            f, s, above, top = add_tile(f, s, above, top, x, m, c, h, ALPHA, SUMS, COUNT)
    weight = 1.0
    if ESTIMATE:
        tiles = (mid_end - mid_start) // BN
        weight = tiles.to(tl.float32) / ((tiles + step - 1) // step).to(tl.float32)
        f /= weight
        s /= weight
    for n in range(mid_start, mid_end, step * BN):
        x = range_scores(
            q, K, KEYMASK, n, k_stride, low, end, lo, hi, diag, x_scale, slope, E, BE, BN,
            HAS_KEYMASK, HAS_ALIBI, PRECISION, False,
        )  # fmt: skip
        f, s, above, top = add_tile(f, s, above, top, x, m, c, h, ALPHA, SUMS, COUNT)
    if ESTIMATE:
        f *= weight
        s *= weight
    return f, s, above, top


@triton.jit
def add_tile(f, s, above, top, x, m, c, h, ALPHA: tl.constexpr, SUMS: tl.constexpr, COUNT: tl.constexpr):
    if SUMS:
        p, u = weights(x, m[:, None], c[:, None], h, ALPHA)
        f += tl.sum(p, 1)
        s += tl.sum(u, 1)
        if COUNT:
            above += tl.sum(tl.where(u > 0.0, 1.0, 0.0), 1)
    else:
        top = tl.maximum(top, tl.max(x, 1))
    return f, s, above, top


@triton.jit
def whole_entries(LIST, count, lo, hi, BK: tl.constexpr):
    """(first, last): between them every row that sees any key sees all the list's keys, so that tiles need no masks there."""
    some = lo < hi
    lo_max = tl.max(tl.where(some, lo, 0), 0)
    hi_min = tl.min(tl.where(some, hi, OPEN), 0)
    first = 0
    last = 0
    for j in range(0, count, 1024):
        at = j + tl.arange(0, 1024)
        keys = tl.load(LIST + at, mask=at < count, other=OPEN)
        first += tl.sum((keys < lo_max).to(tl.int32), 0)
        last += tl.sum((keys < hi_min).to(tl.int32), 0)
    return first, tl.minimum(last, count)


@triton.jit
def listed_keys(LIST, j, count, BK: tl.constexpr):
    """Entries j .. j + BK, without the mark that :func:`mark_listed` may have left."""
    at = j + tl.arange(0, BK)
    return tl.load(LIST + at, mask=at < count, other=0) & 0x7FFFFFFF


@triton.jit
def mark_listed(LIST, keys, hit, j, count, BK: tl.constexpr):
    """Mark entries by their sign, in place: a loop that moved them would need barriers, and Triton does not pipeline such loops."""
    at = j + tl.arange(0, BK)
    tl.store(LIST + at, tl.where(hit, keys | -0x80000000, keys), mask=at < count)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def any_row(hit):
    """Per column of hit (BM, BN), whether some row has it, int32 (BN,): up to 32 columns go into one word before rows are compared.

    Each thread of the tensor cores' layout holds columns 8 i + 2 t + j of a row (t its place in a quad), so words need no exchange.
    """
    BM: tl.constexpr = hit.shape[0]
    BN: tl.constexpr = hit.shape[1]
    PARTS: tl.constexpr = max(BN // 128, 1)
    EIGHTS: tl.constexpr = BN // 8 // PARTS
    bit = (tl.arange(0, EIGHTS) * 2)[:, None, None] + tl.arange(0, 2)[None, None, :] + tl.zeros((1, 4, 1), tl.int32)
    flags = tl.reshape(hit.to(tl.int32), (BM, PARTS, EIGHTS, 4, 2)) << bit[None, None]
    words = tl.reduce(tl.sum(tl.sum(flags, 4), 2), 0, either)
    return tl.reshape((words[:, None, :, None] >> bit[None]) & 1, (BN,))


@triton.jit
def collect_marked(LIST, count, OUT, BLOCK: tl.constexpr):
    """Write the marked entries, without their marks, to OUT, which may be LIST itself; returns how many."""
    kept = 0
    for j in range(0, count, BLOCK):
        at = j + tl.arange(0, BLOCK)
        entries = tl.load(LIST + at, mask=at < count, other=0)
        hit = (entries < 0).to(tl.int32)
        tl.debug_barrier()
        tl.store(OUT + kept + tl.cumsum(hit, 0) - 1, entries & 0x7FFFFFFF, mask=hit != 0)
        kept += tl.sum(hit, 0)
    tl.debug_barrier()
    return kept


@triton.jit
def count_marked(LIST, count, BLOCK: tl.constexpr):
    total = 0
    for j in range(0, count, BLOCK):
        at = j + tl.arange(0, BLOCK)
        total += tl.sum((tl.load(LIST + at, mask=at < count, other=0) < 0).to(tl.int32), 0)
    return total


@triton.jit
def mask_listed(x, LIST, j, count, first, last, lo, hi, BK: tl.constexpr):
    """x (BM, BK) with -inf where a row does not see the key, and past the list's end; untouched between ``first`` and ``last``."""
    if (j < first) | (j + BK > last):
        keys = listed_keys(LIST, j, count, BK)  # loaded again: otherwise every tile would load them in this layout too
        inside = (j + tl.arange(0, BK)) < count
        x = tl.where(visible(keys[None, :], lo[:, None], hi[:, None]) & inside[None, :], x, float("-inf"))
    return x


@triton.jit
def evaluate_list(
    q, K, LIST, count, first, last, k_stride, lo, hi, diag, m, c, h, x_scale, slope,
    ALPHA: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(sum p, sum u) over a list: exact wherever the list holds every key above the threshold."""
    f = tl.zeros((BM,), tl.float32)
    s = tl.zeros((BM,), tl.float32)
    ahead = listed_keys(LIST, 0, count, BK)
    for j in range(0, count, BK):
        keys = ahead
        ahead = listed_keys(LIST, j + BK, count, BK)  # a tile early: the rows of K wait for their indices
        k = load_rows(K, keys, k_stride, 0, E, BE, False)
        x = scores(q, k, keys, diag, x_scale, slope, HAS_ALIBI, PRECISION)
        x = mask_listed(x, LIST, j, count, first, last, lo, hi, BK)
        p, u = weights(x, m[:, None], c[:, None], h, ALPHA)
        f += tl.sum(p, 1)
        s += tl.sum(u, 1)
    return f, s


@triton.jit
def solve_tile(x, count, h, tol, max_steps, ALPHA: tl.constexpr, STATS: tl.constexpr):
    """(m, c) of rows whose scores x (BM, BN), at most ``count`` of them finite, are all on chip."""
    m = tl.max(x, 1)
    m = tl.where(m == float("-inf"), 0.0, m)
    c = first_c(h, m, ALPHA)
    c_before = c
    s_before = tl.zeros_like(c)
    row_keys = tl.zeros_like(c) + count
    steps = 0
    residual = 1.0
    while (residual > tol) & (steps < max_steps):
        p, u = weights(x, m[:, None], c[:, None], h, ALPHA)
        f = tl.sum(p, 1)
        s = tl.sum(u, 1)
        new = newton_step(c, f, s, h, ALPHA)
        # Always taken, and dropped by the compiler. Without it Triton 3.6 fails for sm_100: it follows a product's result up to a
        # branch or the end of a loop, and has no layout for a reduction to a number.
        residuals = tl.zeros_like(f)
        if steps < max_steps:
            residuals = residual_after(c, new, f, s, c_before, s_before, row_keys, ALPHA, STATS)
        residual = tl.max(residuals, 0)
        c_before = c
        s_before = s
        c = new
        steps += 1
    return m, c
