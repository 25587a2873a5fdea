"""EntmaxAttention: projections around attention(), rotary positions, caches, and ASEntmax's scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from adasplash_core import attention
from adasplash_core.errors import ArgumentError
from adasplash_core.nn import DynamicCache, EntmaxAttention, KVCache, LengthScaling, RotaryEmbedding, StaticCache

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "rotary": {"rotary_base": 100.0},
    "window": {"window": (3, 0)},
    "scaled by length": {"length_scaling": True},
    "all": {"num_kv_heads": 1, "rotary_base": 100.0, "length_scaling": True, "window": (4, 0), "learnable_alpha": True, "bias": True},
}  # fmt: skip


def layer(**options: Any) -> EntmaxAttention:
    torch.manual_seed(0)
    return EntmaxAttention(16, 4, dtype=torch.float64, **options)


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=VARIANTS, ids=str)
def causal(request: pytest.FixtureRequest) -> EntmaxAttention:
    return layer(is_causal=True, **VARIANTS[request.param]).eval()


class TestForward:
    def test_is_attention_between_projections(self) -> None:
        m, x = layer(num_kv_heads=2, bias=True, alpha=1.7), randn(2, 5, 16)
        q, k, v = (p(x).view(2, 5, -1, 4).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
        out = attention(q, k, v, enable_gqa=True, alpha=1.7).transpose(1, 2).reshape(2, 5, 16)  # type: ignore[union-attr]
        torch.testing.assert_close(m(x), m.out_proj(out))

    def test_a_context_of_another_size(self) -> None:
        m = layer(context_dim=6)
        out = m(randn(2, 5, 16), randn(2, 7, 6))
        assert out.shape == (2, 5, 16)

    def test_causal_layers_see_no_future(self, causal: EntmaxAttention) -> None:
        x = randn(2, 8, 16)
        torch.testing.assert_close(causal(x)[:, :5], causal(x[:, :5]))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, causal: EntmaxAttention, side: str) -> None:
        x, padding = randn(2, 6, 16), torch.full((2, 3, 16), 7.0, dtype=torch.float64)
        if side == "left":
            out = causal(torch.cat((padding, x), 1), kv_starts=torch.tensor([3, 3]))[:, 3:]
        else:
            out = causal(torch.cat((x, padding), 1), kv_lengths=torch.tensor([6, 6]))[:, :6]
        torch.testing.assert_close(out, causal(x))

    def test_packed_sequences_are_separate(self, causal: EntmaxAttention) -> None:
        first, second = randn(1, 4, 16), randn(1, 6, 16, seed=2)
        packed = causal(torch.cat((first, second), 1), cu_seqlens=torch.tensor([0, 4, 10]), max_seqlen=6)
        torch.testing.assert_close(packed, torch.cat((causal(first), causal(second)), 1))

    def test_stats(self) -> None:
        out, stats = layer(is_causal=True)(randn(2, 5, 16), return_stats=True)
        assert out.shape == (2, 5, 16)
        assert stats.support.shape == (2, 4, 5)
        assert (stats.support[..., 0] == 1).all()

    def test_dropout_in_training_only(self) -> None:
        m, x = layer(dropout=0.5), randn(2, 16, 16)
        assert not torch.equal(m(x), m(x))
        m.eval()
        assert torch.equal(m(x), m(x))

    def test_every_parameter_learns(self) -> None:
        m = layer(is_causal=True, **VARIANTS["all"])
        m(randn(2, 8, 16)).square().sum().backward()
        for name, parameter in m.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


class TestRotary:
    def test_turns_pairs_as_complex_numbers(self) -> None:
        x, positions = randn(1, 2, 5, 8).float(), torch.arange(3, 8)
        turned = RotaryEmbedding(8, base=50.0)(x, positions)
        angles = torch.outer(positions.double(), 50.0 ** (-torch.arange(4).double() / 4))
        expected = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(turned.double(), torch.cat((expected.real, expected.imag), -1), atol=1e-5, rtol=1e-5)

    def test_only_distances_matter(self) -> None:
        rotary = RotaryEmbedding(8)
        q, k = randn(2, 1, 3, 8).chunk(2)
        products = [rotary(q, torch.arange(3) + s) @ rotary(k, torch.arange(3) + s).mT for s in (0, 11)]
        torch.testing.assert_close(*products, atol=1e-5, rtol=0)

    def test_a_cast_does_not_coarsen_the_angles(self) -> None:
        rotary = RotaryEmbedding(16)
        exact = rotary.frequencies.clone()
        assert torch.equal(rotary.bfloat16().frequencies, exact)

    def test_odd_head_dims(self) -> None:
        with pytest.raises(ArgumentError, match="even head dim"):
            EntmaxAttention(9, 3, rotary_base=100.0)


class TestLengthScaling:
    def test_is_the_formula(self) -> None:
        torch.manual_seed(0)
        scaling, x = LengthScaling(6, 2, delta=0.5, dtype=torch.float64), randn(3, 4, 6)
        factors = scaling(x, torch.arange(1, 5)).detach()
        for b in range(3):
            for h in range(2):
                for i in range(4):
                    beta, gamma = (float(w.weight[h].detach() @ x[b, i]) for w in (scaling.beta, scaling.gamma))
                    wanted = 0.5 + math.log1p(math.exp(beta)) * math.log(i + 2) ** (2 * math.tanh(gamma))
                    assert float(factors[b, h, i, 0]) == pytest.approx(wanted)

    @pytest.mark.parametrize(
        ("options", "masks", "visible"),
        [
            ({"is_causal": True}, {}, [[1, 2, 3, 4, 5, 6]]),
            ({}, {}, [[6] * 6]),
            ({}, {"kv_lengths": [4, 6]}, [[4] * 6, [6] * 6]),
            ({"is_causal": True, "window": (2, 0)}, {}, [[1, 2, 3, 3, 3, 3]]),
            ({"is_causal": True}, {"kv_starts": [2, 0]}, [[0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]),
        ],
    )
    def test_counts_the_keys_that_the_masks_let_a_query_see(
        self, options: dict[str, Any], masks: dict[str, list[int]], visible: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[torch.Tensor] = []
        m = layer(length_scaling=True, **options)
        m.length_scaling.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))  # type: ignore[union-attr]
        m(randn(2, 6, 16), **{name: torch.tensor(values) for name, values in masks.items()})
        assert torch.equal(seen[0].expand(2, 1, 6)[:, 0], torch.tensor(visible).expand(2, 6))

    def test_sharpens_attention_as_the_context_grows(self) -> None:
        """With gamma at its upper bound the support of the last row grows more slowly than without."""
        supports = []
        for scaled in (False, True):
            m = layer(length_scaling=scaled, is_causal=True)
            if m.length_scaling is not None:
                with torch.no_grad():
                    m.length_scaling.gamma.weight.fill_(0)
                    m.length_scaling.gamma.register_forward_hook(lambda module, inputs, out: out + 9)
            _, stats = m(3 * randn(1, 256, 16), return_stats=True)
            supports.append(stats.support[0, :, -1].double().mean())
        assert supports[1] < supports[0] / 2

    def test_the_first_query_is_finite_whatever_gamma(self) -> None:
        scaling = LengthScaling(1, 1)
        with torch.no_grad():
            scaling.gamma.weight.fill_(-100)
        assert scaling(torch.ones(1, 2, 1), torch.tensor([0, 1])).isfinite().all()


class TestCaches:
    @pytest.mark.parametrize("prompt", [1, 4])
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_token_by_token_is_all_at_once(self, causal: EntmaxAttention, kind: str, prompt: int) -> None:
        x = randn(2, 9, 16)
        cache = make_cache(kind, causal, room=12)
        parts = [x[:, :prompt], *x[:, prompt:7].split(1, dim=1), x[:, 7:]]
        out = torch.cat([causal(part, cache=cache) for part in parts], 1)
        torch.testing.assert_close(out, causal(x))
        assert int(cache.position) == 9

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_prompts_padded_on_the_left(self, causal: EntmaxAttention, kind: str) -> None:
        x, starts = randn(2, 9, 16), torch.tensor([3, 0])
        cache = make_cache(kind, causal, room=9)
        parts = [x[:, :5], *x[:, 5:].split(1, dim=1)]
        out = torch.cat([causal(part, cache=cache, kv_starts=starts) for part in parts], 1)
        torch.testing.assert_close(out[0, 3:], causal(x[:1, 3:])[0])
        torch.testing.assert_close(out[1], causal(x[1:])[0])

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_reset(self, causal: EntmaxAttention, kind: str) -> None:
        x, cache = randn(1, 4, 16), make_cache(kind, causal, room=4, batch=1)
        first = causal(x, cache=cache)
        cache.reset()  # type: ignore[attr-defined]
        torch.testing.assert_close(causal(x, cache=cache), first)

    @pytest.mark.parametrize("causal", ["plain", "all"], indirect=True)  # each option alone is in the tests above, uncompiled
    def test_one_graph_serves_every_step_of_a_static_cache(self, causal: EntmaxAttention) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        x, cache = randn(2, 8, 16), make_cache("static", causal, room=8)
        step = torch.compile(lambda token: causal(token, cache=cache), fullgraph=True, backend=counter)
        with torch.no_grad():
            out = [causal(x[:, :3], cache=cache), *(step(x[:, i : i + 1]) for i in range(3, 8))]
            torch.testing.assert_close(torch.cat(out, 1), causal(x))
        assert counter.frame_count == 1

    def test_a_full_static_cache_says_so(self) -> None:
        m = layer(is_causal=True)
        cache = make_cache("static", m, room=4)
        m(randn(2, 3, 16), cache=cache)
        with pytest.raises(ArgumentError, match="max_length = 4 tokens. Got 2 more after 3"):
            m(randn(2, 2, 16), cache=cache)

    def test_a_static_cache_of_other_sizes(self) -> None:
        with pytest.raises(ArgumentError, match=r"keys \(2, 4, 3, 4\) for a cache \(2, 2, 4, 4\)"):
            layer(is_causal=True)(randn(2, 3, 16), cache=StaticCache(2, 2, 4, 4, dtype=torch.float64))


def make_cache(kind: str, module: EntmaxAttention, room: int, batch: int = 2) -> KVCache:
    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(batch, module.num_kv_heads, room, module.head_dim, dtype=torch.float64)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"embed_dim": 10, "num_heads": 3}, "multiple of num_heads.*head_dim"),
            ({"embed_dim": 12, "num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads"),
            ({"embed_dim": 0, "num_heads": 1}, "positive"),
            ({"embed_dim": 12, "num_heads": 4, "dropout": 1.0}, "dropout"),
            ({"embed_dim": 12, "num_heads": 4, "alpha": 3.0}, "alpha"),
        ],
    )
    def test_sizes(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            EntmaxAttention(**arguments)

    def test_inputs_that_are_not_batched(self) -> None:
        with pytest.raises(ArgumentError, match="batch, length, embed_dim"):
            layer()(randn(5, 16))

    def test_a_cache_where_it_cannot_be_right(self) -> None:
        with pytest.raises(ArgumentError, match="is_causal=True"):
            layer()(randn(2, 3, 16), cache=DynamicCache())
        with pytest.raises(ArgumentError, match="kv_lengths.*pad prompts on the left"):
            layer(is_causal=True)(randn(2, 3, 16), cache=DynamicCache(), kv_lengths=torch.tensor([3, 2]))

    def test_mask_and_causal_as_in_attention(self) -> None:
        with pytest.raises(ArgumentError, match="exclude each other"):
            layer(is_causal=True)(randn(2, 3, 16), attn_mask=torch.ones(3, 3, dtype=torch.bool))


def test_the_repr_tells_what_is_not_default() -> None:
    text = repr(EntmaxAttention(16, 4, num_kv_heads=2, is_causal=True, learnable_alpha=True))
    assert "16, num_heads=4, num_kv_heads=2, is_causal=True" in text
    assert "learnable, heads=4" in text
    assert isinstance(EntmaxAttention(16, 4).q_proj, nn.Linear)
