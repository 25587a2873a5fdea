"""The entmax transform's kernels against the oracle: every regime of row lengths, layout, alpha, and what is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from adasplash_core import entmax
from adasplash_core.testing import oracle
from adasplash_triton import transform_launch

BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
REGIMES = {"on chip": {}, "in chunks": {"MOST_ON_CHIP": 16, "CHUNK": 256, "LISTED": 32}}
"""Module constants: as they are, and such that short rows are worked on as long ones are."""


@pytest.fixture(params=REGIMES, ids=lambda name: name.replace(" ", "_"))
def _regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REGIMES[request.param].items():
        monkeypatch.setattr(transform_launch, name, value)


def draw(*shape: int, spread: float = 2.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def check(x: torch.Tensor, alpha: float | torch.Tensor, dim: int = -1, bound: float | None = None) -> torch.Tensor:
    """Output and gradients within ``bound`` of the oracle's; returns the output."""
    bound = BOUNDS[x.dtype] if bound is None else bound
    leaves = [x.detach().requires_grad_()]
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.detach().requires_grad_()
        leaves.append(alpha)
    p = entmax(leaves[0], alpha, dim, backend="triton")
    assert p.dtype == x.dtype
    grad = draw(*p.shape, spread=1.0, dtype=x.dtype).flip(-1)
    found = torch.autograd.grad(p, leaves, grad)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = oracle.transform(exact_leaves[0], exact_leaves[1] if len(leaves) == 2 else alpha, dim)
    assert oracle.relative_error(p, exact.detach()) < bound
    want = torch.autograd.grad(exact, exact_leaves, grad.double())
    # The gradient is that of the p which was written: its rounding enters through p^(2 - alpha).
    for got, right in zip(found, want, strict=True):
        assert got.shape == right.shape
        assert oracle.relative_error(got, right) < 10 * bound
    return p.detach()


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("n", [1, 17, 300])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25, 1.0])
def test_lengths_and_alphas(n: int, alpha: float) -> None:
    check(draw(5, n), alpha)


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("spread", [0.0, 0.05, 30.0])
def test_rows_dense_and_very_sparse(spread: float) -> None:
    for alpha in (1.5, 2.0, 1.1):
        check(draw(3, 400, spread=spread) - 100.0, alpha, bound=1e-5 if spread else None)


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = draw(4, 270, dtype=dtype)
    for alpha in (1.5, 2.0, 1.3):
        p = entmax(x, alpha, backend="triton")
        exact = oracle.transform(x, alpha)
        torch.testing.assert_close(p.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    check(x, 1.5, bound=2 * BOUNDS[dtype])


LAYOUTS = {
    "first dimension": (lambda: draw(40, 9), 0),
    "middle dimension": (lambda: draw(2, 50, 5), 1),
    "transposed": (lambda: draw(2, 6, 50).transpose(0, 1), -1),
    "sliced": (lambda: draw(6, 4, 120)[::2, 1:, 10:100], -1),
    "expanded": (lambda: draw(4, 1, 60).expand(4, 3, 60), -1),
    "three dimensions of rows that do not merge": (lambda: draw(2, 5, 3, 40)[:, ::2, ::2].permute(2, 1, 0, 3), -1),
    "every second entry": (lambda: draw(5, 300)[:, ::2], -1),
    "one dimension": (lambda: draw(90), 0),
}


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    make, dim = LAYOUTS[name]
    x = make()
    p = check(x, 1.5, dim)
    assert p.stride() == torch.empty_like(x).stride() or name == "one dimension"


def test_long_rows_of_distant_entries_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_launch, "MOST_ON_CHIP", 1024)
    x = draw(100, 6)
    p = check(x, 1.5, 0)
    assert p.stride() == x.stride()


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("shape", [(), (1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 3, 1)])
def test_alpha_as_a_tensor_with_gradient(shape: tuple[int, ...]) -> None:
    alpha = torch.linspace(1.0, 2.0, max(1, math.prod(shape)), dtype=torch.float64).reshape(shape)
    if not shape or alpha.numel() == 1:
        alpha = alpha + 0.37
    check(draw(2, 3, 60, spread=1.0), alpha, bound=2e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 0.0, 7.0])
def test_an_alpha_that_only_the_device_knows_is_clamped_and_specialised(alpha: float) -> None:
    x = draw(6, 200)
    p = entmax(x, torch.tensor(alpha), backend="triton")
    torch.testing.assert_close(p, entmax(x, min(max(alpha, 1.0), 2.0), backend="triton"), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("_regime")
@pytest.mark.parametrize("n", [3, 300])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_rows_that_are_not_finite(n: int, alpha: float) -> None:
    x = torch.zeros(7, n)
    x[1] = -math.inf
    x[2, 1:] = -math.inf
    x[3, 0] = x[3, 2] = math.inf
    x[4, 1] = math.nan
    x[5, 0], x[5, n - 1] = math.inf, math.nan
    p = entmax(x, alpha, backend="triton")
    torch.testing.assert_close(p[[0, 6]], torch.full((2, n), 1 / n))
    assert p[1].eq(0).all()
    assert p[2, 0] == 1
    torch.testing.assert_close(p[3, [0, 2]], torch.tensor([0.5, 0.5]))
    assert p[3].count_nonzero() == 2
    assert p[4:6].isnan().all()
    assert not p[:4].isnan().any()


@pytest.mark.usefixtures("_regime")
def test_a_needle_among_many_ties_and_in_a_far_chunk() -> None:
    x = torch.zeros(2, 1500)
    x[0, 1400] = 0.5
    x[1, 700:] = 4.0
    for alpha in (1.5, 2.0):
        check(x, alpha, bound=1e-5)


def test_second_derivatives() -> None:
    x = draw(3, 12, spread=0.5).double().requires_grad_()
    p = entmax(x.float(), 1.5, backend="triton")
    (first,) = torch.autograd.grad((p * p).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    other = x.detach().requires_grad_()
    q = entmax(other, 1.5, backend="torch")
    (first,) = torch.autograd.grad((q * q).sum(), other, create_graph=True)
    (want,) = torch.autograd.grad(first.square().sum(), other)
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-5)


def test_the_operator_keeps_its_contract() -> None:
    x = draw(3, 40).requires_grad_()
    alpha = torch.tensor(1.4, requires_grad=True)
    torch.library.opcheck(
        torch.ops.adasplash.entmax_forward.default,
        (x, alpha, "triton", "any"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    p = draw(3, 40).softmax(-1)
    torch.library.opcheck(
        torch.ops.adasplash.entmax_backward.default,
        (p, p, torch.tensor(1.4), "triton", "any", True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_empty() -> None:
    for shape in ((0, 5), (3, 0), (2, 0, 4)):
        x = torch.empty(shape, requires_grad=True)
        p = entmax(x, 1.5, backend="triton")
        assert p.shape == shape
        p.sum().backward()
        assert x.grad is not None
