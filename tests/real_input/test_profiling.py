"""Every statistic against a plain dense computation with the entmax package's exact algorithms."""

from __future__ import annotations

import math

import entmax
import pytest
import torch

from adasplash_core import profiling
from adasplash_core.errors import ArgumentError
from adasplash_core.profiling import BLOCK, advice, profile_layers
from adasplash_core.workload import WorkloadLayer


def make_layer(length=150, heads=4, kv_heads=2, batch=2, sharpness=3.0, index=5, dtype=torch.float32, **facts) -> WorkloadLayer:
    generator = torch.Generator().manual_seed(0)
    make = lambda count: torch.randn(batch, count, length, 16, generator=generator)  # noqa: E731
    query = (make(heads) * sharpness).to(dtype)
    return WorkloadLayer(index, query, make(kv_heads).to(dtype), make(kv_heads).to(dtype), scale=0.25, **facts)


def dense_statistics(layer: WorkloadLayer, alpha: float, allowed: torch.Tensor, bias=None) -> list[dict[str, float]]:
    """One dictionary a head. ``allowed``: (B, H, Lq, Lk); rows without keys, and padding, are all False in it."""
    _, heads, length, _ = layer.query.shape
    keys = layer.key.double().repeat_interleave(heads // layer.key.shape[1], 1)
    scores = layer.query.double() @ keys.mT * layer.scale
    scores = (scores if bias is None else scores + bias).masked_fill(~allowed, -1e9)
    p = (entmax.sparsemax if alpha == 2 else entmax.entmax15)(scores, dim=-1)
    p[~allowed.any(-1)] = 0
    support = p > 0
    top = (scores * (alpha - 1)).amax(-1)
    above_bound = (scores * (alpha - 1) > top[..., None] - 1) & allowed
    # tau from any key with weight: p = (z - tau) ^ (1 / (alpha - 1)), best from the largest
    gap = p.amax(-1) ** (alpha - 1)

    def columns(x):
        return torch.stack([x[..., i : i + BLOCK, :].any(-2) for i in range(0, length, BLOCK)])

    def blocks(x):
        return torch.stack([columns(x)[..., j : j + BLOCK].any(-1) for j in range(0, length, BLOCK)])

    found = []
    for head in range(heads):
        s, a = support[:, head], allowed[:, head]
        seen = a.any(-1)
        found.append(
            {
                "rows": int(seen.sum()),
                "keys_per_row": a.sum().item() / seen.sum().item(),
                "support_per_row": s.sum().item() / seen.sum().item(),
                "support_density": s.sum().item() / a.sum().item(),
                "block_density": blocks(s).sum().item() / blocks(a).sum().item(),
                "column_density": columns(s).sum().item() / columns(a).sum().item(),
                "bound_density": columns(above_bound[:, head]).sum().item() / columns(a).sum().item(),
                "gap": gap[:, head][seen].mean().item(),
            }
        )
    return found


def check(layer, allowed, bias=None):
    profile = profile_layers([layer], [1.5, 2.0])
    for alpha in (1.5, 2.0):
        mine = [p for p in profile.heads if p.alpha == alpha]
        assert [(p.layer, p.head) for p in mine] == [(5, head) for head in range(layer.query.shape[1])]
        for p, expected in zip(mine, dense_statistics(layer, alpha, allowed, bias), strict=True):
            assert {name: getattr(p, name) for name in expected} == pytest.approx(expected, rel=1e-5)
            assert p.residual < 1e-5
            assert 0 < p.gap_quantiles["0.1"] <= p.gap_quantiles["0.5"] <= p.gap_quantiles["0.99"] <= 1 + 1e-5


def everything(layer):
    batch, heads, length, _ = layer.query.shape
    return torch.ones(batch, heads, length, length, dtype=torch.bool)


@pytest.fixture(params=[1 << 20, 1], ids=["one chunk", "chunks of a block"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(profiling, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunks")
class TestStatisticsAreTheDenseOnes:
    def test_without_a_mask(self):
        layer = make_layer()
        check(layer, everything(layer))

    def test_causal(self):
        layer = make_layer(is_causal=True)
        check(layer, everything(layer).tril())

    def test_window(self):
        layer = make_layer(window=(20, 3))
        check(layer, everything(layer).triu(-20).tril(3))

    def test_padding_rows_do_not_count(self):
        layer = make_layer(is_causal=True, kv_starts=torch.tensor([0, 70]), kv_lengths=torch.tensor([90, 150]))
        allowed = everything(layer).tril()
        allowed[0, :, :, 90:] = allowed[0, :, 90:] = False
        allowed[1, :, :, :70] = False
        check(layer, allowed)

    def test_boolean_mask(self):
        mask = torch.rand(2, 1, 150, 150, generator=torch.Generator().manual_seed(1)) > 0.7
        layer = make_layer(attn_mask=mask)
        check(layer, mask.expand(-1, 4, -1, -1))

    def test_additive_mask_by_head(self):
        bias = torch.randn(1, 4, 150, 150, generator=torch.Generator().manual_seed(1))
        bias[..., 100:] = float("-inf")
        layer = make_layer(attn_mask=bias)
        check(layer, (bias > float("-inf")).expand(2, -1, -1, -1), bias.double())

    def test_key_mask_with_holes(self):
        mask = torch.ones(2, 1, 1, 150, dtype=torch.bool)
        mask[0, ..., 5:9] = False
        layer = make_layer(attn_mask=mask)
        check(layer, mask.expand(-1, 4, 150, -1))


def test_another_alpha_and_a_half_precision_layer():
    layer = make_layer(dtype=torch.bfloat16, is_causal=True)
    profile = profile_layers([layer], [1.25])
    assert max(p.residual for p in profile.heads) < 1e-5
    for p in profile.heads:
        assert 0 < p.support_density <= p.column_density <= p.bound_density <= 1
        assert p.column_density <= p.block_density


def test_the_summary_weighs_layers_and_heads_by_what_they_hold():
    short, long = make_layer(length=40, heads=2, index=1), make_layer(length=150, index=2)
    profile = profile_layers([short, long], [2.0])
    (summary,) = profile.summaries
    assert summary.heads == 6
    support = sum(p.support_per_row * p.rows for p in profile.heads)
    assert summary.support_density == pytest.approx(support / sum(p.keys_per_row * p.rows for p in profile.heads))
    assert summary.gap == pytest.approx(sum(p.gap * p.rows for p in profile.heads) / sum(p.rows for p in profile.heads))


def test_sharper_scores_are_sparser():
    density = [profile_layers([make_layer(sharpness=s)], [1.5]).summaries[0].column_density for s in (0.1, 2.0, 20.0)]
    assert density[0] == 1
    assert density[0] > density[1] > density[2]


def test_progress_names_the_layer_just_done():
    done = []
    profile_layers(
        [make_layer(length=8, index=3), make_layer(length=8, index=6)], [2.0], progress=lambda layer: done.append(layer.index)
    )
    assert done == [3, 6]


def test_a_layer_that_is_all_padding_has_no_rows():
    layer = make_layer(length=10, kv_lengths=torch.tensor([0, 0]))
    (head, *_) = profile_layers([layer], [2.0]).heads
    assert head.rows == 0
    assert math.isnan(head.support_density)
    assert head.gap_quantiles == {}


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, float("nan")])
def test_alphas_without_zeros_are_refused(alpha):
    with pytest.raises(ArgumentError, match="1 < alpha <= 2"):
        profile_layers([make_layer(length=8)], [alpha])


def test_no_alpha_is_refused():
    with pytest.raises(ArgumentError, match="must be an alpha"):
        profile_layers([make_layer(length=8)], [])


@pytest.mark.parametrize(("density", "verdict"), [(0.05, "pays."), (0.25, "pays a little"), (0.5, "does not pay")])
def test_advice_follows_the_cost_of_gathering(density, verdict):
    assert verdict in advice(1.5, density)
