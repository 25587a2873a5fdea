"""The solve ends once another look at the keys would tell nothing: rows of every kind end near the solution, most after few looks."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_triton.kernels.evaluate import solve_tile
from tests.triton_backend.interpreted.test_passes import SMALL, check, lengths

ROWS, KEYS = 64, 256
TOL = 2e-3


@triton.jit
def solve_kernel(X, M, C, tol, max_steps, ROWS: tl.constexpr, KEYS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    x = tl.load(X + rows[:, None] * KEYS + tl.arange(0, KEYS)[None, :])
    m, c = solve_tile(x, KEYS, 0.5, tol, max_steps, 15, False)
    tl.store(M + rows, m)
    tl.store(C + rows, c)


def solve(x: torch.Tensor, max_steps: int = 40) -> torch.Tensor:
    """u (ROWS, KEYS) float64 at the threshold that the kernel ends with."""
    m, c = torch.empty(ROWS), torch.empty(ROWS)
    solve_kernel[(1,)](x, m, c, TOL, max_steps, ROWS, KEYS)
    return (x.double() - m.double()[:, None] + c.double()[:, None]).clamp(min=0)


def exact(x: torch.Tensor) -> torch.Tensor:
    """u in float64, by bisection."""
    x = x.double()
    low, high = x.max(1, keepdim=True).values - 1, x.max(1, keepdim=True).values
    for _ in range(60):
        middle = (low + high) / 2
        above = (x - middle).clamp(min=0).square().sum(1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (x - low).clamp(min=0)


def two_clusters(r: torch.Generator) -> torch.Tensor:
    first = torch.randint(1, KEYS, (ROWS, 1), generator=r)
    gap = -1.2 * torch.rand(ROWS, 1, generator=r)
    width = 10 ** (-4 * torch.rand(ROWS, 1, generator=r))
    return torch.where(torch.arange(KEYS) < first, 0.0, gap) + 0.1 * width * torch.randn(ROWS, KEYS, generator=r)


def three_clusters(r: torch.Generator) -> torch.Tensor:
    place = torch.rand(ROWS, KEYS, generator=r)
    shares = 10 ** (-2 * torch.rand(2, ROWS, 1, generator=r))
    second = -0.9 * torch.rand(ROWS, 1, generator=r)
    third = second - 0.3 * torch.rand(ROWS, 1, generator=r)
    x = torch.where(place < shares[0], 0.0, torch.where(place < shares.sum(0), second, third))
    return x + 1e-3 * torch.randn(ROWS, KEYS, generator=r)


def one_large_and_many_small(r: torch.Generator) -> torch.Tensor:
    x = -1.0 + 0.2 * torch.rand(ROWS, 1, generator=r) * torch.rand(ROWS, KEYS, generator=r)
    x[:, 7] = 0.0
    return x


KINDS = {
    "two clusters": two_clusters,
    "three clusters": three_clusters,
    "one large, many small": one_large_and_many_small,
    "exponential": lambda r: (
        -torch.empty(ROWS, KEYS).exponential_(generator=r) * 10 ** (2 * torch.rand(ROWS, 1, generator=r) - 2)
    ),
    "uniform": lambda r: -torch.rand(ROWS, KEYS, generator=r) * 10 ** (2 * torch.rand(ROWS, 1, generator=r) - 1),
    "normal": lambda r: torch.randn(ROWS, KEYS, generator=r) * 10 ** (3 * torch.rand(ROWS, 1, generator=r) - 2),
    "equal": lambda r: torch.zeros(ROWS, KEYS) + torch.randn(ROWS, 1, generator=r),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sums_end_within_the_tolerance_and_gradient_weights_near_it(kind: str) -> None:
    generator = torch.Generator()
    seed = generator.seed()
    x = KINDS[kind](generator).float()
    u, want = solve(x), exact(x)
    assert ((u.square().sum(1) - 1).abs() <= TOL).all(), seed
    assert ((u / u.sum(1, keepdim=True) - want / want.sum(1, keepdim=True)).abs().sum(1) <= 10 * TOL).all(), seed


@pytest.mark.parametrize(("spread", "looks"), [(0.15, 4), (0.5, 4), (2.0, 3)])
def test_looks_that_would_only_confirm_are_not_taken(spread: float, looks: int) -> None:
    """As of scores with 64 dimensions and queries scaled by 0.3, 1 and 4: one look fewer than until sum p is seen to be 1."""
    x = spread * torch.randn(ROWS, KEYS, generator=torch.Generator().manual_seed(3))
    assert torch.equal(solve(x, looks), solve(x))
    assert looks_until_seen(x) > looks


def looks_until_seen(x: torch.Tensor) -> int:
    x = x.double()
    tau = x.max(1, keepdim=True).values - 1
    for look in range(1, 40):
        u = (x - tau).clamp(min=0)
        f, s = u.square().sum(1, keepdim=True), u.sum(1, keepdim=True)
        if ((f - 1).abs() <= TOL).all():
            return look
        tau = tau + (f - f.sqrt()) / s
    raise AssertionError("no solution")


def unlike_the_sample(sampled: float, others: float) -> AttentionCall:
    """Rows over 64 tiles of 16 keys, of which an estimate sees each fourth, whose keys are larger or smaller than the rest."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 1, n, 16, generator=generator) for n in (64, 64 * 16, 64 * 16))
    tile = torch.arange(64 * 16) // 16
    key = key * torch.where(tile % 4 == 0, sampled, others)[:, None]
    return make_call(query, key, value, return_stats=True)


@pytest.mark.parametrize(("sampled", "others"), [(0.3, 0.3), (3.0, 0.1), (0.1, 3.0), (0.0, 1.0)])
def test_an_estimate_from_keys_unlike_the_others_costs_looks_and_nothing_else(sampled: float, others: float) -> None:
    found = check(unlike_the_sample(sampled, others), **{**SMALL, "list_percent": 0, "least_list": 0, "dense_percent": 0})
    assert (lengths(found) == -1).all()
