"""The entmax transform at sizes that only a GPU can do, against the oracle."""

from __future__ import annotations

import pytest
import torch

from adasplash_core import entmax
from adasplash_core.testing import oracle
from adasplash_core.testing.inputs import poisoned_memory
from tests.triton_backend.gpu.machine import COMPILER, DEVICE, ON_GPU, error, size

BOUNDS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LENGTHS = [1, 7, 64, 250, 1000, 4096, 5000, 16384, 40000, 1 << 17] if ON_GPU else [1, 7, 250]


def draw(*shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(DEVICE, dtype)


def check(x: torch.Tensor, alpha: float | torch.Tensor, dim: int = -1) -> None:
    leaves = [x.detach().requires_grad_(), *([alpha] if isinstance(alpha, torch.Tensor) else [])]
    with poisoned_memory():
        p = entmax(leaves[0], alpha, dim, backend="triton")
        grad = draw(*p.shape, dtype=p.dtype).roll(1, dim)
        found = torch.autograd.grad(p, leaves, grad)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = oracle.transform(exact_leaves[0], exact_leaves[1] if len(leaves) == 2 else alpha, dim)
    # float16 has an absolute step too, 2^-24, which is much of the weights of long dense rows.
    step = 2.0**-24 * x.numel() ** 0.5 / float(exact.norm()) if x.dtype == torch.float16 else 0.0
    bound = BOUNDS[x.dtype] + step
    assert error(p, exact) < bound
    want = torch.autograd.grad(exact, exact_leaves, grad.double())
    settled = torch.ones_like(exact, dtype=torch.bool)
    if not isinstance(alpha, torch.Tensor) and alpha > 1.5:
        # The gradient jumps where an entry enters the support: rows with one on the edge say nothing.
        settled = ((p > 0) == (exact > 0)).all(dim, keepdim=True)
        assert settled.float().mean() > 0.9
    for i, (got, right) in enumerate(zip(found, want, strict=True)):
        keep = settled if i == 0 else True
        assert error(got * keep, right * keep) < 10 * bound


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25, 1.0])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_rows(n: int, dtype: torch.dtype, alpha: float, spread: float) -> None:
    check(draw(size(37, 3), n, spread=spread, dtype=dtype), alpha)


@pytest.mark.parametrize("n", [size(3000, 40), size(600, 30), size(100, 20)])
def test_other_dimensions(n: int) -> None:
    check(draw(2, n, size(48, 5), spread=3.0), 1.5, dim=1)
    check(draw(n, size(65, 5), spread=3.0, dtype=torch.float16), 2.0, dim=0)


@pytest.mark.parametrize("n", [size(900, 60), size(70000, 200)])
def test_alpha_of_each_row_with_gradient(n: int) -> None:
    check(draw(5, n), torch.linspace(1, 2, 5, device=DEVICE)[:, None].requires_grad_())
    check(draw(5, n), torch.tensor(1.3, device=DEVICE, requires_grad=True))


@pytest.mark.skipif(not ON_GPU, reason="minutes, interpreted")
def test_a_million_entries() -> None:
    for alpha in (1.5, 2.0, 1.1):
        check(draw(2, (1 << 20) + 3, spread=2.0), alpha)


@pytest.mark.skipif(not ON_GPU, reason="a GPU's own")
def test_graphs_and_no_waiting() -> None:
    for n in (500, 70000):
        x = draw(8, n)
        entmax(x, 1.5, backend="triton")
        torch.cuda.set_sync_debug_mode("error")
        try:
            entmax(x, 1.5, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            p = entmax(x, 1.5, backend="triton")
        x.copy_(draw(8, n, spread=3.0).flip(0))
        graph.replay()
        assert torch.equal(p, entmax(x, 1.5, backend="triton"))


def test_compiled_in_one_graph_it_equals_eager() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: entmax(x * 2, 1.5, 0, backend="triton").square(), fullgraph=True, backend=COMPILER)
    x = draw(size(300, 40), 6).requires_grad_()
    found, want = compiled(x), entmax(x * 2, 1.5, 0, backend="triton").square()
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (found, want)))


def test_float64_is_left_to_the_reference() -> None:
    x = draw(4, 30).double()
    assert error(entmax(x, 1.5), oracle.transform(x, 1.5)) < 1e-12
