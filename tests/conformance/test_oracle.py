"""The oracle against others: the entmax package, a loop over single entries, finite differences, and the shared mask rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash_core import dropout, masking
from adasplash_core.backend import AttentionCall
from adasplash_core.call import make_call
from adasplash_core.testing import oracle
from tests.conformance import strategies

DOUBLE = torch.float64
_random = strategies.random


class TestTransform:
    @pytest.mark.parametrize("alpha", [1.01, 1.2, 1.5, 1.8, 2.0])
    def test_agrees_with_the_entmax_package(self, alpha: float) -> None:
        entmax = pytest.importorskip("entmax")
        x = 3 * _random(20, 50)
        torch.testing.assert_close(oracle.transform(x, alpha), entmax.entmax_bisect(x, alpha, n_iter=100), rtol=0, atol=1e-13)

    def test_alpha_of_one_is_softmax_and_its_limit(self) -> None:
        x = 3 * _random(20, 50)
        torch.testing.assert_close(oracle.transform(x, 1.0), x.softmax(-1))
        # The first-order term of the difference is (alpha - 1) dp/dalpha, at most a few times alpha - 1.
        for alpha in (1 + 1e-4, 1 + 1e-6, 1 + 1e-8):
            assert (oracle.transform(x, alpha) - x.softmax(-1)).abs().max() < 3 * (alpha - 1)

    @pytest.mark.parametrize("alpha", [1.0, 1 + 1e-6, 1.3, 1.5, 1.9, 2.0])
    @pytest.mark.parametrize("shift", [0.0, 1e6])
    def test_sums_to_one_whatever_the_scores(self, alpha: float, shift: float) -> None:
        x = (
            torch.stack([_random(64), torch.zeros(64, dtype=DOUBLE), 1e4 * _random(64), -(_random(64).abs().log() ** 2)])
            + shift
        )
        x[0, ::3] = -torch.inf
        p = oracle.transform(x, alpha)
        torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=DOUBLE), rtol=1e-12, atol=0)
        assert (p >= 0).all()
        assert (p[0, ::3] == 0).all()
        torch.testing.assert_close(p[1], torch.full((64,), 1 / 64, dtype=DOUBLE), rtol=1e-9, atol=0)

    def test_dim_and_broadcast_alpha(self) -> None:
        x, alpha = _random(3, 7, 4), torch.tensor([1.2, 1.5, 2.0], dtype=DOUBLE).view(3, 1, 1)
        p = oracle.transform(x, alpha, dim=1)
        for i in range(3):
            torch.testing.assert_close(p[i], oracle.transform(x[i].T, float(alpha[i])).T)

    @pytest.mark.parametrize("alpha", [1.01, 1.3, 1.7])
    def test_gradients_in_scores_and_alpha(self, alpha: float) -> None:
        x = _random(3, 9).requires_grad_()
        alphas = torch.full((3, 1), alpha, dtype=DOUBLE, requires_grad=True)
        assert torch.autograd.gradcheck(oracle.transform, (x, alphas))

    @pytest.mark.parametrize(("alpha", "step"), [(1.0, 1e-5), (1 + 1e-6, 1e-5), (1.5, 1e-5), (2.0, -1e-5)])
    def test_alpha_gradient_at_the_special_points(self, alpha: float, step: float) -> None:
        """At the ends from inside, to second order; gradcheck would step outside or off the closed forms."""
        x, weight = 2 * _random(6, 30), _random(6, 30, seed=1)

        def f(a: float) -> torch.Tensor:
            return (oracle.transform(x, a) * weight).sum(-1)

        at = torch.full((6, 1), alpha, dtype=DOUBLE, requires_grad=True)
        (oracle.transform(x, at) * weight).sum().backward()
        differences = (-3 * f(alpha) + 4 * f(alpha + step) - f(alpha + 2 * step)) / (2 * step)
        assert at.grad is not None
        torch.testing.assert_close(at.grad[:, 0], differences, rtol=1e-5, atol=1e-7)


def _entry_by_entry(call: AttentionCall) -> torch.Tensor:
    """Attention as its definition reads: one row at a time, one key at a time, bisection on the textbook formula."""
    batch, heads, q_len, _ = call.query.shape
    kv_len = call.key.shape[2]
    out = torch.zeros(batch, heads, q_len, call.value.shape[3], dtype=DOUBLE)
    for b in range(batch):
        end = kv_len if call.kv_lengths is None else min(int(call.kv_lengths[b]), kv_len)
        start = 0 if call.kv_starts is None else int(call.kv_starts[b])
        if call.spec.causal_alignment == "bottom_right":
            offset = end - q_len
        else:
            offset = call.query_offset if isinstance(call.query_offset, int) else int(call.query_offset[b])
        for h in range(heads):
            slope = 0.0 if call.alibi_slopes is None else float(call.alibi_slopes[h])
            alpha = float(call.alpha if call.alpha.ndim == 0 else call.alpha[h])
            kv_head = h // (heads // call.key.shape[1])
            for i in range(q_len):
                keys, scores = [], []
                for j in range(start, end):
                    right = j - (i + offset)
                    if call.spec.causal and right > 0:
                        continue
                    if call.window[0] >= 0 and -right > call.window[0]:
                        continue
                    if call.window[1] >= 0 and right > call.window[1]:
                        continue
                    if call.spec.mask == "key" and not call.attn_mask[b % call.attn_mask.shape[0], j]:
                        continue
                    bias = 0.0
                    if call.spec.mask in ("bool", "additive"):
                        entry = call.attn_mask.expand(batch, heads, q_len, kv_len)[b, h, i, j]
                        if call.spec.mask == "bool" and not entry:
                            continue
                        bias = float(entry) if call.spec.mask == "additive" else 0.0
                    if bias == -math.inf:
                        continue
                    keys.append(j)
                    scores.append(call.scale * float(call.query[b, h, i] @ call.key[b, kv_head, j]) + bias - slope * abs(right))
                for j, p in zip(keys, _weights(scores, alpha), strict=True):
                    if call.dropout_p:
                        kept = dropout.keep(call.dropout_seed, b * heads + h, torch.tensor(i), torch.tensor(j), call.dropout_p)
                        p = p / (1 - call.dropout_p) if kept else 0.0
                    out[b, h, i] += p * call.value[b, kv_head, j]
    return out


def _weights(scores: list[float], alpha: float) -> list[float]:
    if not scores:
        return []
    top = max(scores)
    if alpha == 1:
        e = [math.exp(s - top) for s in scores]
        return [x / sum(e) for x in e]
    z = [(alpha - 1) * (s - top) for s in scores]
    low, high = -1.0, 0.0
    for _ in range(60):
        tau = (low + high) / 2
        total = sum(max(x - tau, 0.0) ** (1 / (alpha - 1)) for x in z)
        low, high = (tau, high) if total > 1 else (low, tau)
    return [max(x - low, 0.0) ** (1 / (alpha - 1)) for x in z]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(strategies.calls())
def test_agrees_with_the_definition_entry_by_entry(call: AttentionCall) -> None:
    torch.testing.assert_close(oracle.attention(call).out, _entry_by_entry(call), rtol=1e-9, atol=1e-10)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strategies.calls())
def test_its_masks_and_the_shared_rules_agree(call: AttentionCall) -> None:
    """The oracle's dense masks and ``masking.row_intervals`` are written independently of each other."""
    plain = replace(call, spec=replace(call.spec, mask="none"), attn_mask=None)
    rows, key = torch.arange(call.query.shape[2]), torch.arange(call.key.shape[2])
    lo, hi, diagonal = masking.row_intervals(call)
    shared = (key >= lo[..., None]) & (key < hi[..., None])
    seen = oracle.visible(plain, rows)[:, 0]
    assert torch.equal(shared.expand_as(seen), seen)
    assert torch.equal(diagonal.expand(seen.shape[:2]), oracle.diagonal(call, rows)[:, 0].expand(seen.shape[:2]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=5), st.data())
