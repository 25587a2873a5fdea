"""Thresholds of alpha-entmax, for rows of scores.

Everything is said in score units, relative to the row's maximum M. With beta = alpha - 1:

    drop_j  = M - s_j >= 0                                  (inf for a key that is masked)
    reach   = M - tau / beta                                keys with drop < reach are the support
    p_j     = [beta (reach - drop_j)]_+ ^ (1 / beta)
    peak    = p at the maximum = (beta reach) ^ (1 / beta)

``peak`` lies in [1/n, 1] and is well conditioned for every alpha in [1, 2], so it is what the forward keeps. Near alpha = 1 the power
loses all digits in floating point; with lam = -ln(peak), in [0, ln n], and x_j = beta drop_j exp(beta lam),

    p_j = exp(log1p(-x_j) / beta - lam),        beta -> 0:  exp(-drop_j - lam)

loses none, and softmax is its limit, lam = logsumexp(-drop).

F(reach) = sum_j p_j - 1 increases and is convex for alpha <= 2: Newton's method from a reach that is too large never overshoots, and
the reach of any subset of the keys is too large for the whole row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch

Method = Literal["hybrid", "halley", "newton"]


class Threshold(NamedTuple):
    """Thresholds of rows (...), in z = (alpha - 1) * score units; for alpha = 1 tau is the log-sum-exp of the scores.

    ``residual`` (...): |sum p - 1| where the last step started. ``iterations``: evaluations of sum p.
    """

    tau: torch.Tensor
    residual: torch.Tensor
    iterations: int


class Solution(NamedTuple):
    """``peak`` (R, 1): each row's largest weight; ``residual`` (R, 1) and ``iterations`` as in :class:`Threshold`."""

    peak: torch.Tensor
    residual: torch.Tensor
    iterations: int


