"""Each input generator makes what its name says, and poisoned memory is poisoned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adasplash_core.backend import AttentionCall
from adasplash_core.spec import AttentionSpec
from adasplash_core.testing import inputs, oracle

SPEC = AttentionSpec(
    device_type="cpu",
    dtype="float32",
    heads=4,
    kv_heads=2,
    head_dim=16,
    head_dim_v=8,
    batch=2,
    q_len=40,
    kv_len=60,
    needs_grad=True,
)


def _support(pattern: str, alpha: float = 1.5) -> tuple[torch.Tensor, AttentionCall]:
    query, key, value = inputs.PATTERNS[pattern](SPEC, 0)
    call = replace(inputs.make_call(SPEC), query=query, key=key, value=value, alpha=torch.tensor(alpha, dtype=torch.float64))
    return oracle.attention(call).support, call


class TestRandom:
    def test_shapes_dtype_and_seed(self) -> None:
        spec = replace(SPEC, dtype="bfloat16")
        query, key, value = inputs.make_qkv(spec, seed=3)
        assert (query.shape, key.shape, value.shape) == ((2, 4, 40, 16), (2, 2, 60, 16), (2, 2, 60, 8))
        assert {x.dtype for x in (query, key, value)} == {torch.bfloat16}
        assert torch.equal(query, inputs.make_qkv(spec, seed=3)[0])
        assert not torch.equal(query, inputs.make_qkv(spec, seed=4)[0])

    def test_sparsities_are_ordered(self) -> None:
        support = {s: oracle.attention(inputs.make_call(SPEC, s)).support.double().mean() for s in inputs.QUERY_SCALE}
        assert support["dense"] > 2 * support["moderate"] > 2 * support["sparse"] >= 2

    def test_packed_is_one_long_batch(self) -> None:
        query, key, _ = inputs.make_qkv(replace(SPEC, packed=True))
        assert query.shape == (1, 4, 80, 16)
        assert key.shape == (1, 2, 120, 16)

    def test_unknown_sizes_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="batch, q_len and kv_len are known"):
            inputs.make_qkv(SPEC.without_lengths())

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"causal": True, "causal_alignment": "bottom_right"},
            {"query_offset": True, "window": True},
            {"kv_lengths": True, "kv_starts": True},
            {"packed": True, "causal": True},
            {"alibi": True, "dropout": True},
            {"mask": "key"},
            {"mask": "bool"},
            {"mask": "additive", "mask_requires_grad": True},
            {"alpha_class": "any", "alpha_per_head": True, "alpha_requires_grad": True},
            {"alpha_class": "2", "deterministic": True, "return_stats": True},
        ],
        ids=lambda changes: "-".join(changes) or "plain",
    )
    def test_a_spec_gives_a_call_of_that_spec(self, changes: dict[str, object]) -> None:
        spec = replace(SPEC, **changes)  # type: ignore[arg-type]
        call = inputs.make_call(spec)
        assert call.spec == spec
        assert (call.attn_mask is not None) == (spec.mask != "none")
        assert (call.window != (-1, -1)) == spec.window
        assert (call.kv_lengths is not None, call.kv_starts is not None) == (spec.kv_lengths, spec.kv_starts)
        assert (call.cu_seqlens_q is not None, call.alibi_slopes is not None) == (spec.packed, spec.alibi)
        assert (call.dropout_p > 0, call.dropout_seed is not None) == (spec.dropout, spec.dropout)
        assert call.alpha.ndim == spec.alpha_per_head


class TestPatterns:
    def test_constant_rows_and_full_support_use_every_key(self) -> None:
        assert (_support("constant_rows")[0] == 60).all()
        assert (_support("full_support")[0] == 60).all()
        assert (_support("full_support", 2.0)[0] == 60).all()

    def test_ties_share_the_maximum(self) -> None:
        support, call = _support("ties", 2.0)
        scores = oracle.Solution(call).scores
        assert ((scores == scores.amax(-1, keepdim=True)).sum(-1) > 5).all()
        assert scores.unique().numel() <= 4
        assert (support > 5).all()

    def test_two_clusters_let_the_lower_one_in(self) -> None:
        scores = oracle.Solution(_support("two_clusters")[1]).scores
        assert (scores.amax(-1) - scores.topk(2).values[..., 1] > 1.4).all()
        assert (_support("two_clusters")[0] > 10).all()

    def test_huge_scores_are_huge(self) -> None:
        assert oracle.Solution(_support("huge_scores")[1]).scores.abs().max() > 1e4

    def test_needles_lie_far_and_neighbouring_rows_want_different_ones(self) -> None:
        _, call = _support("needles")
        best = oracle.Solution(call).scores[:, ::2].argmax(-1)  # planted for the first head of each group
        assert ((best[..., 1:] != best[..., :-1]).double().mean() > 0.95).all()
        assert ((best - torch.arange(40)).abs() > 8).double().mean() > 0.5


class TestLayouts:
    @pytest.mark.parametrize("name", inputs.LAYOUTS)
    def test_values_survive_and_strides_do_not(self, name: str) -> None:
        x = torch.randn(2, 3, 5, 4)
        view = inputs.LAYOUTS[name](x)
        assert view.shape == x.shape
        assert not view.is_contiguous()
        assert torch.equal(view, x if name != "expanded" else x[:, :1].expand_as(x))


class TestPoisonedMemory:
    def test_new_memory_is_nan_inside_and_ordinary_outside(self) -> None:
        like = torch.ones(2, 3)
        with inputs.poisoned_memory():
            made = [torch.empty(2, 3), torch.empty_like(like), like.new_empty(2, 3), torch.empty_strided((2, 3), (1, 2))]
            integers = torch.empty(4, dtype=torch.int32)
            zeros = torch.zeros(3)
        assert all(tensor.isnan().all() for tensor in made)
        assert (integers == torch.iinfo(torch.int32).max).all()
        assert (zeros == 0).all()
        assert not torch.empty(0).isnan().any()

    def test_ends_with_an_exception(self) -> None:
        with pytest.raises(RuntimeError, match="inside"), inputs.poisoned_memory():
            raise RuntimeError("inside")
        assert not torch.full((3,), 1.0).isnan().any()
