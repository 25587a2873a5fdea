"""Thresholds: every method finds the root to the dtype's last bits, on rows chosen to be hard."""

from __future__ import annotations

import math

import pytest
import torch

from adasplash_core.transform_grad import log_excess
from adasplash_torch.solver import ClosedFormRule, GeneralRule, SoftmaxRule, rule_for, threshold

ALPHAS = [1.0, 1 + 1e-6, 1.001, 1.1, 1.25, 1.5, 1.6, 1.75, 1.95, 2.0]


def rows_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16, 1000, generator=generator, dtype=torch.float64)
    return {
        "normal": normal,
        "spread": 10 * normal,
        "constant": torch.full((4, 1000), -7.25, dtype=torch.float64),
        "one key": normal[:, :1],
        "two clusters": torch.where(normal > 0.5, 0.0, -0.6) + 1e-3 * normal,
        "exponential": -torch.empty(16, 1000, dtype=torch.float64).exponential_(generator=generator),
        "ties at the top": normal.clamp(max=1.0),
        "huge": 1e6 * normal,
        "far offset": normal.round() + 2.0**20,
        "masked": normal.masked_fill(torch.arange(1000) % 3 == 0, -math.inf),
    }[kind]


KINDS = [
    "normal", "spread", "constant", "one key", "two clusters", "exponential", "ties at the top", "huge", "far offset", "masked",
]  # fmt: skip


def weights_by_bisection(scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """The definition, in float64: halve [max - 1, max] for tau until nothing moves; softmax for alpha = 1."""
    if alpha == 1:
        return scores.softmax(-1)
    beta = alpha - 1
    below = beta * (scores.amax(-1, keepdim=True) - scores)
    low, high = torch.zeros_like(below[..., :1]), torch.full_like(below[..., :1], math.log(scores.shape[-1]))

    def p(lam: torch.Tensor) -> torch.Tensor:
        return (torch.log1p(-(below * torch.exp(beta * lam)).clamp(max=1)) / beta - lam).exp()

    for _ in range(80):
        middle = (low + high) / 2
        too_much = p(middle).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return p((low + high) / 2)


def solve(scores: torch.Tensor, alpha: float, iterations: int = 64) -> tuple[torch.Tensor, float, int]:
    rule = rule_for(alpha, scores.dtype, early_stop=True)
    drop = scores.amax(-1, keepdim=True) - scores
    solution = rule.solve(drop, iterations)
    p = rule.weights(drop, solution.peak, out=torch.empty_like(drop))
    return p, float(solution.residual.max()), solution.iterations


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-13), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_weights_are_exact_to_rounding(kind: str, alpha: float, dtype: torch.dtype, bound: float) -> None:
    scores = rows_of(kind).to(dtype)
    p, residual, iterations = solve(scores, alpha)
    exact = weights_by_bisection(scores.double(), alpha)
    assert float((p.double() - exact).norm() / exact.norm()) < bound
    assert float((p.sum(-1) - 1).abs().max()) < 20 * torch.finfo(dtype).eps
    assert residual < 100 * torch.finfo(dtype).eps
    assert iterations <= 20


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_closed_form_needs_few_steps_on_normal_rows(alpha: float) -> None:
    assert solve(rows_of("normal").float(), alpha)[2] <= 8


def test_few_iterations_leave_a_residual_that_says_so() -> None:
    scores = rows_of("normal")
    residuals = [solve(scores, 1.25, iterations)[1] for iterations in (1, 2, 3, 10)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] > 0.1
    assert residuals[-1] < 1e-13


@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("method", ["halley", "newton", "hybrid"])
@pytest.mark.parametrize("kind", ["normal", "two clusters", "exponential", "constant"])
def test_every_method_finds_the_same_threshold(kind: str, method: str, alpha: float) -> None:
    scores = rows_of(kind)
    found, used = threshold(scores, alpha, 200, method), threshold(scores, alpha)  # type: ignore[arg-type]
    torch.testing.assert_close(found.tau, used.tau, rtol=0, atol=1e-12)