def test_packed_sequences_are_the_same_sequences_alone(q_lengths: list[int], data: st.DataObject) -> None:
    k_lengths = data.draw(st.lists(st.integers(0, 5), min_size=len(q_lengths), max_size=len(q_lengths)))
    alignment = data.draw(st.sampled_from(["top_left", "bottom_right"]))
    q_places, k_places = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths))
    query, key, value = (
        _random(1, 2, sum(q_lengths), 4),
        _random(1, 2, sum(k_lengths), 4, seed=1),
        _random(1, 2, sum(k_lengths), 4, seed=2),
    )
    options = {"is_causal": True, "causal_alignment": alignment, "window": (3, 0), "alibi_slopes": torch.tensor([0.3, 1.0])}
    packed = make_call(
        query,
        key,
        value,
        cu_seqlens_q=q_places,
        cu_seqlens_k=k_places,
        max_seqlen_q=max(q_lengths),
        max_seqlen_k=max(k_lengths),
        **options,
    )
    out = oracle.attention(packed).out
    for s in range(len(q_lengths)):
        q, k = slice(q_places[s], q_places[s + 1]), slice(k_places[s], k_places[s + 1])
        alone = oracle.attention(make_call(query[:, :, q], key[:, :, k], value[:, :, k], **options)).out
        torch.testing.assert_close(out[:, :, q], alone)