class Rule(ABC):
    """alpha-entmax for one alpha, or one per row. Rows are (R, n) tensors of drops; per-row values are (R, 1)."""

    beta: float | torch.Tensor

    def __init__(self, early_stop: bool) -> None:
        self.early_stop = early_stop  # reading residuals on the host would make an accelerator wait

    @abstractmethod
    def solve(self, drop: torch.Tensor, iterations: int, upper: torch.Tensor | None = None) -> Solution:
        """Find the largest weight of each row. ``upper``: a reach known to be large enough. Rows with no key get a peak of 0."""

    @abstractmethod
    def bound(self, drop: torch.Tensor, steps: int) -> torch.Tensor:
        """A reach that is large enough for any row of which ``drop`` is a part: ``steps`` Newton steps from 1 / beta."""

    @abstractmethod
    def reach(self, peak: torch.Tensor) -> torch.Tensor:
        """The reach that belongs to a peak; 0 for 0."""

    @abstractmethod
    def weights(self, drop: torch.Tensor, peak: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """p into ``out`` (may be ``drop``). ``peak`` is broadcastable to ``drop``."""

    @abstractmethod
    def support_power(self, p: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """u = p^(2-alpha) on the support, 0 elsewhere."""

    def is_dense(self) -> bool:
        """Whether rows hardly ever have weights of exactly 0, so that looking for them is a waste."""
        return not isinstance(self.beta, float) or not self.beta >= 0.1  # NaN too

    def tau(self, row_max: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
        """tau in z units from M and the peak, both (R, 1); 0 for rows with no key."""
        return torch.where(peak == 0, 0.0, self.beta * (row_max - self.reach(peak)))


class SoftmaxRule(Rule):
    """alpha = 1: every visible key is in the support."""

    beta: float = 0.0

    def solve(self, drop: torch.Tensor, iterations: int, upper: torch.Tensor | None = None) -> Solution:
        total = drop.neg().exp_().sum(-1, keepdim=True)
        return Solution(torch.where(total == 0, 0.0, 1 / total), torch.zeros_like(total), 1)

    def bound(self, drop: torch.Tensor, steps: int) -> torch.Tensor:
        return drop.new_full((drop.shape[0], 1), math.inf)

    def reach(self, peak: torch.Tensor) -> torch.Tensor:
        return torch.full_like(peak, math.inf).masked_fill_(peak == 0, 0)

    def weights(self, drop: torch.Tensor, peak: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.neg(drop, out=out).exp_().mul_(peak)

    def support_power(self, p: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return p.clone() if out is None else out.copy_(p)

    def tau(self, row_max: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
        return torch.where(peak == 0, 0.0, row_max - torch.log(peak))


class ClosedFormRule(Rule):
    """alpha = 1.5 and 2: with the support known, the reach is the root of a quadratic or linear equation.

    Repeated on the support of the last answer this settles in a few steps; it alternates around the root, so it runs inside a bracket.
    """

    beta: float

    def __init__(self, beta: float, early_stop: bool) -> None:
        super().__init__(early_stop)
        self.beta = beta
        self.squared = beta == 0.5

    def solve(self, drop: torch.Tensor, iterations: int, upper: torch.Tensor | None = None) -> Solution:
        eps = torch.finfo(drop.dtype).eps
        high = drop.new_full((drop.shape[0], 1), 1 / self.beta) if upper is None else upper
        low = torch.full_like(high, max(drop.shape[-1], 1) ** -self.beta / self.beta)
        reach, residual = high, torch.zeros_like(high)
        above = torch.empty_like(drop)
        done = 0
        for done in range(1, iterations + 1):  # noqa: B007
            excess, step = self._step(drop, reach, above)
            residual = excess.abs()
            high, low = torch.where(excess >= 0, reach, high), torch.where(excess < 0, reach, low)
            moved = reach - step
            moved = torch.where((moved >= low) & (moved <= high), moved, (low + high) / 2)
            pending = (residual > 4 * eps) & ((moved - reach).abs() > eps * reach)
            reach = moved
            if self.early_stop and not bool(pending.any()):
                break
        empty = drop.isinf().all(-1, keepdim=True) if drop.shape[-1] == 0 else drop.amin(-1, keepdim=True).isinf()
        return Solution(torch.where(empty, 0.0, self._peak(reach)), torch.where(empty, 0.0, residual), done)

    def _step(self, drop: torch.Tensor, reach: torch.Tensor, above: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """F and the closed-form step (to subtract) at ``reach``. The sums are torch's cascaded ones, good to the last bits."""
        torch.sub(reach, drop, out=above).clamp_(min=0)
        linear = above.sum(-1, keepdim=True)
        if not self.squared:
            excess = linear - 1
            return excess, excess / above.sign_().sum(-1, keepdim=True)
        over = above.square_().sum(-1, keepdim=True) - 4  # p = (reach - drop)^2 / 4
        count = above.sign_().sum(-1, keepdim=True)
        # The root nearer to 0 of count x^2 - 2 linear x + over = 0, in the form that does not cancel.
        return over / 4, over / (linear + (linear.square() - count * over).sqrt_())

    def bound(self, drop: torch.Tensor, steps: int) -> torch.Tensor:
        reach = drop.new_full((drop.shape[0], 1), 1 / self.beta)
        above = torch.empty_like(drop)
        for _ in range(steps):
            torch.sub(reach, drop, out=above).clamp_(min=0)
            linear = above.sum(-1, keepdim=True)
            if self.squared:
                step = (above.square_().sum(-1, keepdim=True) - 4) / (2 * linear)
            else:
                step = (linear - 1) / above.sign_().sum(-1, keepdim=True)
            reach = reach - step.clamp_(min=0).nan_to_num_(0.0)
        return reach

    def _peak(self, reach: torch.Tensor) -> torch.Tensor:
        return (reach / 2).square() if self.squared else reach

    def reach(self, peak: torch.Tensor) -> torch.Tensor:
        return 2 * peak.sqrt() if self.squared else peak

    def weights(self, drop: torch.Tensor, peak: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.sub(self.reach(peak), drop, out=out).clamp_(min=0)
        return out.mul_(0.5).square_() if self.squared else out

    def support_power(self, p: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return torch.sqrt(p, out=out) if self.squared else torch.sign(p, out=out)


class GeneralRule(Rule):
    """Any alpha in [1, 2], one for all rows or one per row (R, 1), solved for lam = -ln(peak) inside a bracket.

    Up to alpha = 1.5 the steps are Halley's in tau (third order), as in AdaSplash (arXiv 2502.12082). Above, F'' is singular where a
    key enters the support, and they are Newton's. Far from the root (sum p > 2) a Newton step on ln(sum p) comes first: it is exact
    where all scores are equal, and for softmax. A step that leaves the bracket is replaced by bisection.
    """

    def __init__(self, beta: float | torch.Tensor, early_stop: bool, method: Method = "hybrid") -> None:
        super().__init__(early_stop)
        self.beta = beta
        self.method = method

    def _log_ratio(
        self, drop: torch.Tensor, lam: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ln(p_j / peak) and 1 - x_j."""
        ratio = torch.mul(drop, self.beta * torch.exp(self.beta * lam)).clamp_(max=1).neg_()
        if isinstance(self.beta, float):
            log_ratio = torch.log1p(ratio, out=out).div_(self.beta)
        else:  # some rows may be softmax's
            softmax = self.beta == 0
            log_ratio = torch.where(softmax, -drop, torch.log1p(ratio) / torch.where(softmax, 1.0, self.beta))
            ratio = torch.where(softmax, 0.0, ratio)
            if out is not None:
                log_ratio = out.copy_(log_ratio)
        return log_ratio, ratio.add_(1)

    def solve(self, drop: torch.Tensor, iterations: int, upper: torch.Tensor | None = None) -> Solution:
        eps, tiny = torch.finfo(drop.dtype).eps, torch.finfo(drop.dtype).tiny
        low = drop.new_zeros((drop.shape[0], 1)) if upper is None else self._lam(upper)
        high = torch.full_like(low, math.log(max(drop.shape[-1], 1)))
        lam, residual = low, torch.zeros_like(low)
        done = 0
        for done in range(1, iterations + 1):  # noqa: B007
            log_ratio, ratio = self._log_ratio(drop, lam)
            p = log_ratio.sub_(lam).exp_()
            total = p.sum(-1, keepdim=True)
            slope = p.div_(ratio.clamp_(min=tiny)).sum(-1, keepdim=True)  # sum p / r  = -d(total)/d(lam)
            excess = total - 1
            residual = excess.abs()
            low, high = torch.where(excess >= 0, lam, low), torch.where(excess < 0, lam, high)
            moved = lam + self._step(total, slope, p, ratio)
            moved = torch.where((moved >= low) & (moved <= high), moved, (low + high) / 2)
            pending = (residual > 4 * eps) & ((moved - lam).abs() > eps * lam)
            lam = moved
            if self.early_stop and not bool(pending.any()):
                break
        empty = drop.isinf().all(-1, keepdim=True) if drop.shape[-1] == 0 else drop.amin(-1, keepdim=True).isinf()
        return Solution(torch.where(empty, 0.0, torch.exp(-lam)), torch.where(empty, 0.0, residual), done)

    def _step(self, total: torch.Tensor, slope: torch.Tensor, p_over_r: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        """The step in lam. A step y in ln(reach) / -beta is a step -log1p(-beta y) / beta in lam."""
        beta, excess = self.beta, total - 1
        newton = excess / slope
        if self.method == "newton" or (isinstance(beta, float) and beta > 0.5 and self.method == "hybrid"):
            step = newton
        else:
            curvature = p_over_r.div_(ratio).sum(-1, keepdim=True)  # sum p / r^2
            step = 2 * excess * slope / (2 * slope.square() - excess * curvature * (1 - beta))
            if isinstance(beta, torch.Tensor) and self.method == "hybrid":
                step = torch.where(beta > 0.5, newton, step)
        if isinstance(beta, float):
            step = torch.log1p(-beta * step) / -beta
        else:
            step = torch.where(beta == 0, step, torch.log1p(-beta * step) / torch.where(beta == 0, -1.0, -beta))
        if self.method != "hybrid":
            return step
        return torch.where(total > 2, total.log() * total / slope, step)

    def bound(self, drop: torch.Tensor, steps: int) -> torch.Tensor:
        lam = drop.new_zeros((drop.shape[0], 1))
        tiny = torch.finfo(drop.dtype).tiny
        for _ in range(steps):
            log_ratio, ratio = self._log_ratio(drop, lam)
            p = log_ratio.sub_(lam).exp_()
            excess = p.sum(-1, keepdim=True) - 1
            step = excess / p.div_(ratio.clamp_(min=tiny)).sum(-1, keepdim=True)
            lam = lam - (torch.log1p(-self.beta * step) / self.beta).clamp_(max=0).nan_to_num_(0.0)
        return self.reach(torch.exp(-lam))

    def _lam(self, reach: torch.Tensor) -> torch.Tensor:
        """A lower bound of the lam that belongs to ``reach``, as near as its rounding, divided by beta, allows."""
        return ((torch.log(self.beta * reach) + 4 * torch.finfo(reach.dtype).eps) / -self.beta).clamp_(min=0)

    def reach(self, peak: torch.Tensor) -> torch.Tensor:
        if isinstance(self.beta, float):
            return peak.pow(self.beta).div_(self.beta)
        return torch.where(peak == 0, 0.0, peak.pow(self.beta) / self.beta)  # inf for softmax's rows

    def weights(self, drop: torch.Tensor, peak: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        lam = torch.log(peak).neg_().clamp_(max=1e4)  # finite for rows with no key, whose drops are all inf
        log_ratio, _ = self._log_ratio(drop, lam, out=out)
        return log_ratio.sub_(lam).exp_()

    def support_power(self, p: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        u = torch.pow(p, 1 - self.beta, out=out)
        return u if isinstance(self.beta, float) else u.mul_(p > 0)  # 0^0 is 1 where beta is 1

    def tau(self, row_max: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
        tau = self.beta * row_max - peak.pow(self.beta)
        if isinstance(self.beta, torch.Tensor):
            tau = torch.where(self.beta == 0, row_max - torch.log(peak), tau)
        return torch.where(peak == 0, 0.0, tau)


def rule_for(alpha: float | torch.Tensor, dtype: torch.dtype, early_stop: bool) -> Rule:
    """The rule for alpha, clamped to [1, 2]: a number, or a float tensor (R, 1) of one per row. ``dtype`` is the scores'."""
    if isinstance(alpha, torch.Tensor):
        return GeneralRule((alpha.clamp(1, 2) - 1).to(dtype), early_stop)  # subtract first: float64 keeps the digits near 1
    beta = min(max(alpha, 1.0), 2.0) - 1.0
    if beta == 0.0:
        return SoftmaxRule(early_stop)
    return ClosedFormRule(beta, early_stop) if beta in (0.5, 1.0) else GeneralRule(beta, early_stop)


def ties_at_infinity(scores: torch.Tensor) -> torch.Tensor:
    """0 where a score is +inf and -inf elsewhere: what rows with +inf mean, its entries sharing the weight."""
    return torch.zeros_like(scores).masked_fill_(scores != math.inf, -math.inf)


def threshold(scores: torch.Tensor, alpha: float, iterations: int = 64, method: Method | None = None) -> Threshold:
    """Thresholds of rows of scores (..., n), n >= 1, floating point and finite or -inf.

    Without ``method`` by what attention uses for this alpha. With it by :class:`GeneralRule`, 1 < alpha <= 2, from tau = max(z) - 1
    and inside a bracket: "halley" and "newton" take that step at every iteration, "hybrid" is what the class describes.
    """
    rows = scores.reshape(-1, scores.shape[-1])
    rule = rule_for(alpha, rows.dtype, early_stop=True) if method is None else GeneralRule(alpha - 1, True, method)
    row_max = rows.amax(-1, keepdim=True)
    row_max = torch.where(row_max == -math.inf, 0.0, row_max)
    solution = rule.solve(row_max - rows, iterations)
    shape = scores.shape[:-1]
    return Threshold(rule.tau(row_max, solution.peak).view(shape), solution.residual.view(shape), solution.iterations)
