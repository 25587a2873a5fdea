"""alpha-entmax of rows that are on chip: the arithmetic shared by the transform's kernels.

A tile holds rows as drops d = h (m - s) for alpha 1.5 and 2 (``ALPHA`` 15 and 20; s the scores, m their max, h = alpha - 1), and
d = m - s for any other alpha (``ALPHA`` 0), where every row has an h of its own. A row's state is c:

    ALPHA 15, 20:  c = h m - tau in (0, 1]            a = [c - d]_+                       p = a^(1/h),  u = p^(2-alpha)
    ALPHA 0:       c = -ln(h (m - tau / h)) / h >= 0  v = [1 - h d e^(h c)]_+             p = v^(1/h) e^-c,  u = p e^(h c) / v

c of ALPHA 0 becomes log-sum-exp(s) - m at alpha = 1. Newton runs on the norm ||a||_(1/h) = 1, which is convex in tau and nearly linear:
from the left it never passes the root, so every step, also one over a part of the row only, bounds the row's tau from below. A part
that holds the largest of every few entries therefore brings tau near its place for a fraction of the work.
"""

import triton
import triton.language as tl

MOST_STEPS = tl.constexpr(48)


@triton.jit
def log1p_ratio(t, h, limit):
    """log1p(t) / h to the last bits for |t| << 1 too; ``limit`` where h = 0."""
    v = tl.maximum(1.0 + t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    exact = tl.where(v == 1.0, t, tl.log(v) * (t / (v - 1.0)))  # Kahan: the rounding of 1 + t cancels
    return tl.where(h > 0.0, exact / tl.where(h > 0.0, h, 1.0), limit)


@triton.jit
def expm1_ratio(t, h, limit):
    """expm1(t) / h, likewise."""
    v = tl.exp(t)
    exact = tl.where(v == 1.0, t, (v - 1.0) * (t / tl.log(v)))
    return tl.where(h > 0.0, exact / tl.where(h > 0.0, h, 1.0), limit)


@triton.jit
def row_alphas(A, rows, inside, PER_ROW: tl.constexpr, ALPHA: tl.constexpr):
    """h of each row, float32: known for ALPHA 15 and 20, else read and clamped to [0, 1]."""
    zero = tl.zeros_like(rows).to(tl.float32)
    if ALPHA == 15:
        return zero + 0.5
    if ALPHA == 20:
        return zero + 1.0
    if PER_ROW:
        a = tl.load(A + rows, mask=inside, other=1.0)
    else:
        a = tl.load(A)
    # In float64 where alpha is: alpha - 1 loses half the digits near 1 otherwise.
    h = (a.to(tl.float64) - 1.0).to(tl.float32)
    return zero + tl.minimum(tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL), 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def drops(x, m, ALPHA: tl.constexpr):
    """d of scores x (R, N) below m (R,)."""
    d = m[:, None] - x
    if ALPHA == 15:
        d *= 0.5
    elif ALPHA == 0:
        d = tl.minimum(d, 1e30, propagate_nan=tl.PropagateNan.ALL)  # 0 * inf is NaN where h = 0
    return d


@triton.jit
def weights(d, c, h, ALPHA: tl.constexpr):
    """(p, u) of drops d (R, N) at c and h, (R,) or (1,). NaN goes through."""
    if ALPHA == 15:
        u = tl.maximum(c[:, None] - d, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = u * u
    elif ALPHA == 20:
        p = tl.maximum(c[:, None] - d, 0.0, propagate_nan=tl.PropagateNan.ALL)
        u = tl.where(p > 0.0, 1.0, 0.0)
    else:
        stretch = tl.exp(h * c)[:, None]
        t = -h[:, None] * d * stretch
        p = tl.exp(log1p_ratio(t, h[:, None], -d) - c[:, None])
        u = p * stretch / tl.maximum(1.0 + t, 1e-30, propagate_nan=tl.PropagateNan.ALL)
    return p, u


@triton.jit
def first_c(h, ALPHA: tl.constexpr):
    """c of the bound tau >= m - 1, where every solve may start."""
    if ALPHA == 0:
        return tl.zeros_like(h)
    return tl.zeros_like(h) + 1.0


@triton.jit
def newton_step(c, f, s, h, ALPHA: tl.constexpr):
    """The next c from f = sum p and s = sum u; rows with no entry in reach keep theirs."""
    safe = tl.where(s > 0.0, s, 1.0)
    if ALPHA == 15:
        new = c - (f - tl.sqrt(f)) / safe
    elif ALPHA == 20:
        new = c - (f - 1.0) / safe
    else:
        log_f = tl.log(tl.maximum(f, 1e-30))
        rise = -f * expm1_ratio(-h * log_f, h, -log_f) / safe  # of tau, in units of the scores
        rise *= tl.exp(h * c)
        new = c - log1p_ratio(-h * rise, h, -rise)
    return tl.where(s > 0.0, new, tl.where(f == f, c, f))


@triton.jit
def reach(c, h, ALPHA: tl.constexpr):
    """Entries with a drop of this or more have weight 0; infinite where every entry counts."""
    if ALPHA == 0:
        return tl.where(h > 0.0, tl.exp(-h * c) / tl.where(h > 0.0, h, 1.0), float("inf"))
    return c


@triton.jit
def largest_of_each(d, R: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """The smallest drop of every GROUP entries: a part of each row that its support is likely to be in.

    Of neighbours for GROUP > 0, of entries N / -GROUP apart for GROUP < 0: whichever a thread holds, so that the part takes each thread
    less work than the whole.
    """
    if GROUP > 0:
        part = tl.min(tl.reshape(d, [R, N // GROUP, GROUP]), 2)
    else:
        part = tl.min(tl.reshape(d, [R, -GROUP, N // -GROUP]), 1)
    return part


@triton.jit
def solve(d, c, h, tolerance, most_steps, ALPHA: tl.constexpr):
    """c of rows of drops d (R, N), from the left, until every row's |sum p - 1| was within ``tolerance`` before its last step."""
    steps = 0
    residual = 2.0 * tolerance + 1.0
    while (residual > tolerance) & (steps < most_steps):
        p, u = weights(d, c, h, ALPHA)
        f = tl.sum(p, 1)
        s = tl.sum(u, 1)
        new = newton_step(c, f, s, h, ALPHA)
        # Rows that rest, be it at a residual which rounding keeps, wait for nothing; NaN is not greater than anything.
        residual = tl.max(tl.where((new != c) & (s > 0.0), tl.abs(f - 1.0), 0.0), 0)
        c = new
        steps += 1
    return c


@triton.jit
def solve_rows(d, h, tolerance, ALPHA: tl.constexpr, R: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """c of whole rows: over a part of each first, if ``GROUP`` says so, then over all of it."""
    c = first_c(h, ALPHA)
    if GROUP != 1:
        part = largest_of_each(d, R, N, GROUP)
        c = solve(part, c, h, 0.01, 8, ALPHA)
    return solve(d, c, h, tolerance, MOST_STEPS, ALPHA)


@triton.jit
def settle_infinities(x, m):
    """(x, m) as the solve wants them: +inf entries become 0 among -inf, so that they share the row; empty rows get m = 0."""
    infinite = m == float("inf")
    if tl.max(infinite.to(tl.int32), 0) > 0:
        ties = tl.where(x == float("inf"), 0.0, tl.where(x == x, float("-inf"), x))
        x = tl.where(infinite[:, None], ties, x)
    return x, tl.where(infinite | (m == float("-inf")), 0.0, m)
