"""The margin below which keys are left out bounds what rounding may do to a score, whatever the products round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from adasplash_triton.kernels.columns import key_max_kernel, score_margin

ROWS, KEYS, DIM = 16, 64, 32
SCALE = -0.37


@triton.jit
def margin_kernel(Q, KEY_MAX, MARGIN, scale, DIM: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, ROWS)
    q = tl.load(Q + rows[:, None] * DIM + tl.arange(0, DIM)[None, :])
    slope = 0.0
    margin, finite = score_margin(q, KEY_MAX, tl.num_programs(0) * 4, scale, slope, tl.num_programs(0), DIM, 16, PRECISION)
    tl.store(MARGIN + rows, tl.where(finite, margin, float("nan")))


def margin_of(query: torch.Tensor, key: torch.Tensor, precision: str) -> np.ndarray:
    sizes, counters, margin = torch.empty(4), torch.empty(4, dtype=torch.int32), torch.empty(ROWS)
    key_max_kernel[(4, 1)](key, sizes, counters, 0, 0, DIM, KEYS, 1, 4, 4, DIM, DIM, 16, precision)
    margin_kernel[(1,)](query, sizes, margin, SCALE, DIM, ROWS, precision)
    return margin.double().numpy()


def truncated(x: np.ndarray) -> np.ndarray:
    """What tensor cores do that ignore the 13 bits that TF32 lacks."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def rounded(x: np.ndarray) -> np.ndarray:
    """To nearest, ties away from zero: ``cvt.rna.tf32.f32``."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def moved(query: torch.Tensor, key: torch.Tensor) -> np.ndarray:
    """The most that scores of a row differ between the two roundings, by row."""
    q, k = query.numpy(), key.numpy()
    return np.abs(SCALE * (truncated(q) @ truncated(k).T - rounded(q) @ rounded(k).T)).max(1)


@pytest.mark.parametrize("magnitude", [(1.0, 1.0), (1e-20, 1e22), (3e18, 1e-19), (1e-30, 1e-25), (1e25, 1e-12)])
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_it_covers_what_truncating_and_rounding_to_tf32_may_differ_by(magnitude: tuple[float, float], spread: float) -> None:
    """Twice, since the threshold is found from scores that have moved as well. ``spread``: of the entries' exponents of 10."""
    generator = torch.Generator().manual_seed(int(spread) + 1)

    def draw(rows: int, size: float) -> torch.Tensor:
        exponents = spread * (torch.rand(rows, DIM, generator=generator) - 0.5)
        return torch.randn(rows, DIM, generator=generator) * 10**exponents * size

    query, key = draw(ROWS, magnitude[0]), draw(KEYS, magnitude[1])
    assert (2 * moved(query, key) <= margin_of(query, key, "tf32")).all()


def test_it_is_no_wider_than_the_worst_case() -> None:
    """Every entry loses all that it can, and all products have one sign; the margin of true fp32 is far too narrow here."""
    query, key = (torch.full((n, DIM), 1 + 2**-10 - 2**-23) for n in (ROWS, KEYS))
    bound, exact = margin_of(query, key, "tf32"), margin_of(query, key, "ieee")
    worst = 2 * moved(query, key)
    assert (worst <= bound).all()
    assert (worst > 0.95 * bound).all()
    assert (worst > 100 * exact).all()


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_keys_that_are_not_finite_are_told(bad: float, precision: str) -> None:
    query, key = torch.ones(ROWS, DIM), torch.ones(KEYS, DIM)
    assert np.isfinite(margin_of(query, key, precision)).all()
    key[37, 5] = bad
    assert np.isnan(margin_of(query, key, precision)).all()
