"""The public functions on ordinary use."""

from __future__ import annotations

import pytest
import torch

import adasplash_core
from adasplash_core import plugins
from adasplash_core.testing import oracle


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3)])
def test_leading_dimensions_are_as_sdpas(leading: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(*leading, n, 8, dtype=torch.float64) for n in (5, 6, 6))
    out, stats = adasplash_core.attention(q, k, v, alpha=1.0, return_stats=True)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    heads = leading or (1,)
    assert out.shape == (*leading, 5, 8)
    assert stats.tau.shape == stats.support.shape == (*leading, 5)
    assert stats.density.shape == (heads if leading else ())


def test_masks_broadcast_over_more_than_four_dimensions() -> None:
    q = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    mask = torch.rand(1, 3, 1, 5, 5) > 0.4
    mask[..., 0] = True
    out = adasplash_core.attention(q, q, q, attn_mask=mask, alpha=1.0)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask))


def test_softmax_with_gqa_equals_sdpa() -> None:
    q, k, v = (torch.randn(2, h, 6, 8, dtype=torch.float64) for h in (6, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(adasplash_core.attention(q, k, v, is_causal=True, enable_gqa=True, alpha=1), expected)


def test_positional_arguments_are_sdpas() -> None:
    q, k, v = (torch.randn(2, 3, 6, 8, dtype=torch.float64) for _ in range(3))
    expected = adasplash_core.attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(adasplash_core.attention(q, k, v, None, 0.0, True, 0.3, False), expected)


def test_stats_count_the_support_of_the_weights_and_their_share_of_the_allowed_keys() -> None:
    q, k = torch.randn(2, 2, 3, 9, 8, dtype=torch.float64) * 3
    _, stats = adasplash_core.attention(q, k, k, is_causal=True, return_stats=True)
    scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    weights = oracle.transform(scores, 1.5, -1)
    assert torch.equal(stats.support, (weights > 0).sum(-1).int())
    torch.testing.assert_close(stats.density, (weights > 0).sum((-1, -2)).float() / 45)
    rebuilt = (scores / 2 - stats.tau.double()[..., None]).clamp(min=0).square()
    torch.testing.assert_close(rebuilt, weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_transforms_sum_to_one_over_their_dimension(dim: int) -> None:
    x = torch.randn(4, 5, 6)
    for p in (adasplash_core.entmax(x, 1.25, dim), adasplash_core.entmax15(x, dim), adasplash_core.sparsemax(x, dim)):
        torch.testing.assert_close(p.sum(dim), torch.ones_like(p.sum(dim)))
    torch.testing.assert_close(adasplash_core.entmax(x, 1, dim), x.softmax(dim))


def test_transform_gradients_also_to_alpha() -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    for value in (1.0 + 1e-3, 1.3, 1.5, 1.9):
        alpha = torch.full((3, 1, 4), value, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, a: adasplash_core.entmax(x, a, 1), (x, alpha), eps=1e-7, atol=1e-5)


def test_the_alpha_gradient_is_continuous_down_to_softmax() -> None:
    x, weights = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def slope(value: float) -> float:
        alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        return float(torch.autograd.grad((adasplash_core.entmax(x, alpha) * weights).sum(), alpha)[0])

    p = x.softmax(0)
    limit = -(p / 2 * (p.log() ** 2 - (p * p.log() ** 2).sum()) * weights).sum()
    assert slope(1.0) == pytest.approx(float(limit), abs=1e-12)
    for step in (1e-9, 1e-6, 1e-4):
        assert slope(1 + step) == pytest.approx(float(limit), abs=20 * step)


def test_explain_runs_nothing_and_says_backend_config_and_source() -> None:
    x = torch.randn(1, 2, 64, 8)
    explanation = adasplash_core.explain(x, x, x, is_causal=True)
    record = explanation.as_dict()
    assert record["backend"] == "torch"
    assert record["passes"]["forward"]["source"] == "heuristic"
    assert record["spec"]["causal"] is True
    assert "backward" not in record["passes"]
    assert "from the backend's heuristic" in str(explanation)
    assert "backward" in adasplash_core.explain(x.requires_grad_(), x, x).as_dict()["passes"]


def test_list_backends_gives_reasons_or_none() -> None:
    listed = adasplash_core.list_backends()
    assert set(listed) >= set(plugins.registry().backends)
    assert listed["torch"] == []
