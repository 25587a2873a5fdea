"""Derivatives of alpha-entmax, from its output alone.

With p = alpha-entmax(s), u = p^(2-alpha) on the support (0 elsewhere), S = sum u and h = alpha - 1:

    dp_j / ds_k   = u_j (1[j = k] - u_k / S)                                                  (Peters et al. 2019, Prop. 2)
    dp_j / dalpha = (p_j - u_j / S) / h^2 - (e_j - (u_j / S) sum e) / h,   e = p ln p         (Correia et al. 2019, Prop. 3)

The second cancels catastrophically near alpha = 1. Put u = p exp(-h L) with L = ln p, and g = (exp(-h L) - 1 + h L) / h^2. Every
negative power of h then drops out,

    dp_j / dalpha = -(p_j / S) [ (g_j - G) + h (L_j G - g_j E) ],   G = sum p g,  E = sum p L,

which holds for all h >= 0; at h = 0, g = L^2 / 2.
"""

from __future__ import annotations

import torch


def gradients(
    p: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor, alpha_grad: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient to the scores, in ``p``'s dtype, and each row's part (..., 1) of alpha's, in a wide one; None unless ``alpha_grad``."""
    wide = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
    p_wide, grad, alpha = p.to(wide), grad.to(wide), alpha.to(torch.promote_types(wide, alpha.dtype))
    by_row = (grad * alpha_derivative(p_wide, alpha)).sum(-1, keepdim=True) if alpha_grad else None
    return score_gradient(p_wide, grad, alpha).to(p.dtype), by_row


def score_gradient(p: torch.Tensor, grad: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Gradient with respect to the scores. ``p``, ``grad`` (..., n); ``alpha`` broadcastable, size 1 in the last dimension."""
    u = support_power(p, alpha)
    total = u.sum(-1, keepdim=True)
    mean = (u * grad).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)
    return u * (grad - mean)


def support_power(p: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """u = p^(2-alpha) on the support, 0 elsewhere (also at alpha = 2, where 0^0 would be 1)."""
    positive = p > 0
    return torch.where(positive, torch.where(positive, p, 1) ** (2 - alpha).to(p.dtype), 0)


def alpha_derivative(p: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """dp/dalpha at fixed scores: (..., n) like ``p``; ``alpha`` broadcastable to it with size 1 in the last dimension."""
    h = (alpha - 1).to(p.dtype)
    positive = p > 0
    log_p = torch.where(positive, torch.where(positive, p, 1).log(), 0)
    g = log_excess(log_p, h)
    u_sum = (p * torch.exp(-h * log_p)).sum(-1, keepdim=True)
    g_mean = (p * g).sum(-1, keepdim=True)
    log_mean = (p * log_p).sum(-1, keepdim=True)
    return -(p / torch.where(u_sum > 0, u_sum, 1)) * ((g - g_mean) + h * (log_p * g_mean - g * log_mean))


def log_excess(log_p: torch.Tensor, h: float | torch.Tensor) -> torch.Tensor:
    """g above, from ln p: with y = -h ln p >= 0, ln(p)^2 (exp(y) - 1 - y) / y^2, to the last bits down to h = 0."""
    y = -h * log_p
    series = torch.ones_like(y)
    for k in range(14, 2, -1):  # 1 + y/3 (1 + y/4 (1 + ...)): below 1/2 the quotient cancels
        series = 1 + series * y / k
    direct = (torch.expm1(y) - y) / torch.where(y > 0.5, y, 1).square()
    return log_p.square() * torch.where(y > 0.5, direct, 0.5 * series)
