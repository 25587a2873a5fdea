"""Device functions shared by the passes.

Units. With h = alpha - 1 and s = scale * q.k + bias, kernels work on x = h s for alpha 1.5 and 2 (``ALPHA`` 15 and 20) and on x = s
for any other alpha (``ALPHA`` 0; where half precision is enough 1, or 2 with NVIDIA's own instructions), which stays exact down to
alpha = 1. A row's state is (m, c): m = max x, and c its distance to the threshold:

    ALPHA 15, 20:  c = m - tau                       a = [x - m + c]_+           p = a^(1/h)             u = p^(2-alpha)
    ALPHA 0 to 2:  c = -ln(h (m - tau_s)) / h        w = log1p(-h d e^(h c))/h - c,  d = m - x,   p = e^w,   u = e^((1-h) w)

so that c of the latter becomes log-sum-exp(x) - m at alpha = 1. m - 1 <= tau < m reads 0 < c <= 1, and c >= 0 for the others.

Newton on ||a||_(1/h) = 1 instead of on sum p = 1: the norm is convex and decreasing in tau, so steps from the left never pass the
root, and it is nearly linear, so few are needed. With F = sum p and S = sum u the step is (F - F^(1-h)) / S; at alpha = 1 it is
ln F, the exact answer.
"""

import triton
import triton.language as tl

