"""Each pass of the kernels against the oracle, at sizes and tiles where every branch is taken."""

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
from adasplash_core.testing.inputs import poisoned_memory
from adasplash_cupy import launch, params
from adasplash_cupy.instances import ALL_FLAGS, KERNELS, Instance
from tests.cupy_backend import emulator
from tests.cupy_backend.drawing import draw

BACKEND = emulator.EmulatedCupyBackend()
SMALL = {"keys": 16, "select_keys": 64, "least_list": 32, "list_percent": 95, "dense_percent": 90}
"""Tiles so small that lists of a hundred keys count as long."""

pytestmark = pytest.mark.usefixtures("_lists")


def run(call: AttentionCall, **config: Any) -> tuple[ForwardResult, Gradients, torch.Tensor]:
    info = device_info("cpu")
    forward = dataclasses.replace(BACKEND.default_config(call.spec, info, "forward"), **config)
    backward = dataclasses.replace(BACKEND.default_config(call.spec, info, "backward"), keys=16, list_keys=16, rows=16)
    with poisoned_memory():
        found = BACKEND.forward(dataclasses.replace(call, config=forward))
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(found.out.shape, generator=generator).to(found.out.dtype)
        grads = BACKEND.backward(dataclasses.replace(call, config=backward), grad_out, found.saved, None)
    return found, grads, grad_out


def check(call: AttentionCall, bound: float = 1e-5, **config: Any) -> ForwardResult:
    """Output, statistics and gradients within ``bound`` of the oracle's; returns the result for a look at its lists."""
    found, grads, grad_out = run(call, **config)
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
    return found.saved[3][..., 1]


@pytest.mark.parametrize("dense_stages", [2, 13])
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_long_lists_are_walked_for_each_step(alpha: float, dense_stages: int) -> None:
    """From global memory, or where the tiles of forward_dense hold them all, in shared memory."""
    found = check(
        make_call(*draw(128, 300, spread=4), alpha=alpha, return_stats=True), **{**SMALL, "dense_stages": dense_stages}
    )
    assert ((lengths(found) > 32) & (lengths(found) < 13 * 16)).all()


def test_short_lists_are_solved_on_chip() -> None:
    found = check(make_call(*draw(64, 300, spread=30), return_stats=True), **{**SMALL, "keys": 64})
    assert ((lengths(found) > 0) & (lengths(found) <= 64)).all()


def test_twice_as_many_keys_are_on_chip_where_alpha_is_known() -> None:
    """Half precision at head dim 64, as most calls: the kernels are compiled for alpha 1.5 and keep two tiles."""
    call = make_call(
        *draw(100, 300, dim=64, spread=5.0, dtype=torch.float16), is_causal=True, query_offset=200, return_stats=True
    )
    found, grads, grad_out = run(call, least_list=1024)
    assert ((lengths(found) > 0) & (lengths(found) <= 128)).all()
    want, want_grads = oracle.attention(call), oracle.gradients(call, grad_out)
    assert error(found.out, want.out) < 2e-3
    for name in ("query", "key", "value"):
        assert error(getattr(grads, name), getattr(want_grads, name)) < 4e-3, name


def test_lists_that_stay_long_are_given_up() -> None:
    call = make_call(*draw(64, 300, spread=4), return_stats=True)
    assert (lengths(check(call, **{**SMALL, "dense_percent": 10})) == -1).all()


def test_rows_that_are_not_sparse_keep_no_list() -> None:
    call = make_call(*draw(70, 150, spread=0.1), return_stats=True)
    assert (lengths(check(call, **SMALL)) == -1).all()


def test_full_pool_sends_blocks_over_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = launch.saved_shapes
    monkeypatch.setattr(launch, "saved_shapes", lambda *args: [*shapes(*args)[:4], (100,)])
    kept = lengths(check(make_call(*draw(192, 300, spread=4), return_stats=True), **SMALL))
    assert (kept == -1).any()
    assert int(kept.clamp(min=0).sum()) <= 100


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-6, 1.05, 1.3, 2.0])
def test_alphas(alpha: float) -> None:
    check(make_call(*draw(64, 130, spread=3), alpha=alpha, is_causal=True, return_stats=True), **SMALL)


def test_alpha_per_head_with_gradient() -> None:
    alpha = torch.tensor([1.0, 1.4, 1.5, 1.9], requires_grad=True)
    check(make_call(*draw(64, 110, heads=4, kv_heads=4, spread=2), alpha=alpha, return_stats=True), **SMALL)


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


def test_keys_that_are_not_finite_reach_the_rows_that_see_them() -> None:
    query, key, value = draw(64, 150, spread=4)
    key[0, 0, 100] = torch.nan
    found, _, _ = run(make_call(query, key, value, is_causal=True, query_offset=60), **SMALL)
    assert found.out[0, 0, 40:].isnan().all()
    assert found.out[0, 0, :40].isfinite().all()


@pytest.mark.parametrize("order", [1, 2])
def test_no_result_depends_on_the_order_of_threads(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing barrier shows when threads take turns in another order."""
    call = make_call(*draw(70, 200, heads=2, spread=4), enable_gqa=True, is_causal=True, query_offset=130, deterministic=True)
    first, first_grads, _ = run(call, **SMALL)
    monkeypatch.setattr(emulator, "order", order)
    second, second_grads, _ = run(call, **SMALL)
    assert torch.equal(first.out, second.out)
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(first_grads, name), getattr(second_grads, name))


@pytest.mark.parametrize("order", [1, 2])
def test_lists_do_not_depend_on_the_order_of_threads(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "order", order)
    check(make_call(*draw(70, 300, spread=4), return_stats=True), **SMALL)


@pytest.mark.parametrize("kernel", sorted({*KERNELS} - {"forward_mark"}))
def test_host_and_kernel_agree_on_shared_memory(kernel: str) -> None:
    tile = 64 if kernel in ("forward_select", "forward_bound", "forward_short") else 16
    instance = Instance(kernel, "float32", 16, 16, 0, tile, 2, ALL_FLAGS)
    assert emulator.shared_bytes(instance) == emulator.merged(instance).shared_bytes


def test_host_and_kernel_agree_on_the_parameters() -> None:
    assert params.size() == emulator.params_size()


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(KeyError, match="scael"):
        params.pack({"scael": 1.0})
