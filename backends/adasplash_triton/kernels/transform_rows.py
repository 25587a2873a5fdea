"""The entmax transform of rows that fit on chip: one read, one write, and between them the solve in registers.

Forward: p = alpha-entmax(s). Backward, for a gradient g to p, with u = p^(2-alpha) on the support and S = sum u:

    ds = u (g - sum u g / S)                        (Peters et al. 2019, Prop. 2)
    dalpha: :func:`alpha_sums`                      (Correia et al. 2019, Prop. 3, in a form that holds down to alpha = 1)

A program takes ``R`` rows of up to ``N`` entries. ``ALPHA`` 1 is one alpha for all rows that only the device knows: the kernels then
branch to the forms of 1.5 and 2.
"""

import triton
import triton.language as tl

from adasplash_triton.kernels.transform_math import drops, row_alphas, settle_infinities, solve_rows, weights


@triton.jit
def row_starts(rows, inner, outer_stride, inner_stride):
    """Offset of each row's first entry; rows count through (outer, inner)."""
    return (rows // inner).to(tl.int64) * outer_stride + (rows % inner).to(tl.int64) * inner_stride


@triton.jit
def entry_offsets(cols, step, NEAR: tl.constexpr):
    """Offsets (1, N) of entries ``step`` apart; ``NEAR``: 1, in 32 bits, which saves registers."""
    if NEAR:
        offsets = cols[None, :]
    else:
        offsets = (cols.to(tl.int64) * step)[None, :]
    return offsets


@triton.jit
def forward_rows(
    X, P, A, row_count, n, inner, x_outer, x_inner, x_step, p_outer, p_inner, p_step,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, NEAR: tl.constexpr, R: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    TOLERANCE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    cols = tl.arange(0, N)
    inside = rows < row_count
    mask = inside[:, None] & (cols < n)[None, :]
    at = row_starts(rows, inner, x_outer, x_inner)[:, None] + entry_offsets(cols, x_step, NEAR)
    x = tl.load(X + at, mask=mask, other=float("-inf")).to(tl.float32)
    h = row_alphas(A, rows, inside, PER_ROW, ALPHA)
    x, m = settle_infinities(x, tl.max(x, 1))
    d = drops(x, m, ALPHA)
    c = solve_rows(d, h, TOLERANCE, ALPHA, R, N, GROUP)
    p, _ = weights(d, c, h, ALPHA)
    at = row_starts(rows, inner, p_outer, p_inner)[:, None] + entry_offsets(cols, p_step, NEAR)
    tl.store(P + at, p.to(P.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_count"])
def transform_rows_kernel(
    X, P, A, row_count, n, inner, x_outer, x_inner, x_step, p_outer, p_inner, p_step,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, NEAR: tl.constexpr, R: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    TOLERANCE: tl.constexpr,
):  # fmt: skip
    if ALPHA == 1:
        a = tl.load(A).to(tl.float32)
        if a == 1.5:
            forward_rows(
                X, P, A, row_count, n, inner, x_outer, x_inner, x_step, p_outer, p_inner, p_step, 15, PER_ROW, NEAR, R, N, GROUP,
                TOLERANCE,
            )  # fmt: skip
        elif a == 2.0:
            forward_rows(
                X, P, A, row_count, n, inner, x_outer, x_inner, x_step, p_outer, p_inner, p_step, 20, PER_ROW, NEAR, R, N, GROUP,
                TOLERANCE,
            )  # fmt: skip
        else:
            forward_rows(
                X, P, A, row_count, n, inner, x_outer, x_inner, x_step, p_outer, p_inner, p_step, 0, PER_ROW, NEAR, R, N, GROUP,
                TOLERANCE,
            )  # fmt: skip
    else:
        forward_rows(
            X, P, A, row_count, n, inner, x_outer, x_inner, x_step, p_outer, p_inner, p_step, ALPHA, PER_ROW, NEAR, R, N, GROUP,
            TOLERANCE,
        )  # fmt: skip


@triton.jit
def support_power(p, h, ALPHA: tl.constexpr):
    """u = p^(2-alpha) on the support, 0 elsewhere; NaN where p is. h (R, 1)."""
    if ALPHA == 15:
        return tl.sqrt(p)
    if ALPHA == 20:
        return tl.where(p > 0.0, 1.0, p)
    return tl.where(p > 0.0, tl.exp((1.0 - h) * tl.log(tl.where(p > 0.0, p, 1.0))), p)


@triton.jit
def log_excess(log_p, h):
    """k = (e^y - 1 - y) / h^2 with y = -h ln p >= 0, and its limit ln(p)^2 / 2: a series below 1/2, where the quotient cancels."""
    y = -h * log_p
    series = tl.zeros_like(y) + 1.0
    for step in tl.static_range(8):
        series = 1.0 + series * y / (10 - step)
    direct = (tl.exp(y) - 1.0 - y) / tl.where(y > 0.5, y * y, 1.0)
    return log_p * log_p * tl.where(y > 0.5, direct, 0.5 * series)


@triton.jit
def alpha_sums(p, g, h):
    """The row sums (R,) that alpha's gradient is made of, for gradients g whose mean under u was taken away.

    With L = ln p and k of :func:`log_excess`, and S = sum u (see adasplash_core.transform_grad):
    dalpha = -1/S [sum g p k - (sum p k) (sum g p) + h ((sum p k) (sum g p L) - (sum p L) (sum g p k))].
    """
    positive = p > 0.0
    log_p = tl.where(positive, tl.log(tl.where(positive, p, 1.0)), 0.0)
    k = log_excess(log_p, h)
    gp = g * p
    return tl.sum(gp * k, 1), tl.sum(p * k, 1), tl.sum(gp, 1), tl.sum(gp * log_p, 1), tl.sum(p * log_p, 1)


@triton.jit
def alpha_gradient(gpk, pk, gp, gpl, pl, s, h):
    return -(gpk - pk * gp + h * (pk * gpl - pl * gpk)) / tl.where(s > 0.0, s, 1.0)


@triton.jit(do_not_specialize=["row_count"])
def transform_rows_backward_kernel(
    P, G, A, DX, DALPHA, row_count, n, inner, p_outer, p_inner, p_step, g_outer, g_inner, g_step, dx_outer, dx_inner, dx_step,
    ALPHA: tl.constexpr, PER_ROW: tl.constexpr, NEAR: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ALPHA_GRAD: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    cols = tl.arange(0, N)
    inside = rows < row_count
    mask = inside[:, None] & (cols < n)[None, :]
    h = row_alphas(A, rows, inside, PER_ROW, ALPHA)
    at = row_starts(rows, inner, p_outer, p_inner)[:, None] + entry_offsets(cols, p_step, NEAR)
    p = tl.load(P + at, mask=mask, other=0.0).to(tl.float32)
    at = row_starts(rows, inner, g_outer, g_inner)[:, None] + entry_offsets(cols, g_step, NEAR)
    g = tl.load(G + at, mask=mask & (p != 0.0), other=0.0).to(tl.float32)  # where p is 0 nothing asks for the gradient
    u = support_power(p, h[:, None], ALPHA)
    s = tl.sum(u, 1)
    g -= (tl.sum(u * g, 1) / tl.where(s > 0.0, s, 1.0))[:, None]
    at = row_starts(rows, inner, dx_outer, dx_inner)[:, None] + entry_offsets(cols, dx_step, NEAR)
    tl.store(DX + at, (u * g).to(DX.dtype.element_ty), mask=mask)
    if ALPHA_GRAD:
        gpk, pk, gp, gpl, pl = alpha_sums(p, g, h[:, None])
        tl.store(DALPHA + rows, alpha_gradient(gpk, pk, gp, gpl, pl, s, h), mask=inside)