def test_tau_is_in_z_units_and_is_log_sum_exp_for_softmax() -> None:
    scores = rows_of("normal")
    for alpha in (1.25, 1.5, 2.0):
        tau = threshold(scores, alpha).tau[:, None]
        total = ((alpha - 1) * scores - tau).clamp(min=0).pow(1 / (alpha - 1)).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(threshold(scores, 1.0).tau, scores.logsumexp(-1))


@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.75, 2.0])
def test_the_bound_from_some_keys_never_cuts_into_the_support(alpha: float) -> None:
    scores = rows_of("normal")
    rule = rule_for(alpha, scores.dtype, early_stop=True)
    drop = scores.amax(-1, keepdim=True) - scores
    exact = rule.reach(rule.solve(drop, 64).peak)
    for steps in range(5):
        some = torch.cat([drop.sort(-1).values[:, :1], drop[:, ::7]], -1)
        assert bool((rule.bound(some, steps) >= exact * (1 - 1e-14)).all())


def test_rows_without_keys_have_weight_nowhere() -> None:
    drop = torch.full((2, 5), math.inf)
    for alpha in (1.0, 1.25, 1.5, 2.0):
        rule = rule_for(alpha, torch.float32, early_stop=True)
        peak = rule.solve(drop, 10).peak
        assert peak.tolist() == [[0.0], [0.0]]
        assert rule.weights(drop, peak, out=torch.empty_like(drop)).tolist() == [[0.0] * 5] * 2
        assert rule.tau(torch.zeros(2, 1), peak).tolist() == [[0.0], [0.0]]


def test_one_alpha_per_row_agrees_with_one_alpha_for_all() -> None:
    scores = rows_of("normal")[: len(ALPHAS)]
    drop = scores.amax(-1, keepdim=True) - scores
    rule = rule_for(torch.tensor(ALPHAS, dtype=torch.float64)[:, None], torch.float64, early_stop=False)
    peak = rule.solve(drop, 20).peak
    p, u = rule.weights(drop, peak, out=torch.empty_like(drop)), torch.empty_like(drop)
    rule.support_power(p, out=u)
    for i, alpha in enumerate(ALPHAS):
        single = rule_for(alpha, torch.float64, early_stop=True)
        alone = single.weights(drop[i : i + 1], single.solve(drop[i : i + 1], 64).peak, out=torch.empty(1, 1000).double())
        torch.testing.assert_close(p[i : i + 1], alone, rtol=1e-12, atol=1e-300)
        torch.testing.assert_close(u[i : i + 1], single.support_power(alone), rtol=1e-10, atol=1e-9)


def test_alpha_is_clamped_and_the_special_ones_have_their_own_rules() -> None:
    assert isinstance(rule_for(0.5, torch.float32, True), SoftmaxRule)
    assert isinstance(rule_for(1.5, torch.float32, True), ClosedFormRule)
    sparsemax = rule_for(3.0, torch.float32, True)
    assert isinstance(sparsemax, ClosedFormRule)
    assert sparsemax.beta == 1.0
    per_row = rule_for(torch.tensor([[0.5], [7.0]]), torch.float32, False)
    assert isinstance(per_row, GeneralRule)
    assert isinstance(per_row.beta, torch.Tensor)
    assert per_row.beta.tolist() == [[0.0], [1.0]]


def test_log_excess_keeps_its_digits_down_to_softmax() -> None:
    log_p = -torch.logspace(-8, 1.5, 60, dtype=torch.float64)
    torch.testing.assert_close(log_excess(log_p, 0.0), log_p.square() / 2, rtol=1e-15, atol=0)
    for beta in (1e-9, 1e-3, 0.1, 0.5, 1.0):
        y = -beta * log_p
        series = sum(y**k / float(math.factorial(k + 2)) for k in range(60))
        wide = y > 20  # the series itself runs out there
        expected = torch.where(wide, (torch.exp(y) - 1 - y) / beta**2, log_p.square() * series)
        torch.testing.assert_close(log_excess(log_p, beta), expected, rtol=1e-13, atol=0)
