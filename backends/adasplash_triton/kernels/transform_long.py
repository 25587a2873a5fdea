"""The entmax transform of rows too long for one program, in chunks of ``N`` entries, which are neighbours in memory.

Any part's tau bounds the row's tau from below, so an entry under its own chunk's threshold has weight 0 whatever the other chunks hold:

1. ``transform_scan_kernel``, a program a chunk: takes a few Newton steps towards the chunk's own tau, writes 0 over its part of p and
   lists the entries above, which are the only ones that can get weight. A chunk with more than ``LISTED`` of them is left as it is
   ("dense", count -1).
2. ``transform_solve_kernel``, a program a row: Newton to the residual over the lists, and over dense chunks' scores.
3. ``transform_scatter_kernel``, a program a chunk: the listed entries' weights to their places, dense chunks whole.

So sparse rows are read once and written once. The backward sums u and u g by chunks, then every chunk's program adds up its row's.
"""

import triton
import triton.language as tl

from adasplash_triton.kernels.transform_math import (
    MOST_STEPS,
    drops,
    first_c,
    largest_of_each,
    newton_step,
    reach,
    row_alphas,
    solve,
    weights,
)
from adasplash_triton.kernels.transform_rows import alpha_sums, row_starts, support_power


@triton.jit
def scan_chunk(
    X, P, A, TOPS, LOWS, COUNTS, SCORES, PLACES, n, chunks, inner, x_outer, x_inner, p_outer, p_inner,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    row = item // chunks + tl.zeros((1,), tl.int32)
    cols = (item % chunks) * N + tl.arange(0, N)
    mask = (cols < n)[None, :]
    at = row_starts(row, inner, x_outer, x_inner)[:, None] + cols[None, :]
    x = tl.load(X + at, mask=mask, other=float("-inf")).to(tl.float32)
    h = row_alphas(A, row, row >= 0, PER_ROW, ALPHA)
    m = tl.max(x, 1)
    broken = tl.max((x != x).to(tl.int32), 1) > 0
    plain = (tl.abs(m) < float("inf")) & (broken == 0)  # neither NaN nor inf in it, and not empty
    d = drops(x, tl.where(plain, m, 0.0), ALPHA)
    c = solve(largest_of_each(d, 1, N, GROUP), first_c(h, ALPHA), h, 0.1, 6, ALPHA)
    edge = reach(c, h, ALPHA)
    edge += 1e-5 * edge + 4e-7 * tl.abs(m)  # the steps' rounding, and that of another max
    keep = (d < edge[:, None]) & plain[:, None] & mask
    count = tl.sum(keep.to(tl.int32), 1)
    low = tl.where(plain, m - edge * (2.0 if ALPHA == 15 else 1.0), float("-inf"))
    listed = (count <= LISTED) & (plain | ((m == float("-inf")) & (broken == 0)))
    one = item + tl.zeros((1,), tl.int32)
    tl.store(TOPS + one, tl.where(broken, float("nan"), m))
    tl.store(LOWS + one, low)
    tl.store(COUNTS + one, tl.where(listed, count, -1))
    if tl.max(listed.to(tl.int32), 0) > 0:
        to = tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.store(SCORES + item.to(tl.int64) * LISTED + to, x, mask=keep)
        tl.store(PLACES + item.to(tl.int64) * LISTED + to, cols[None, :] + tl.zeros_like(to), mask=keep)
        at = row_starts(row, inner, p_outer, p_inner)[:, None] + cols[None, :]
        tl.store(P + at, tl.zeros_like(x).to(P.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunks"])
def transform_scan_kernel(
    X, P, A, TOPS, LOWS, COUNTS, SCORES, PLACES, n, chunks, inner, x_outer, x_inner, p_outer, p_inner,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    if ALPHA == 1:
        a = tl.load(A).to(tl.float32)
        if a == 1.5:
            scan_chunk(
                X, P, A, TOPS, LOWS, COUNTS, SCORES, PLACES,
                n, chunks, inner, x_outer, x_inner, p_outer, p_inner, 15, PER_ROW, N, GROUP, LISTED,
            )  # fmt: skip
        elif a == 2.0:
            scan_chunk(
                X, P, A, TOPS, LOWS, COUNTS, SCORES, PLACES,
                n, chunks, inner, x_outer, x_inner, p_outer, p_inner, 20, PER_ROW, N, GROUP, LISTED,
            )  # fmt: skip
        else:
            scan_chunk(
                X, P, A, TOPS, LOWS, COUNTS, SCORES, PLACES,
                n, chunks, inner, x_outer, x_inner, p_outer, p_inner, 0, PER_ROW, N, GROUP, LISTED,
            )  # fmt: skip
    else:
        scan_chunk(
            X, P, A, TOPS, LOWS, COUNTS, SCORES, PLACES, n,
            chunks, inner, x_outer, x_inner, p_outer, p_inner, ALPHA, PER_ROW, N, GROUP, LISTED,
        )  # fmt: skip


@triton.jit
def settled(x, top):
    """Scores of a row whose max is ``top``, +inf ones as 0 among -inf: see settle_infinities."""
    if top == float("inf"):
        x = tl.where(x == float("inf"), 0.0, tl.where(x == x, float("-inf"), x))
    return x


@triton.jit
def solve_row(
    X, A, TOPS, LOWS, COUNTS, SCORES, C, M, n, chunks, inner, x_outer, x_inner,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, N: tl.constexpr, LISTED: tl.constexpr, B: tl.constexpr, ENTRIES: tl.constexpr,
    TOLERANCE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    row = item + tl.zeros((1,), tl.int32)
    h = row_alphas(A, row, row >= 0, PER_ROW, ALPHA)
    first = item.to(tl.int64) * chunks
    top = float("-inf")
    low = float("-inf")
    longest = 0
    dense = 0
    broken = 0
    for chunk in range(0, chunks, 1024):
        at = chunk + tl.arange(0, 1024)
        tops = tl.load(TOPS + first + at, mask=at < chunks, other=float("-inf"))
        counts = tl.load(COUNTS + first + at, mask=at < chunks, other=0)
        top = tl.maximum(top, tl.max(tops, 0))
        low = tl.maximum(low, tl.max(tl.load(LOWS + first + at, mask=at < chunks, other=float("-inf")), 0))
        longest = tl.maximum(longest, tl.max(counts, 0))
        dense += tl.sum((counts < 0).to(tl.int32), 0)
        broken += tl.sum((tops != tops).to(tl.int32), 0)
    m = tl.where(tl.abs(top) < float("inf"), top, 0.0) + tl.zeros((1,), tl.float32)
    c = first_c(h, ALPHA)
    if ALPHA != 0:
        c = tl.minimum(c, tl.where(low > float("-inf"), m - low, 2.0) * (0.5 if ALPHA == 15 else 1.0))
    if top == float("inf"):
        c = first_c(h, ALPHA)
        longest = 0
    steps = 0
    residual = 1.0
    if broken > 0:
        residual = 0.0
        c += float("nan")
    while (residual > TOLERANCE) & (steps < MOST_STEPS):
        f = tl.zeros((1,), tl.float32)
        s = tl.zeros((1,), tl.float32)
        lane = tl.arange(0, B)
        for chunk in range(0, chunks, B // ENTRIES):
            some = chunk + lane // ENTRIES
            counts = tl.load(COUNTS + first + some, mask=some < chunks, other=0)
            for j in range(0, longest, ENTRIES):
                entry = j + lane % ENTRIES
                at = (first + some) * LISTED + entry
                x = tl.load(SCORES + at, mask=entry < counts, other=float("-inf"))[None, :]
                p, u = weights(drops(x, m, ALPHA), c, h, ALPHA)
                f += tl.sum(p, 1)
                s += tl.sum(u, 1)
        if dense > 0:
            for chunk in range(chunks):
                if tl.load(COUNTS + first + chunk) < 0:
                    for j in range(0, N, B):
                        cols = chunk * N + j + tl.arange(0, B)
                        at = row_starts(row, inner, x_outer, x_inner)[:, None] + cols[None, :]
                        x = tl.load(X + at, mask=(cols < n)[None, :], other=float("-inf")).to(tl.float32)
                        p, u = weights(drops(settled(x, top), m, ALPHA), c, h, ALPHA)
                        f += tl.sum(p, 1)
                        s += tl.sum(u, 1)
        new = newton_step(c, f, s, h, ALPHA)
        residual = tl.max(tl.where((new != c) & (s > 0.0), tl.abs(f - 1.0), 0.0), 0)
        c = new
        steps += 1
    tl.store(C + row, c)
    tl.store(M + row, tl.where(top == float("inf"), top, m))


@triton.jit(do_not_specialize=["chunks"])
def transform_solve_kernel(
    X, A, TOPS, LOWS, COUNTS, SCORES, C, M, n, chunks, inner, x_outer, x_inner,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, N: tl.constexpr, LISTED: tl.constexpr, B: tl.constexpr, ENTRIES: tl.constexpr,
    TOLERANCE: tl.constexpr,
):  # fmt: skip
    if ALPHA == 1:
        a = tl.load(A).to(tl.float32)
        if a == 1.5:
            solve_row(
                X, A, TOPS, LOWS, COUNTS, SCORES, C, M, n,
                chunks, inner, x_outer, x_inner, 15, PER_ROW, N, LISTED, B, ENTRIES, TOLERANCE,
            )  # fmt: skip
        elif a == 2.0:
            solve_row(
                X, A, TOPS, LOWS, COUNTS, SCORES, C, M, n,
                chunks, inner, x_outer, x_inner, 20, PER_ROW, N, LISTED, B, ENTRIES, TOLERANCE,
            )  # fmt: skip
        else:
            solve_row(
                X, A, TOPS, LOWS, COUNTS, SCORES, C, M, n,
                chunks, inner, x_outer, x_inner, 0, PER_ROW, N, LISTED, B, ENTRIES, TOLERANCE,
            )  # fmt: skip
    else:
        solve_row(
            X, A, TOPS, LOWS, COUNTS, SCORES, C, M, n,
            chunks, inner, x_outer, x_inner, ALPHA, PER_ROW, N, LISTED, B, ENTRIES, TOLERANCE,
        )  # fmt: skip


@triton.jit
def scatter_chunk(
    X, P, A, COUNTS, SCORES, PLACES, C, M, n, chunks, inner, x_outer, x_inner, p_outer, p_inner,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, N: tl.constexpr, LISTED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    row = item // chunks + tl.zeros((1,), tl.int32)
    h = row_alphas(A, row, row >= 0, PER_ROW, ALPHA)
    c = tl.load(C + row)
    top = tl.max(tl.load(M + row), 0)
    m = tl.where(top == float("inf"), 0.0, top) + tl.zeros((1,), tl.float32)
    count = tl.load(COUNTS + item)
    p_start = row_starts(row, inner, p_outer, p_inner)[:, None]
    spoilt = tl.max((c != c).to(tl.int32), 0) > 0
    if spoilt | (count < 0):
        for j in range(0, N, B):
            cols = (item % chunks) * N + j + tl.arange(0, B)
            mask = (cols < n)[None, :]
            at = row_starts(row, inner, x_outer, x_inner)[:, None] + cols[None, :]
            x = settled(tl.load(X + at, mask=mask, other=float("-inf")).to(tl.float32), top)
            p, _ = weights(drops(x, m, ALPHA), c, h, ALPHA)
            p = tl.where(spoilt, float("nan"), p)
            tl.store(P + p_start + cols[None, :], p.to(P.dtype.element_ty), mask=mask)
    elif top < float("inf"):
        for j in range(0, count, B):
            entry = j + tl.arange(0, B)
            at = item.to(tl.int64) * LISTED + entry
            x = tl.load(SCORES + at, mask=entry < count, other=float("-inf"))[None, :]
            place = tl.load(PLACES + at, mask=entry < count, other=0)[None, :]
            p, _ = weights(drops(x, m, ALPHA), c, h, ALPHA)
            tl.store(P + p_start + place, p.to(P.dtype.element_ty), mask=(entry < count)[None, :])


@triton.jit(do_not_specialize=["chunks"])
def transform_scatter_kernel(
    X, P, A, COUNTS, SCORES, PLACES, C, M, n, chunks, inner, x_outer, x_inner, p_outer, p_inner,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, N: tl.constexpr, LISTED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    if ALPHA == 1:
        a = tl.load(A).to(tl.float32)
        if a == 1.5:
            scatter_chunk(
                X, P, A, COUNTS, SCORES, PLACES, C, M, n,
                chunks, inner, x_outer, x_inner, p_outer, p_inner, 15, PER_ROW, N, LISTED, B,
            )  # fmt: skip
        elif a == 2.0:
            scatter_chunk(
                X, P, A, COUNTS, SCORES, PLACES, C, M, n,
                chunks, inner, x_outer, x_inner, p_outer, p_inner, 20, PER_ROW, N, LISTED, B,
            )  # fmt: skip
        else:
            scatter_chunk(
                X, P, A, COUNTS, SCORES, PLACES, C, M, n,
                chunks, inner, x_outer, x_inner, p_outer, p_inner, 0, PER_ROW, N, LISTED, B,
            )  # fmt: skip
    else:
        scatter_chunk(
            X, P, A, COUNTS, SCORES, PLACES, C, M, n,
            chunks, inner, x_outer, x_inner, p_outer, p_inner, ALPHA, PER_ROW, N, LISTED, B,
        )  # fmt: skip


@triton.jit(do_not_specialize=["chunks"])
def transform_sums_kernel(
    P, G, A, SUMS, n, chunks, inner, p_outer, p_inner, g_outer, g_inner,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sum of u and of u g over a chunk."""
    item = tl.program_id(0)
    row = item // chunks + tl.zeros((1,), tl.int32)
    cols = (item % chunks) * N + tl.arange(0, N)
    mask = (cols < n)[None, :]
    h = row_alphas(A, row, row >= 0, PER_ROW, ALPHA)
    at = row_starts(row, inner, p_outer, p_inner)[:, None] + cols[None, :]
    p = tl.load(P + at, mask=mask, other=0.0).to(tl.float32)
    at = row_starts(row, inner, g_outer, g_inner)[:, None] + cols[None, :]
    g = tl.load(G + at, mask=mask & (p != 0.0), other=0.0).to(tl.float32)
    u = support_power(p, h[:, None], ALPHA)
    one = item + tl.zeros((1,), tl.int32)
    tl.store(SUMS + one.to(tl.int64) * 2, tl.sum(u, 1))
    tl.store(SUMS + one.to(tl.int64) * 2 + 1, tl.sum(u * g, 1))


@triton.jit(do_not_specialize=["chunks"])
def transform_long_backward_kernel(
    P, G, A, DX, SUMS, ALPHA_SUMS, n, chunks, inner, p_outer, p_inner, g_outer, g_inner, dx_outer, dx_inner,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, N: tl.constexpr, ALPHA_GRAD: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    row = item // chunks + tl.zeros((1,), tl.int32)
    cols = (item % chunks) * N + tl.arange(0, N)
    mask = (cols < n)[None, :]
    h = row_alphas(A, row, row >= 0, PER_ROW, ALPHA)
    s = 0.0
    ug = 0.0
    first = (item // chunks).to(tl.int64) * chunks
    for chunk in range(0, chunks, 1024):
        part = chunk + tl.arange(0, 1024)
        at = SUMS + (first + part) * 2
        s += tl.sum(tl.load(at, mask=part < chunks, other=0.0), 0)
        ug += tl.sum(tl.load(at + 1, mask=part < chunks, other=0.0), 0)
    at = row_starts(row, inner, p_outer, p_inner)[:, None] + cols[None, :]
    p = tl.load(P + at, mask=mask, other=0.0).to(tl.float32)
    at = row_starts(row, inner, g_outer, g_inner)[:, None] + cols[None, :]
    g = tl.load(G + at, mask=mask & (p != 0.0), other=0.0).to(tl.float32)
    u = support_power(p, h[:, None], ALPHA)
    g -= ug / tl.where(s > 0.0, s, 1.0)
    at = row_starts(row, inner, dx_outer, dx_inner)[:, None] + cols[None, :]
    tl.store(DX + at, (u * g).to(DX.dtype.element_ty), mask=mask)
    if ALPHA_GRAD:
        gpk, pk, gp, gpl, pl = alpha_sums(p, g, h[:, None])
        one = ALPHA_SUMS + (item + tl.zeros((1,), tl.int32)).to(tl.int64) * 5
        tl.store(one, gpk)
        tl.store(one + 1, pk)
        tl.store(one + 2, gp)
        tl.store(one + 3, gpl)
        tl.store(one + 4, pl)
