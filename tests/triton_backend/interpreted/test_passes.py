"""Each pass of the kernels against the oracle, at sizes and block sizes where every branch is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adasplash_core.backend import AttentionCall, ForwardResult, Gradients
from adasplash_core.call import make_call
from adasplash_core.device import device_info
from adasplash_core.testing import oracle
from adasplash_triton import operands
from adasplash_triton.backend import TritonBackend
from adasplash_triton.configs import LIST_ROWS

BACKEND = TritonBackend()
SMALL = {
    "select_keys": 32, "list_keys": 16, "list_keys_on_chip": 32, "dense_keys": 16, "least_list": 32,
    "list_percent": 95, "dense_percent": 90,
}  # fmt: skip
"""Blocks so small that lists of a hundred keys count as long."""


@pytest.fixture(autouse=True)
def _one_dropout_mask() -> None:
    torch.manual_seed(0)  # the sum that is alpha's gradient cancels more under some masks than under others


@pytest.fixture(autouse=True)
def _no_short_path(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "short_sequences" not in request.node.name:
        monkeypatch.setattr(operands, "short_length", lambda *sizes: 0)


def draw(
    q_len: int, kv_len: int, *, batch: int = 1, heads: int = 1, kv_heads: int = 1, dim: int = 16, spread: float = 1.0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return [query * spread, key, value]


def run(call: AttentionCall, **config: Any) -> tuple[ForwardResult, Gradients, torch.Tensor]:
    info = device_info("cpu")
    forward = dataclasses.replace(BACKEND.default_config(call.spec, info, "forward"), **config)
    backward = BACKEND.default_config(call.spec, info, "backward")
    found = BACKEND.forward(dataclasses.replace(call, config=forward))
    grad_out = torch.randn(found.out.shape, generator=torch.Generator().manual_seed(1))
    return found, BACKEND.backward(dataclasses.replace(call, config=backward), grad_out, found.saved, None), grad_out


def check(call: AttentionCall, bound: float = 1e-5, **config: Any) -> ForwardResult:
    """Output, statistics and gradients within ``bound`` of the oracle's; returns the result for a look at its lists."""
    return compare(call, *run(call, **config), bound)


def compare(
    call: AttentionCall, found: ForwardResult, grads: Gradients, grad_out: torch.Tensor, bound: float = 1e-5
) -> ForwardResult:
    want, want_grads = oracle.attention(call), oracle.gradients(call, grad_out)
    assert error(found.out, want.out) < bound
    assert found.tau is not None
    assert found.support is not None
    assert (found.tau - want.tau).abs().max() < 1e-5 * max(1.0, float(want.tau.abs().max()))
    assert (found.support != want.support).float().mean() < 0.01  # keys within rounding of the threshold
    for name in ("query", "key", "value", "alpha"):
        if getattr(want_grads, name) is not None:
            assert error(getattr(grads, name), getattr(want_grads, name)) < bound, name
    return found


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.double() - want).norm() / want.norm().clamp(min=1e-30))


def lengths(found: ForwardResult) -> torch.Tensor:
    """Keys in each block's saved list, -1 for blocks without."""
    batch, heads, q_len, _ = found.out.shape
    blocks = -(-q_len // LIST_ROWS)
    return found.saved[2][: batch * heads * blocks * 2].view(batch, heads, blocks, 2)[..., 1]


def test_sparse_rows_keep_lists_of_their_support() -> None:
    call = make_call(*draw(64, 300, spread=4), return_stats=True)
    found = check(call, **SMALL)
    assert ((lengths(found) > 32) & (lengths(found) < 200)).all()


def test_small_lists_are_solved_on_chip() -> None:
    call = make_call(*draw(64, 300, spread=30), return_stats=True)
    found = check(call, **{**SMALL, "list_keys_on_chip": 256})
    assert ((lengths(found) > 0) & (lengths(found) <= 256)).all()


def test_lists_that_stay_long_are_given_up() -> None:
    call = make_call(*draw(64, 300, spread=4), return_stats=True)
    assert (lengths(check(call, **{**SMALL, "dense_percent": 10})) == -1).all()


def test_rows_that_are_not_sparse_keep_no_list() -> None:
    call = make_call(*draw(70, 150, spread=0.1), return_stats=True)
    assert (lengths(check(call, **SMALL)) == -1).all()


def test_full_pool_sends_blocks_over_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from adasplash_triton import launch

    shapes = launch.saved_shapes
    monkeypatch.setattr(launch, "saved_shapes", lambda *args: [*shapes(*args)[:2], (launch.list_entries(1, 1, 192) + 100,)])
    call = make_call(*draw(192, 300, spread=4), return_stats=True)
    kept = lengths(check(call, **SMALL))
    assert (kept == -1).any()
    assert int(kept.clamp(min=0).sum()) <= 100


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-6, 1.05, 1.3, 2.0])
def test_alphas(alpha: float) -> None:
    check(make_call(*draw(64, 130, spread=3), alpha=alpha, is_causal=True, return_stats=True), **SMALL)


def test_alpha_per_head_with_gradient() -> None:
    alpha = torch.tensor([1.0, 1.4, 1.9], requires_grad=True)
    check(make_call(*draw(64, 110, heads=3, kv_heads=3, spread=2), alpha=alpha, return_stats=True), **SMALL)