class TestAttention:
    def _call(self, **arguments: object) -> AttentionCall:
        return make_call(_random(2, 2, 6, 4), _random(2, 2, 9, 4, seed=1), _random(2, 2, 9, 5, seed=2), **arguments)

    @pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 1.9])
    def test_gradients_match_finite_differences(self, alpha: float) -> None:
        mask = _random(2, 1, 6, 9, seed=3).requires_grad_()
        call = self._call(alpha=torch.tensor([alpha, 1.2], dtype=DOUBLE, requires_grad=True), attn_mask=mask)
        grad_out = _random(2, 2, 6, 5, seed=4)
        grads = oracle.gradients(call, grad_out)
        for name in ("query", "key", "value", "alpha", "attn_mask"):
            if name == "alpha" and alpha == 1.0:
                continue  # one-sided there, see above
            tensor, grad = getattr(call, name), getattr(grads, name)
            direction = _random(*tensor.shape, seed=5)
            outs = [
                oracle.attention(replace(call, **{name: tensor.detach() + sign * 1e-6 * direction})).out for sign in (1, -1)
            ]
            difference = ((outs[0] - outs[1]) * grad_out).sum() / 2e-6
            torch.testing.assert_close((grad * direction).sum(), difference, rtol=1e-5, atol=1e-7)

    def test_sampled_rows_are_rows_of_the_whole(self) -> None:
        call, rows = self._call(is_causal=True, dropout_p=0.2), [0, 3, 5]
        whole, part = oracle.attention(call), oracle.attention(call, rows)
        torch.testing.assert_close(part.out, whole.out[:, :, rows])
        torch.testing.assert_close(part.tau, whole.tau[:, :, rows])
        assert torch.equal(part.support, whole.support[:, :, rows])
        grad_out = torch.zeros(2, 2, 6, 5, dtype=DOUBLE)
        grad_out[:, :, rows] = 1.0
        sampled = oracle.gradients(call, grad_out[:, :, rows], rows)
        for name in ("query", "key", "value"):
            torch.testing.assert_close(getattr(sampled, name), getattr(oracle.gradients(call, grad_out), name))

    def test_rows_without_a_key_are_zero_with_zero_gradient(self) -> None:
        call = self._call(kv_lengths=torch.tensor([0, 9]))
        found, grads = oracle.attention(call), oracle.gradients(call, torch.ones(2, 2, 6, 5))
        for tensor in (*found, grads.query, grads.key, grads.value):
            assert (tensor[0] == 0).all()
            assert (tensor[1] != 0).any()

    def test_what_hidden_keys_hold_does_not_matter(self) -> None:
        call = self._call(kv_lengths=torch.tensor([4, 9]))
        dirty = replace(call, key=call.key.clone(), value=call.value.clone())
        dirty.key[0, :, 4:], dirty.value[0, :, 4:] = torch.nan, torch.inf
        assert torch.equal(oracle.attention(dirty).out, oracle.attention(call).out)
        assert torch.equal(
            oracle.gradients(dirty, torch.ones(2, 2, 6, 5)).query, oracle.gradients(call, torch.ones(2, 2, 6, 5)).query
        )


def test_relative_error() -> None:
    one, nan = torch.tensor([1.0, 1.0]), torch.tensor([1.0, torch.nan])
    assert oracle.relative_error(one, one) == 0
    assert oracle.relative_error(one * 1.01, one) == pytest.approx(0.01, rel=1e-5)
    assert oracle.relative_error(one, torch.zeros(2)) == pytest.approx(math.sqrt(2))
    assert oracle.relative_error(nan, nan) == 0
    assert oracle.relative_error(nan, one) == oracle.relative_error(one, nan) == math.inf


def test_rounded_ideal_is_the_rounding_of_the_format() -> None:
    exact = _random(1000)
    assert oracle.rounded_ideal(exact, DOUBLE) == 0
    assert 2**-11 < oracle.rounded_ideal(exact, torch.bfloat16) < 2**-8
    assert 2**-27 < oracle.rounded_ideal(exact, torch.float32) < 2**-24