OPEN = tl.constexpr(1 << 30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p_ratio(y, h):
    """log1p(h y) / h, and its limit y at h = 0; the argument of the logarithm is kept above 0."""
    t = h * y
    v = tl.maximum(1.0 + t, 1e-37, propagate_nan=tl.PropagateNan.ALL)
    exact = tl.where(v == 1.0, t, tl.log(v) * (t / (v - 1.0)))  # Kahan: the rounding of 1 + t cancels
    return tl.where(h > 0.0, exact / h, y)


@triton.jit
def expm1_ratio(y, h):
    """expm1(h y) / h, and its limit y at h = 0."""
    t = h * y
    v = tl.exp(t)
    exact = tl.where(v == 1.0, t, (v - 1.0) * (t / tl.log(v)))
    return tl.where(h > 0.0, exact / h, y)


@triton.jit
def weights_near_softmax(x, m, c, h):
    """(p, u) for any h in [0, 1], to the last bits of float32."""
    y = (x - m) * tl.exp(h * c)
    w = log1p_ratio(y, h) - c
    out = h * y <= -1.0
    return tl.where(out, 0.0, tl.exp(w)), tl.where(out, 0.0, tl.exp((1.0 - h) * w))


@triton.jit
def log2_half(x, ALPHA: tl.constexpr):
    """log2 to 2^-22: Triton's own takes ten times as many instructions."""
    if ALPHA == 2:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def exp2_half(x, ALPHA: tl.constexpr):
    """2^x with results below 2^-126 as 0."""
    if ALPHA == 2:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def weights(x, m, c, h, ALPHA: tl.constexpr):
    """(p, u) of a tile of x; m and c broadcast against it: (BM, 1) beside (BM, BN), or (1, BM) beside (BN, BM). NaN goes through."""
    if ALPHA == 15:
        u = tl.maximum((x - m) + c, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = u * u
    elif ALPHA == 20:
        p = tl.maximum((x - m) + c, 0.0, propagate_nan=tl.PropagateNan.ALL)
        u = tl.where(p > 0.0, 1.0, 0.0)
    elif ALPHA > 0:
        # Enough for half precision: three special functions an entry, and no branch. Below h = 1e-3 the logarithm over h is a series,
        # good wherever p > e^-30.
        d = tl.maximum(x - m, -1e30, propagate_nan=tl.PropagateNan.ALL)  # -inf times h = 0 would be NaN
        rate = tl.exp(h * c)
        z = d * (h * rate)
        t = tl.maximum(1.0 + z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        near = d * (rate * LOG2_E) * (1.0 - z * (0.5 - z * (1.0 / 3 - z * 0.25)))
        w = tl.where(h > 1e-3, log2_half(t, ALPHA) * (1.0 / tl.maximum(h, 1e-3)), near) - LOG2_E * c
        p = tl.where(t == 0.0, 0.0, exp2_half(w, ALPHA))
        u = tl.where(t == 0.0, 0.0, exp2_half((1.0 - h) * w, ALPHA))
    else:
        p, u = weights_near_softmax(x, m, c, h)
    return p, u


@triton.jit
def newton_step(c, f, s, h, ALPHA: tl.constexpr):
    """The next c from f = sum p and s = sum u (0 where the row is empty: c stays)."""
    safe = tl.where(s > 0.0, s, 1.0)
    if ALPHA == 15:
        new = c - (f - tl.sqrt(f)) / safe
    elif ALPHA == 20:
        new = c - (f - 1.0) / safe
    else:
        step = -f * expm1_ratio(-tl.log(tl.maximum(f, 1e-30)), h) / safe
        new = c - log1p_ratio(-step * tl.exp(h * c), h)
    return tl.where(s > 0.0, new, c)


@triton.jit
def residual_after(c, new, f, s, c_before, s_before, keys, ALPHA: tl.constexpr, STATS: tl.constexpr):
    """How far sum p may be from 1 where the solve goes on from ``new``: 0 where the row is empty.

    Known at c is |f - 1|. For alpha 1.5, f is convex in tau with slope -2s and curvature 2n, n keys above the threshold; so after a
    step d of tau it lies between f - 2sd and f - 2sd + nd^2: that takes no look at the keys. n is at most the row's ``keys``; after a
    look at c_before further left, where s was s_before, at most the mean (s_before - s) / (c_before - c) between the two. Twice the
    bound is taken, or what it means for the normalised u, whose entries move by n / s^2 of it in sum, if that is more. With ``STATS``
    it is not taken: tau, and the support even more, are asked for to float32's precision.
    """
    residual = tl.abs(f - 1.0)
    if ALPHA == 15 and not STATS:
        moved = c_before - c
        mean = (s_before - s) / tl.where(moved > 1e-4, moved, 1.0)
        n = tl.where(moved > 1e-4, tl.minimum(tl.maximum(1.01 * mean, 1.0), keys), keys)
        d = c - new
        n = tl.where(d < 0.0, keys, n)
        line = f - 1.0 - 2.0 * s * d
        after = tl.maximum(tl.abs(line), tl.abs(line + n * d * d))
        residual = tl.minimum(residual, after * tl.maximum(2.0, n / (s * s)))
    return tl.where(s > 0.0, residual, 0.0)


@triton.jit
def first_c(h, rows, ALPHA: tl.constexpr):
    """c of the bound tau >= m - 1: where every solve may start."""
    if ALPHA < 15:
        return tl.zeros_like(rows)
    return tl.zeros_like(rows) + 1.0


@triton.jit
def threshold(m, c, h, ALPHA: tl.constexpr):
    """tau in units of x; -inf where every key counts (alpha = 1)."""
    if ALPHA < 15:
        return tl.where(h > 0.0, m - tl.exp(-h * c) / tl.where(h > 0.0, h, 1.0), float("-inf"))
    return m - c


@triton.jit
def bounded_c(m, t_x, h, ALPHA: tl.constexpr):
    """c of the threshold t_x for general alpha, where that is a bound below m; else that of m - 1."""
    c = first_c(h, m, ALPHA)
    bound = (t_x < m) & (t_x > float("-inf"))
    gap = tl.where(bound, m - t_x, 1.0)
    risen = tl.maximum(c, -tl.log(tl.where(h > 0.0, h * gap, 1.0)) / tl.where(h > 0.0, h, 1.0))
    return tl.where(bound, risen, c)


@triton.jit
def start_of_row(T, ROW_MAX, at, inside, h, ALPHA: tl.constexpr):
    """(m, c) of rows whose tau is known to be at least T. For alpha 1.5 and 2 any reference serves as m: T itself; the others need the
    row max, inf where it is not known."""
    t_x = tl.load(T + at, mask=inside, other=0.0)
    if ALPHA >= 15:
        return tl.where(tl.abs(t_x) < float("inf"), t_x, 0.0), tl.zeros_like(t_x)
    m = tl.load(ROW_MAX + at, mask=inside, other=0.0)
    m = tl.where(m == float("-inf"), 0.0, m)
    return m, bounded_c(m, t_x, h, ALPHA)


@triton.jit
def alpha_minus_one(A, head, PER_HEAD: tl.constexpr, ALPHA: tl.constexpr):
    """h as float32: known for ALPHA 15 and 20, else read from the device and clamped to [0, 1]."""
    if ALPHA == 15:
        return 0.5
    if ALPHA == 20:
        return 1.0
    if PER_HEAD:
        a = tl.load(A + head)
    else:
        a = tl.load(A)
    # In float64 where alpha is: alpha - 1 loses half the digits near 1 otherwise.
    return tl.minimum(tl.maximum((a.to(tl.float64) - 1.0).to(tl.float32), 0.0), 1.0)


@triton.jit
def row_interval(LO, HI, DIAG, batch_stride, b, rows, q_len, kv_len, shift, left, right, LOADED: tl.constexpr):
    """Visible keys [lo, hi) and diagonal of each row, int32 (BM,); rows past the end are empty.

    Either from arrays (``LOADED``) or from the affine rule of causal masks and windows; ``left`` and ``right`` are OPEN without.
    """
    inside = rows < q_len
    if LOADED:
        at = b.to(tl.int64) * batch_stride + rows
        lo = tl.load(LO + at, mask=inside, other=0)
        hi = tl.load(HI + at, mask=inside, other=0)
        diag = tl.load(DIAG + at, mask=inside, other=0)
    else:
        diag = rows + shift
        lo = tl.maximum(diag - left, 0)
        hi = tl.minimum(diag + right + 1, kv_len)
    hi = tl.where(inside, hi, 0)
    return lo, hi, diag


@triton.jit
def block_range(lo, hi, BN: tl.constexpr):
    """(low, mid_start, mid_end, end): the keys low .. end that some row of a block sees, and the middle, whole tiles that all see."""
    some = lo < hi
    end = tl.max(tl.where(some, hi, 0), 0)
    low = tl.minimum(tl.min(tl.where(some, lo, OPEN), 0), end)
    mid_start = (tl.max(tl.where(some, lo, 0), 0) + BN - 1) // BN * BN
    mid_end = tl.maximum(tl.min(tl.where(some, hi, OPEN), 0) // BN * BN, mid_start)
    return low, tl.minimum(mid_start, end), tl.minimum(mid_end, end), end


@triton.jit
def edge_tile(t, low, mid_start, mid_end, BN: tl.constexpr):
    """First key of the t-th tile outside the middle: the left edge's tiles, then the right edge's."""
    start = low // BN * BN
    left_tiles = (mid_start - start + BN - 1) // BN
    return tl.where(t < left_tiles, start + t * BN, mid_end + (t - left_tiles) * BN)


@triton.jit
def edge_tiles(low, mid_start, mid_end, end, BN: tl.constexpr):
    return (mid_start - low // BN * BN + BN - 1) // BN + (end - mid_end + BN - 1) // BN


@triton.jit
def load_rows(X, rows, stride, limit, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr):
    """Rows of a (length, D) matrix with contiguous columns, as (BM, BD); if ``CHECKED``, 0 from ``limit`` on. X points at row 0."""
    cols = tl.arange(0, BD)
    at = X + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if CHECKED:
        return load_masked(at, rows < limit, cols, D, BD)
    return load_unmasked(at, cols, D, BD)


@triton.jit
def load_tile(X, first, stride, low, end, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr):
    """Rows first .. first + BN; at an edge, 0 outside low .. end. 64-bit arithmetic on the tile's base only."""
    rows = tl.arange(0, BN)
    cols = tl.arange(0, BD)
    at = X + tl.cast(first, tl.int64) * stride + (rows * stride)[:, None] + cols[None, :]
    if EDGE:
        return load_masked(at, (first + rows >= low) & (first + rows < end), cols, D, BD)
    return load_unmasked(at, cols, D, BD)


@triton.jit
def load_masked(at, rows_mask, cols, D: tl.constexpr, BD: tl.constexpr):
    if D == BD:
        return tl.load(at, mask=rows_mask[:, None], other=0.0)
    return tl.load(at, mask=rows_mask[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def load_unmasked(at, cols, D: tl.constexpr, BD: tl.constexpr):
    if D == BD:
        return tl.load(at)
    return tl.load(at, mask=(cols < D)[None, :], other=0.0)


@triton.jit
def store_rows(X, x, rows, stride, limit, D: tl.constexpr, BD: tl.constexpr):
    cols = tl.arange(0, BD)
    at = X + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if D == BD:
        tl.store(at, x, mask=(rows < limit)[:, None])
    else:
        tl.store(at, x, mask=(rows < limit)[:, None] & (cols < D)[None, :])


@triton.jit
def scores(q, k, keys, diag, x_scale, slope, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr):
    """x (BM, BN) of q (BM, BD) and k (BN, BD): fp32, scaled after the product so that q is not rounded."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * x_scale
    if HAS_ALIBI:
        x -= slope * tl.abs(diag[:, None] - keys[None, :]).to(tl.float32)
    return x


@triton.jit
def visible(keys, lo, hi):
    """lo <= key < hi with one comparison: shapes that broadcast, int32."""
    return (keys - lo).to(tl.uint32, bitcast=True) < tl.maximum(hi - lo, 0).to(tl.uint32, bitcast=True)


@triton.jit
def dropout_factor(seed, keep_from, keep_scale, row, key, head):
    """1 / (1 - dropout_p) where the entry stays, else 0: Philox-4x32-7 at counter (key, row, b * H + h, 0), word 0."""
    i = (row + tl.zeros_like(key)).to(tl.uint32)
    j = (key + tl.zeros_like(row)).to(tl.uint32)
    bh = tl.zeros_like(i) + head.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, j, i, bh, tl.zeros_like(i), n_rounds=7)
    return tl.where(word >= keep_from.to(tl.uint32), keep_scale, 0.0)


@triton.jit
def open_rows(
    Q, A, LO, HI, DIAG, SLOPES, bh, block, q_batch, q_head, q_stride, mask_batch, slopes_batch, heads, q_len, kv_len,
    shift, left, right, scale, ALPHA: tl.constexpr, PER_HEAD: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
    LOADED: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """What every pass knows of a block of rows: (rows, q, h, x_scale, slope, lo, hi, diag). x_scale carries the scale's sign."""
    b = bh // heads
    head = bh % heads
    rows = block * BM + tl.arange(0, BM)
    q = load_rows(Q + b.to(tl.int64) * q_batch + head.to(tl.int64) * q_head, rows, q_stride, q_len, E, BE, True)
    h = alpha_minus_one(A, head, PER_HEAD, ALPHA)
    x_scale = scale
    if ALPHA >= 15:
        x_scale *= h
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(SLOPES + b.to(tl.int64) * slopes_batch + head).to(tl.float32)
        if ALPHA >= 15:
            slope *= h
    lo, hi, diag = row_interval(LO, HI, DIAG, mask_batch, b, rows, q_len, kv_len, shift, left, right, LOADED)
    return rows, q, h, x_scale, slope, lo, hi, diag


@triton.jit
def block_of_program(q_blocks, spread):
    """(b * H + h, block of rows): in a head the longest rows of a causal mask first. Head by head, so that K and V stay in the L2
    cache; or, where all of them fit (``spread``), all heads' longest rows first, so that none is left for the end."""
    pid = tl.program_id(0)
    heads = tl.num_programs(0) // q_blocks
    bh = tl.where(spread != 0, pid % heads, pid // q_blocks)
    return bh, q_blocks - 1 - tl.where(spread != 0, pid // heads, pid % q_blocks)


@triton.jit
def head_pointer(X, bh, heads, group, batch_stride, head_stride):
    """Where the rows of K or V start that query head ``bh`` reads."""
    return X + (bh // heads).to(tl.int64) * batch_stride + ((bh % heads) // group).to(tl.int64) * head_stride


@triton.jit
def first_row(b, head, heads, length, head_step):
    """Rows before a head's first in an output. Outputs are dense, so steps from head to head and row to row count in rows, and all
    that a store needs to know of its alignment is the compile-time row size."""
    return b.to(tl.int64) * heads * length + head.to(tl.int64) * head_step


@triton.jit
def store_result(
    OUT, O2, M, C, TAU, SUPPORT, q, o, o2, sum_p, sum_u, support, m, c, h, lo, hi, rows, bh, heads, q_len, out_head, out_row,
    ALPHA: tl.constexpr, EV: tl.constexpr, BEV: tl.constexpr, GRAD: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Normalise and write a block of rows; rows that see no key become 0."""
    some = lo < hi
    live = some & (sum_p > 0.0)
    # A query with NaN or inf in it spoils its own row, whatever its keys.
    broken = tl.max(tl.where(tl.abs(q.to(tl.float32)) < float("inf"), 0, 1), 1) > 0
    o = tl.where(live[:, None], o / tl.where(live, sum_p, 1.0)[:, None], 0.0)
    o = tl.where((some & (broken | (sum_p != sum_p)))[:, None], float("nan"), o)
    row_at = bh.to(tl.int64) * q_len
    out_at = first_row(bh // heads, bh % heads, heads, q_len, out_head)
    store_rows(OUT + out_at * EV, o.to(OUT.dtype.element_ty), rows, out_row * EV, q_len, EV, BEV)
    if GRAD:
        o2 = tl.where(live[:, None], o2 / tl.where(sum_u > 0.0, sum_u, 1.0)[:, None], 0.0)
        store_rows(O2 + row_at * EV, o2.to(O2.dtype.element_ty), rows, EV, q_len, EV, BEV)
        tl.store(M + row_at + rows, m, mask=rows < q_len)
        # O is divided by sum p, which the backward's p are not: for these, the step from the sums at hand.
        tl.store(C + row_at + rows, newton_step(c, sum_p, sum_u, h, ALPHA), mask=rows < q_len)
    if STATS:
        if ALPHA < 15:
            tau = tl.where(h > 0.0, h * m - tl.exp(-h * c), m + c)
        else:
            tau = m - c
        tl.store(TAU + row_at + rows, tl.where(live, tau, 0.0), mask=rows < q_len)
        tl.store(SUPPORT + row_at + rows, tl.where(live, support, 0), mask=rows < q_len)


@triton.jit
def take_slot(SLOTS, first, slots):
    """A row of scratch for this program alone: the first free one from ``first`` on. There are about as many as programs fit."""
    slot = first % slots
    while tl.atomic_cas(SLOTS + slot, 0, 1) != 0:
        slot = (slot + 1) % slots
    return slot


@triton.jit
def give_slot(SLOTS, slot):
    tl.debug_barrier()
    tl.atomic_xchg(SLOTS + slot, 0)


@triton.jit
def allocate(TOP, count, size):
    """Where ``count`` entries may be written in a pool of ``size``, -1 where it is full: a bump of the pool's top."""
    base = tl.zeros((), tl.int64)
    if count > 0:
        base = tl.atomic_add(TOP, count.to(tl.int64))
    if base + count > size:
        base = tl.zeros((), tl.int64) - 1
    return base
