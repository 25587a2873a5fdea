"""The reference backend: the conformance suite, gradcheck through the public function, and the empty calls that the core answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from adasplash_core import attention
from adasplash_core.backend import AttentionCall
from adasplash_core.testing import AttentionConformance
from adasplash_core.testing.target import Target
from adasplash_torch.backend import TorchBackend
from tests.conformance import strategies

DOUBLE = torch.float64


class TestTorchBackend(AttentionConformance):
    backend = TorchBackend()
    devices = ("cpu",)


def _leaf(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).requires_grad_()


def _qkv(q_len: int = 4, kv_len: int = 5, heads: int = 2, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _leaf(2, heads, q_len, 3, seed=1), _leaf(2, kv_heads, kv_len, 3, seed=2), _leaf(2, kv_heads, kv_len, 2, seed=3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strategies.calls())
def test_any_mix_of_arguments_agrees_with_the_oracle(call: AttentionCall) -> None:
    """Forward and backward in float64, for shapes, strides, masks and alphas drawn together."""
    Target(TorchBackend(), "cpu", "float64").check(call)


class TestGradcheck:
    """Numerical against analytical derivatives in q, k, v and alpha, in float64, through ``adasplash_core.attention``."""

    @pytest.mark.parametrize("alpha", [1.05, 1.3, 1.45, 1.6, 1.8])
    def test_alpha_for_all_heads(self, alpha: float) -> None:
        leaves = (*_qkv(), torch.tensor(alpha, dtype=DOUBLE, requires_grad=True))
        assert torch.autograd.gradcheck(lambda q, k, v, a: attention(q, k, v, alpha=a, backend="torch"), leaves)

    def test_alpha_per_head_with_gqa_and_a_causal_mask(self) -> None:
        leaves = (*_qkv(heads=4), torch.tensor([1.1, 1.4, 1.6, 1.3], dtype=DOUBLE, requires_grad=True))
        assert torch.autograd.gradcheck(
            lambda q, k, v, a: attention(q, k, v, alpha=a, is_causal=True, enable_gqa=True, backend="torch"), leaves
        )

    @pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
    def test_the_special_alphas_as_numbers(self, alpha: float) -> None:
        assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, alpha=alpha, backend="torch"), _qkv())

    def test_an_additive_mask(self) -> None:
        leaves = (*_qkv(), _leaf(1, 2, 4, 5, seed=4))
        assert torch.autograd.gradcheck(lambda q, k, v, m: attention(q, k, v, attn_mask=m, alpha=1.3, backend="torch"), leaves)

    def test_lengths_window_and_alibi(self) -> None:
        options: dict[str, Any] = {
            "kv_lengths": torch.tensor([5, 2]),
            "window": (2, 1),
            "alibi_slopes": torch.tensor([0.5, 0.1]),
            "causal_alignment": "bottom_right",
        }
        assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, backend="torch", **options), _qkv())


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 4, 5), (2, 0, 5), (2, 4, 0), (2, 0, 0)])
def test_empty_calls_give_zeros_of_the_right_shape(batch: int, q_len: int, kv_len: int) -> None:
    query, key, value = (
        torch.ones(batch, 2, length, dim, requires_grad=True) for length, dim in ((q_len, 3), (kv_len, 3), (kv_len, 2))
    )
    out, stats = attention(query, key, value, return_stats=True, backend="torch")
    assert out.shape == (batch, 2, q_len, 2)
    assert (out == 0).all()
    assert stats.tau.shape == stats.support.shape == (batch, 2, q_len)
    out.sum().backward()
    for leaf in (query, key, value):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()
