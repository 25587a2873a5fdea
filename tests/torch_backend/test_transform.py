"""The entmax transform against the ``entmax`` package and its own definition."""

from __future__ import annotations

import math

import entmax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash_torch.transform import transform_forward

CLASSES = {1.0: "1", 1.5: "1.5", 2.0: "2"}


def transform(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return transform_forward(x, torch.tensor(alpha, dtype=torch.float64), CLASSES.get(alpha, "other"))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 700),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
    transposed=st.booleans(),
    offset=st.sampled_from([0.0, -1e3]),
)
def test_agrees_with_the_sorting_algorithms(n: int, scale: float, seed: int, transposed: bool, offset: float) -> None:
    shape = (n, 3, 2) if transposed else (2, 3, n)
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    x = x.transpose(0, 2) if transposed else x
    torch.testing.assert_close(transform(x, 1.5), entmax.entmax15(x, dim=-1), rtol=0, atol=1e-11)
    torch.testing.assert_close(transform(x, 2.0), entmax.sparsemax(x, dim=-1), rtol=0, atol=1e-11)
    torch.testing.assert_close(transform(x, 1.0), x.softmax(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.5, 1.7, 1.95, 2.0])
def test_agrees_with_bisection(alpha: float) -> None:
    x = 3 * torch.randn(40, 513, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(transform(x, alpha), entmax.entmax_bisect(x, alpha=alpha, n_iter=100), rtol=0, atol=1e-12)


def test_one_alpha_per_row() -> None:
    x = torch.randn(4, 5, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alpha = torch.tensor([1.0, 1.2, 1.5, 2.0], dtype=torch.float64).view(4, 1, 1)
    p = transform_forward(x, alpha, "any")
    for i in range(4):
        torch.testing.assert_close(p[i], transform(x[i], float(alpha[i])), rtol=1e-11, atol=1e-14)


def test_a_tensor_of_equal_alphas_takes_the_fast_way_to_the_same_result() -> None:
    x = torch.randn(8, 2000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(transform_forward(x, torch.full((8, 1), 1.5), "any"), transform(x, 1.5), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(4)).to(dtype)
    p = transform(x, 1.5)
    assert p.dtype == dtype
    exact = transform(x.double(), 1.5)
    torch.testing.assert_close(p.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("n", [3, 400])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_rows_that_are_not_finite(n: int, alpha: float) -> None:
    x = torch.zeros(5, n)
    x[1] = -math.inf
    x[2, 1:] = -math.inf
    x[3, 0] = x[3, 2] = math.inf
    x[4, 1] = math.nan
    p = transform(x, alpha)
    torch.testing.assert_close(p[0], torch.full((n,), 1 / n))
    assert p[1].eq(0).all()
    assert p[2, 0] == 1
    torch.testing.assert_close(p[3, [0, 2]], torch.tensor([0.5, 0.5]))
    assert p[3].count_nonzero() == 2
    assert p[4].isnan().all()
    assert not p[:4].isnan().any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert transform(torch.empty(shape), 1.5).shape == shape