def test_short_sequences_in_one_kernel() -> None:
    check(make_call(*draw(70, 90, heads=2, kv_heads=1), enable_gqa=True, is_causal=True, return_stats=True))


def test_short_sequences_with_dropout_and_alpha_gradient() -> None:
    alpha = torch.tensor(1.5, requires_grad=True)
    check(make_call(*draw(33, 140, heads=2, kv_heads=2), alpha=alpha, dropout_p=0.3, return_stats=True))


MASKS: dict[str, Callable[[], AttentionCall]] = {
    "causal bottom right, grouped heads": lambda: make_call(
        *draw(64, 300, heads=2, spread=3), enable_gqa=True, is_causal=True, causal_alignment="bottom_right", return_stats=True
    ),
    "window": lambda: make_call(*draw(130, 130, spread=4), window=(20, 5), return_stats=True),
    "left and right padding, an empty sequence": lambda: make_call(
        *draw(70, 130, batch=2, spread=4), kv_lengths=torch.tensor([90, 0]), kv_starts=torch.tensor([10, 0]), return_stats=True
    ),
    "packed": lambda: make_call(
        *draw(100, 120, spread=4),
        cu_seqlens_q=torch.tensor([0, 30, 30, 100]),
        cu_seqlens_k=torch.tensor([0, 40, 50, 120]),
        max_seqlen_q=70,
        max_seqlen_k=70,
        is_causal=True,
        return_stats=True,
    ),
    "key mask with holes": lambda: make_call(
        *draw(40, 150, batch=2, spread=4),
        attn_mask=torch.rand(2, 1, 1, 150, generator=torch.Generator().manual_seed(2)) < 0.5,
        return_stats=True,
    ),
    "alibi": lambda: make_call(
        *draw(70, 150, heads=2, kv_heads=2, spread=4), alibi_slopes=torch.tensor([0.1, 0.5]), is_causal=True, return_stats=True
    ),
    "dropout": lambda: make_call(*draw(64, 150, heads=2, kv_heads=2, spread=4), dropout_p=0.3, return_stats=True),
    "deterministic": lambda: make_call(*draw(70, 130, spread=4), deterministic=True, is_causal=True, return_stats=True),
    "negative offset: rows without keys": lambda: make_call(
        *draw(64, 200, spread=4), query_offset=-10, is_causal=True, return_stats=True
    ),
    "negative scale": lambda: make_call(*draw(64, 200, spread=4), scale=-0.5, return_stats=True),
    "constant rows": lambda: make_call(*draw(64, 100, spread=0), alpha=2.0, return_stats=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    check(MASKS[name](), **SMALL)


def test_huge_scores_select_one_key() -> None:
    call = make_call(*draw(64, 150, spread=1e8))
    found, _, _ = run(call, **SMALL)
    assert torch.equal(found.out.double(), oracle.attention(call).out)


def test_two_blocks_of_rows_a_program() -> None:
    check(make_call(*draw(150, 200, spread=4), is_causal=True, return_stats=True), **SMALL, select_blocks=2)


@pytest.mark.parametrize("path", ["lists", "dense", "short_sequences"])
def test_with_tf32_allowed_every_path_is_right(path: str) -> None:
    """The interpreter multiplies exactly all the same: what is left are TF32's wider margins and other tiles."""
    kept = {"lists": 4.0, "dense": 0.1, "short_sequences": 1.0}
    call = make_call(*draw(64, 300, spread=kept[path]), return_stats=True)
    call.spec = dataclasses.replace(call.spec, tf32=True)
    found = check(call, **({} if path == "short_sequences" else SMALL))
    if path != "short_sequences":
        assert bool((lengths(found) >= 0).all()) == (path == "lists")


HIDDEN_SAMPLES: dict[str, dict[str, int | float]] = {
    "lists on chip": {"least_list": 1 << 20, "list_keys_on_chip": 512},
    "long lists": {"least_list": 1 << 20},
    "T stays": {"least_list": 1 << 20, "follow_share": 1e9},
    "lists given up": {"dense_percent": 0, "least_list": 16},
    "no lists": {"list_percent": 0, "least_list": 0},
}


@pytest.mark.parametrize("path", HIDDEN_SAMPLES)
@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_a_key_mask_that_hides_the_whole_sample(alpha: float, path: str) -> None:
    """Every z is about -5, and only keys between the sampled tiles are allowed; one sequence of the batch has none."""
    query, key, value = draw(20, 192, batch=2)
    direction = torch.nn.functional.normalize(torch.ones(16), dim=0)
    key, query = direction + key / 10, -20 / (alpha - 1) * (direction + query / 50)
    allowed = torch.arange(192) // 32 % 3 > 0
    mask = torch.stack([allowed, torch.zeros(192, dtype=torch.bool)])[:, None, None]
    found = check(
        make_call(query, key, value, attn_mask=mask, alpha=alpha, return_stats=True),
        3e-5,
        **{**SMALL, "sample": 3, **HIDDEN_SAMPLES[path]},
    )
    assert not found.out[1].any()
